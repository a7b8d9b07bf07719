"""A run that was killed and one that said how it failed leave the same, and the next run looks after both alike."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]

BUILT = """\
import os
import time

with op.get_context().autocommit_block():
    op.create_index('t1_note', 't1', ['note'], postgresql_concurrently=True)
if os.environ.get("FAIL"):
    op.execute("SELECT 1/0")
time.sleep(120 if os.environ.get("HOLD") else 0)
"""
INDEX = (
    "SELECT to_regclass('t1_note')::oid, indisvalid FROM pg_index WHERE indexrelid = to_regclass('t1_note')"
)
OFF = {"MIGRATOR_BACKUP": "off"}
ENDS = ["SIGKILL", "SIGTERM", "an error"]


def history(upgrade: str = BUILT, downgrade: str = "DROP INDEX t1_note") -> list[Revision]:
    return [*linear_history(1), Revision("r002", "r001", upgrade, downgrade)]


def end_badly(
    how: str, database: Database, start: Start, folder: Path, *command: str, env: dict[str, str] = OFF
) -> Result:
    """End a run when the index is built, and its revision does not count as done."""
    if how == "an error":
        run = start(*command, cwd=folder, database=database, env={**env, "FAIL": "yes"})
        return run.finish()
    before = database.psql(INDEX)
    run = start(*command, cwd=folder, database=database, env={**env, "HOLD": "yes"})
    run.wait_for(lambda: (now := database.psql(INDEX)) != before and [row[1] for row in now] == [True])
    run.send(signal.Signals[how])
    return run.finish()


def backups(result: Result) -> list[str]:
    """Return the backups that a run's last line names as ways back."""
    return re.findall(r"migrator restore (\S+) --yes", result.stderr.splitlines()[-1])


@pytest.mark.parametrize("how", ENDS)
def test_the_next_run_drops_what_it_built(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, how: str
) -> None:
    """Also the first run of migrator on a database that was there before it."""
    bring_to(database, 1)
    folder = project(revisions=history())
    first = end_badly(how, database, start_migrator, folder)
    assert first.code == (-9 if how == "SIGKILL" else ExitCode.PARTIAL), first
    (before,) = database.psql(INDEX)
    # Nothing is pending here: that says nothing about what is.
    done(run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF))
    result = done(run_migrator(cwd=folder, database=database, env=OFF))
    assert "dropping the index public.t1_note" in result.stderr
    (after,) = database.psql(INDEX)
    assert after[1]
    assert after != before
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


@pytest.mark.parametrize("how", ["SIGKILL", "an error"])
def test_a_downgrade_too(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, how: str
) -> None:
    bring_to(database, 1)
    folder = project(revisions=history("DROP TABLE IF EXISTS t2", BUILT))
    done(run_migrator(cwd=folder, database=database, env=OFF))
    end_badly(how, database, start_migrator, folder, "downgrade", "r001")
    (before,) = database.psql(INDEX)
    result = done(run_migrator("downgrade", "r001", cwd=folder, database=database, env=OFF))
    assert "dropping the index public.t1_note" in result.stderr
    assert database.psql(INDEX) != [before]


def test_an_index_of_the_same_name_on_another_table_stays(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    bring_to(database, 1)
    folder = project(revisions=history())
    database.execute("CREATE SCHEMA other; CREATE TABLE other.t1 (note text)")
    database.execute("CREATE INDEX t1_note ON other.t1 (note)")
    kept = database.psql("SELECT 'other.t1_note'::regclass::oid")
    end_badly("an error", database, start_migrator, folder)
    done(run_migrator(cwd=folder, database=database, env=OFF))
    assert database.psql("SELECT 'other.t1_note'::regclass::oid") == kept


def test_an_index_that_somebody_made_after_the_run_had_ended_stays(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    bring_to(database, 1)
    folder = project(revisions=history())
    end_badly("an error", database, start_migrator, folder)
    database.execute("DROP INDEX t1_note")
    database.execute("CREATE INDEX t1_note ON t1 (note)")
    kept = database.psql(INDEX)
    for _ in range(2):
        result = run_migrator(cwd=folder, database=database, env=OFF)
        assert result.code in (ExitCode.ROLLED_BACK, ExitCode.PARTIAL), result
        assert "already exists" in result.stderr
        assert database.psql(INDEX) == kept


@pytest.mark.parametrize("under_way", [False, True])
def test_the_backup_that_is_named_is_the_newest_without_what_is_left(
    database: Database, project: Project, run_migrator: Runner, under_way: bool
) -> None:
    """However many runs end badly after it, each with a backup of its own over what the one before it has left.

    Nor does it matter whether somebody's transaction is older than all of them.
    """
    bring_to(database, 1)
    if under_way:
        old = database.connect()
        old.cursor().execute("SELECT txid_current()")
    folder = project(revisions=history())
    fail = {"FAIL": "yes"}
    first = run_migrator("--format", "json", cwd=folder, database=database, env=fail)
    assert first.code == ExitCode.PARTIAL, first
    clean = first.answer["backup"]["id"]
    assert backups(first) == [clean]
    own = []
    for age in ("0s", "0s", "1h"):
        again = run_migrator(
            "--format", "json", cwd=folder, database=database, env={**fail, "MIGRATOR_BACKUP_MAX_AGE": age}
        )
        assert again.code == ExitCode.PARTIAL, again
        assert backups(again) == [clean], again
        own.append(again.answer["backup"]["id"])
    # One may be reused that was made before the first of these runs began to apply, and none that was made since.
    assert len({clean, *own[:2]}) == 3
    assert own[2] == clean
    done(run_migrator("restore", clean, "--yes", cwd=folder, database=database))
    assert database.psql(INDEX) == []
    done(run_migrator(cwd=folder, database=database, env=OFF))


def test_a_restore_of_its_own_backup_says_what_is_still_in_it(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    bring_to(database, 1)
    folder = project(revisions=history())
    fail = {"FAIL": "yes", "MIGRATOR_DISCARD_WRITES": "true"}
    first = run_migrator("--format", "json", cwd=folder, database=database, env=fail)
    clean = first.answer["backup"]["id"]
    second = run_migrator("--on-failure", "restore", cwd=folder, database=database, env=fail)
    refusal(
        second,
        ExitCode.RESTORED,
        "It still holds the committed part of a revision that an earlier run did not finish;"
        f" `migrator restore {clean} --yes` restores the state before that.",
    )
    assert [row[1] for row in database.psql(INDEX)] == [True]


CANNOT_BE_UNDONE = """\
import os

with op.get_context().autocommit_block():
    op.execute("UPDATE t1 SET note = upper(note) || '!'")
if os.environ.get("FAIL"):
    op.execute("SELECT 1/0")
"""


def test_what_cannot_be_undone_is_refused_with_a_backup_that_works(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Also a run that was told to go on all the same names the backup from before the part, and not its own."""
    bring_to(database, 1)
    database.execute("INSERT INTO t1 VALUES (1, 'one')")
    folder = project(revisions=history(CANNOT_BE_UNDONE))
    fail = {"FAIL": "yes"}
    first = run_migrator("--format", "json", cwd=folder, database=database, env=fail)
    assert first.code == ExitCode.PARTIAL, first
    clean = first.answer["backup"]["id"]
    again = run_migrator(cwd=folder, database=database, env=fail)
    refusal(again, ExitCode.UNSAFE, "a part of r002", "`migrator upgrade head --retry`")
    assert backups(again) == [clean]
    retried = run_migrator("--retry", "--format", "json", cwd=folder, database=database, env=fail)
    assert retried.code == ExitCode.PARTIAL, retried
    assert retried.answer["backup"]["id"] != clean
    assert backups(retried) == [clean], retried
    done(run_migrator("restore", clean, "--yes", cwd=folder, database=database))
    done(run_migrator(cwd=folder, database=database))
    assert database.psql("SELECT note FROM t1") == [("ONE!",)]
