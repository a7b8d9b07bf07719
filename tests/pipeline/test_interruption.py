"""SIGTERM, SIGINT and SIGHUP at every point of a run: it is gone at once, the database is as if it had never come."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.leaks import process_tree
from tests.support.outcomes import done, refusal, unchanged
from tests.support.pace import Stopwatch
from tests.support.ports import free_port
from tests.support.projects import ENV_FILES, Revision, bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]

GONE = 3.0
"""Seconds after a signal by which the process has ended, as Kubernetes' and Docker's users expect."""

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])


@pytest.fixture(autouse=True)
def unignored() -> Iterator[None]:
    """Have what is started get SIGHUP, even where these tests were started with nohup(1)."""
    previous = signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGHUP, previous)


def interrupt(run: Running, number: signal.Signals = signal.SIGTERM, *words: str) -> Result:
    """Send a signal; assert that the run, with all that it started, ends soon and says so."""
    family = process_tree(run.pid)
    result = ended(run, number, within=GONE)
    refusal(result, ExitCode.INTERRUPTED, number.name, "run it again", *words)
    assert not [pid for pid in family if alive(pid)]
    return result


def ended(run: Running, *numbers: signal.Signals, within: float) -> Result:
    """Send signals; return how the run ended, within so many seconds."""
    with Stopwatch() as watch:
        for number in numbers:
            run.send(number)
        result = run.finish()
    assert watch.within(within), f"{watch.seconds:.1f} s: {result}"
    return result


def alive(pid: int) -> bool:
    """Whether a process is there and more than a zombie that nobody has reaped yet (proc(5), `stat`)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waiting_for(database: Database, event: str) -> Callable[[], object]:
    """Return a function that tells whether a session of the database waits for this (pg_stat_activity)."""
    sql = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = %s"
    return lambda: database.psql(sql, (event,))


def slow(body: str) -> list[Revision]:
    """Return two revisions, the second of which does something that takes long."""
    return [*linear_history(1), Revision("r002", "r001", body)]


@contextmanager
def locked(database: Database, table: str) -> Iterator[None]:
    """Keep a table locked against everyone."""
    other = database.connect()
    other.cursor().execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    yield
    other.close()


@SIGNALS
def test_while_waiting_for_the_server(
    project: Project, start_migrator: Start, number: signal.Signals
) -> None:
    env = {"MIGRATOR_DATABASE_URL": f"postgresql://me@127.0.0.1:{free_port()}/shop"}
    run = start_migrator(cwd=project(revisions=linear_history(1)), env=env)
    run.wait_for("waiting for postgresql://")
    interrupt(run, number)


def test_while_waiting_for_another_run(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=slow("SELECT pg_sleep(60)"))
    bring_to(database, 1)
    with unchanged(database):
        first = start_migrator(cwd=folder, database=database)
        first.wait_for(waiting_for(database, "PgSleep"))
        second = start_migrator(cwd=folder, database=database)
        second.wait_for("waiting for the run lock")
        interrupt(second)
        assert first.process.poll() is None
        interrupt(first)


@SIGNALS
@pytest.mark.parametrize("env", ["plain_url", "async_engine"])
def test_while_a_revision_runs_sql(
    database: Database,
    project: Project,
    run_migrator: Runner,
    start_migrator: Start,
    env: str,
    number: signal.Signals,
) -> None:
    folder = project(
        revisions=slow(
            "CREATE TABLE half (id int); SELECT pg_sleep(60)"
            if env == "plain_url"
            else 'op.execute("CREATE TABLE half (id int)")\nop.execute("SELECT pg_sleep(60)")'
        ),
        env=env,
    )
    bring_to(database, 1)
    with unchanged(database):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(waiting_for(database, "PgSleep"))
        interrupt(run, number, "r002", "Everything was rolled back.")
    done(run_migrator("verify", cwd=project(revisions=linear_history(1), name="first"), database=database))


def test_a_terminal_that_hangs_up(database: Database, project: Project) -> None:
    folder = project(revisions=slow("SELECT pg_sleep(60)"))
    bring_to(database, 1)
    settings = {
        "MIGRATOR_DATABASE_URL": database.server.url(database.name),
        "MIGRATOR_BACKUP": "off",
        "MIGRATOR_LOG_FORMAT": "text",
    }
    with unchanged(database):
        pid, terminal = pty.fork()
        if not pid:
            os.chdir(folder)
            words = [sys.executable, "-m", "migrator", "upgrade"]
            os.execve(words[0], words, {**os.environ, **settings})  # noqa: S606 - without a shell
        try:
            deadline = time.monotonic() + 60
            while not waiting_for(database, "PgSleep")():
                assert time.monotonic() < deadline, os.read(terminal, 10_000)
                time.sleep(0.1)
            os.close(terminal)  # which sends SIGHUP, and all that is written from now on fails
            deadline = time.monotonic() + 30
            while alive(pid):
                assert time.monotonic() < deadline, "it goes on"
                time.sleep(0.1)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not waiting_for(database, "PgSleep")()


SLEEPING = 'import pathlib, time\npathlib.Path("started").touch()\nwhile True:\n    time.sleep(0.1)'
IN_PYTHON = {
    "sleeping": SLEEPING,
    "busy": SLEEPING.replace("time.sleep(0.1)", "pass"),
    "one long sleep": SLEEPING.replace("time.sleep(0.1)", "time.sleep(60)"),
    "except Exception": SLEEPING.replace(
        "    time.sleep(0.1)", "    try:\n        time.sleep(0.1)\n    except Exception:\n        pass"
    ),
}


@pytest.mark.parametrize("kind", IN_PYTHON)
def test_while_a_revision_runs_python(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, kind: str
) -> None:
    folder = project(revisions=slow('op.execute("CREATE TABLE half (id int)")\n' + IN_PYTHON[kind]))
    bring_to(database, 1)
    with unchanged(database):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for((folder / "started").exists)
        interrupt(run, signal.SIGTERM, "r002", "Everything was rolled back.")


def test_while_env_py_imports_the_application(
    database: Database, project: Project, start_migrator: Start
) -> None:
    env = f"{SLEEPING}\n" + (ENV_FILES / "plain_url.py").read_text()
    folder = project({"migrations/env.py": env}, revisions=linear_history(1))
    with unchanged(database):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for((folder / "started").exists)
        interrupt(run)


def test_while_a_revision_waits_for_a_lock(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=slow("ALTER TABLE t1 ADD COLUMN b int"))
    bring_to(database, 1)
    env = {"MIGRATOR_LOCK_TIMEOUT": "60s", "MIGRATOR_BACKUP": "off"}
    with unchanged(database), locked(database, "t1"):
        run = start_migrator(cwd=folder, database=database, env=env)
        run.wait_for(waiting_for(database, "relation"))
        interrupt(run, signal.SIGTERM, "r002")


def slow_pg_dump(folder: Path, real: Path, body: str) -> Path:
    """Write a `pg_dump` that leaves a sign and then takes its time, beside the real `pg_restore`."""
    folder.mkdir()
    for name in ("pg_dump", "pg_restore"):
        script = folder / name
        slowness = f'touch "{folder}/started"; {body}; ' if name == "pg_dump" else ""
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exec "{real}/{name}" --version\n'
            f'{slowness}exec "{real}/{name}" "$@"\n'
        )
        script.chmod(0o755)
    return folder


@pytest.mark.parametrize("body", ["sleep 60", "trap '' TERM; sleep 60"])
def test_while_pg_dump_runs(
    database: Database,
    project: Project,
    run_migrator: Runner,
    start_migrator: Start,
    tmp_path: Path,
    body: str,
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    programs = slow_pg_dump(tmp_path / "bin", database.server.bin, body)
    with unchanged(database):
        run = start_migrator(cwd=folder, database=database, env={"MIGRATOR_PG_BIN": str(programs)})
        run.wait_for((programs / "started").exists)
        if body.startswith("trap"):  # a child that is deaf to SIGTERM costs the grace that it is given
            refusal(ended(run, signal.SIGTERM, within=10), ExitCode.INTERRUPTED)
        else:
            interrupt(run)
    assert list(run_migrator.backups.iterdir()) == []


def test_while_the_backup_waits_for_a_table(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    with unchanged(database), locked(database, "t1"):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(waiting_for(database, "relation"))
        interrupt(run)
    assert list(run_migrator.backups.iterdir()) == []


def test_while_the_version_table_is_locked(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    with unchanged(database), locked(database, "alembic_version"):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(waiting_for(database, "relation"))
        interrupt(run)


VERIFY_SLOWLY = '[[assertions]]\nname = "slow"\nsql = "SELECT count(*) FROM pg_sleep(60)"\nexpect = 1\n'


def test_while_verify_looks_at_what_was_there(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(1))
    done(run_migrator(cwd=folder, database=database))
    (folder / "migrations" / "verify.toml").write_text(VERIFY_SLOWLY)
    with unchanged(database):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(waiting_for(database, "PgSleep"))
        interrupt(run)


def test_while_verify_looks_at_what_was_done(
    database: Database, project: Project, start_migrator: Start
) -> None:
    folder = project({"migrations/verify.toml": VERIFY_SLOWLY}, revisions=linear_history(1))
    run = start_migrator(cwd=folder, database=database)
    run.wait_for(waiting_for(database, "PgSleep"))
    result = ended(run, signal.SIGTERM, within=10)
    refusal(result, ExitCode.PARTIAL, "SIGTERM", "The database is at r001", "`migrator verify`")
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


def test_after_some_revisions_were_committed(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    env = (ENV_FILES / "plain_url.py").read_text()
    env = env.replace("connection=connection, ", "connection=connection, transaction_per_migration=True, ")
    folder = project({"migrations/env.py": env}, revisions=slow("SELECT pg_sleep(60)"))
    run = start_migrator("--format", "json", cwd=folder, database=database)
    run.wait_for(waiting_for(database, "PgSleep"))
    result = ended(run, signal.SIGTERM, within=10)
    refusal(
        result,
        ExitCode.PARTIAL,
        "Interrupted by SIGTERM in revision r002",
        "1 of 2 revisions were applied and committed; the database is at r001",
        "then continue with `migrator upgrade head`",
    )
    assert [item["revision"] for item in result.answer["revisions"]] == ["r001"]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    project(revisions=linear_history(2))
    done(run_migrator(cwd=folder, database=database))


def test_a_second_signal_does_not_stop_the_telling(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=slow("SELECT pg_sleep(60)"))
    bring_to(database, 1)
    with unchanged(database):
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(waiting_for(database, "PgSleep"))
        result = ended(run, signal.SIGINT, signal.SIGTERM, signal.SIGTERM, within=10)
        refusal(result, ExitCode.INTERRUPTED)


def test_at_any_moment_of_the_start(database: Database, project: Project, start_migrator: Start) -> None:
    # from before Python has a handler of ours (128 + 15 then) to the very end of a run
    folder = project(revisions=linear_history(1))
    done_or_not = set()
    for tenths in range(0, 14, 2):
        run = start_migrator("check", cwd=folder, database=database)
        time.sleep(tenths / 20)
        done_or_not.add(ended(run, signal.SIGTERM, within=10).code)
        assert "Traceback" not in run.stderr, run.stderr
    assert done_or_not <= {-signal.SIGTERM, ExitCode.INTERRUPTED, ExitCode.PENDING}, done_or_not


def test_a_signal_within_a_finalizer_is_not_lost() -> None:
    """Python drops what is raised in a weakref's callback; the import system has such callbacks."""
    program = """
import os, signal, time, weakref
from migrator.runtime.signals import Interrupt, Interruption

class Thing: pass
def gone(_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass  # the handler runs here

Interruption().install()
try:
    thing = Thing()
    watched = weakref.ref(thing, gone)
    del thing
    print("dropped", flush=True)
    time.sleep(60)
except Interrupt as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["dropped", "SIGTERM"], done
    assert done.stderr == ""
