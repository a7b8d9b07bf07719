"""What a revision did, measured on real servers with every driver: statements, locks, rewrites, rows and sizes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from migrator.config.database_url import parse
from migrator.pipeline.apply.metrics import observer
from migrator.pipeline.apply.metrics.measurement import MOST, Lock, Measured, Rows, Statement, shown
from migrator.pipeline.apply.metrics.observer import Observation
from migrator.postgres.session import connect
from migrator.runtime.logs import Redactor
from tests.support.projects import ENV_FILES, Revision
from tests.support.runner import Runner
from tests.support.servers import Database

Work = Callable[[Any, Observation], None]


def observe(database: Database, work: Work, *, driver: str = "psycopg2", autocommit: bool = False) -> None:
    """Let ``work`` have a connection and its observation."""
    url = database.url.replace("postgresql://", f"postgresql+{driver}://", 1)
    level = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}

    def go(connection: Any) -> None:
        with connect(parse(database.url), "test", 60) as session:
            work(connection, Observation(connection, session, {"alembic_version", "migrator_ledger"}))

    if driver == "asyncpg":

        async def run() -> None:
            async with create_async_engine(url, poolclass=NullPool, **level).connect() as connection:
                await connection.run_sync(go)
                await connection.commit()

        asyncio.run(run())
        return
    with create_engine(url, poolclass=NullPool, **level).connect() as connection:
        go(connection)
        connection.commit()


@contextlib.contextmanager
def revision(
    connection: Any, observation: Observation, *, autocommit: bool = False
) -> Iterator[list[Measured]]:
    """Observe the block as one revision; the yielded list gets what was measured."""
    number = 0 if autocommit else connection.exec_driver_sql("SELECT txid_current()").scalar()
    found: list[Measured] = []
    observation.begins(number)
    yield found
    connection.exec_driver_sql("UPDATE alembic_version SET version_num = version_num")  # as Alembic does
    found.append(observation.ends()[0])


@pytest.fixture
def filled(each_database: Database) -> Database:
    """A database with a table of 1000 rows and what refers to it."""
    each_database.execute(
        "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('a');"
        "CREATE TABLE t1 (id int PRIMARY KEY, note text);"
        "INSERT INTO t1 SELECT n, repeat('x', 100) FROM generate_series(1, 1000) n;"
        "CREATE TABLE child (id int REFERENCES t1 ON DELETE CASCADE);"
        "INSERT INTO child SELECT n FROM generate_series(1, 10) n"
    )
    return each_database


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_a_rewritten_table(filled: Database, driver: str) -> None:
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        with revision(connection, observation) as measured:
            connection.execute(text("ALTER TABLE t1 ALTER COLUMN id TYPE bigint"))
            connection.execute(text("UPDATE t1 SET note = note || :more WHERE id <= 700"), {"more": "s3cret"})
            connection.execute(text("INSERT INTO t1 VALUES (2000, 'x')"))
            connection.execute(text("DELETE FROM t1 WHERE id IN (1, 2, 3)"))
        found.extend(measured)

    before = filled.psql("SELECT pg_relation_size('t1')::text")[0][0]
    observe(filled, work, driver=driver)
    after = filled.psql("SELECT pg_relation_size('t1')::text")[0][0]
    (result,) = found
    assert result.transactional
    assert [item.text.split()[0] for item in result.statements] == ["ALTER", "UPDATE", "INSERT", "DELETE"]
    assert [item.rows for item in result.statements][1:] == [700, 1, 3]
    assert "s3cret" not in repr(result)
    assert result.statement_count == 4
    assert 0 < result.statement_seconds <= result.seconds
    modes = {lock.relation: lock.modes for lock in result.locks}
    assert modes["public.t1"][0] == "AccessExclusiveLock"
    assert "RowExclusiveLock" in modes["public.child"]
    assert not any("pg_" in name or "alembic" in name for name in modes)
    assert set(result.rows) == {Rows("public.t1", 1, 700, 3), Rows("public.child", 0, 0, 3)}
    rewritten = {item.relation: (item.before, item.after) for item in result.rewritten}
    assert rewritten["public.t1"] == (int(before), int(after))
    assert "public.child" not in rewritten
    assert {item.relation: (item.before, item.after) for item in result.sizes}["public.t1"] == rewritten[
        "public.t1"
    ]
    assert json.loads(json.dumps(result.as_dict()))["rewritten"]["public.t1"]["bytes_before"] == int(before)


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_several_revisions_of_one_transaction_are_told_apart(filled: Database, driver: str) -> None:
    found: list[Measured] = []
    works = [
        ["CREATE TABLE a (id serial PRIMARY KEY)"],
        ["ALTER TABLE t1 ADD COLUMN b int"],
        ["CREATE TABLE b (id int PRIMARY KEY)", "INSERT INTO b VALUES (1), (2)"],
        ["INSERT INTO b VALUES (3)", "ALTER TABLE t1 ALTER COLUMN b TYPE bigint USING 1"],
        ["ALTER TABLE b ALTER COLUMN id TYPE bigint"],
        [],
        ["DROP TABLE child"],
        ["CREATE TABLE c (id int REFERENCES t1)"],
        ["DROP TABLE a, b"],
    ]

    def work(connection: Any, observation: Observation) -> None:
        for statements in works:
            with revision(connection, observation) as measured:
                for statement in statements:
                    connection.execute(text(statement))
            found.extend(measured)

    observe(filled, work, driver=driver)
    one, two, three, four, five, six, seven, eight, nine = found
    assert one.created == ("public.a_id_seq", "public.a", "public.a_pkey")
    assert one.rows == one.rewritten == one.dropped == ()
    assert two.locks == (Lock("public.t1", ("AccessExclusiveLock",)),)
    assert two.created == two.rewritten == ()
    assert three.created == ("public.b", "public.b_pkey")
    assert three.rows == (Rows("public.b", 2, 0, 0),)
    assert Rows("public.b", 1, 0, 0) in four.rows
    assert [item.relation for item in four.rewritten] == ["public.t1"]
    assert four.created == ()
    assert "public.b" in [item.relation for item in five.rewritten]
    assert "public.t1" not in [item.relation for item in five.rewritten]
    assert (six.locks, six.rows, six.statements) == ((), (), ())
    assert "public.child" in seven.dropped
    assert eight.created == ("public.c",)
    assert Lock("public.t1", ("AccessExclusiveLock", "ShareRowExclusiveLock")) in [
        Lock(lock.relation, lock.modes[:2]) for lock in eight.locks
    ]
    assert {"public.a", "public.b"} & set(nine.dropped)
    assert nine.created == ()


def test_each_transaction_is_its_own(filled: Database) -> None:
    """Rows that one transaction counted are not counted by the next, even of a table that no statement names."""
    filled.execute(
        "CREATE TABLE audit (n int); CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO audit VALUES (1); RETURN NEW; END';"
        "CREATE TRIGGER note AFTER INSERT ON t1 FOR EACH ROW EXECUTE FUNCTION note()"
    )
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        for number in (3000, 3001):
            with revision(connection, observation) as measured:
                connection.execute(text(f"INSERT INTO t1 VALUES ({number}, '')"))
            connection.commit()
            found.extend(measured)

    observe(filled, work)
    for result in found:
        assert set(result.rows) == {Rows("public.t1", 1, 0, 0), Rows("public.audit", 1, 0, 0)}
        assert result.locks


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_what_commits_by_itself(filled: Database, driver: str) -> None:
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        with revision(connection, observation, autocommit=True) as measured:
            connection.execute(text("CREATE INDEX CONCURRENTLY i ON t1 (note)"))
            connection.execute(text("UPDATE t1 SET note = '' WHERE id < 3"))
            connection.execute(text("VACUUM FULL t1"))
            connection.execute(text("CREATE TABLE fresh (id int)"))
        found.extend(measured)

    observe(filled, work, driver=driver, autocommit=True)
    (result,) = found
    assert not result.transactional
    assert result.rows == (Rows("t1", 0, 2, 0),)
    assert set(result.created) == {"public.i", "public.fresh"}
    assert "public.t1" in [item.relation for item in result.rewritten]
    assert result.locks == ()


def test_a_table_that_somebody_locks_is_not_waited_for(filled: Database) -> None:
    """The size before would wait for their lock; the statement itself does, and nothing else."""
    other = filled.connect()
    other.cursor().execute("LOCK TABLE t1 IN ACCESS EXCLUSIVE MODE")
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        connection.exec_driver_sql("SET lock_timeout = '1s'")
        with contextlib.suppress(Exception), revision(connection, observation):
            connection.execute(text("ALTER TABLE t1 ADD COLUMN b int"))
        connection.rollback()
        other.rollback()
        with revision(connection, observation) as measured:
            connection.execute(text("ALTER TABLE t1 ADD COLUMN b int"))
        found.extend(measured)

    before = errors_told(filled)
    observe(filled, work)
    other.close()
    assert found[0].locks[0] == Lock("public.t1", ("AccessExclusiveLock",))
    assert errors_told(filled) == before + 1  # of the statement itself


def errors_told(database: Database) -> int:
    """How often the server's log tells of a lock that was not granted in time."""
    return database.server.log.read_text().count("canceling statement due to lock timeout")


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_no_question_of_ours_waits_for_what_the_migration_itself_holds(filled: Database, driver: str) -> None:
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        for number, statements in enumerate(
            (
                ("CREATE TABLE new (id int)", "CREATE INDEX ON new (id)", "INSERT INTO new VALUES (1)"),
                (
                    "ALTER TABLE new ADD COLUMN note text",
                    "TRUNCATE t1 CASCADE",
                    "ALTER TABLE t1 ADD COLUMN c int",
                ),
                ("DO $$ BEGIN LOCK TABLE t1; END $$", "UPDATE t1 SET id = id", "DROP TABLE new"),
            )
        ):
            with revision(connection, observation) as measured:
                for statement in statements:
                    connection.execute(text(statement))
            assert measured[0].statement_count == len(statements), number
            found.extend(measured)

    before = errors_told(filled)
    observe(filled, work, driver=driver)
    assert "public.new" in found[0].created
    assert errors_told(filled) == before


def test_the_statement_says_what_is_wrong_and_not_the_observation(filled: Database) -> None:
    def work(connection: Any, observation: Observation) -> None:
        for wrong in (
            "ALTER TABLE nowhere ADD COLUMN x int",
            'UPDATE "no such".t SET a = 1',
            "INSERT INTO t1",
        ):
            observation.begins(1)
            with pytest.raises(Exception, match=r"does not exist|syntax error"):
                connection.execute(text(wrong))
            connection.rollback()

    observe(filled, work)


def test_many_statements_are_counted_and_few_are_kept(filled: Database) -> None:
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        with revision(connection, observation) as measured:
            for number in range(5_000, 8_000):
                connection.exec_driver_sql(f"INSERT INTO t1 VALUES ({number}, '')")
            connection.exec_driver_sql("CREATE SCHEMA s")
            for number in range(150):
                connection.exec_driver_sql(f"CREATE TABLE s.t{number} (id int)")
        found.extend(measured)

    observe(filled, work)
    (result,) = found
    assert result.statement_count == 3_151
    assert len(result.statements) == MOST
    assert Rows("public.t1", 3_000, 0, 0) in result.rows
    document = result.as_dict()
    assert document["cut"]["statements"] == 3_051
    assert document["cut"]["created"] == 50
    assert len(json.dumps(document)) < 60_000


def test_observing_costs_a_statement_next_to_nothing() -> None:
    """A data migration may have a hundred thousand statements."""

    class Cursor:
        rowcount = 1

    observation = Observation.__new__(Observation)
    observation._forget()
    observation._observes = True
    observation._looked = {"t1": 0}
    observation._ignore = frozenset({"alembic_version", "migrator_ledger"})
    observation._transaction = 1
    began = time.process_time()
    for number in range(20_000):
        statement = f"INSERT INTO t1 VALUES ({number})"
        observation._before(None, None, statement, (), None, False)
        observation._after(None, Cursor(), statement, (), None, False)
    assert (time.process_time() - began) / 20_000 < 0.0002  # seconds; it is a fiftieth of that when idle
    assert observation._count == 20_000


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("SELECT\n  1", "SELECT 1"),
        ("ALTER ROLE a PASSWORD 'geheim' LOGIN", "ALTER ROLE a PASSWORD '***' LOGIN"),
        ("ALTER ROLE a password   E'ge''heim'", "ALTER ROLE a password E'***'"),
        ("CREATE ROLE a PASSWORD 'never closed", "CREATE ROLE a PASSWORD '***'"),
        ("SELECT '" + "x" * 600, "SELECT '" + "x" * 489 + "..."),
        ("SELECT dblink('password=tr0ub4dor&3')", "SELECT dblink('password=***')"),
    ],
)
def test_a_statement_as_it_is_shown(monkeypatch: pytest.MonkeyPatch, sql: str, text: str) -> None:
    monkeypatch.setattr("migrator.pipeline.apply.metrics.measurement.redact", Redactor(["tr0ub4dor&3"]))
    assert shown(sql) == text


def test_an_empty_measure_is_small() -> None:
    measured = Measured(seconds=1.23456789, statements=(Statement("SELECT 1", 0.1, None),), statement_count=1)
    document = measured.as_dict()
    assert document["seconds"] == 1.234568
    assert document["statements"] == [{"sql": "SELECT 1", "seconds": 0.1, "rows": None}]
    assert "cut" not in document


PER_MIGRATION = (
    (ENV_FILES / "own_variable.py")
    .read_text()
    .replace(
        "context.configure(connection=connection)",
        "context.configure(connection=connection, transaction_per_migration=True)",
    )
)
WORK = [
    Revision("r001", None, "CREATE TABLE t1 (id int PRIMARY KEY, note text)"),
    Revision("r002", "r001", "INSERT INTO t1 SELECT n, repeat('x', 200) FROM generate_series(1, 500) n"),
    Revision("r003", "r002", "ALTER TABLE t1 ALTER COLUMN id TYPE bigint"),
    Revision(
        "r004",
        "r003",
        "op.execute('UPDATE t1 SET note = upper(note) WHERE id <= 10')\n"
        "with op.get_context().autocommit_block():\n    op.execute('CREATE INDEX CONCURRENTLY i ON t1 (note)')",
    ),
    Revision(
        "r005", "r004", "op.execute(\"CREATE ROLE x_{0} PASSWORD 'geheim'\")\nop.execute('DROP ROLE x_{0}')"
    ),
    Revision("r006", "r005", ""),
]


@pytest.mark.parametrize("env_file", ["own_variable", "per migration", "async"])
def test_the_outcome_and_the_ledger_say_what_each_revision_did(
    database: Database, project: Callable[..., Path], run_migrator: Runner, env_file: str
) -> None:
    revisions = [replace(item, upgrade=item.upgrade.replace("{0}", database.name)) for item in WORK]
    if env_file == "per migration":
        folder = project({"migrations/env.py": PER_MIGRATION}, revisions=revisions)
    else:
        name = env_file if env_file == "own_variable" else "async_engine"
        folder = project(revisions=revisions, env=name)
    env = {"MIGRATOR_BACKUP": "off", "DATABASE_URL": None}
    result = run_migrator("upgrade", "--format", "json", cwd=folder, database=database, env=env)
    assert result.code == 0, result
    measured = {item["revision"]: item["measured"] for item in result.answer["revisions"]}
    kept = database.psql("SELECT revision, details FROM migrator_ledger WHERE event = 'applied'")
    assert dict(kept) == measured
    one, two, three, four, five, six = (measured[item.id] for item in WORK)
    assert one["created"] == ["public.t1", "public.t1_pkey"]
    assert [item["sql"] for item in one["statements"]] == [WORK[0].upgrade]
    assert two["rows"] == {"public.t1": {"inserted": 500, "updated": 0, "deleted": 0}}
    assert two["sizes"]["public.t1"]["bytes_after"] > 100_000
    assert three["locks"]["public.t1"][0] == "AccessExclusiveLock"
    assert three["rewritten"]["public.t1"]["bytes_before"] == two["sizes"]["public.t1"]["bytes_after"]
    assert not four["transactional"]
    assert four["created"] == ["public.i"]
    assert four["rows"] == {"t1": {"inserted": 0, "updated": 10, "deleted": 0}}
    assert "PASSWORD '***'" in five["statements"][0]["sql"]
    assert "geheim" not in result.stdout + result.stderr
    assert (six["statement_count"], six["locks"], six["rows"]) == (0, {}, {})
    assert not any(
        "alembic_version" in str(item) or "migrator_ledger" in str(item) for item in measured.values()
    )


INDEXED = (
    "CREATE TABLE made (id int PRIMARY KEY, note text)",
    "CREATE INDEX made_note ON made (note)",
    'CREATE UNIQUE INDEX "Made" ON public.made USING btree (id, note) WHERE id > 3',
)


@pytest.mark.parametrize(
    "more", ["", "CREATE INDEX ON t1 (note)", "INSERT INTO made SELECT id, note FROM t1"]
)
def test_indexes_of_a_new_table_are_measured_as_by_the_whole_question(
    more: str, filled: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Measured] = []

    def work(connection: Any, observation: Observation) -> None:
        with revision(connection, observation) as measured:
            for statement in (*INDEXED, *[more] * bool(more)):
                connection.exec_driver_sql(statement)
        found.extend(measured)
        connection.rollback()

    asked: list[str] = []
    query = Observation._query
    monkeypatch.setattr(Observation, "_query", lambda self, sql: asked.append(sql) or query(self, sql))
    observe(filled, work)
    assert ("pg_lock_status" in asked[0]) == bool(more)
    monkeypatch.setattr(observer, "_CREATES_A_TABLE", re.compile("(?!)"))
    observe(filled, work)
    assert "pg_lock_status" in asked[-1]
    quick, whole = (
        {**replace(item, seconds=0, statement_seconds=0, statements=()).as_dict(), "locks": strongest(item)}
        for item in found
    )
    assert quick == whole
    assert quick["created"][:4] == ["public.made", "public.made_pkey", "public.made_note", "public.Made"]


def strongest(measured: Measured) -> dict[str, str]:
    """Return the strongest lock on each relation."""
    return {lock.relation: lock.modes[0] for lock in measured.locks}
