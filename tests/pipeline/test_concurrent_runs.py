"""One at a time: however many runs start, one applies and the others find the work done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import APPLY_LOCK, LOCK_CLASS, RUN_LOCK
from tests.support.gates import Gate
from tests.support.outcomes import done, left_behind, refusal, unchanged
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]

RUNS = 8
IN_A_TRANSACTION = f'op.execute("CREATE TABLE slow (id int)")\nop.execute("{Gate.statement}")'
CONCURRENTLY = (
    "with op.get_context().autocommit_block():\n"
    f'    op.execute("{Gate.statement}")\n'
    '    op.execute("CREATE INDEX CONCURRENTLY t1_note ON t1 (note)")'
)
WAITED = "waiting for the run lock"


@pytest.mark.parametrize("body", [IN_A_TRANSACTION, CONCURRENTLY], ids=["in a transaction", "concurrently"])
def test_of_many_runs_at_once_one_applies(
    each_database: Database, project: Project, start_migrator: Start, body: str
) -> None:
    revisions = [*linear_history(2), Revision("r003", "r002", body), Revision("r004", "r003")]
    folder = project(revisions=revisions)
    with Gate(each_database) as gate:
        runs = [start_migrator("--format", "json", cwd=folder, database=each_database) for _ in range(RUNS)]
        runs[0].wait_for(gate.reached)
        runs[0].wait_for(lambda: sum(WAITED in run.stderr for run in runs) == RUNS - 1)
    results = [done(run.finish()) for run in runs]
    applied = [len(result.answer["revisions"]) for result in results]
    assert sorted(applied) == [0] * (RUNS - 1) + [4]
    assert each_database.psql("SELECT version_num FROM alembic_version") == [("r004",)]
    assert left_behind(each_database) == []
    assert each_database.psql("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]
    followers = [result for result in results if not result.answer["revisions"]]
    assert all("Nothing to do" in result.answer["message"] for result in followers)
    waited = [
        line["message"] for result in followers for line in result.logs if "run lock" in line["message"]
    ]
    assert any("held by migrator/" in line for line in waited)


def asleep(database: Database) -> Callable[[], object]:
    """Return a function that tells whether a session of the database sleeps."""
    sleeps = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    return lambda: database.psql(sleeps)


def test_a_lock_that_is_held_too_long_names_its_holder(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", "SELECT pg_sleep(60)")])
    bring_to(database, 1)
    first = start_migrator(cwd=folder, database=database)
    first.wait_for(asleep(database))
    ((pid, name),) = database.psql(
        "SELECT pid, application_name FROM pg_stat_activity JOIN pg_locks USING (pid)"
        " WHERE locktype = 'advisory' AND objid = 1 AND datname = current_database()"
    )
    env = {"MIGRATOR_RUN_LOCK_TIMEOUT": "1s"}
    with Stopwatch() as watch:
        result = run_migrator("--format", "json", cwd=folder, database=database, env=env)
    refusal(result, ExitCode.LOCK_BUSY, name, f"pid {pid}", "for 1 s", f"pg_terminate_backend({pid})")
    (lock,) = [stage for stage in result.answer["stages"] if stage["stage"] == "lock"]
    assert lock["seconds"] > 0.9
    assert watch.within(3, lock["seconds"])
    status = done(run_migrator("status", "--format", "json", cwd=folder, database=database))
    assert name in status.answer["running"]
    first.send(signal.SIGTERM)
    refusal(first.finish(), ExitCode.INTERRUPTED)


def test_ending_the_holders_control_session_lets_no_second_run_in(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    # the holder's control session is ended, as the message advises; the applying one still keeps others out
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", Gate.statement)])
    bring_to(database, 1)
    gate = Gate(database)
    first = start_migrator(cwd=folder, database=database)
    first.wait_for(gate.reached)
    database.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    second = start_migrator("--format", "json", cwd=folder, database=database)
    second.wait_for("waiting for the run lock")
    gate.open()
    done(first.finish())
    assert done(second.finish()).answer["revisions"] == []
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


def test_a_control_session_that_is_lost_comes_back_with_its_lock(
    database: Database, project: Project, start_migrator: Start
) -> None:
    held = (
        "SELECT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'advisory' AND objid = 1 AND datname = current_database()"
    )
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", Gate.statement)])
    bring_to(database, 1)
    gate = Gate(database)
    run = start_migrator(cwd=folder, database=database)
    run.wait_for(gate.reached)
    ((before, name),) = database.psql(held)
    database.psql("SELECT pg_terminate_backend(%s)", (before,))
    run.wait_for("the control connection was lost")  # while the revision still runs
    run.wait_for(lambda: [found for found in database.psql(held) if found[0] != before])
    ((after, same),) = database.psql(held)
    assert (after != before, same) == (True, name)
    gate.open()
    done(run.finish())
    assert left_behind(database) == []


def test_a_run_that_was_killed_keeps_nobody_out(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", Gate.statement)])
    bring_to(database, 1)
    gate = Gate(database)
    first = start_migrator(cwd=folder, database=database)
    first.wait_for(gate.reached)
    with unchanged(database):
        first.kill()
        first.finish()
        gate.open()
    result = done(run_migrator("--format", "json", cwd=folder, database=database))
    assert [item["revision"] for item in result.answer["revisions"]] == ["r002"]


def test_runs_against_two_databases_do_not_wait_for_each_other(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    other = database.server.create_database()
    slow = project(
        revisions=[*linear_history(1), Revision("r002", "r001", "SELECT pg_sleep(60)")], name="slow"
    )
    first = start_migrator(cwd=slow, database=other)
    first.wait_for(asleep(other))
    env = {"MIGRATOR_RUN_LOCK_TIMEOUT": "0"}
    done(run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=env))
    first.send()
    refusal(first.finish(), ExitCode.INTERRUPTED)
    database.server.drop_database(other.name)


def test_tables_that_another_run_is_about_to_commit_are_not_unversioned(
    database: Database, project: Project, start_migrator: Start
) -> None:
    """Between two queries of the unlocked look, another run may commit its tables and its version table."""
    folder = project(revisions=linear_history(2))
    database.execute(
        "CREATE TABLE t1 (id int PRIMARY KEY, note text)"
    )  # as a run whose version row is to come
    holder = database.connect()
    holder.autocommit = True
    holder.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    run = start_migrator(cwd=folder, database=database)
    run.wait_for("waiting for the run lock")  # and has not given up with 33
    database.execute(
        "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);"
        " INSERT INTO alembic_version VALUES ('r001')"
    )
    holder.close()
    done(run.finish())
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


def test_a_killed_run_gives_its_locks_up_while_its_statement_still_runs(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", "SELECT pg_sleep(120)")])
    bring_to(database, 1)
    run = start_migrator(cwd=folder, database=database)
    run.wait_for(asleep(database))
    run.kill()
    assert left_behind(database) == []


def waits(
    database: Database, project: Project, start_migrator: Start, key: int, patience: str = "60s"
) -> tuple[Any, Running]:
    """Return a session that holds one of the locks, and a run with one revision to apply that waits for it."""
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    rival = database.connect(application_name="rival")
    rival.autocommit = True
    rival.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, key))
    env = {"MIGRATOR_RUN_LOCK_TIMEOUT": patience}
    run = start_migrator("--format", "json", cwd=folder, database=database, env=env)
    run.wait_for("held by rival (pid")
    return rival, run


DONE_BY_ANOTHER = (
    "CREATE TABLE t2 (id int PRIMARY KEY, note text); UPDATE alembic_version SET version_num = 'r002'"
)


def test_who_has_waited_leaves_beside_others_that_only_look(
    database: Database, project: Project, start_migrator: Start
) -> None:
    rival, run = waits(database, project, start_migrator, RUN_LOCK)
    database.execute(DONE_BY_ANOTHER)
    cursor = rival.cursor()
    cursor.execute("SELECT pg_advisory_lock_shared(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    cursor.execute("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    result = done(run.finish())
    assert "Nothing to do" in result.answer["message"]
    assert [stage["stage"] for stage in result.answer["stages"]] == [
        "wait",
        "inspect",
        "lock",
        "inspect",
        "verify",
    ]
    assert [
        stage["details"].get("current") for stage in result.answer["stages"] if stage["stage"] == "inspect"
    ] == [
        ["r001"],
        ["r002"],
    ]
    rival.close()
    assert left_behind(database) == []


def test_nobody_applies_beside_others_that_look_and_they_are_not_named_as_holders(
    database: Database, project: Project, start_migrator: Start
) -> None:
    rival, run = waits(database, project, start_migrator, RUN_LOCK, "8s")
    cursor = rival.cursor()
    cursor.execute("SELECT pg_advisory_lock_shared(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    cursor.execute("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    sentence = refusal(run.finish(), ExitCode.LOCK_BUSY, "for 8 s: another run.")
    assert "rival" not in sentence
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    rival.close()


def test_nobody_leaves_while_an_applying_connection_without_its_run_is_still_alive(
    database: Database, project: Project, start_migrator: Start
) -> None:
    rival, run = waits(database, project, start_migrator, APPLY_LOCK, "3s")
    database.execute(DONE_BY_ANOTHER)  # and not done with it: the lock is still there
    refusal(run.finish(), ExitCode.LOCK_BUSY, "rival", f"pg_terminate_backend({rival.info.backend_pid})")
    rival.close()


def test_a_run_whose_rival_gave_up_does_the_work(
    database: Database, project: Project, start_migrator: Start
) -> None:
    rival, run = waits(database, project, start_migrator, RUN_LOCK)
    rival.close()
    result = done(run.finish())
    assert [item["revision"] for item in result.answer["revisions"]] == ["r002"]
    assert left_behind(database) == []
