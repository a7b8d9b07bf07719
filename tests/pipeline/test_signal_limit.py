"""Five seconds after a signal a run has ended, whatever hangs, with its outcome written and a code that is true."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrator.config.database_url import parse
from migrator.outcome import ExitCode
from migrator.pipeline.stages.standbys import missing
from migrator.postgres import session as postgres
from migrator.postgres.session import connect
from tests.chaos.holding import LIMIT, SCENES, sweep
from tests.support.gates import Gate
from tests.support.outcomes import done, left_behind, refusal
from tests.support.pace import Stopwatch
from tests.support.projects import ENV_FILES, Revision, bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]
Start = Callable[..., Running]
Make = Callable[..., Server]

NOBODY = "ALTER SYSTEM SET synchronous_standby_names = 'nobody'"


def terminated(run: Running) -> Result:
    """Send SIGTERM; return how the run ended, after asserting that it took no longer than it may."""
    with Stopwatch() as watch:
        run.send()
        result = run.finish()
    assert watch.within(LIMIT), f"{watch.seconds:.1f} s: {result}"
    return result


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process of the server within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def pid_of(server: Server, condition: str) -> int:
    """Return a process of the server, by a condition on pg_stat_activity."""
    return int(server.psql(f"SELECT pid FROM pg_stat_activity WHERE {condition}")[0][0])


# -- each query, held on the network ----------------------------------------------------------------------


def spread(sites: list[str]) -> list[str]:
    """Choose a few of a command's queries; `python -m tests.chaos.holding` holds them all."""
    return [sites[len(sites) // 3], sites[len(sites) * 4 // 5]]


def test_whichever_query_the_network_swallows() -> None:
    outcomes = sweep(list(SCENES), spread, again=False)
    wrong = [str(outcome) for outcome in outcomes if outcome.problem]
    assert not wrong, "\n".join(wrong)
    assert len(outcomes) == 2 * len(SCENES)
    assert {ExitCode.INTERRUPTED, ExitCode.PARTIAL} <= {outcome.code for outcome in outcomes}


# -- each kind of thing that does not answer --------------------------------------------------------------


def test_a_server_process_that_is_frozen(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    bring_to(database, 1)
    with Gate(database) as gate:
        folder = project(revisions=[*linear_history(1), Revision("r002", "r001", gate.statement)])
        run = start_migrator(cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})
        run.wait_for(gate.reached)
        with stopped(pid_of(database.server, f"wait_event = 'PgSleep' AND datname = '{database.name}'")):
            refusal(terminated(run), ExitCode.PARTIAL, "not known", "`migrator current`")
    assert not left_behind(database)
    done(run_migrator("upgrade", cwd=folder, database=database))


def test_an_env_file_that_swallows_the_signal(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, tmp_path: Path
) -> None:
    deaf = "import time\nprint('deaf', flush=True)\nwhile True:\n    try:\n        time.sleep(60)\n"
    deaf += "    except BaseException:\n        pass\n"
    folder = project(files={"migrations/env.py": deaf}, revisions=linear_history(1))
    told, report = tmp_path / "told", tmp_path / "report.json"
    told.touch()
    env = {"MIGRATOR_TERMINATION_LOG": str(told), "MIGRATOR_REPORT_FILE": str(report)}
    run = start_migrator(cwd=folder, database=database, env=env)
    run.wait_for("deaf")
    sentence = refusal(terminated(run), ExitCode.PARTIAL, "SIGTERM", "not known", "`migrator current`")
    assert told.read_text() == sentence
    assert json.loads(report.read_text())["code"] == ExitCode.PARTIAL
    (folder / "migrations" / "env.py").write_text((ENV_FILES / "plain_url.py").read_text())
    done(run_migrator("upgrade", cwd=folder, database=database))


def test_a_scratch_database_that_cannot_be_dropped(
    private_server: Make, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    server = private_server()
    database = server.create_database()
    bring_to(database, 1)
    env = {"MIGRATOR_BACKUP_VERIFY": "restore"}
    folder = project(revisions=linear_history(2))
    # DROP DATABASE waits until every process of the server has answered a signal barrier.
    with stopped(pid_of(server, "backend_type = 'walwriter'")):
        run = start_migrator(cwd=folder, database=database, env=env)
        run.wait_for(
            lambda: server.psql("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'ProcSignalBarrier'")
        )
        result = terminated(run)
        refusal(result, ExitCode.INTERRUPTED, "SIGTERM")
        assert "could not be dropped (" in result.stderr, result
        assert f'DROP DATABASE \\"{database.name}_verify_' in result.stderr, result
    result = done(run_migrator("upgrade", cwd=folder, database=database, env=env))
    assert "which an interrupted verification left" in result.stderr, result
    assert not server.psql("SELECT datname FROM pg_database WHERE datname ~ '_verify_'")


# -- a synchronous standby that is not there --------------------------------------------------------------


def test_work_waits_for_a_standby_that_comes(
    private_server: Make, project: Project, start_migrator: Start
) -> None:
    server = private_server()
    database = server.create_database()
    bring_to(database, 1)
    server.psql(NOBODY)
    server.reload()
    run = start_migrator(cwd=project(revisions=linear_history(2)), database=database)
    run.wait_for("waiting for a synchronous standby")
    server.psql("ALTER SYSTEM RESET synchronous_standby_names")
    server.reload()
    done(run.finish())


def test_a_standby_that_does_not_come_is_told_before_anything_begins(
    private_server: Make, project: Project, run_migrator: Runner
) -> None:
    server = private_server()
    database = server.create_database()
    bring_to(database, 1)
    server.psql(NOBODY)
    server.reload()
    folder = project(revisions=linear_history(2))
    result = run_migrator("upgrade", cwd=folder, database=database, env={"MIGRATOR_WAIT_TIMEOUT": "2s"})
    refusal(result, ExitCode.BLOCKED, "'nobody'", "ALTER SYSTEM SET synchronous_standby_names")
    assert not run_migrator.backups.exists() or not list(run_migrator.backups.iterdir())


def test_a_standby_that_goes_while_a_revision_runs(
    private_server: Make, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    server = private_server()
    database = server.create_database()
    bring_to(database, 1)
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with Gate(database) as gate:
        folder = project(revisions=[*linear_history(1), Revision("r002", "r001", gate.statement)])
        runs = [start_migrator(cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})]
        runs[0].wait_for(gate.reached)
        server.psql(NOBODY)
        server.reload()
        runs[0].wait_for(lambda: server.psql("SHOW synchronous_standby_names") == [("nobody",)])
    runs[0].wait_for(lambda: server.psql(waits))
    # What waits there is committed, whether it is answered or not.
    refusal(terminated(runs[0]), ExitCode.PARTIAL, "the database is at r002")
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert not left_behind(database)


def test_a_killed_run_that_waits_for_a_standby_is_named_with_what_ends_it(
    private_server: Make, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    server = private_server()
    database = server.create_database()
    bring_to(database, 1)
    with Gate(database) as gate:
        revisions = [*linear_history(1), Revision("r002", "r001", gate.statement)]
        folder = project(revisions=revisions)
        first = start_migrator(cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})
        first.wait_for(gate.reached)
        server.psql(NOBODY)
        server.reload()
        first.wait_for(lambda: server.psql("SHOW synchronous_standby_names") == [("nobody",)])
    waits = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    first.wait_for(lambda: server.psql(waits))
    first.kill()
    late = Revision("r003", "r002", "CREATE TABLE late (id int)")
    second = start_migrator(
        cwd=project(revisions=[*revisions, late], name="later"),
        database=database,
        env={"MIGRATOR_BACKUP": "off"},
    )
    second.wait_for("waits for a synchronous standby (SyncRep)")
    server.psql("ALTER SYSTEM RESET synchronous_standby_names")
    for (pid,) in server.psql(waits):
        assert f"SELECT pg_terminate_backend({pid})" in second.stderr
        server.psql("SELECT pg_terminate_backend(%s)", (pid,))
    server.reload()
    done(second.finish())


@pytest.mark.parametrize(
    ("names", "there", "hidden", "expected"),
    [
        ("", 0, 0, False),
        ("nobody", 0, 0, True),
        ("*", 1, 0, False),
        ("nobody", 0, 1, False),
        ("FIRST 2 (a, b)", 1, 0, True),
        ("ANY 1 (a, b)", 1, 0, False),
        ("2 (a, b)", 2, 0, False),
        ('"2 (x"', 1, 0, False),
    ],
)
def test_when_a_commit_would_wait(names: str, there: int, hidden: int, *, expected: bool) -> None:
    assert missing(names, True, there, hidden) is expected
    assert not missing(names, False, there, hidden)


# -- a sign of life ---------------------------------------------------------------------------------------


def test_a_query_of_ours_that_takes_long_says_what_it_waits_for(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres, "ANSWER_TIMEOUT", 0.2)
    monkeypatch.setattr(postgres, "_BEAT", 0.2)
    caplog.set_level(logging.INFO)
    with Gate(database) as gate, connect(parse(database.url), "migrator/test", 60) as session:

        class Opener(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if "still waiting after" in record.getMessage():
                    gate.open()

        handler = Opener()
        logging.getLogger("migrator").addHandler(handler)
        try:
            session.query(gate.statement)
        finally:
            logging.getLogger("migrator").removeHandler(handler)
    assert "which waits for Timeout PgSleep" in caplog.text
