"""A server without room for another connection: 20 after the wait, and 0 where there is room again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.outcome import ExitCode
from migrator.postgres.errors import child_refused, had_no_free_connection, no_free_connection
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database

ROLE = "room_app"


@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [
        ("53300", "désolé, trop de clients sont déjà connectés"),
        ("53400", "any"),
        ("57P03", "das Datenbanksystem startet"),
        ("", "FATAL:  sorry, too many clients already"),
        ("", "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute"),
        ("", 'FATAL:  too many connections for role "app"'),
        ("", 'FATAL:  too many connections for database "shop"'),
        ("", "FATAL:  the database system is starting up"),
        ("08P01", "no more connections allowed (max_client_conn)"),
        ("08P01", "query_wait_timeout"),
        ("XX000", "Max client connections reached"),
        ("XX000", "MaxClientsInSessionMode: max clients reached - in Session mode max clients are limited"),
    ],
)
def test_what_says_that_there_is_no_room(sqlstate: str, text: str) -> None:
    assert no_free_connection(sqlstate, text)


@pytest.mark.parametrize(
    ("sqlstate", "text"),
    [
        ("28P01", 'password authentication failed for user "too many clients"'),
        ("3D000", 'database "too many connections" does not exist'),
        ("", 'FATAL:  password authentication failed for user "app"'),
        ("08006", "server closed the connection unexpectedly"),
        ("42P01", 'relation "query_wait_timeout" does not exist'),
    ],
)
def test_what_says_something_else(sqlstate: str, text: str) -> None:
    assert not no_free_connection(sqlstate, text)


def test_a_drivers_error_is_known_however_often_it_is_wrapped() -> None:
    drivers = type("OperationalError", (type("Error", (Exception,), {}),), {})
    asyncpgs = type("TooManyConnectionsError", (type("PostgresError", (Exception,), {}),), {})
    wrapped = RuntimeError("env.py's own words")
    wrapped.__cause__ = drivers("connection to server failed: FATAL:  sorry, too many clients already")
    assert had_no_free_connection(wrapped)
    error = asyncpgs("désolé")
    error.sqlstate = "53300"  # type: ignore[attr-defined]
    assert had_no_free_connection(error)
    assert not had_no_free_connection(ValueError("sorry, too many clients already"))


def test_a_childs_words_are_english_and_the_servers_may_not_be() -> None:
    start = 'pg_dump: error: connection to server at "db" (10.0.0.1), port 5432 failed: '
    assert child_refused(f"{start}FATAL:  désolé, trop de clients sont déjà connectés")
    assert not child_refused("pg_dump: error: query failed: ERROR:  permission denied for table t")


@pytest.fixture
def limited(database: Database) -> Iterator[Callable[[int], str]]:
    """Give the database to a role that has room for only so many connections now; returns its address."""
    others: list[Any] = []

    def limit(connections: int) -> str:
        database.server.create_role(ROLE, "LOGIN CONNECTION LIMIT 8")
        others.extend(database.server.connect(database.name, user=ROLE) for _ in range(8 - connections))
        database.execute("CREATE TABLE kept (a int)")
        database.execute(f"ALTER TABLE kept OWNER TO {ROLE}")
        database.execute(f"ALTER SCHEMA public OWNER TO {ROLE}")
        return database.server.url(database.name, user=ROLE)

    yield limit
    for other in others:
        other.close()
    database.execute(f"DROP OWNED BY {ROLE} CASCADE")
    database.execute(f"DROP ROLE {ROLE}")


WHO = {1: "the snapshot's session", 2: "pg_dump"}


def test_env_py_that_finds_no_room_is_run_again_from_the_top(
    limited: Callable[[int], str],
    database: Database,
    project: Callable[..., Path],
    start_migrator: Callable[..., Running],
) -> None:
    env = {"MIGRATOR_DATABASE_URL": limited(1), "MIGRATOR_BACKUP": "off", "MIGRATOR_WAIT_TIMEOUT": "1s"}
    folder = project(revisions=linear_history(1))
    words = ("upgrade", "--baseline", "base")
    result = start_migrator(*words, cwd=folder, database=database, env=env).finish()
    assert result.code == 20, result
    assert "No further connection was possible" in result.stderr
    running = start_migrator(
        *words, cwd=folder, database=database, env={**env, "MIGRATOR_WAIT_TIMEOUT": "60s"}
    )
    running.wait_for("env.py: no connection yet")
    database.server.psql(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
    result = running.finish()
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


@pytest.mark.parametrize("connections", WHO, ids=WHO.values())
def test_no_room_for_a_later_connection_is_20_after_the_wait(
    connections: int,
    limited: Callable[[int], str],
    database: Database,
    project: Callable[..., Path],
    run_migrator: Runner,
) -> None:
    env = {"MIGRATOR_DATABASE_URL": limited(connections), "MIGRATOR_WAIT_TIMEOUT": "1s"}
    folder = project(revisions=linear_history(1))
    result = run_migrator("upgrade", "--baseline", "base", cwd=folder, database=database, env=env)
    assert result.code == 20, result
    assert "No further connection was possible" in result.stderr
    assert "too many connections for role" in result.stderr
    assert "unexpected" not in result.stderr
    assert database.psql("SELECT to_regclass('t1')::text") == [(None,)]
    command = run_migrator("backup", cwd=folder, database=database, env=env)
    assert command.code == 20, command
    assert list(run_migrator.backups.glob("*.dump")) == []


@pytest.mark.parametrize("connections", WHO, ids=WHO.values())
def test_a_run_goes_on_when_there_is_room_again(
    connections: int,
    limited: Callable[[int], str],
    database: Database,
    project: Callable[..., Path],
    start_migrator: Callable[..., Running],
) -> None:
    env = {"MIGRATOR_DATABASE_URL": limited(connections)}
    folder = project(revisions=linear_history(1))
    running = start_migrator("upgrade", "--baseline", "base", cwd=folder, database=database, env=env)
    running.wait_for("no connection yet")
    database.server.psql(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")
    result = running.finish()
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


def test_a_limit_that_no_run_fits_into_is_named(
    database: Database, project: Callable[..., Path], run_migrator: Runner
) -> None:
    role = database.server.create_role("room_limited", "LOGIN CREATEDB")
    database.execute(f'ALTER DATABASE "{database.name}" OWNER TO {role}')
    folder = project(revisions=linear_history(3))
    address = database.server.url(database.name, role)
    off = {"MIGRATOR_BACKUP": "off"}
    tried = (
        (["upgrade", "r001"], off, 2, "A run takes 2 connections at once"),
        (["upgrade", "r002"], {}, 3, "A backup takes 3 connections at once"),
        (["restore", "latest", "--yes"], {}, 4, "A restore takes 4 connections at once"),
    )
    try:
        for words, more, needed, says in tried:
            env = {"MIGRATOR_DATABASE_URL": address, "MIGRATOR_WAIT_TIMEOUT": "5s", **more}
            database.server.psql(f"ALTER ROLE {role} CONNECTION LIMIT {needed - 1}")
            with unchanged(database):
                result = run_migrator(*words, cwd=folder, env=env)
            refusal(result, ExitCode.ACCESS_DENIED, says, f"CONNECTION LIMIT {needed}")
            database.server.psql(f"ALTER ROLE {role} CONNECTION LIMIT {needed}")
            done(run_migrator(*words, cwd=folder, env=env))
    finally:
        for (name,) in database.server.psql(
            f"SELECT datname::text FROM pg_database WHERE datdba = '{role}'::regrole"
        ):
            database.server.drop_database(name)
        database.server.psql(f"DROP ROLE {role}")
