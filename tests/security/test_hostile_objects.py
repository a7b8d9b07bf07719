"""Every command, with hostile objects of every kind planted by an ordinary role: it answers as without them.

No function of the ordinary role is called by a session of ours, and no privilege has moved.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from migrator.cli.parser import make_parser
from tests.security import canaries, world
from tests.security.scenario import STEPS, Answer, Scenario, Step
from tests.security.world import Call, World

SUPERUSER, OWNER = world.SUPERUSER, world.OWNER


@dataclass(frozen=True)
class Excuse:
    """Why a canary's call is no attack on us: who called it where, in which command, by which statement (patterns)."""

    template: str
    caller: str
    command: str
    statement: str
    why: str

    def covers(self, template: str, step: Step, call: Call) -> bool:
        """Whether this is the call that is meant."""
        given = (template, call.role, step.words, " ".join(call.statement.split()))
        wanted = (self.template, self.caller, self.command, self.statement)
        return all(re.match(pattern, text) for pattern, text in zip(wanted, given, strict=True))


ROWS = r"COPY app\.\w+ \(.*\) FROM stdin;$"
EXCUSES = [
    Excuse(
        ".*", ".*", "restore", ROWS, "a restore that a person typed runs what the dump says, with its login"
    ),
    Excuse(
        ".*",
        OWNER,
        "upgrade r002|verify-backup one --how restore",
        ROWS,
        "a proof by restore runs checks with a login that has no privilege; as a superuser there is none",
    ),
    Excuse(
        ".*",
        f"{canaries.OWNER}|{OWNER}",
        "upgrade r002|verify-backup one --how restore|restore",
        r"(CREATE INDEX \w+ ON app\.|REFRESH MATERIALIZED VIEW app\.|ANALYZE \"app\"\.)",
        "the server runs it as the table's owner, in a security-restricted operation",
    ),
    Excuse(
        "first",
        ".*",
        "upgrade|downgrade|stamp|alembic",
        r"SELECT t\.oid, typarray FROM pg_type t JOIN pg_namespace ns ON typnamespace = ns\.oid"
        r" WHERE typname = 'hstore';$",
        "an administrator has put this schema before pg_catalog: psycopg2 looks for hstore in it",
    ),
]
"""The calls that cannot be avoided. SECURITY.md has a row for each."""

SCENES = [
    ("debian", "hostile", SUPERUSER),
    ("debian", "login", OWNER),
    ("zstd", "hostile", SUPERUSER),
    ("embedded18", "first", SUPERUSER),
]
"""On PostgreSQL 15, 17 and 18."""


@dataclass(frozen=True)
class Seen:
    """A step's answer, and which privileges moved in it."""

    answer: Answer
    moved: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def worlds() -> Iterator[Callable[[str], World]]:
    """Return the server of a kind, with its templates."""
    with ExitStack() as stack:
        made: dict[str, World] = {}

        def get(kind: str) -> World:
            if kind not in made:
                templates = [template for other, template, _ in SCENES if other == kind]
                made[kind] = stack.enter_context(world.make(kind, templates))
            return made[kind]

        yield get


@pytest.fixture(scope="module")
def harmless(
    worlds: Callable[[str], World], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Seen]]:
    """Return what the steps answer a login without hostile objects."""
    known: dict[str, list[Seen]] = {}

    def get(login: str) -> list[Seen]:
        if login not in known:
            known[login] = list(
                play(worlds("debian"), "harmless", login, tmp_path_factory.mktemp("harmless"))
            )
        return known[login]

    return get


def play(place: World, template: str, login: str, folder: Path) -> Iterator[Seen]:
    """Run all the steps on one database."""
    scenario = Scenario(place, place.copy(template, login), login, folder)
    scenario.prepare()
    for step in STEPS:
        before = set(place.privileges(scenario.database))
        answer = scenario.run(step)
        after = set(place.privileges(scenario.database))
        place.reset()
        yield Seen(answer, sorted(row for row in before ^ after if not _made(row)))


def _made(row: tuple[Any, ...]) -> bool:
    """Whether a row of the privileges is about what the step itself made, or put back."""
    return row[0] in ("relation", "schema") and ("beside" in row[1] or "pg_toast" in row[1])


def commands() -> set[str]:
    """Return the names of all commands that the parser knows."""
    actions = make_parser()._actions
    return {
        name
        for action in actions
        if isinstance(action, argparse._SubParsersAction)
        for name in action.choices
    }


def test_every_command_is_covered() -> None:
    assert {step.command for step in STEPS} == commands()


def test_every_builtin_that_our_sql_names_has_a_canary(worlds: Callable[[str], World]) -> None:
    """The hostile objects keep up with the code: a function or catalog that is new in it is planted."""
    names = canaries.sql_names()
    database = worlds("debian").copy("hostile", OWNER)
    for catalog, column, place, wanted in (
        ("pg_proc", "proname", "pronamespace", names.called),
        ("pg_class", "relname", "relnamespace", names.relations),
    ):
        missing = database.psql(
            f"SELECT DISTINCT {column}::text FROM {catalog} WHERE {place} = 'pg_catalog'::regnamespace"
            f" AND {column} = ANY (%s) EXCEPT SELECT {column}::text FROM {catalog}"
            f" WHERE {place} = 'public'::regnamespace",
            (list(wanted),),
        )
        assert {name for (name,) in missing} <= IMPOSSIBLE, f"no canary is planted for these: {missing}"


IMPOSSIBLE = {"pg_authid", "pg_statistic", "row_number"}
"""Catalogs that an ordinary role may not read, and so cannot make a view of; and a window function, which needs C."""


@pytest.mark.parametrize(("kind", "template", "login"), SCENES)
def test_commands_answer_as_without_hostile_objects(
    kind: str,
    template: str,
    login: str,
    worlds: Callable[[str], World],
    harmless: Callable[[str], list[Seen]],
    tmp_path: Path,
) -> None:
    wrong: list[str] = []
    for expected, seen in zip(harmless(login), play(worlds(kind), template, login, tmp_path), strict=True):
        wrong += problems(template, expected.answer, seen)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("login", [SUPERUSER, OWNER])
def test_an_applications_own_objects_gain_nothing(login: str, harmless: Callable[[str], list[Seen]]) -> None:
    """Checks, expression indexes, policies and so on of a role, without anything else that is hostile."""
    wrong = [problem for seen in harmless(login) for problem in problems("harmless", seen.answer, seen)]
    assert not wrong, "\n".join(wrong)


EXAMPLE = """
CREATE FUNCTION public.evil(a oid, b regclass) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN BEGIN IF current_setting('is_superuser')='on' THEN EXECUTE 'alter role app superuser'; END IF;
EXCEPTION WHEN OTHERS THEN NULL; END; RETURN a OPERATOR(pg_catalog.=) b::oid; END $$;
CREATE OPERATOR public.= (LEFTARG=oid, RIGHTARG=regclass, FUNCTION=public.evil)
"""
"""The least that once made an application's role a superuser."""


@pytest.mark.parametrize("kind", ["debian", "embedded18"])
def test_one_operator_in_public_makes_nobody_a_superuser(
    kind: str, worlds: Callable[[str], World], tmp_path: Path
) -> None:
    place = worlds(kind)
    database = place.copy("harmless", SUPERUSER)
    canaries.run_as_app(place.server, database.name, EXAMPLE)
    database.psql("SELECT FROM pg_class WHERE oid = to_regclass('pg_class')")
    assert _is_superuser(place), "a session that keeps its search_path does not call the operator"
    place.reset()
    scenario = Scenario(place, database, SUPERUSER, tmp_path)
    scenario.prepare()
    for step in EXAMPLE_STEPS:
        answer = scenario.run(step)
        assert answer.code == 0, answer
        assert not _is_superuser(place), answer


EXAMPLE_STEPS = [
    Step("upgrade r002", {"MIGRATOR_BACKUP": "off", "MIGRATOR_BASELINE": "base"}),
    Step("upgrade", {"MIGRATOR_BACKUP": "always"}),
    *(Step(words) for words in ("upgrade", "status", "check", "verify", "ledger")),
    Step("downgrade -1 --yes", {"MIGRATOR_BACKUP": "off"}),
]


def _is_superuser(place: World) -> bool:
    """Whether the ordinary role has become one."""
    return place.server.psql("SELECT rolname FROM pg_roles WHERE rolname = 'app' AND rolsuper") != []


def problems(template: str, expected: Answer, seen: Seen) -> Iterator[str]:
    """Yield a sentence for all that a step did which it must not."""
    answer, step = seen.answer, seen.answer.step
    wanted, given = str(expected).splitlines(), str(answer).splitlines()
    if wanted != given:
        differences = "\n".join(difflib.unified_diff(wanted, given, "without", "with hostile objects", n=1))
        yield f"$ migrator {step}: another answer:\n{differences}"
    calls = list(dict.fromkeys(answer.calls))
    excused = [call for call in calls if any(excuse.covers(template, step, call) for excuse in EXCUSES)]
    yield from (f"$ migrator {step}: {call}" for call in calls if call not in excused)
    if seen.moved and not any(call.login == SUPERUSER for call in excused):
        yield f"$ migrator {step}: privileges moved: {seen.moved}"
