"""Mutants of the code that look names up by the user's search_path: the hostile objects notice each of them.

Two cheap commands run in a copy of the package, in which one place is as it must not be.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.security import canaries, world
from tests.security.scenario import Answer, Scenario, Step
from tests.security.world import World

MARKER = "the copy runs"
SETTINGS = {"MIGRATOR_BACKUP": "off", "MIGRATOR_BASELINE": "base"}
INDEXED = """
CREATE TABLE public.alembic_version (version_num varchar(32) PRIMARY KEY);
CREATE INDEX ON public.alembic_version (app.seen('index', 1));
GRANT ALL ON public.alembic_version TO PUBLIC
"""
"""A version table of the ordinary role's, whose index the planner evaluates."""


@dataclass(frozen=True)
class Mutant:
    """One text of one module, and what it is in the mutant; which canary notices it, in which command."""

    module: str
    text: str
    instead: str
    command: str
    canary: str
    planted: str = ""
    """What the ordinary role has in the database besides."""


MUTANTS = {
    "our sessions keep the user's path": Mutant(
        "postgres/search_path.py",
        "f\"pg_catalog.set_config('search_path', {path}, {local}),\"",
        "f\"pg_catalog.set_config('search_path', pg_catalog.current_setting('search_path'), {local}),\"",
        "status",
        "oid = regclass",
    ),
    "an operator on env.py's connection is not qualified": Mutant(
        "pipeline/apply/connection.py",
        "OPERATOR(pg_catalog.*) 1000000",
        "* 1000000",
        "upgrade r001",
        "numeric * int4",
    ),
    "a version table is read by a query": Mutant(
        "postgres/version_table.py",
        'f"COPY {table.quoted} (version_num) TO STDOUT (FORMAT csv, FORCE_QUOTE (version_num))", sink=sink\n',
        'f"COPY (SELECT version_num FROM {table.quoted}) TO STDOUT (FORMAT csv, FORCE_QUOTE (version_num))",'
        " sink=sink\n",
        "status",
        "index",
        INDEXED,
    ),
}


@pytest.fixture(scope="module")
def place() -> Iterator[World]:
    with world.make("debian", ["hostile"]) as made:
        yield made


def copy_of_the_package(folder: Path) -> Path:
    """Copy the package into a source folder; the copy says in each run that it runs."""
    source = folder / "source"
    shutil.copytree(canaries.SOURCE, source / "migrator", ignore=shutil.ignore_patterns("__pycache__"))
    with (source / "migrator" / "__init__.py").open("a") as file:
        file.write(f"import sys\nprint('WARNING {MARKER}', file=sys.stderr)\n")
    return source


def mutate(source: Path, mutant: Mutant) -> None:
    """Put the mutant's text in the place of the one that is there."""
    path = source / "migrator" / mutant.module
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.text) == 1, f"the mutant of {mutant.module} is of code that is gone: change it"
    path.write_text(text.replace(mutant.text, mutant.instead), encoding="utf-8")


def run(place: World, folder: Path, source: Path, planted: str, *commands: str) -> list[Answer]:
    """Run the commands in a hostile database of their own."""
    database = place.copy("hostile", world.SUPERUSER)
    if planted:
        canaries.run_as_app(place.server, database.name, planted)
    scenario = Scenario(place, database, world.SUPERUSER, folder)
    scenario.prepare()
    answers = [scenario.run(Step(words, SETTINGS), source) for words in commands]
    for answer in answers:
        assert MARKER in answer.said, f"another package than the copy ran:\n{answer}"
    return answers


def gained(place: World) -> bool:
    """Whether the ordinary role is a superuser; it is none afterwards."""
    found = place.server.psql("SELECT rolsuper FROM pg_roles WHERE rolname = %s", (canaries.OWNER,))
    place.reset()
    return found == [(True,)]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, place: World, tmp_path: Path) -> None:
    """The canary says so, and its owner has become a superuser; `upgrade` of the mutant is not asked to end well."""
    mutant = MUTANTS[name]
    source = copy_of_the_package(tmp_path)
    mutate(source, mutant)
    answers = run(place, tmp_path, source, mutant.planted, mutant.command)
    assert mutant.canary in {call.what for call in answers[0].calls}, answers[0]
    assert gained(place)


@pytest.mark.parametrize("planted", ["", INDEXED], ids=["hostile", "indexed"])
def test_the_code_as_it_is_calls_nothing(planted: str, place: World, tmp_path: Path) -> None:
    """The same commands, in a copy without a mutation."""
    source = copy_of_the_package(tmp_path)
    commands = ("status",) if planted else ("status", "upgrade r001", "upgrade r001", "status")
    for answer in run(place, tmp_path, source, planted, *commands):
        assert not answer.calls, "\n".join(map(str, answer.calls))
        assert answer.code == 0, answer
    assert not gained(place)
