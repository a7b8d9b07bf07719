"""Verify: each rule against a real database with exactly that fault, and against one without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import psycopg2
import pytest

from migrator.config.database_url import parse as parse_address
from migrator.pipeline.stages.verify import verify
from migrator.postgres.session import Session, connect
from migrator.schema import catalog
from migrator.schema.expectations import Expectations, parse
from tests.support.checks import EXPECTED, SCHEMA, check, rules
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


def make_invalid_index(database: Database) -> None:
    """Fail to build a unique index, as on a table with rows that are there twice."""
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.psql("CREATE UNIQUE INDEX CONCURRENTLY lines_note_key ON lines (note)")


def test_a_sound_database_has_no_findings(each_database: Database) -> None:
    each_database.execute(SCHEMA)
    at = frozenset({"r1"})
    with connect(parse_address(each_database.url), "test", 60) as session:
        for expectations in (None, Expectations(), parse(EXPECTED)):
            assert (
                verify(
                    session,
                    expected=at,
                    actual=at,
                    not_valid_before=frozenset(),
                    expectations=expectations,
                )
                == ()
            )


def test_it_costs_two_statements_and_four_for_any_number_of_tables(
    database: Database, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute(SCHEMA)
    statements: list[str] = []
    ask = session.query
    monkeypatch.setattr(
        session, "query", lambda sql, *rest, **more: statements.append(sql) or ask(sql, *rest, **more)
    )
    assert check(session) == ()
    assert len(statements) == 2
    statements.clear()
    assert check(session, EXPECTED.split("[[assertions]]")[0]) == ()
    assert len(statements) == 6  # one asks for the schemas of the user's search_path


def test_not_at_target(session: Session) -> None:
    found = check(session, expected=frozenset({"a", "b"}), actual=frozenset({"c"}))
    assert rules(found) == [("not-at-target", "alembic_version")]
    assert found[0].sentence == "the database is at c, not at a and b"
    assert check(session, expected=frozenset(), actual=frozenset()) == ()
    assert "not at base" in check(session, expected=frozenset())[0].sentence
    assert "is at no revision" in check(session, actual=frozenset())[0].sentence


def test_an_invalid_index_is_found_and_the_remedy_mends_it(database: Database, session: Session) -> None:
    database.execute(SCHEMA)
    make_invalid_index(database)
    (found,) = check(session)
    assert (found.rule, found.place) == ("invalid-index", "public.lines_note_key")
    assert "on public.lines is invalid" in found.sentence
    reindex = 'REINDEX INDEX CONCURRENTLY "public"."lines_note_key"'
    drop = 'DROP INDEX CONCURRENTLY "public"."lines_note_key"'
    assert found.remedy == f"remove the duplicate rows, then {reindex}; or, if it is not needed, {drop};"
    # REINDEX CONCURRENTLY that fails leaves an index of its own.
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.psql(reindex)
    assert rules(check(session)) == [
        ("invalid-index", "public.lines_note_key"),
        ("invalid-index", "public.lines_note_key_ccnew"),
    ]
    leftover = check(session)[1].remedy
    assert leftover.endswith(': DROP INDEX CONCURRENTLY "public"."lines_note_key_ccnew";')
    database.psql(leftover.partition(": ")[2])
    database.execute("UPDATE lines SET note = position::text")
    database.psql(reindex)
    assert check(session) == ()
    database.psql(drop)


def test_an_invalid_index_can_be_allowed(database: Database, session: Session) -> None:
    database.execute(SCHEMA)
    make_invalid_index(database)
    assert check(session, '[allow]\ninvalid_indexes = ["public.lines_note_key"]') == ()
    assert check(session, '[allow]\ninvalid_indexes = ["lines_note_key"]') == ()
    assert len(check(session, '[allow]\ninvalid_indexes = ["accounts.lines_note_key"]')) == 1


def test_an_expected_index_that_is_invalid_is_said_once(database: Database, session: Session) -> None:
    database.execute(SCHEMA)
    make_invalid_index(database)
    expected = '[tables.lines]\nindexes = ["lines_note_key"]\n'
    assert rules(check(session, expected)) == [("invalid-index", "public.lines_note_key")]
    found = check(session, expected + '[allow]\ninvalid_indexes = ["lines_note_key"]')
    assert rules(found) == [("missing-index", "public.lines_note_key")]
    assert "invalid" in found[0].sentence


def test_a_partitioned_index_may_be_invalid(database: Database, session: Session) -> None:
    database.execute(
        "CREATE TABLE parts (id int) PARTITION BY RANGE (id);"
        "CREATE TABLE part1 PARTITION OF parts FOR VALUES FROM (0) TO (9);"
        "CREATE INDEX parts_idx ON ONLY parts (id)"
    )
    assert database.psql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'parts_idx'::regclass") == [
        (False,)
    ]
    assert check(session) == ()
    assert rules(check(session, '[tables.parts]\nindexes = ["parts_idx"]')) == [
        ("missing-index", "public.parts_idx")
    ]


def test_an_index_that_another_session_builds_is_left_alone(
    database: Database, plain_session: Session
) -> None:
    database.execute(SCHEMA)
    writer, builder = database.connect(), database.connect()
    builder.autocommit = True
    with writer.cursor() as cursor:
        cursor.execute("INSERT INTO lines VALUES (9, 9, 'z')")

    def build() -> None:
        with pytest.raises(psycopg2.OperationalError), builder.cursor() as cursor:
            cursor.execute("CREATE INDEX CONCURRENTLY lines_note_idx ON lines (note)")

    thread = threading.Thread(target=build)
    thread.start()
    count = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    try:
        deadline = time.monotonic() + 60
        while database.psql(count) != [(1,)]:
            assert time.monotonic() < deadline, "the build did not start"
            time.sleep(0.02)
        assert catalog.invalid_indexes(plain_session) == ()
        database.psql("SELECT pg_terminate_backend(%s)", (builder.info.backend_pid,))
        thread.join(60)
        assert [str(index) for index in catalog.invalid_indexes(plain_session)] == ["public.lines_note_idx"]
    finally:
        writer.close()
        builder.close()
        thread.join(60)


def test_a_lock_that_is_no_build_hides_nothing(database: Database, plain_session: Session) -> None:
    database.execute(SCHEMA)
    make_invalid_index(database)
    with database.connect() as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE lines IN SHARE UPDATE EXCLUSIVE MODE")  # as VACUUM and ANALYZE do
        assert len(catalog.invalid_indexes(plain_session)) == 1


def test_a_constraint_that_this_run_left_not_valid(database: Database, session: Session) -> None:
    database.execute(SCHEMA)
    database.execute("ALTER TABLE lines ADD CONSTRAINT lines_old_check CHECK (position > 0) NOT VALID")
    before = catalog.not_valid_constraints(session)
    assert before == {"public.lines.lines_old_check"}
    assert check(session, before=before) == ()
    database.execute(
        "ALTER TABLE lines ADD CONSTRAINT lines_order_id_fkey"
        " FOREIGN KEY (order_id) REFERENCES accounts.orgs NOT VALID"
    )
    (found,) = check(session, before=before)
    assert (found.rule, found.place) == ("constraint-not-valid", "public.lines.lines_order_id_fkey")
    assert found.remedy == 'ALTER TABLE "public"."lines" VALIDATE CONSTRAINT "lines_order_id_fkey";'
    database.execute("INSERT INTO accounts.orgs VALUES (1, 1)")
    database.psql(found.remedy)
    assert check(session, before=before) == ()
    assert rules(check(session)) == [("constraint-not-valid", "public.lines.lines_old_check")]


def test_a_constraint_can_be_allowed_to_stay_not_valid(database: Database, session: Session) -> None:
    database.execute(SCHEMA)
    database.execute("ALTER TABLE lines ADD CONSTRAINT later CHECK (position > 0) NOT VALID")
    assert check(session, '[allow]\nnot_valid = ["public.lines.later"]') == ()
    assert check(session, '[allow]\nnot_valid = ["public.later"]') == ()
    assert (
        len(check(session, '[allow]\nnot_valid = ["public.other.later", "lines.later", "accounts.later"]'))
        == 1
    )


def test_constraints_of_domains_and_of_partitions(database: Database, session: Session) -> None:
    database.execute(
        "CREATE DOMAIN age AS int; ALTER DOMAIN age ADD CONSTRAINT positive CHECK (VALUE > 0) NOT VALID;"
        "CREATE TABLE parts (id int) PARTITION BY RANGE (id);"
        "CREATE TABLE part1 PARTITION OF parts FOR VALUES FROM (0) TO (9);"
        "CREATE TABLE parent (id int); CREATE TABLE child () INHERITS (parent);"
        "ALTER TABLE parts ADD CONSTRAINT parts_check CHECK (id <> 3) NOT VALID;"
        "ALTER TABLE parent ADD CONSTRAINT parent_check CHECK (id <> 3) NOT VALID"
    )
    found = check(session)
    assert rules(found) == [
        ("constraint-not-valid", "public.age.positive"),
        ("constraint-not-valid", "public.parent.parent_check"),
        ("constraint-not-valid", "public.parts.parts_check"),
    ]
    for finding in found:
        database.psql(finding.remedy)
    assert check(session) == ()


def test_a_constraint_that_is_not_enforced_is_not_one_to_validate(servers: Callable[[str], Server]) -> None:
    server = servers("embedded18")
    database = server.create_database()
    database.execute("CREATE TABLE t (a int); ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0) NOT ENFORCED")
    database.execute("ALTER TABLE t ADD CONSTRAINT n NOT NULL a NOT VALID")
    assert database.psql("SELECT count(*) FROM pg_constraint WHERE NOT convalidated") == [(2,)]
    with connect(parse_address(database.url), "test", 60) as session:
        assert catalog.not_valid_constraints(session) == {"public.t.n"}


def test_user_tables(database: Database, session: Session) -> None:
    assert catalog.user_tables(session) == ()
    database.execute(SCHEMA)
    database.execute(
        "CREATE TABLE owned (); ALTER EXTENSION plpgsql ADD TABLE owned; CREATE VIEW v AS SELECT 1"
    )
    session.query("CREATE TEMP TABLE passing ()")
    assert catalog.user_tables(session) == ("accounts.orgs", "accounts.users", "public.lines")
