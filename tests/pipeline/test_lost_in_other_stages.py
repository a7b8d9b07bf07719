"""Connections that are lost before anything was applied, or after; and silence that is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.config.database_url import parse
from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import LOCK_CLASS, RUN_LOCK
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session, connect
from tests.support.env_text import env
from tests.support.gates import Gate
from tests.support.outcomes import done, left_behind, refusal, unchanged
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.proxy import Proxy
from tests.support.runner import Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]
Start = Callable[..., Running]

RUNS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    " AND application_name LIKE 'migrator/%' AND application_name {} '% backup'"
)
CONTROL, DUMP = RUNS.format("NOT LIKE"), RUNS.format("LIKE")
OURS = (
    "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'migrator/%'"
)
AGAIN = "starting again (1 of 3)"


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    """A proxy in front of the shared server, for one test."""
    with Proxy(database.server.port) as made:
        yield made


def test_while_waiting_for_the_run_lock(database: Database, project: Project, start_migrator: Start) -> None:
    other = database.connect()
    other.autocommit = True
    other.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    run = start_migrator(cwd=project(revisions=linear_history(2)), database=database)
    run.wait_for("waiting for the run lock")
    database.psql(CONTROL)
    run.wait_for(AGAIN)
    other.close()
    done(run.finish())
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert left_behind(database) == []


def backing_up(database: Database, run: Running) -> None:
    """Wait until the backup waits for a locked table."""
    run.wait_for(
        lambda: database.psql(
            "SELECT 1 FROM pg_stat_activity JOIN pg_locks USING (pid)"
            " WHERE application_name LIKE '% backup' AND NOT granted AND datname = current_database()"
        )
    )


def test_the_control_connection_during_the_backup(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    bring_to(database, 1)
    holder = database.connect()
    holder.cursor().execute("LOCK TABLE t1")
    run = start_migrator("--format", "json", cwd=project(revisions=linear_history(2)), database=database)
    backing_up(database, run)
    database.psql(CONTROL)
    holder.close()
    result = done(run.finish())
    assert AGAIN in result.stderr
    assert [item["revision"] for item in result.answer["revisions"]] == ["r002"]
    assert len(list(run_migrator.backups.rglob("*.dump"))) == 1  # the one that the run knows of
    assert left_behind(database) == []


def test_the_dumps_own_connection(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    bring_to(database, 1)
    holder = database.connect()
    holder.cursor().execute("LOCK TABLE t1")
    run = start_migrator(cwd=project(revisions=linear_history(2)), database=database)
    backing_up(database, run)
    database.psql(DUMP)
    refusal(run.finish(), ExitCode.BACKUP_FAILED)
    holder.close()
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    assert not list(run_migrator.backups.rglob("*.dump"))
    assert left_behind(database) == []


def test_a_restart_during_the_backup(
    private_server: Callable[..., Server], project: Project, start_migrator: Start, run_migrator: Runner
) -> None:
    server = private_server()
    database = server.create_database()
    bring_to(database, 1)
    holder = database.connect()
    holder.cursor().execute("LOCK TABLE t1")
    run = start_migrator(cwd=project(revisions=linear_history(2)), database=database)
    backing_up(database, run)
    server.restart("immediate")
    result = done(run.finish())
    assert AGAIN in result.stderr
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert len(list(run_migrator.backups.rglob("*.dump"))) == 1


@pytest.mark.parametrize("how", ["ended", "restart"])
def test_while_env_py_is_loaded(
    private_server: Callable[..., Server], project: Project, start_migrator: Start, tmp_path: Path, how: str
) -> None:
    server = private_server()
    database = server.create_database()
    mark = tmp_path / "loading"
    slow = env(
        before=f"import pathlib, time; pathlib.Path({str(mark)!r}).touch()\n"
        "while not pathlib.Path('go').exists():\n    time.sleep(0.02)\n"
    )
    folder = project(slow, revisions=linear_history(2))
    run = start_migrator(cwd=folder, database=database)
    run.wait_for(mark.exists)
    if how == "restart":
        server.restart("fast")
    else:
        database.psql(CONTROL)
        run.wait_for(lambda: not database.psql(OURS))
    (folder / "go").touch()
    run.wait_for("the control connection was lost")
    done(run.finish())
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert left_behind(database) == []


ASSERTION = """\
[[assertions]]
name = "slow"
sql = "SELECT public.slowly()"
expect = 1
"""
SLOWLY = f"op.execute('CREATE FUNCTION slowly() RETURNS int LANGUAGE plpgsql AS $$ BEGIN {Gate.body} RETURN 1; END $$')"


@pytest.mark.parametrize("how", ["ended", "restart"])
def test_while_verifying(
    private_server: Callable[..., Server], project: Project, start_migrator: Start, how: str
) -> None:
    server = private_server()
    database = server.create_database()
    revisions = [*linear_history(1), Revision("r002", "r001", SLOWLY)]
    folder = project({"migrations/verify.toml": ASSERTION}, revisions=revisions)
    gate = Gate(database)
    run = start_migrator("--format", "json", cwd=folder, database=database)
    run.wait_for(gate.reached)
    if how == "restart":
        server.restart("fast")
    else:
        database.psql(CONTROL)
        gate.open()
    result = done(run.finish())
    assert "the connection was lost while verifying" in result.stderr
    assert [item["revision"] for item in result.answer["revisions"]] == ["r001", "r002"]
    assert left_behind(database) == []


def test_a_stall_while_inspecting_is_bounded(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, proxy: Proxy
) -> None:
    folder = project(revisions=linear_history(2))
    other = database.connect()
    other.autocommit = True
    other.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    environment = {**proxy.environment(database), "MIGRATOR_WAIT_TIMEOUT": "3s"}
    run = start_migrator(cwd=folder, database=database, env=environment)
    run.wait_for("waiting for the run lock")
    with unchanged(database):
        proxy.stall()
        refusal(run.finish(), ExitCode.UNREACHABLE, "did not answer within 3 s")
        other.close()
        proxy.close()


def test_a_revision_that_computes_is_left_alone(
    database: Database, project: Project, start_migrator: Start
) -> None:
    """The server waits for the client, and rightly: nothing was lost."""
    computes = Revision(
        "r002",
        "r001",
        "import time\n"
        "connection = op.get_bind()\n"
        "connection.exec_driver_sql('INSERT INTO t1 VALUES (1)')\n"
        "with connection.engine.connect() as other:\n"
        "    other.exec_driver_sql('SELECT pg_sleep(9)')\n"
        "time.sleep(7)\n"
        "connection.exec_driver_sql('INSERT INTO t1 VALUES (2)')",
    )
    run = start_migrator(cwd=project(revisions=[*linear_history(1), computes]), database=database)
    result = done(run.finish())
    assert "lost" not in result.stderr
    assert database.psql("SELECT id FROM t1 ORDER BY 1") == [(1,), (2,)]


def test_the_server_is_told_to_look_after_its_client(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    told = " || ' ' || ".join(
        f"current_setting('{name}')"
        for name in ("tcp_keepalives_idle", "tcp_user_timeout", "client_connection_check_interval")
    )
    revisions = [*linear_history(1), Revision("r002", "r001", f"INSERT INTO t1 VALUES (1, {told})")]
    done(run_migrator(cwd=project(revisions=revisions), database=database))
    assert database.psql("SELECT note FROM t1") == [("5 15000 2s",)]


def session(database: Database, url: str) -> Session:
    """Connect as migrator does."""
    return connect(parse(url), "migrator/test", 60)


def test_a_query_may_take_as_long_as_the_server_works_on_it(database: Database) -> None:
    with session(database, database.url) as patient:
        assert patient.value("SELECT 1 FROM (SELECT pg_sleep(14)) AS s") == 1
        assert patient.answers()


def test_a_query_with_a_limit_ends_at_it(database: Database) -> None:
    with session(database, database.url) as impatient:
        with Stopwatch() as watch, pytest.raises(QueryFailed, match="no answer for 1 s") as caught:
            impatient.value("SELECT pg_sleep(30)", timeout=1)
        assert watch.seconds < 10
        assert caught.value.lost
        impatient.reconnect(60)
        assert impatient.answers()


def test_an_answer_that_was_lost_is_not_waited_for(database: Database, proxy: Proxy) -> None:
    database.execute(
        f"CREATE FUNCTION slowly() RETURNS int LANGUAGE plpgsql AS $$ BEGIN {Gate.body} RETURN 1; END $$"
    )
    gate = Gate(database)

    def lose() -> None:
        while not gate.reached():
            time.sleep(0.02)
        proxy.stall(port, direction="down")
        gate.open()

    with session(database, proxy.environment(database)["MIGRATOR_DATABASE_URL"]) as stalled:
        ((port,),) = database.psql("SELECT client_port FROM pg_stat_activity WHERE pid = %s", (stalled.pid,))
        losing = threading.Thread(target=lose)
        losing.start()
        with pytest.raises(QueryFailed, match="no answer for") as caught:
            stalled.value("SELECT public.slowly()")
        losing.join()
        assert caught.value.lost
