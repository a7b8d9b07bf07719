"""An image that is older than the schema: what it is told, and when it may start all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.ledgers import events, runs
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]
OFF = {"MIGRATOR_BACKUP": "off"}


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Callable[..., object]:
    """Run migrator on the test's database, without backups."""
    return lambda *arguments, cwd, **variables: run_migrator(
        *arguments, cwd=cwd, database=database, env={**OFF, **variables}
    )


def floors(folder: Path, **wanted: str) -> None:
    """Let revisions declare which images can work on the schema."""
    for revision, floor in wanted.items():
        file = folder / f"migrations/versions/{revision}.py"
        file.write_text(file.read_text() + f"\nmigrator_min_compatible = {floor!r}\n")


@pytest.fixture
def ahead(project: Project, run: Callable[..., object]) -> Callable[..., Path]:
    """Apply five revisions with the floors that are given, as image 2.0; return the older image with two."""

    def make(**wanted: str) -> Path:
        newer = project(revisions=linear_history(5), name="newer")
        floors(newer, **wanted)
        done(run(cwd=newer, MIGRATOR_IMAGE_VERSION="2.0"))  # type: ignore[arg-type]
        return project(revisions=linear_history(2), name="older")

    return make


def test_it_is_told_who_is_ahead_of_it(
    ahead: Callable[..., Path], run_migrator: Runner, database: Database
) -> None:
    older = ahead()
    run_id = database.psql("SELECT run_id FROM migrator_ledger WHERE revision = 'r005'")[0][0]
    for command in ("upgrade", "verify", "check", "status", "wait-for-current"):
        with unchanged(database):
            result = run_migrator(command, cwd=older, database=database, env=OFF)
        refusal(
            result,
            ExitCode.DATABASE_AHEAD,
            "is at revision r005, which this image does not have (its newest is r002)",
            "r005 was applied on 20",
            f"by run {run_id} of image 2.0",
            "deploy image 2.0 or newer",
            "with image 2.0: `migrator downgrade r002`",
        )
    assert runs(database) == [("upgrade", "OK")]


def test_without_a_ledger_it_is_told_less(database: Database, project: Project, run_migrator: Runner) -> None:
    older = project(revisions=linear_history(2))
    bring_to(database, 5)
    result = run_migrator(cwd=older, database=database, env=OFF)
    said = refusal(
        result, ExitCode.DATABASE_AHEAD, "is at revision r005", "deploy the image that has the revision"
    )
    assert "the ledger has" not in said


@pytest.mark.parametrize(
    ("wanted", "allow", "said"),
    [
        ({}, False, ""),
        ({}, True, "MIGRATOR_ALLOW_AHEAD is set"),
        ({"r005": "r002"}, False, "images from r002 on are declared compatible"),
        ({"r005": "r001"}, False, "images from r001 on are declared compatible"),
        ({"r005": "r003"}, False, ""),
        ({"r005": "r003"}, True, ""),  # what is declared is not overridden
        ({"r005": "r001", "r004": "r004"}, True, ""),  # nor what was declared on the way there
        ({"r004": "r001"}, False, ""),  # r005 says nothing
        ({"r004": "r001"}, True, "MIGRATOR_ALLOW_AHEAD is set"),
    ],
)
def test_a_floor_says_which_images_may_start(
    wanted: dict[str, str],
    allow: bool,
    said: str,
    ahead: Callable[..., Path],
    run_migrator: Runner,
    database: Database,
) -> None:
    older = ahead(**wanted)
    variables = {**OFF, "MIGRATOR_ALLOW_AHEAD": str(allow).lower()}
    with unchanged(database):
        upgraded = run_migrator("upgrade", cwd=older, database=database, env=variables)
        waited = run_migrator("wait-for-current", cwd=older, database=database, env=variables)
    if not said:
        why = (
            "The schema declares that images need at least r00"
            if any(floor > "r002" for floor in wanted.values())
            else "r005"
        )
        refusal(upgraded, ExitCode.DATABASE_AHEAD, why)
        refusal(waited, ExitCode.DATABASE_AHEAD, why)
        return
    assert f"is at r005, ahead of this image, and {said}; verified." in done(upgraded).stdout
    assert said in done(waited).stderr
    assert runs(database) == [("upgrade", "OK")]  # nothing was done
    status = done(run_migrator("status", cwd=older, database=database, env=variables))
    assert f"ahead:    {said}" in status.stdout


def test_waiting_needs_no_rights_on_the_ledger(
    ahead: Callable[..., Path], run_migrator: Runner, database: Database
) -> None:
    older = ahead(r005="r001")
    role = database.server.create_role(f"reads_{database.name}")
    database.execute(f"GRANT SELECT ON alembic_version TO {role}")
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, user=role)}
    result = run_migrator("wait-for-current", cwd=older, env=env)
    refusal(result, ExitCode.DATABASE_AHEAD, "is at revision r005")
    done(run_migrator("wait-for-current", cwd=older, env={**env, "MIGRATOR_ALLOW_AHEAD": "true"}))
    database.execute(f"GRANT SELECT ON migrator_ledger TO {role}")
    done(run_migrator("wait-for-current", cwd=older, env=env))


def test_separate_ways_are_none_that_is_ahead(
    ahead: Callable[..., Path], project: Project, run_migrator: Runner, database: Database
) -> None:
    ahead(r005="r001")
    other = project(revisions=[*linear_history(2), Revision("x003", "r002", "SELECT 1")], name="other")
    env = {**OFF, "MIGRATOR_ALLOW_AHEAD": "true"}
    result = run_migrator(cwd=other, database=database, env=env)
    refusal(
        result,
        ExitCode.DATABASE_AHEAD,
        "This image's x003 is not applied either: the two histories have diverged",
    )


def test_a_floor_that_is_no_revision_is_refused_when_it_is_written(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    folder = project(revisions=linear_history(2))
    floors(folder, r002="r01")
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database, env=OFF)
    refusal(
        result,
        ExitCode.BAD_HISTORY,
        "r002 sets migrator_min_compatible = 'r01', and there is no such revision",
    )


def test_an_older_image_leaves_the_ledger_of_the_newer_one_alone(
    ahead: Callable[..., Path], run_migrator: Runner, database: Database
) -> None:
    older = ahead()
    # Plain Alembic of the newer image went back, so that the older one knows where the database is.
    database.execute(
        "DROP TABLE t5; DROP TABLE t4; DROP TABLE t3; UPDATE alembic_version SET version_num = 'r002'"
    )
    done(run_migrator(cwd=older, database=database, env=OFF))
    assert [name for event, name in events(database) if event == "gone"] == []
    newer = older.parent / "newer"
    done(run_migrator(cwd=newer, database=database, env=OFF))
    went = [("gone", name) for name in ("r003", "r004", "r005")]
    assert events(database)[5:8] == went
    assert events(database)[8:] == [("applied", name) for name in ("r003", "r004", "r005")]
