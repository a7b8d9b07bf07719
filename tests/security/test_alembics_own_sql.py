"""What Alembic itself asks on the connection of env.py calls no operator of others, whatever the driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.project.env.operators import qualified
from tests.security import world
from tests.security.scenario import REVISIONS, Scenario, Step
from tests.security.world import World
from tests.support.projects import write_project


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world.make("debian", templates=("hostile",)) as made:
        yield made


@pytest.mark.parametrize("env", ["plain_url", "async_engine"])
def test_no_operator_of_others_is_called(env: str, place: World, tmp_path: Path) -> None:
    scenario = Scenario(place, place.copy("hostile", world.SUPERUSER), world.SUPERUSER, tmp_path)
    scenario.prepare()
    write_project(tmp_path / "project", revisions=REVISIONS, env=env)
    settings = {"MIGRATOR_BACKUP": "off", "MIGRATOR_BASELINE": "base"}
    for words in ("upgrade r002", "upgrade", "downgrade -1 --yes", "stamp r001", "alembic current"):
        answer = scenario.run(Step(words, settings))
        assert answer.code == 0, answer
        assert not answer.calls, "\n".join(map(str, answer.calls))
    assert place.server.psql("SELECT rolsuper FROM pg_roles WHERE rolname = 'app'") == [(False,)]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE t SET a = 1 WHERE version_num = 'x'",
        "DELETE FROM t WHERE t.version_num = 'x' OR true",
        "SELECT 1 = 1",
        "UPDATE t SET version_num='x' WHERE t.version_num = 'x' AND f(' = ')",
    ],
)
def test_a_revisions_own_statement_stays_as_it_is(statement: str) -> None:
    assert qualified(statement) == statement


def test_alembics_own_statement_names_its_operator() -> None:
    assert (
        qualified("UPDATE s.v SET version_num='b' WHERE s.v.version_num = 'a'")
        == "UPDATE s.v SET version_num='b' WHERE s.v.version_num OPERATOR(pg_catalog.=) 'a'"
    )
