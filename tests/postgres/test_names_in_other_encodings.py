"""Names in the shared catalogs that are no UTF-8: they were made in a database of another encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server


def execute_bytes(server: Server, database: str, *statements: bytes) -> None:
    with closing(server.connect(database)) as connection:
        connection.autocommit = True
        connection.set_client_encoding("SQL_ASCII")
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)


@pytest.fixture
def latin_names(server: Server) -> Iterator[None]:
    """A database and a role with bytes in their names that are no UTF-8."""
    server.psql(
        "CREATE DATABASE of_bytes TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    execute_bytes(
        server,
        "of_bytes",
        b'CREATE DATABASE "caf\xe9\xff"',
        b"COMMENT ON DATABASE \"caf\xe9\xff\" IS '\xe9'",
        b'CREATE ROLE "role\xe9"',
    )
    yield
    execute_bytes(server, "of_bytes", b'DROP DATABASE "caf\xe9\xff"', b'DROP ROLE "role\xe9"')
    server.psql("DROP DATABASE of_bytes")


@pytest.mark.usefixtures("latin_names")
def test_commands_work_beside_names_that_are_no_utf8(
    database: Database, project: Callable[..., Path], run_migrator: Runner
) -> None:
    database.execute("CREATE TABLE kept (a int)")
    folder = project(revisions=linear_history(1))
    for words in (
        ["upgrade", "--baseline", "base"],
        ["restore", "latest", "--yes", "--drop-old"],
        ["status"],
    ):
        result = run_migrator(*words, cwd=folder, database=database)
        assert result.code == 0, result
    (globals_sql,) = run_migrator.backups.glob("*.globals.sql")
    assert b'"role\xe9"' in globals_sql.read_bytes()
