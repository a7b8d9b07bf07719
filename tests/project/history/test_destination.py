"""MIGRATOR_DESTINATION: a database that is to stay on one of several branches, for every command alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import Revision
from tests.support.runner import Runner
from tests.support.servers import Database
from tests.support.sidecars import start

Project = Callable[..., Path]

MAIN = {"MIGRATOR_DESTINATION": "main@head", "MIGRATOR_BACKUP": "off"}
LOOKS = ("check", "status --exit-code", "verify", "wait-for-current --wait-timeout 1s")


@pytest.fixture
def branches(project: Project) -> Path:
    """A project with two branches; that of the extras is never applied. The other one's last revision follows it."""
    revisions = [Revision("m1", None), Revision("m2", "m1"), Revision("x1", None), Revision("x2", "x1")]
    files = {
        f"migrations/versions/{item.id}.py": item.render()
        .replace("branch_labels = None", f"branch_labels = {label!r}")
        .replace("depends_on = None", f"depends_on = {needs!r}")
        for item, label, needs in zip(
            revisions, ("main", None, "extras", None), (None, "x1", None, None), strict=True
        )
    }
    return project(files)


@pytest.mark.parametrize("frozen", [False, True], ids=["history", "manifest"])
def test_every_command_goes_by_the_destination(
    database: Database, branches: Path, run_migrator: Runner, frozen: bool
) -> None:
    def migrator(words: str, env: Mapping[str, str] = MAIN) -> int:
        return run_migrator(*words.split(), cwd=branches, database=database, env=dict(env)).code

    if frozen:
        done(run_migrator("freeze", cwd=branches))
    for words, code in zip(LOOKS, (3, 3, 41, 24), strict=True):
        assert migrator(words) == code, words
    assert migrator("upgrade") == 0
    assert database.psql("SELECT version_num FROM alembic_version") == [("m2",)]
    for words in (*LOOKS, "upgrade"):
        with unchanged(database):
            assert migrator(words) == 0, words
    if frozen:
        for words in ("upgrade", "wait-for-current"):
            env = {**MAIN, "MIGRATOR_LOG_LEVEL": "debug"}
            assert "not enough" not in run_migrator(words, cwd=branches, database=database, env=env).stderr

    off = {"MIGRATOR_BACKUP": "off"}
    check = run_migrator("check", cwd=branches, database=database, env=off)
    assert (check.code, "m2 is main@head, x2 is extras@head" in check.stdout) == (3, True), check
    for words, exit_code in (
        ("upgrade", ExitCode.BAD_HISTORY),
        ("verify", ExitCode.VERIFY_FAILED),
        ("wait-for-current --wait-timeout 1s", ExitCode.NOT_CURRENT),
    ):
        result = run_migrator(*words.split(), cwd=branches, database=database, env=off)
        refusal(result, exit_code, "set MIGRATOR_DESTINATION (m2 is main@head, x2 is extras@head)")
    assert migrator("upgrade heads") == 0  # what is typed comes first
    for words in (*LOOKS, "upgrade"):  # and what is beyond is not in the way
        assert migrator(words) == 0, words


def test_a_destination_that_depends_on_where_the_database_is(
    database: Database, branches: Path, run_migrator: Runner
) -> None:
    result = run_migrator("check", cwd=branches, database=database, env={"MIGRATOR_DESTINATION": "+1"})
    refusal(result, ExitCode.BAD_SETTINGS, "MIGRATOR_DESTINATION", "'+1'")


def test_a_sidecar_goes_by_the_destination(database: Database, branches: Path, run_migrator: Runner) -> None:
    sidecar = start(run_migrator, branches, database, env=MAIN)
    sidecar.wait_until_ready()
    assert database.psql("SELECT version_num FROM alembic_version") == [("m2",)]
    database.execute(
        "UPDATE alembic_version SET version_num = 'm1'; INSERT INTO alembic_version VALUES ('x1')"
    )
    assert "1 of this image's revisions is pending" in sidecar.wait_until_not_ready(24).body
    done(run_migrator(cwd=branches, database=database, env=MAIN))
    sidecar.wait_until_ready()
    assert sidecar.stop().code == 0
