"""A project is upgraded by migrator and by plain Alembic, each in a database of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.comparison import Comparison
from tests.support.runner import Runner
from tests.support.servers import Database, Server


@pytest.fixture
def plain(server: Server) -> Iterator[Database]:
    """The database that plain Alembic migrates."""
    database = server.create_database()
    yield database
    server.drop_database(database.name)


@pytest.fixture
def compare(run_migrator: Runner, database: Database, plain: Database) -> Comparison:
    return Comparison(run_migrator, database, plain)
