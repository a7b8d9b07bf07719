"""Timeouts that a role or a database has are the application's: migrator's own questions are not cut off by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.config.database_url import parse
from migrator.postgres.session import FirstQuery, connect
from tests.support.projects import Revision
from tests.support.runner import Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]


def test_a_question_that_takes_longer(each_database: Database) -> None:
    """The first one too, which asks for the server's facts."""
    each_database.execute(
        f"ALTER DATABASE {each_database.name} SET statement_timeout = '20ms';"
        f" ALTER DATABASE {each_database.name} SET idle_in_transaction_session_timeout = '20ms'"
    )
    target = parse(each_database.url)
    with connect(
        target, "migrator/test", 60, first_query=lambda: FirstQuery("pg_sleep(0.1)::text || 'slept'")
    ) as session:
        assert session.first_row == ("slept",)
        assert session.value("SELECT pg_sleep(0.1)::text || 'again'") == "again"
        session.query("BEGIN")
        assert session.value("SELECT current_setting('idle_in_transaction_session_timeout')") == "0"
        session.query("ROLLBACK")
        session.reconnect(60)
        assert session.value("SELECT pg_sleep(0.1)::text || 'still'") == "still"


def test_the_newest_timeouts(servers: Callable[[str], Server]) -> None:
    server = servers("embedded18")
    database = server.create_database()
    try:
        for name in ("transaction_timeout", "idle_session_timeout"):
            database.execute(f"ALTER DATABASE {database.name} SET {name} = '30s'")
        with connect(parse(database.url), "migrator/test", 60) as session:
            shown = "SELECT current_setting('transaction_timeout'), current_setting('idle_session_timeout')"
            assert session.query(shown) == [("0", "0")]
    finally:
        server.drop_database(database.name)


@pytest.mark.parametrize("given", ["0", "10s"])
def test_the_migrations_have_what_is_theirs(
    project: Project, run_migrator: Runner, database: Database, given: str
) -> None:
    """What a migration is cut off by is the database's, or MIGRATOR_STATEMENT_TIMEOUT where that is set."""
    database.execute(f"ALTER DATABASE {database.name} SET statement_timeout = '300ms'")
    folder = project(revisions=[Revision("r001", None, "op.execute('SELECT pg_sleep(1)')")])
    env = {"MIGRATOR_BACKUP": "off"} | ({"MIGRATOR_STATEMENT_TIMEOUT": given} if given != "0" else {})
    result = run_migrator(cwd=folder, database=database, env=env)
    assert result.code == (39 if given == "0" else 0), result
