"""Live traffic: a lock that is not to be had is asked for again, and nothing that lasts is ever run twice."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.gates import Gate
from tests.support.load import Load
from tests.support.outcomes import done, left_behind, refusal, unchanged
from tests.support.pace import Stopwatch, slowness
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]

OWN_VARIABLE = (Path(__file__).parents[1] / "support/env_files/own_variable.py").read_text()
PER_MIGRATION = OWN_VARIABLE.replace(
    "context.configure(connection=connection)",
    "context.configure(connection=connection, transaction_per_migration=True)",
)
ALTER = Revision(
    "r003",
    "r002",
    "op.execute('CREATE TABLE t3 (id int)')\nop.execute('ALTER TABLE t1 ADD COLUMN b int')",
    "op.execute('ALTER TABLE t1 DROP COLUMN b')\nop.execute('DROP TABLE t3')",
)
LAST = Revision("r004", "r003", "CREATE TABLE t4 (id int)", "DROP TABLE t4")
HISTORY = [*linear_history(2), ALTER, LAST]
SHORT = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "DATABASE_URL": None}


def retried(run: Running) -> bool:
    """Whether the run has given up a first attempt."""
    return "retrying" in run.stderr


@pytest.mark.parametrize("env_file", [OWN_VARIABLE, PER_MIGRATION], ids=["one transaction", "per migration"])
@pytest.mark.parametrize("destination", ["head", "+3"])
def test_a_lock_that_comes_free_is_got_in_the_end(
    database: Database,
    project: Project,
    run_migrator: Runner,
    start_migrator: Start,
    env_file: str,
    destination: str,
) -> None:
    folder = project({"migrations/env.py": env_file}, revisions=HISTORY)
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    reader = database.connect()
    reader.cursor().execute("SELECT * FROM t1")
    env = {**SHORT, "MIGRATOR_LOCK_TIMEOUT": "1s", "MIGRATOR_LOCK_RETRIES": "100"}
    run = start_migrator("upgrade", destination, "--format", "json", cwd=folder, database=database, env=env)
    run.wait_for(lambda: retried(run))
    # While it pauses it holds nothing that others wait for.
    run.wait_for(lambda: "blocked by pid" in run.stderr)
    reader.close()
    result = done(run.finish())
    assert [item["revision"] for item in result.answer["revisions"]] == ["r002", "r003", "r004"]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r004",)]
    assert left_behind(database) == []


def test_who_blocks_is_named_while_waiting_and_at_the_end(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=HISTORY)
    done(run_migrator("upgrade", "r002", cwd=folder, database=database))
    with unchanged(database):
        reader = database.connect(application_name="nightly report")
        reader.cursor().execute("SELECT * FROM t1 -- of last month")
        env = {"MIGRATOR_LOCK_TIMEOUT": "3s", "MIGRATOR_LOCK_RETRIES": "1"}
        result = run_migrator(cwd=folder, database=database, env=env)
        pid = reader.info.backend_pid
        reader.close()
    refusal(
        result,
        ExitCode.BLOCKED,
        "Revision r003 failed",
        "It was tried 2 times.",
        f"pid {pid} (nightly report), idle in transaction for",
        "AccessShareLock",
        "SELECT * FROM t1 -- of last month",
        "Everything was rolled back.",
        "MIGRATOR_LOCK_RETRIES",
    )
    waiting = [line for line in result.logs if line.get("blockers") == [pid]]
    assert waiting
    assert "waiting for AccessExclusiveLock on t1" in waiting[0]["message"]


def test_a_blocker_of_another_role_hides_what_it_does(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    role = database.server.create_role(f"migrates_{database.name}")
    database.execute(f'GRANT ALL ON SCHEMA public TO "{role}"')
    folder = project(revisions=HISTORY)
    url = {**SHORT, "MIGRATOR_DATABASE_URL": database.server.url(database.name, user=role)}
    done(run_migrator("upgrade", "r002", cwd=folder, database=database, env=url))
    application = database.connect(application_name="the backend")
    application.cursor().execute("SELECT * FROM t1")
    result = run_migrator(
        cwd=folder,
        database=database,
        env={**url, "MIGRATOR_LOCK_RETRIES": "2", "MIGRATOR_LOCK_TIMEOUT": "1s"},
    )
    pid = application.info.backend_pid
    application.close()
    refusal(result, ExitCode.BLOCKED, f"pid {pid} (the backend), its activity is hidden", "AccessShareLock")
    assert "<insufficient privilege>" not in result.stderr
    assert "Exception in thread" not in result.stderr


def test_only_blockers_idle_in_transaction_are_ended_and_only_when_told(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=HISTORY)
    done(run_migrator("upgrade", "r002", cwd=folder, database=database))
    idle = database.connect(application_name="forgotten")
    idle.cursor().execute("SELECT * FROM t1")
    env = {"MIGRATOR_LOCK_TIMEOUT": "1s", "MIGRATOR_LOCK_RETRIES": "2"}
    refusal(run_migrator(cwd=folder, database=database, env=env), ExitCode.BLOCKED, "(forgotten)")
    assert database.psql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'forgotten'") == [(1,)]
    told = {**env, "MIGRATOR_LOCK_RETRIES": "50", "MIGRATOR_TERMINATE_BLOCKERS_AFTER": "1s"}
    result = done(run_migrator(cwd=folder, database=database, env=told))
    assert "ended pid" in result.stderr
    assert database.psql("SELECT 1 FROM pg_stat_activity WHERE application_name = 'forgotten'") == []
    idle.close()


def test_a_blocker_that_works_is_never_ended(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=HISTORY)
    done(run_migrator("upgrade", "r002", cwd=folder, database=database))
    busy = (
        f"PGPASSWORD={shlex.quote(database.server.password)} exec {database.server.bin}/psql -qAt -h 127.0.0.1"
        f" -p {database.server.port} -U {database.server.user} {database.name}"
        f" -c 'BEGIN; SELECT count(*) FROM t1; {Gate.statement}; COMMIT'"
    )
    with Gate(database) as gate, subprocess.Popen(["sh", "-c", busy], stdout=subprocess.DEVNULL) as reader:
        while not gate.reached():
            time.sleep(0.05)
        env = {
            "MIGRATOR_LOCK_TIMEOUT": "1s",
            "MIGRATOR_LOCK_RETRIES": "50",
            "MIGRATOR_TERMINATE_BLOCKERS_AFTER": "1s",
        }
        run = start_migrator(cwd=folder, database=database, env=env)
        run.wait_for(lambda: run.stderr.count("retrying") >= 3)
        gate.open()
        result = done(run.finish())
        assert reader.wait(60) == 0
    assert "blocked by" in result.stderr
    assert "ended pid" not in result.stderr


def test_a_lost_deadlock_is_tried_again(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    both = (
        f"op.execute('LOCK TABLE t1')\nop.execute('{Gate.statement}')\nop.execute('LOCK TABLE t2')\n"
        "op.execute('CREATE TABLE t3 (id int)')"
    )
    folder = project(revisions=[*linear_history(2), Revision("r003", "r002", both)])
    done(run_migrator("upgrade", "r002", cwd=folder, database=database))
    gate = Gate(database)
    run = start_migrator(cwd=folder, database=database, env={"MIGRATOR_LOCK_TIMEOUT": "60s"})
    run.wait_for(gate.reached)

    def lock() -> None:
        with database.connect(application_name="the rival") as rival:
            cursor = rival.cursor()
            cursor.execute("SET deadlock_timeout = '1min'")  # so that the migration is the one that loses
            cursor.execute("LOCK TABLE t2")
            cursor.execute("LOCK TABLE t1")
        rival.close()

    locking = threading.Thread(target=lock)
    locking.start()
    waits = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'the rival' AND wait_event = 'relation'"
    run.wait_for(lambda: database.psql(waits))
    gate.open()
    locking.join(60)
    result = done(run.finish())
    assert "deadlock" in result.stderr
    assert "retrying" in result.stderr
    assert database.psql("SELECT to_regclass('t3') IS NOT NULL") == [(True,)]


def test_what_was_committed_is_not_run_twice(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    body = (
        "with op.get_context().autocommit_block():\n"
        "    op.execute('INSERT INTO t2 VALUES (1)')\n"
        "    op.execute('ALTER TABLE t1 ADD COLUMN b int')"
    )
    folder = project(revisions=[*linear_history(2), Revision("r003", "r002", body)])
    done(run_migrator("upgrade", "r002", cwd=folder, database=database))
    reader = database.connect()
    reader.cursor().execute("SELECT * FROM t1")
    result = run_migrator(cwd=folder, database=database, env=SHORT)
    reader.close()
    refusal(result, ExitCode.PARTIAL, "A part of r003 was committed")
    assert "retrying" not in result.stderr
    assert database.psql("SELECT count(*) FROM t2") == [(1,)]


def test_a_concurrent_build_waits_for_as_long_as_it_takes(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    body = (
        "with op.get_context().autocommit_block():\n"
        "    op.create_index('t1_note', 't1', ['note'], postgresql_concurrently=True)"
    )
    after = Revision("r003", "r002", "INSERT INTO t1 VALUES (2, current_setting('lock_timeout'))")
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", body), after])
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    writer = database.connect()
    writer.cursor().execute("INSERT INTO t1 VALUES (1, 'x')")
    env = {**SHORT, "MIGRATOR_STATEMENT_TIMEOUT": "1500ms"}
    run = start_migrator(cwd=folder, database=database, env=env)
    run.wait_for(lambda: "blocked by pid" in run.stderr)
    building = (
        "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONC%' AND now() - query_start > '2s'"
    )
    run.wait_for(lambda: database.psql(building))
    writer.commit()
    writer.close()
    done(run.finish())
    assert database.psql("SELECT indisvalid FROM pg_index WHERE indexrelid = 't1_note'::regclass") == [
        (True,)
    ]


def test_env_py_and_the_setting_disagree_about_the_version_table(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    database.execute("CREATE TABLE other_version (version_num varchar(32) PRIMARY KEY)")
    with unchanged(database):
        env = {"MIGRATOR_VERSION_TABLE": "other_version"}
        result = run_migrator(cwd=folder, database=database, env=env)
    refusal(
        result, ExitCode.BAD_SETTINGS, "alembic_version", "r001", "MIGRATOR_VERSION_TABLE=alembic_version"
    )


BUSY = {
    "writer": "UPDATE t1 SET note = md5(random()::text) WHERE id = 1 + floor(random() * 1000)::int",
    "second writer": "INSERT INTO t1 VALUES (1001 + floor(random() * 1e9)::int, 'new') ON CONFLICT DO NOTHING",
    "reader": "SELECT count(*) FROM t1 WHERE id < 500",
    "second reader": "SELECT note FROM t1 WHERE id = 7",
}
LOCK_TIMEOUT = 1.0


@pytest.mark.parametrize("env_file", ["plain_url", "async_engine"])
def test_no_request_waits_longer_than_the_lock_timeout_and_the_migration_gets_through(
    each_database: Database, project: Project, start_migrator: Start, env_file: str
) -> None:
    """Behind an ALTER that waits for a long transaction everybody else waits too, but never for long.

    What is measured is what a client sees, from sending a request to having its answer.
    """
    database = each_database
    revisions = [
        *linear_history(2),
        Revision("r003", "r002", "ALTER TABLE t1 ADD COLUMN b int", "ALTER TABLE t1 DROP COLUMN b"),
        Revision("r004", "r003", "ALTER TABLE t1 ALTER COLUMN id TYPE bigint"),
    ]
    folder = project(revisions=revisions, env=env_file)
    bring_to(database, 2)
    database.execute("INSERT INTO t1 SELECT g, 'x' FROM generate_series(1, 1000) g")
    report = database.connect(application_name="long report")
    env = {"MIGRATOR_LOCK_TIMEOUT": f"{LOCK_TIMEOUT}s", "MIGRATOR_LOCK_RETRIES": "100"}
    with Stopwatch() as watch, Load(database, BUSY) as load:
        report.cursor().execute("SELECT count(*) FROM t1")
        run = start_migrator("--format", "json", cwd=folder, database=database, env=env)
        run.wait_for(lambda: run.stderr.count("retrying") >= 3)
        report.close()
        result = done(run.finish())
        after = time.monotonic()  # the traffic goes on after it, too
        run.wait_for(
            lambda: all(
                sum(item.client == name and item.began > after for item in list(load.requests)) > 20
                for name in BUSY
            ),
            ended=True,
        )
    assert [item["revision"] for item in result.answer["revisions"]] == ["r003", "r004"]
    assert load.errors() == []
    # Some did wait behind the ALTER, or nothing would have been shown; and all were answered in time.
    assert load.slowest() > LOCK_TIMEOUT / 2
    late = load.slowest() - LOCK_TIMEOUT - watch.missed
    assert late <= 1 or late <= slowness()
    assert left_behind(database) == []
