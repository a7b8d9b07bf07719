"""Verify, the assertions of verify.toml: what they answer, and that they cannot change anything."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from migrator.config.database_url import parse as parse_address
from migrator.pipeline.stages.verify import same, verify
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session, connect
from migrator.schema.expectations import parse
from tests.support.checks import EXPECTED, SCHEMA, check, rules
from tests.support.pace import Stopwatch
from tests.support.servers import Database, Server


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """A session of migrator's own on an empty database."""
    with connect(parse_address(database.url), "test", 60) as session:
        yield session


@pytest.fixture
def plain_session(server: Server, database: Database) -> Iterator[Session]:
    """A session of a role without any privilege."""
    role = server.create_role(f"plain_{database.name}")
    with connect(parse_address(server.url(database.name, user=role)), "test", 60) as session:
        yield session
    server.psql(f'DROP ROLE "{role}"')


def assertion(sql: str, expect: str = "0") -> str:
    assert "'''" not in sql
    return f"[[assertions]]\nname = 'it'\nsql = '''\n{sql}'''\nexpect = {expect}\n"


@pytest.mark.parametrize(
    ("sql", "expect"),
    [
        ("SELECT count(*) FROM lines", "2"),
        ("SELECT 2::numeric", "2"),
        ("SELECT 2.50", "2.5"),
        ("SELECT 0.1::numeric", "0.1"),
        ("SELECT 0.1::float4::float8 > 0", "true"),
        ("SELECT 1e300::float8 * 2", "2e300"),
        ("SELECT 12345678901234567890", "12345678901234567890"),
        ("SELECT 'a%sb'", "'a%sb'"),
        ("SELECT '%'", "'%'"),
        ("SELECT E'a\\\\b'", "'a\\b'"),
        ("SELECT DATE '2024-02-29'", "'2024-02-29'"),
        ("SELECT false", "false"),
        ("SELECT 1, 'second column', ARRAY[1]", "1"),
        ("SELECT generate_series(7, 10000000)", "7"),
        ("WITH n AS (SELECT 4 AS n) SELECT n FROM n -- the end", "4"),
        ("VALUES (5), (6)", "5"),
        ("TABLE lines LIMIT 1", "1"),
        ("SHOW transaction_read_only", "'on'"),
        ("SELECT 3;", "3"),
        ("SELECT $x$migrator's $migrator$ quote$x$", '"migrator\'s $migrator$ quote"'),
        ("SELECT 1 WHERE current_setting('statement_timeout') = '1min'", "1"),
        ("SELECT 'é€😀'", "'é€😀'"),
    ],
)
def test_an_assertion_that_holds(database: Database, session: Session, sql: str, expect: str) -> None:
    database.execute(SCHEMA)
    assert check(session, assertion(sql, expect)) == ()


@pytest.mark.parametrize(
    ("sql", "expect", "sentence"),
    [
        ("SELECT 1", "0", "it returned 1, not 0"),
        ("SELECT NULL", "0", "it returned null, not 0"),
        ("SELECT NULL::text", "'None'", "it returned null, not 'None'"),
        ("SELECT true", "1", "it returned true, not 1"),
        ("SELECT 1", "true", "it returned 1, not true"),
        ("SELECT 1", "'1'", "it returned 1, not '1'"),
        ("SELECT '1'", "1", "it returned '1', not 1"),
        ("SELECT 'x' WHERE false", "'x'", "it returned no row"),
        ("SELECT 'NaN'::float8", "0", "it returned nan, not 0"),
        ("SELECT 'NaN'::numeric", "0.5", "it returned NaN, not 0.5"),
        ("SELECT repeat('x', 1000)", "'x'", "it returned '" + "x" * 196 + "..., not 'x'"),
        ("SELECT", "0", "it returned no row"),
    ],
)
def test_an_assertion_that_fails(session: Session, sql: str, expect: str, sentence: str) -> None:
    (found,) = check(session, assertion(sql, expect))
    assert (found.rule, found.place, found.sentence) == ("assertion-failed", "assertion 'it'", sentence)


WRITES = [
    "COMMIT; DELETE FROM lines",
    "SELECT 1; COMMIT; DELETE FROM lines; SELECT 1",
    "SELECT 1) x; COMMIT; DELETE FROM lines; SELECT (1",
    "SELECT 1; END; DELETE FROM lines",
    "ROLLBACK; DELETE FROM lines",
    "DELETE FROM lines",
    "DELETE FROM lines RETURNING 0",
    "WITH gone AS (DELETE FROM lines RETURNING 1) SELECT 0",
    "SET TRANSACTION READ WRITE; DELETE FROM lines",
    "SELECT set_config('transaction_read_only', 'off', false); DELETE FROM lines",
    "SELECT set_config('transaction_read_only', 'off', false)::int FROM empty_lines()",
    "SELECT empty_lines()",
    "CALL empty_lines_and_commit()",
    "DO 'BEGIN COMMIT; DELETE FROM lines; END'",
    "DO $migrator$ BEGIN DELETE FROM lines; END $migrator$",
    "$migrator$; COMMIT; DELETE FROM lines; --",
    "'; COMMIT; DELETE FROM lines; --",
    "\\'; COMMIT; DELETE FROM lines; --",
    "TRUNCATE lines",
    "DROP TABLE lines",
    "SELECT nextval('seq')",
    "SELECT setval('seq', 99)",
    "SELECT * INTO copied FROM lines",
    "CREATE TABLE copied AS TABLE lines",
    "COPY lines TO PROGRAM 'false'",
    "EXPLAIN ANALYZE DELETE FROM lines",
    "SELECT lo_create(424242)",
    "SELECT query_to_xml('DELETE FROM lines RETURNING 1', true, false, '')",
    "CLOSE ALL",
    "BEGIN",
    "SET search_path = accounts",
    "-- nothing",
    "PREPARE p AS DELETE FROM lines",
    "LISTEN x",
    "VACUUM lines",
    "LOCK TABLE lines IN ACCESS EXCLUSIVE MODE",
    "REFRESH MATERIALIZED VIEW m",
]


@pytest.mark.parametrize("sql", WRITES)
def test_an_assertion_cannot_change_anything(database: Database, session: Session, sql: str) -> None:
    database.execute(SCHEMA + "CREATE SEQUENCE seq; CREATE MATERIALIZED VIEW m AS TABLE lines;")
    database.execute(
        "CREATE FUNCTION empty_lines() RETURNS int LANGUAGE sql AS 'DELETE FROM lines; SELECT 0';"
        "CREATE PROCEDURE empty_lines_and_commit() LANGUAGE plpgsql AS"
        " 'BEGIN COMMIT; SET TRANSACTION READ WRITE; DELETE FROM lines; COMMIT; END'"
    )
    dump, path = database.dump(), session.value("SHOW search_path")
    (found,) = check(session, assertion(sql))
    # Large objects escape READ ONLY before PostgreSQL 16; the transaction is rolled back anyhow.
    escapes = "lo_create" in sql and database.server.major < 16
    assert found.rule == ("assertion-failed" if escapes else "assertion-error")
    assert database.dump() == dump
    assert session.value("SHOW search_path") == path
    assert session.value("SHOW transaction_read_only") == "off"
    assert session.value("SELECT count(*) FROM pg_cursors WHERE is_holdable") == 0
    session.query("CREATE TABLE public.ordinary ()")
    assert database.psql("SELECT to_regclass('ordinary') IS NOT NULL") == [(True,)]


def test_what_an_assertion_sets_is_gone_after_it(database: Database, session: Session) -> None:
    settings = "SELECT name, setting FROM pg_settings WHERE name NOT LIKE 'plpgsql.%' ORDER BY 1"
    before = session.query(settings)
    text = assertion("SELECT set_config('search_path', 'elsewhere', false)", "'elsewhere'")
    assert check(session, text) == ()
    assert (
        check(session, assertion("SELECT set_config('default_transaction_read_only', 'on', false)", "'on'"))
        == ()
    )
    assert session.query(settings) == before
    assert not session.value("SELECT current_setting('migrator.assertion', true)")


def test_one_assertion_that_errs_does_not_stop_the_next(database: Database, session: Session) -> None:
    text = "".join(
        f"[[assertions]]\nname = '{number}'\nsql = '''{sql}'''\nexpect = 1\n"
        for number, sql in enumerate(
            ("SELEKT 1", "SELECT 1", "SELECT 1/0", "SELECT 1", "SELECT * FROM nowhere", "SELECT 2")
        )
    )
    assert rules(check(session, text)) == [
        ("assertion-error", "assertion '0'"),
        ("assertion-error", "assertion '2'"),
        ("assertion-error", "assertion '4'"),
        ("assertion-failed", "assertion '5'"),
    ]
    assert "SELEKT" in check(session, text)[0].sentence
    assert "division by zero" in check(session, text)[1].sentence


def test_an_assertion_is_bounded_in_time(database: Database, session: Session) -> None:
    with Stopwatch() as watch:
        (found,) = check(session, assertion("SELECT pg_sleep(30)"), database_timeout=0.3)
    assert watch.within(2)
    assert found.rule == "assertion-error"
    assert found.sentence.startswith("it did not end within 0.3 s: ")
    database.execute(SCHEMA)
    with database.connect() as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE lines")
        with Stopwatch() as watch:
            (found,) = check(session, assertion("SELECT count(*) FROM lines"), database_timeout=0.3)
        assert found.sentence.startswith("it did not end within 0.3 s: ")
    assert watch.within(2)


@pytest.mark.parametrize("sql", ["SELECT DATE '20000-01-01'", "SELECT TIMESTAMP '294276-01-01'"])
def test_a_value_that_python_cannot_hold(session: Session, sql: str) -> None:
    (found,) = check(session, assertion(sql, "'x'"))
    assert (found.rule, found.remedy) == ("assertion-error", "cast the first column to text")
    assert session.value("SELECT pg_current_xact_id_if_assigned() IS NULL AND now() = statement_timestamp()")


def test_a_database_without_plpgsql(database: Database, session: Session) -> None:
    database.execute("DROP EXTENSION plpgsql")
    assert check(session) == ()
    (found,) = check(session, assertion("SELECT 0"))
    assert (found.rule, found.remedy) == ("assertion-error", "CREATE EXTENSION plpgsql;")


def test_a_database_in_another_encoding(server: Server) -> None:
    server.psql("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1'")
    at = frozenset({"r1"})
    text = assertion("SELECT 'é'", "'é'") + assertion("SELECT '€'", "'€'").replace("'it'", "'euro'")
    try:
        with connect(parse_address(server.url("latin")), "test", 60) as session:
            found = verify(
                session, expected=at, actual=at, not_valid_before=frozenset(), expectations=parse(text)
            )
            assert session.value("SELECT 1") == 1
    finally:
        server.drop_database("latin")
    assert rules(found) == [("assertion-error", "assertion 'euro'")]


def test_a_lost_connection_is_no_finding(database: Database, session: Session) -> None:
    with pytest.raises(QueryFailed) as caught:
        check(session, assertion("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert caught.value.lost
    with pytest.raises(QueryFailed):
        check(session)


def test_a_role_that_may_only_read_the_catalog(database: Database, plain_session: Session) -> None:
    database.execute(SCHEMA)
    at = frozenset({"r1"})
    found = verify(
        plain_session, expected=at, actual=at, not_valid_before=frozenset(), expectations=parse(EXPECTED)
    )
    assert rules(found) == [("assertion-error", "assertion 'two lines'")]
    assert "permission denied" in found[0].sentence


@pytest.mark.parametrize(
    ("expected", "value", "equal"),
    [
        (0, Decimal(0), True),
        (0, Decimal("0.00"), True),
        (0.1, Decimal("0.1"), True),
        (0.1, 0.1 + 1e-17, True),
        (1, 1.0, True),
        (1, True, False),
        (True, True, True),
        (True, 1, False),
        ("1", 1, False),
        (1, "1", False),
        ("None", None, False),
        (0, None, False),
        (float("inf"), Decimal("Infinity"), True),
    ],
)
def test_same(expected: Any, value: Any, equal: bool) -> None:
    assert same(expected, value) is equal
