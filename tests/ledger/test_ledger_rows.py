"""Rows of revisions that share a transaction are written together, and yet commit with their revisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alembic import op
from alembic.operations import MigrateOperation, Operations

from migrator.created import Relation, share
from migrator.history.plain import is_plain, is_straight
from migrator.outcome import ExitCode
from tests.support.env_text import AUTOCOMMIT, async_env, env
from tests.support.ledgers import agrees
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]
OFF = {"MIGRATOR_BACKUP": "off"}
RAW = "connection.connection.dbapi_connection"


def writes(database: Database) -> int:
    """Return how many statements wrote the rows of the revisions."""
    counted = "SELECT count(DISTINCT (xmin::text, cmin::text)) FROM migrator_ledger WHERE event = 'applied'"
    return int(database.psql(counted)[0][0])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (env(), 3),
        (async_env(), 3),
        (env(configure="transaction_per_migration=True"), 230),
        (env(connected=AUTOCOMMIT), 230),
    ],
    ids=["one transaction", "asyncpg", "a transaction each", "autocommit"],
)
def test_rows_of_one_transaction_take_few_statements(
    files: Any, expected: int, database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(files, revisions=linear_history(230))
    done(run_migrator(cwd=folder, database=database, env=OFF))
    agrees(database, [f"r{number:03d}" for number in range(1, 231)])
    assert writes(database) == expected
    wrong = database.psql(
        "SELECT revision, details->'created', details->'locks' FROM migrator_ledger WHERE event = 'applied'"
        " AND (details->'created' <> jsonb_build_array('public.t' || substr(revision, 2)::int,"
        " 'public.t' || substr(revision, 2)::int || '_pkey') OR details->'statement_count' <> '1')"
    )
    assert wrong == []
    ordered = database.psql(
        "SELECT bool_and(later) FROM (SELECT at > lag(at) OVER (ORDER BY number) AS later FROM migrator_ledger"
        " WHERE event = 'applied') x"
    )
    assert ordered == [(True,)]


ENDS = {
    "COMMIT": "op.execute('COMMIT')",
    "COMMIT within a text": "op.execute('SELECT 1; COMMIT; BEGIN')",
    "END": "op.execute('/* so */ END')",
    "autocommit_block": "with op.get_context().autocommit_block():\n    op.execute('CREATE TABLE extra (id int)')",
    "SQLAlchemy's commit": "op.get_bind().commit()",
    "the driver's commit": "op.get_bind().connection.dbapi_connection.commit()",
    "the driver's cursor": "op.get_bind().connection.cursor().execute('COMMIT')",
    "a helper": "import helper_of_test\nhelper_of_test.commit(op)",
}
HELPER = "def commit(op):\n    op.get_bind().connection.dbapi_connection.commit()\n"


@pytest.mark.parametrize("way", ENDS)
def test_who_commits_in_the_middle_commits_the_rows_before_it(
    way: str, database: Database, project: Project, run_migrator: Runner
) -> None:
    """What committed is in the ledger, though the same revision then fails."""
    fails = Revision("r004", "r003", f"{ENDS[way]}\nop.execute('SELECT 1/0')\nraise ValueError")
    folder = project({**env(), "helper_of_test.py": HELPER}, revisions=[*linear_history(3), fails])
    result = run_migrator(cwd=folder, database=database, env={**OFF, "PYTHONPATH": str(folder)})
    refusal(result, ExitCode.PARTIAL, "division by zero")
    agrees(database, ["r001", "r002", "r003"])
    assert writes(database) == 1


def test_an_env_py_may_commit_in_its_own_way(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(env(run=f"run(connection); {RAW}.commit()"), revisions=linear_history(3))
    done(run_migrator(cwd=folder, database=database, env=OFF))
    agrees(database, ["r001", "r002", "r003"])


def test_a_two_phase_commit_has_the_rows(private_server: Any, project: Project, run_migrator: Runner) -> None:
    server = private_server("embedded", settings={"max_prepared_transactions": "4"})
    database = server.create_database()
    run = "two = connection.begin_twophase(); run(connection); two.prepare(); two.commit()"
    folder = project(env(run=run), revisions=linear_history(3))
    done(run_migrator(cwd=folder, database=database, env=OFF))
    agrees(database, ["r001", "r002", "r003"])


def test_who_reads_the_ledger_finds_the_rows_before_it(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    reads = "CREATE TABLE seen AS SELECT revision FROM migrator_ledger WHERE event = 'applied'"
    folder = project(revisions=[*linear_history(3), Revision("r004", "r003", reads)])
    done(run_migrator(cwd=folder, database=database, env=OFF))
    assert database.psql("SELECT revision FROM seen ORDER BY 1") == [("r001",), ("r002",), ("r003",)]


def test_a_callback_of_env_py_finds_the_row(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """What runs after a step may do anything, so nothing waits."""
    look = "def look(ctx, step, **_):\n    ctx.connection.connection.dbapi_connection.commit()\n"
    folder = project(env(before=look, configure="on_version_apply=look"), revisions=linear_history(3))
    run_migrator(cwd=folder, database=database, env=OFF)
    agrees(database, ["r001", "r002", "r003"])


MIXED = [
    Revision(
        "r001",
        None,
        "CREATE TABLE a (id serial PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, u text UNIQUE)",
    ),
    Revision("r002", "r001", "CREATE TABLE IF NOT EXISTS a (id int)"),
    Revision("r003", "r002", 'CREATE TABLE "Odd.Name" (id serial, other serial)'),
    Revision(
        "r004", "r003", "op.execute('CREATE TABLE b (id int)')\nop.execute('CREATE TABLE c (id serial)')"
    ),
    Revision("r005", "r004", "op.execute('CREATE TABLE d (id int)')\nop.execute('ALTER TABLE b ADD x int')"),
    Revision("r006", "r005", "CREATE TABLE e (id int PRIMARY KEY)"),
    Revision("r007", "r006", "DROP TABLE c"),
]
MADE = {
    "r001": ["a", "a_id_seq", "a_n_seq", "a_pkey", "a_u_key"],
    "r002": [],
    "r003": ["Odd.Name", "Odd.Name_id_seq", "Odd.Name_other_seq"],
    "r004": ["b", "c", "c_id_seq"],
    "r005": ["d"],
    "r006": ["e", "e_pkey"],
    "r007": [],
}


def test_each_revision_is_told_what_it_made(
    each_database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=MIXED)
    result = done(run_migrator("--format", "json", cwd=folder, database=each_database, env=OFF))
    measured = {item["revision"]: item["measured"] for item in result.answer["revisions"]}
    made = {name: sorted(found["created"]) for name, found in measured.items()}
    assert made == {name: [f"public.{item}" for item in items] for name, items in MADE.items()}
    assert "public.c" in measured["r007"]["dropped"]
    assert "public.b" in measured["r005"]["locks"]
    kept = each_database.psql("SELECT revision, details FROM migrator_ledger WHERE event = 'applied'")
    assert dict(kept) == measured


def test_shares_of_what_was_made() -> None:
    def relation(oid: int, name: str, kind: str = "r", owner: int | None = None) -> Relation:
        return Relation(oid, "s", name, kind, oid, owner)

    made = [
        relation(12, "a"),
        relation(10, "a_id_seq", "S", 12),
        relation(14, "a_pkey", "i"),
        relation(15, "by_a_trigger"),
        relation(16, "b"),
    ]
    first, nothing, second = share(made, [["s.A"], ["gone"], ['"b"']])
    assert [item.oid for item in first] == [10, 12, 14, 15]
    assert nothing == []
    assert [item.oid for item in second] == [16]
    assert share([], [[], []]) == [[], []]


PLAIN = {
    "op.execute('x')": (True, True),
    "op.add_column('t', sa.Column('u', postgresql.UUID(), server_default=sa.text('x')))": (True, True),
    "[op.drop_table(name) for name in ('a', 'b')]": (True, False),
    "helper()": (True, False),
    "raise ValueError('x')": (True, False),
    "op.get_bind()": (False, False),
    "op.get_context()": (False, False),
    "op.run_async(None)": (False, False),
    "bad_helper()": (False, False),
    "getattr(op, 'get_' + 'bind')()": (False, False),
    "import os": (False, False),
    "os.remove('x')": (False, False),
    "open('x')": (False, False),
    "sa.create_engine('x')": (True, False),
    "op.f.__globals__": (False, False),
    "exec('x')": (False, False),
}


@pytest.mark.parametrize("body", PLAIN)
def test_what_is_plain_and_straight(body: str) -> None:
    module = ModuleType("revision")
    text = (
        "from alembic import op\nimport os\nimport sqlalchemy as sa\nfrom sqlalchemy.dialects import postgresql\n"
        "def helper(): op.execute('x')\ndef bad_helper(): op.get_bind()\n"
        f"def upgrade():\n    {body}\n"
    )
    exec(compile(text, "revision", "exec"), vars(module))  # noqa: S102 - our own text
    upgrade = vars(module)["upgrade"]
    assert (is_plain(upgrade), is_straight(upgrade)) == PLAIN[body]


def test_an_operation_of_somebody_else_is_not_plain() -> None:
    """Alembic lets anybody register one: https://alembic.sqlalchemy.org/en/latest/api/operations.html"""

    def upgrade() -> None:
        op.operation_of_a_test()

    assert is_plain(upgrade)

    @Operations.register_operation("operation_of_a_test")
    class _(MigrateOperation):
        @classmethod
        def operation_of_a_test(cls, operations: Operations) -> None:
            pass

    assert not is_plain(upgrade)


def test_a_decorated_function_is_not_plain() -> None:
    def wrapped(function: Callable[[], None]) -> Callable[[], None]:
        return lambda: function()

    assert not is_plain(wrapped(lambda: None))
    assert not is_plain(print)
