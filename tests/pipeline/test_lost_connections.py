"""Connections that are lost, servers that restart, networks that are cut: nothing is run twice, nothing half told."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import LOCK_CLASS, RUN_LOCK
from tests.support.env_text import env
from tests.support.gates import Gate
from tests.support.outcomes import done, left_behind, refusal
from tests.support.pace import Stopwatch
from tests.support.projects import Revision
from tests.support.proxy import Proxy
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]
Start = Callable[..., Running]

ASYNC = (Path(__file__).parents[1] / "support/env_files/async_engine.py").read_text()
URL = "config.get_main_option('sqlalchemy.url').replace('postgresql:', 'postgresql+psycopg:')"
ENV_FILES = {
    "psycopg2": env(),
    "psycopg2, per migration": env(configure="transaction_per_migration=True"),
    "psycopg": env(engine=f"create_engine({URL}, poolclass=pool.NullPool)"),
    "asyncpg": {"migrations/env.py": ASYNC},
    "its own transaction": env(run="with connection.begin():\n    run(connection)"),
}
each_env = pytest.mark.parametrize("files", ENV_FILES.values(), ids=ENV_FILES)
both = pytest.mark.parametrize(
    "files", [ENV_FILES["psycopg2"], ENV_FILES["asyncpg"]], ids=["psycopg2", "asyncpg"]
)

HELD = (
    "SELECT pid, client_port FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE locktype = 'advisory' AND granted AND objid = {} AND datname = current_database()"
)
CONTROL, APPLYING = HELD.format(1), HELD.format(2)
ENDED = "SELECT pg_terminate_backend(pid) FROM ({}) AS found"
SOON = {"MIGRATOR_WAIT_TIMEOUT": "5s"}


def history(
    slow: int = 2, body: str = "{insert}\nop.execute('{wait}')", wait: str = Gate.statement
) -> list[Revision]:
    """Return three revisions, each of which leaves a row per time it was run; the `slow` one stops at a gate."""
    insert = "op.execute(\"INSERT INTO effects VALUES ('r00{}')\")"
    bodies = {1: "op.execute('CREATE TABLE effects (revision text)')\n" + insert.format(1)}
    bodies |= {number: insert.format(number) for number in (2, 3)}
    bodies[slow] = body.format(insert=bodies[slow], wait=wait)
    return [
        Revision(f"r00{number}", f"r00{number - 1}" if number > 1 else None, text)
        for number, text in sorted(bodies.items())
    ]


def once_each(result: Result, database: Database, *, again: bool | None = True) -> None:
    """Check that a run got through, and ran each revision once; `again` says whether it had to begin again."""
    done(result)
    assert database.psql("SELECT revision FROM effects ORDER BY 1") == [("r001",), ("r002",), ("r003",)]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
    assert left_behind(database) == []
    assert [item["revision"] for item in result.answer["revisions"]] == ["r001", "r002", "r003"]
    if again is not None:
        assert ("running env.py again" in result.stderr) is again, result


def gone(database: Database, pid: int) -> Callable[[], bool]:
    """Return a function that tells whether the server has ended a session."""
    return lambda: not database.psql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,))


@pytest.fixture
def gate(database: Database) -> Iterator[Gate]:
    """The gate at which the slow revision of a history stops."""
    with Gate(database) as made:
        yield made


@pytest.fixture
def proxy(database: Database) -> Iterator[Proxy]:
    """A proxy in front of the shared server, for one test."""
    with Proxy(database.server.port) as made:
        yield made


@pytest.fixture
def start(start_migrator: Start) -> Start:
    """Start an upgrade that answers in JSON."""

    def begin(folder: Path, database: Database, **variables: str) -> Running:
        return start_migrator("--format", "json", cwd=folder, database=database, env=variables)

    return begin


@each_env
def test_an_ended_migration_is_run_again(
    database: Database, project: Project, start: Start, files: dict[str, str], gate: Gate
) -> None:
    run = start(project(files, revisions=history()), database)
    run.wait_for(gate.reached)
    database.psql(ENDED.format(APPLYING))
    gate.open()
    once_each(run.finish(), database)


COMPUTES = """\
import os, time
open('here', 'w').close()
while not os.path.exists('go'):
    time.sleep(0.02)"""


@each_env
@pytest.mark.parametrize("slow", [2, 3])
def test_ended_between_a_statement_and_the_commit(
    database: Database, project: Project, start: Start, files: dict[str, str], slow: int
) -> None:
    """What finds out is then what migrator asks by itself; SQLAlchemy is not to trip over it with a traceback."""
    folder = project(files, revisions=history(slow, body="{insert}\n" + COMPUTES))
    run = start(folder, database)
    run.wait_for((folder / "here").exists)
    ((pid, _),) = database.psql(APPLYING)
    database.psql(ENDED.format(APPLYING))
    run.wait_for(gone(database, pid))
    (folder / "go").touch()
    result = run.finish()
    once_each(result, database)
    assert "Traceback" not in result.stderr, result
    assert "during reset" not in result.stderr, result


@pytest.mark.parametrize("slow", [1, 3])
def test_in_the_first_and_in_the_last_revision_too(
    database: Database, project: Project, start: Start, slow: int, gate: Gate
) -> None:
    run = start(project(revisions=history(slow)), database)
    run.wait_for(gate.reached)
    database.psql(ENDED.format(APPLYING))
    gate.open()
    once_each(run.finish(), database)


@both
def test_both_connections_ended_at_once(
    database: Database, project: Project, start: Start, files: dict[str, str], gate: Gate
) -> None:
    run = start(project(files, revisions=history()), database)
    run.wait_for(gate.reached)
    database.psql(f"{ENDED.format(APPLYING)} UNION ALL {ENDED.format(CONTROL)}")
    gate.open()
    result = run.finish()
    once_each(result, database)
    assert "the run lock was lost before its release" not in result.stderr


def test_another_run_that_was_faster_has_the_lock(
    database: Database, project: Project, start: Start, gate: Gate
) -> None:
    rival = database.connect(application_name="the rival")
    rival.autocommit = True
    run = start(project(revisions=history()), database)
    run.wait_for(gate.reached)
    queued = threading.Thread(
        target=lambda: rival.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    )
    queued.start()
    waiting = (
        "SELECT 1 FROM pg_stat_activity WHERE application_name = 'the rival' AND wait_event = 'advisory'"
    )
    run.wait_for(lambda: database.psql(waiting))
    database.psql(f"{ENDED.format(CONTROL)}")  # whose lock the rival gets
    queued.join(60)
    database.psql(ENDED.format(APPLYING))
    gate.open()
    refusal(run.finish(), ExitCode.LOCK_BUSY, "Another run took the run lock", "Everything was rolled back.")
    rival.close()
    assert database.psql("SELECT to_regclass('effects')") == [(None,)]
    assert left_behind(database) == []


def test_it_is_given_up_where_it_is_ended_each_time(
    database: Database, project: Project, start: Start
) -> None:
    suicide = "{insert}\nop.execute('SELECT pg_terminate_backend(pg_backend_pid())')"
    result = start(project(revisions=history(body=suicide)), database).finish()
    refusal(result, ExitCode.ROLLED_BACK, "Revision r002 failed", "Everything was rolled back.")
    assert result.stderr.count("running env.py again") == 3
    assert database.psql("SELECT to_regclass('effects')") == [(None,)]


def test_what_env_py_did_on_its_connection_is_done_again(
    database: Database, project: Project, start: Start, gate: Gate
) -> None:
    database.execute("CREATE SCHEMA tenant")
    set_path = env(connected="connection.execute(text('SET search_path TO tenant')); connection.commit()")
    run = start(project(set_path, revisions=history()), database)
    run.wait_for(gate.reached)
    database.psql(ENDED.format(APPLYING))
    gate.open()
    done(run.finish())
    assert database.psql("SELECT count(*) FROM tenant.effects") == [(3,)]
    assert database.psql("SELECT to_regclass('public.effects')") == [(None,)]


@both
def test_what_left_its_transaction_is_not_run_again(
    database: Database, project: Project, start: Start, files: dict[str, str], gate: Gate
) -> None:
    block = "with op.get_context().autocommit_block():\n    {insert}\n    op.execute('{wait}')"
    run = start(project(files, revisions=history(body=block)), database)
    run.wait_for(gate.reached)
    database.psql(ENDED.format(APPLYING))
    gate.open()
    result = run.finish()
    refusal(result, ExitCode.PARTIAL, "A part of r002 was committed", "the database is at r001")
    assert "again (1 of" not in result.stderr
    assert database.psql("SELECT revision FROM effects ORDER BY 1") == [("r001",), ("r002",)]


SLOW_COMMIT = """{insert}
op.execute('''CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS
              $$ BEGIN {wait} RETURN NULL; END $$''')
op.execute('''CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON effects DEFERRABLE INITIALLY DEFERRED
              FOR EACH ROW WHEN (NEW.revision = 'last') EXECUTE FUNCTION slowly()''')
op.execute("INSERT INTO effects VALUES ('last')")"""


@pytest.mark.parametrize("how", ["ended", "answer lost"])
@pytest.mark.parametrize("name", ["psycopg2", "psycopg2, per migration", "asyncpg"])
def test_while_it_commits(
    database: Database, project: Project, start: Start, proxy: Proxy, name: str, how: str, gate: Gate
) -> None:
    revisions = history(3, body=SLOW_COMMIT, wait=Gate.body)
    run = start(project(ENV_FILES[name], revisions=revisions), database, **proxy.environment(database))
    run.wait_for(gate.reached)
    ((_, port),) = database.psql(APPLYING)
    if how == "ended":
        database.psql(ENDED.format(APPLYING))
    else:
        proxy.stall(port, direction="down")
    gate.open()
    result = run.finish()
    assert database.psql("DELETE FROM effects WHERE revision = 'last' RETURNING 1") == [(1,)]
    once_each(result, database)
    assert ("an answer was lost" in result.stderr) is (how == "answer lost")


@both
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_restarts(
    private_server: Callable[..., Server], project: Project, start: Start, files: dict[str, str], mode: str
) -> None:
    server = private_server()
    database = server.create_database()
    gate = Gate(database)  # which the stop opens
    run = start(project(files, revisions=history()), database)
    run.wait_for(gate.reached)
    server.stop(mode)
    time.sleep(1)
    server.start()
    once_each(run.finish(), database)


def test_a_server_that_does_not_come_back(
    private_server: Callable[..., Server], project: Project, start: Start, run_migrator: Runner
) -> None:
    server = private_server()
    database, other = server.create_database(), server.create_database()
    folder = project(revisions=history())
    per_migration = project(ENV_FILES["psycopg2, per migration"], revisions=history(), name="per_migration")
    gates = {where: Gate(where) for where in (database, other)}  # which the stop opens
    runs = [start(folder, database, **SOON), start(per_migration, other, **SOON)]
    for run, where in zip(runs, (database, other), strict=True):
        run.wait_for(gates[where].reached)
    server.stop("immediate")
    results = [run.finish() for run in runs]
    server.start()
    refusal(results[0], ExitCode.UNREACHABLE, "Revision r002 failed", "Nothing was committed")
    assert database.psql("SELECT to_regclass('effects')") == [(None,)]
    refusal(results[1], ExitCode.PARTIAL, "The database could not be read after that")
    assert other.psql("SELECT revision FROM effects") == [("r001",)]
    done(run_migrator(cwd=folder, database=database))
    done(run_migrator(cwd=per_migration, database=other))
    assert other.psql("SELECT revision FROM effects ORDER BY 1") == [("r001",), ("r002",), ("r003",)]


@both
def test_a_stall_that_passes_is_waited_for(
    database: Database, project: Project, start: Start, proxy: Proxy, files: dict[str, str], gate: Gate
) -> None:
    run = start(project(files, revisions=history()), database, **proxy.environment(database))
    run.wait_for(gate.reached)
    proxy.stall()
    gate.open()
    time.sleep(3)
    proxy.resume()
    once_each(run.finish(), database, again=False)


@both
@pytest.mark.parametrize("how", ["drop", "reset"])
def test_a_network_that_ends_every_connection(
    database: Database,
    project: Project,
    start: Start,
    proxy: Proxy,
    files: dict[str, str],
    how: str,
    gate: Gate,
) -> None:
    run = start(project(files, revisions=history()), database, **proxy.environment(database))
    run.wait_for(gate.reached)
    ((pid, _),) = database.psql(APPLYING)
    getattr(proxy, how)()
    run.wait_for(gone(database, pid))  # the server looks after its client while it works
    gate.open()
    once_each(run.finish(), database)


@each_env
def test_a_stall_of_the_migration_alone(
    database: Database, project: Project, start: Start, proxy: Proxy, files: dict[str, str], gate: Gate
) -> None:
    run = start(project(files, revisions=history()), database, **proxy.environment(database))
    run.wait_for(gate.reached)
    ((_, port),) = database.psql(APPLYING)
    proxy.stall(port)
    gate.open()
    result = run.finish()
    once_each(result, database)
    assert "an answer was lost" in result.stderr


@both
def test_a_stall_for_good_ends_and_nobody_applies_beside_it(
    database: Database,
    project: Project,
    start: Start,
    start_migrator: Start,
    proxy: Proxy,
    files: dict[str, str],
    gate: Gate,
) -> None:
    folder = project(files, revisions=history())
    run = start(folder, database, **proxy.environment(database), **SOON)
    run.wait_for(gate.reached)
    proxy.stall()
    gate.open()
    run.wait_for("the control connection was lost")
    database.psql(
        ENDED.format(CONTROL)
    )  # as the server does when it notices; the other one still holds its lock
    second = start(folder, database)
    second.wait_for("waiting for the run lock")
    refusal(run.finish(), ExitCode.UNREACHABLE, "Revision r002 failed", "Nothing was committed")
    assert database.psql("SELECT to_regclass('effects')") == [(None,)]
    proxy.close()
    once_each(second.finish(), database, again=False)


def test_a_signal_is_obeyed_when_nothing_answers(
    database: Database, project: Project, start: Start, proxy: Proxy, gate: Gate
) -> None:
    run = start(project(revisions=history()), database, **proxy.environment(database))
    run.wait_for(gate.reached)
    proxy.stall()
    with Stopwatch() as watch:
        run.send(signal.SIGTERM)
        result = run.finish()
    refusal(result, ExitCode.PARTIAL, "Interrupted by SIGTERM", "The database could not be read after that")
    assert watch.within(28), result
    ((pid, _),) = database.psql(APPLYING)
    proxy.close()
    run.wait_for(gone(database, pid), ended=True)
    gate.open()
    assert left_behind(database) == []
    assert database.psql("SELECT to_regclass('effects')") == [(None,)]
