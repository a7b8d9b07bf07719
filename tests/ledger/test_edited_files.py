"""Applied revisions whose file was edited since: code 34, what kind of edit it was, and accepting one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.ledgers import events
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]
OFF = {"MIGRATOR_BACKUP": "off"}
COSMETIC = ('"""a change"""', '"""a better description"""\n# a comment')
REAL = ("note text", "note text NOT NULL")


@pytest.fixture
def applied(database: Database, project: Project, run_migrator: Runner) -> Path:
    """A project of three revisions, two of which are applied."""
    folder = project(revisions=linear_history(3))
    variables = {**OFF, "MIGRATOR_IMAGE_VERSION": "1.4.2"}
    done(run_migrator("upgrade", "r002", cwd=folder, database=database, env=variables))
    return folder


def edit(folder: Path, change: tuple[str, str], revision: str = "r001") -> tuple[str, str]:
    """Edit a revision's file; return its checksums before and after."""
    file = folder / f"migrations/versions/{revision}.py"
    before = file.read_bytes()
    assert change[0].encode() in before
    file.write_text(before.decode().replace(*change))
    return hashlib.sha256(before).hexdigest(), hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("command", ["upgrade", "downgrade", "verify", "check"])
def test_a_real_edit_is_refused_with_all_there_is_to_know(
    command: str, applied: Path, database: Database, run_migrator: Runner
) -> None:
    before, after = edit(applied, REAL)
    run_id = database.psql("SELECT run_id FROM migrator_ledger WHERE revision = 'r001'")[0][0]
    words = [command, "r001"] if command == "downgrade" else [command]
    with unchanged(database):
        result = run_migrator(*words, cwd=applied, database=database, env=OFF)
    refusal(
        result,
        ExitCode.TAMPERED,
        "versions/r001.py was edited (statements)",
        f"its checksum is {after[:12]} and was {before[:12]} when it was applied on 20",
        f"by run {run_id} of image 1.4.2",
        "`migrator repair --accept r001`",
    )


@pytest.mark.parametrize(
    ("change", "policy", "code"),
    [
        (COSMETIC, "refuse", ExitCode.TAMPERED),
        (COSMETIC, "cosmetic", ExitCode.OK),
        (COSMETIC, "warn", ExitCode.OK),
        (REAL, "cosmetic", ExitCode.TAMPERED),
        (REAL, "warn", ExitCode.OK),
    ],
)
def test_the_policy_says_which_edits_pass(
    change: tuple[str, str],
    policy: str,
    code: ExitCode,
    applied: Path,
    database: Database,
    run_migrator: Runner,
) -> None:
    edit(applied, change)
    kind = "cosmetic" if change is COSMETIC else "real"
    result = run_migrator(
        "--format", "json", cwd=applied, database=database, env={**OFF, "MIGRATOR_EDITED": policy}
    )
    assert result.code == code, result
    severity = "error" if code else "warning"
    found = [(item["rule"], item["place"], item["severity"]) for item in result.answer["findings"]]
    assert found == [(f"edited-revision-{kind}", "r001", severity)]
    if change is COSMETIC:
        assert "comments or formatting" in result.stdout
    tables = database.psql("SELECT to_regclass('t3') IS NOT NULL")
    assert tables == [(code == ExitCode.OK,)]


def test_accepting_an_edit_says_who_did_it(applied: Path, database: Database, run_migrator: Runner) -> None:
    before, after = edit(applied, REAL)
    variables = {**OFF, "MIGRATOR_ACTOR": "ann"}
    result = done(
        run_migrator("repair", "--accept", "r001", "r002", cwd=applied, database=database, env=variables)
    )
    assert "accepted r001: versions/r001.py was edited (statements)" in result.stdout
    assert "r002: the file is the applied one" in result.stdout
    row = database.psql(
        "SELECT revision, checksum, details->>'checksum_before', details->>'edit', actor, command FROM migrator_ledger"
        " WHERE event = 'accepted'"
    )
    assert row == [("r001", after, before, "real", "ann", "repair --accept")]
    done(run_migrator(cwd=applied, database=database, env=OFF))
    edit(applied, COSMETIC)  # the next edit is another one
    refusal(
        run_migrator(cwd=applied, database=database, env=OFF),
        ExitCode.TAMPERED,
        "comments or formatting",
        "when it was accepted on",
    )


def test_what_was_not_applied_may_be_edited(applied: Path, database: Database, run_migrator: Runner) -> None:
    edit(applied, REAL, "r003")
    done(run_migrator(cwd=applied, database=database, env=OFF))
    assert events(database)[-1] == ("applied", "r003")
    refused = run_migrator("repair", "--accept", "nonsense", cwd=applied, database=database)
    assert refused.code == ExitCode.BAD_HISTORY, refused


def test_a_revision_that_was_reverted_may_be_edited(
    applied: Path, database: Database, run_migrator: Runner
) -> None:
    done(run_migrator("downgrade", "r001", cwd=applied, database=database, env=OFF))
    edit(applied, REAL, "r002")
    result = run_migrator("repair", "--accept", "r002", cwd=applied, database=database, env=OFF)
    refusal(result, ExitCode.BAD_HISTORY, "The ledger does not have r002")
    done(run_migrator(cwd=applied, database=database, env=OFF))


def test_edits_of_what_plain_alembic_applied_count_from_the_adoption(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 2)
    edit(folder, COSMETIC)
    done(run_migrator(cwd=folder, database=database, env=OFF))
    edit(folder, REAL)
    refusal(run_migrator(cwd=folder, database=database, env=OFF), ExitCode.TAMPERED, "when it was found on")


def test_status_shows_edits_and_the_last_run(applied: Path, database: Database, run_migrator: Runner) -> None:
    edit(applied, COSMETIC)
    result = done(run_migrator("status", cwd=applied, database=database))
    assert "last run: upgrade, OK (0), 20" in result.stdout
    assert "image 1.4.2" in result.stdout
    assert "edited:   r001: versions/r001.py was edited (comments or formatting)" in result.stdout
    answer = done(run_migrator("status", "--format", "json", cwd=applied, database=database)).answer
    assert answer["last_run"]["outcome"] == "OK"
    assert [(item["revision"], item["edit"]) for item in answer["edited"]] == [("r001", "cosmetic")]


def test_without_a_ledger_nothing_is_compared(
    applied: Path, database: Database, run_migrator: Runner
) -> None:
    edit(applied, REAL)
    off = {**OFF, "MIGRATOR_LEDGER": "off"}
    done(run_migrator(cwd=applied, database=database, env=off))
    assert ("applied", "r003") not in events(database)


def test_an_edit_that_passed_is_told_of_again(
    applied: Path, database: Database, run_migrator: Runner
) -> None:
    """A run with nothing to do and a manifest of the edited files takes the long way, and warns too."""
    edit(applied, REAL)
    done(run_migrator("freeze", cwd=applied))
    variables = {**OFF, "MIGRATOR_EDITED": "warn"}
    for pending in (1, 0):
        result = run_migrator("--format", "json", cwd=applied, database=database, env=variables)
        assert result.code == 0, result
        assert len(result.answer["revisions"]) == pending, result
        assert [item["rule"] for item in result.answer["findings"]] == ["edited-revision-real"], result
    result = run_migrator(cwd=applied, database=database, env=OFF)
    assert result.code == ExitCode.TAMPERED, result
