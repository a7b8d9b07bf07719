"""Each revision has one row in the ledger, written by one statement in the transaction that moves the version row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def transactions(database: Database) -> int:
    """Return in how many transactions the rows of the revisions were written."""
    counted = "SELECT count(DISTINCT xmin::text) FROM migrator_ledger WHERE event = 'applied'"
    return int(database.psql(counted)[0][0])


EACH = env(configure="transaction_per_migration=True")


@pytest.mark.parametrize(
    ("files", "expected"),
    [(env(), 1), (async_env(), 1), (EACH, 30), (env(connected=AUTOCOMMIT), 30)],
    ids=["one transaction", "asyncpg", "a transaction each", "autocommit"],
)
def test_a_row_for_each_revision_in_its_transaction(
    files: Any, expected: int, database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(files, revisions=linear_history(30))
    done(run_migrator(cwd=folder, database=database, env=OFF))
    agrees(database, [f"r{number:03d}" for number in range(1, 31)])
    assert transactions(database) == expected
    statements = database.psql(
        "SELECT count(DISTINCT (xmin::text, cmin::text)) FROM migrator_ledger WHERE event = 'applied'"
    )
    assert statements == [(30,)]
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


@pytest.mark.parametrize("each", [False, True])
def test_a_failure_leaves_no_row_of_what_was_rolled_back(
    each: bool, database: Database, project: Project, run_migrator: Runner
) -> None:
    fails = Revision("r004", "r003", "CREATE TABLE t4 (id int); SELECT 1/0")
    folder = project(EACH if each else env(), revisions=[*linear_history(3), fails])
    result = run_migrator(cwd=folder, database=database, env=OFF)
    refusal(result, ExitCode.PARTIAL if each else ExitCode.ROLLED_BACK, "division by zero")
    if each:
        agrees(database, ["r001", "r002", "r003"])
    else:
        assert database.psql("SELECT to_regclass('migrator_ledger'), to_regclass('t1')") == [(None, None)]


def test_no_more_statements_than_one_question_and_one_row(
    private_server: Any, project: Project, run_migrator: Runner
) -> None:
    """What is added to Alembic's own statements, for each revision after the first."""
    server = private_server("embedded", settings={"log_statement": "all"})
    database = server.create_database()
    folder = project(revisions=linear_history(12))
    done(run_migrator(cwd=folder, database=database, env=OFF))
    said = re.findall(r"\[(\d+)\] LOG:  statement: \s*(\w+)\s+(\S+\s+\S+)", server.log.read_text())
    (process,) = {process for process, *words in said if words == ["CREATE", "TABLE t11"]}
    ours = [words for of, *words in said if of == process]
    after = ours[ours.index(["CREATE", "TABLE t11"]) :]
    assert [word for word, _ in after[:5]] == ["CREATE", "SELECT", "UPDATE", "INSERT", "CREATE"], after


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
    """What runs after a step may commit."""
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
