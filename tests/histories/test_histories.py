"""Histories that nobody here wrote end, under migrator, where plain Alembic ends.

Each goes from an empty database to head twice, once with `alembic upgrade head` and once with `migrator
upgrade`; the two databases are then compared as pg_dump writes them, rows and `alembic_version` included.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.histories.projects import HISTORIES, History, Installation
from tests.support.runner import Runner
from tests.support.servers import Database

pytestmark = pytest.mark.histories

MOMENT = re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+\+00\b")
LEDGER = "--exclude-table=*.migrator_ledger*"


@pytest.fixture(scope="module", params=HISTORIES, ids=lambda history: history.name)
def installation(request: pytest.FixtureRequest) -> Installation:
    history: History = request.param
    return history.install()


@pytest.fixture
def migrator(installation: Installation, tmp_path: Path, _clean_environment: None) -> Iterator[Runner]:
    """The `migrator` that is installed beside the project."""
    runner = Runner(tmp_path, [str(installation.bin / "migrator")])
    yield runner
    runner.close()


def difference(expected: str, found: str) -> str:
    """Return the lines in which two dumps differ, empty where they are the same; `now()` is no difference."""
    alembic, migrator = (MOMENT.sub("<moment>", dump).splitlines() for dump in (expected, found))
    return "\n".join(difflib.unified_diff(alembic, migrator, "alembic", "migrator", lineterm=""))


def test_it_ends_where_plain_alembic_ends(
    installation: Installation, migrator: Runner, each_database: Database, tmp_path: Path
) -> None:
    history, database, server = installation.history, each_database, each_database.server
    plain = server.create_database()
    installation.plain_upgrade(plain, tmp_path)
    assert plain.psql("SELECT version_num FROM alembic_version") == [(history.head,)]

    variables = installation.variables(database, tmp_path)
    command = ("-c", str(installation.ini), "upgrade", "--format", "json")
    result = migrator(*command, cwd=installation.ini.parent, env=variables, database=database)
    assert result.code == 0, result
    assert len(result.answer["revisions"]) == history.revisions
    assert difference(plain.dump(), database.dump(LEDGER)) == ""

    again = migrator(*command, cwd=installation.ini.parent, env=variables, database=database)
    assert (again.code, again.answer["revisions"]) == (0, []), again
    assert database.psql("SELECT version_num FROM alembic_version") == [(history.head,)]
    server.drop_database(plain.name)
