"""A server that is not there, not ready, or will not let us in: waited for, or refused at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from migrator.outcome import ExitCode
from tests.support import PLANTED
from tests.support.outcomes import done, refusal, unchanged
from tests.support.pace import Stopwatch
from tests.support.ports import free_port
from tests.support.projects import bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]

LATE = 1.0
"""Seconds by which a busy machine may end a wait later than asked for."""


@contextlib.contextmanager
def after(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    """Do something from another thread after a while.

    The thread lives as long as the block, for Linux ends a server with the *thread* that started it.
    """
    over = threading.Event()

    def wait_and_act() -> None:
        if not over.wait(seconds):
            act()
            over.wait()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def stage_seconds(result: Result, stage: str) -> float:
    """Return how long a stage took, by its own monotonic clock."""
    (seconds,) = [found["seconds"] for found in result.answer["stages"] if found["stage"] == stage]
    return float(seconds)


def test_a_wrong_password_is_refused_at_once(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, password="wrong")}
    with unchanged(database):
        result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, ExitCode.ACCESS_DENIED, database.name, "28P01", "pg_hba.conf", "migrator settings")


def test_a_role_that_does_not_exist_is_refused_at_once(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, user="nobody there")}
    with unchanged(database):
        result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "nobody%20there", "28")


def test_a_role_that_may_not_connect_is_told_what_to_grant(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    role = database.server.create_role(f"outsider_{database.name}")
    database.execute(f'REVOKE CONNECT ON DATABASE "{database.name}" FROM PUBLIC')
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, user=role)}
    result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "42501", "GRANT CONNECT", role)


def test_tls_that_the_server_has_not_is_refused_at_once(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    env = {"MIGRATOR_DATABASE_URL": f"{database.url}?sslmode=require"}
    result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "SSL", "sslmode")


def test_a_database_that_does_not_exist_is_refused_at_once(
    server: Server, project: Project, run_migrator: Runner
) -> None:
    env = {"MIGRATOR_DATABASE_URL": server.url("not_there_yet")}
    result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "not_there_yet", "3D000", "MIGRATOR_WAIT_FOR_DATABASE")


def test_a_database_that_is_created_after_three_seconds_is_waited_for(
    server: Server, project: Project, run_migrator: Runner
) -> None:
    name = "created_late"
    folder = project(revisions=linear_history(1))
    env = {"MIGRATOR_DATABASE_URL": server.url(name)}
    try:
        with after(3, lambda: server.create_database(name)):
            result = run_migrator("--wait-for-database", "--format", "json", cwd=folder, env=env)
        done(result)
        assert server.psql("SELECT version_num FROM alembic_version", dbname=name) == [("r001",)]
        assert result.answer["stages"][0]["details"]["attempts"] > 1
        assert any("waiting for" in line["message"] and name in line["message"] for line in result.logs)
    finally:
        server.drop_database(name)


def test_a_host_that_does_not_resolve_is_waited_for_to_the_end(
    project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    env = {"MIGRATOR_DATABASE_URL": f"postgresql://me:{quote(PLANTED)}@nosuch.invalid/shop"}
    with Stopwatch() as watch:
        result = run_migrator("--wait-timeout", "2s", "--format", "json", cwd=folder, env=env)
    refusal(
        result,
        ExitCode.UNREACHABLE,
        "me@nosuch.invalid/shop",
        "within 2 s",
        "nosuch.invalid",
        "MIGRATOR_WAIT",
    )
    assert watch.within(2 + LATE, stage_seconds(result, "wait"))


def test_a_server_that_appears_after_eight_seconds_is_waited_for(
    private_server: Callable[..., Server], project: Project, start_migrator: Callable[..., Running]
) -> None:
    server = private_server(start=False)
    env = {"MIGRATOR_DATABASE_URL": server.url(), "MIGRATOR_WAIT_TIMEOUT": "150s"}
    folder = project(revisions=linear_history(1))
    with Stopwatch() as watch:
        run = start_migrator("--format", "json", cwd=folder, env=env)
        run.wait_for("waiting for")  # only now: a busy machine takes seconds to get so far
        time.sleep(8)
        server.start()
        result = done(run.finish())
        assert server.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    wait = result.answer["stages"][0]
    assert wait["seconds"] > 7
    assert watch.within(30, wait["seconds"])
    assert wait["details"]["attempts"] > 2
    waiting = [line["message"] for line in result.logs if "waiting for" in line["message"]]
    assert waiting
    assert str(server.port) in waiting[0]
    assert "refused" in waiting[0]


def test_a_wait_is_used_to_its_end(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    # the pauses grow to five seconds: none of them may end the wait before its time
    server = private_server(start=False)
    env = {"MIGRATOR_DATABASE_URL": server.url()}
    folder = project(revisions=linear_history(1))
    for _ in range(2):
        with Stopwatch() as watch:
            result = run_migrator("--wait-timeout", "3", "--format", "json", cwd=folder, env=env)
        refusal(result, ExitCode.UNREACHABLE, "refused", "within 3 s")
        assert stage_seconds(result, "wait") > 2.5
        assert watch.within(3 + LATE, stage_seconds(result, "wait"))


def test_a_server_that_accepts_and_says_nothing_cannot_hold_the_wait_up(
    project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        env = {"MIGRATOR_DATABASE_URL": f"postgresql://me:{quote(PLANTED)}@127.0.0.1:{port}/shop"}
        with Stopwatch() as watch:
            result = run_migrator("--wait-timeout", "3s", "--format", "json", cwd=folder, env=env)
    refusal(result, ExitCode.UNREACHABLE, f"127.0.0.1:{port}", "within 3 s")
    assert watch.within(3 + LATE, stage_seconds(result, "wait"))
    assert watch.within(3 + 5 * LATE)


def test_a_wait_of_nothing_makes_one_attempt(project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(1))
    env = {"MIGRATOR_DATABASE_URL": f"postgresql://me:{quote(PLANTED)}@127.0.0.1:{free_port()}/shop"}
    result = run_migrator("--wait-timeout", "0", cwd=folder, env=env)
    refusal(result, ExitCode.UNREACHABLE, "1 attempt")


def test_a_server_with_too_many_clients_is_waited_for(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server(settings={"max_connections": "6", "superuser_reserved_connections": "0"})
    clients = [server.connect() for _ in range(6)]

    def leave() -> None:
        for client in clients:
            client.close()

    env = {"MIGRATOR_DATABASE_URL": server.url()}
    with after(2, leave):
        result = done(run_migrator("--format", "json", cwd=project(revisions=linear_history(1)), env=env))
    assert result.answer["stages"][0]["details"]["attempts"] > 1


def test_a_standby_is_refused(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server()
    server.stop()
    (server.data / "standby.signal").touch()
    server.start()
    assert server.psql("SELECT pg_is_in_recovery()") == [(True,)]
    env = {"MIGRATOR_DATABASE_URL": server.url()}
    folder = project(revisions=linear_history(1))
    result = run_migrator(cwd=folder, env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "standby", "primary")
    status = done(run_migrator("status", "--format", "json", cwd=folder, env=env))
    assert status.answer["current"] == []


@pytest.mark.parametrize("command", [("upgrade",), ("downgrade", "-1"), ("stamp", "r001")])
def test_a_read_only_database_is_refused(
    database: Database, project: Project, run_migrator: Runner, command: tuple[str, ...]
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    database.execute(f'ALTER DATABASE "{database.name}" SET default_transaction_read_only = on')
    with unchanged(database):
        result = run_migrator(*command, cwd=folder, database=database)
    refusal(result, ExitCode.ACCESS_DENIED, "read-only", "default_transaction_read_only")


def lesser_role(database: Database, *grants: str) -> dict[str, str]:
    """Return the address of a new role that owns nothing and is granted this much."""
    role = database.server.create_role(f"lesser_{database.name}")
    for grant in (f'CONNECT ON DATABASE "{database.name}"', *grants):
        database.execute(f'GRANT {grant} TO "{role}"')
    return {
        "MIGRATOR_DATABASE_URL": database.server.url(database.name, user=role),
        "MIGRATOR_PG_BIN": str(database.server.bin),
    }


def test_a_role_that_may_not_create_in_the_schema(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    env = lesser_role(database)
    with unchanged(database):
        result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "permission denied for schema public", "42501", "grant")


def test_a_role_that_may_not_read_the_version_table(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    env = lesser_role(database)
    with unchanged(database):
        result = run_migrator(cwd=folder, env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "alembic_version", "GRANT SELECT")


def test_a_role_that_may_not_alter_what_it_does_not_own(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    (folder / "migrations/versions/r002.py").write_text(
        (folder / "migrations/versions/r002.py")
        .read_text()
        .replace("CREATE TABLE t2", "ALTER TABLE t1 ADD b int --")
    )
    bring_to(database, 1)
    everything = ("USAGE, CREATE ON SCHEMA public", "ALL ON ALL TABLES IN SCHEMA public")
    env = lesser_role(database, *everything)
    with unchanged(database):
        result = run_migrator(cwd=folder, env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "r002", "must be owner of table t1", "42501", "owner")


def test_a_role_that_may_not_write_the_version_table(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    env = lesser_role(database, "USAGE, CREATE ON SCHEMA public", "SELECT ON ALL TABLES IN SCHEMA public")
    with unchanged(database):
        result = run_migrator(cwd=folder, env=env)
    refusal(result, ExitCode.ACCESS_DENIED, "alembic_version", "42501")
