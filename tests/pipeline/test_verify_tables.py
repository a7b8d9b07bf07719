"""Verify, what verify.toml says of tables: each rule against a real database with exactly that fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.config.database_url import parse as parse_address
from migrator.pipeline.stages.verify import verify
from migrator.postgres.session import Session, connect
from migrator.schema.expectations import parse
from tests.support.checks import EXPECTED, SCHEMA, check, rules
from tests.support.servers import Database


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    """A session of migrator's own on an empty database."""
    with connect(parse_address(database.url), "test", 60) as session:
        yield session


FAULTS = [
    ("DROP TABLE lines", "missing-table", "public.lines", "the table does not exist"),
    ("ALTER TABLE lines RENAME TO liness", "missing-table", "public.lines", "; there is public.liness"),
    (
        "ALTER TABLE accounts.users DROP COLUMN nickname",
        "missing-column",
        "accounts.users.nickname",
        "the column does not exist",
    ),
    (
        "ALTER TABLE accounts.users RENAME nickname TO nick_name",
        "missing-column",
        "accounts.users.nickname",
        "; there is nick_name",
    ),
    (
        "ALTER TABLE accounts.users ALTER nickname TYPE varchar(41)",
        "wrong-type",
        "accounts.users.nickname",
        "the type is character varying(41), not character varying(40)",
    ),
    (
        "ALTER TABLE accounts.users ALTER email DROP NOT NULL",
        "wrong-nullability",
        "accounts.users.email",
        "the column can be null",
    ),
    (
        "ALTER TABLE accounts.users ALTER nickname SET NOT NULL",
        "wrong-nullability",
        "accounts.users.nickname",
        "the column is NOT NULL and should not be",
    ),
    (
        "DROP INDEX accounts.users_email_key; CREATE INDEX users_email_key ON accounts.orgs (region)",
        "missing-index",
        "accounts.users_email_key",
        "the index on accounts.users does not exist",
    ),
    (
        "ALTER TABLE accounts.users DROP CONSTRAINT users_org_id_region_fkey",
        "missing-foreign-key",
        "accounts.users",
        "there is no foreign key region, org_id -> accounts.orgs(region, id)",
    ),
    (
        "ALTER TABLE lines DROP CONSTRAINT lines_pkey",
        "wrong-primary-key",
        "public.lines",
        "the primary key does not exist, not (order_id, position)",
    ),
    (
        "ALTER TABLE lines DROP CONSTRAINT lines_pkey, ADD PRIMARY KEY (position, order_id)",
        "wrong-primary-key",
        "public.lines",
        "the primary key is (position, order_id), not (order_id, position)",
    ),
    (
        "INSERT INTO lines VALUES (3, 3, 'c')",
        "assertion-failed",
        "assertion 'two lines'",
        "it returned 3, not 2",
    ),
]


@pytest.mark.parametrize(("fault", "rule", "place", "sentence"), FAULTS)
def test_each_fault_is_one_finding(
    database: Database, session: Session, fault: str, rule: str, place: str, sentence: str
) -> None:
    database.execute(SCHEMA)
    database.execute(fault)
    found = check(session, EXPECTED)
    assert found[0].rule == rule
    assert found[0].place == place
    assert sentence in found[0].sentence
    others = [finding.rule for finding in found[1:]]
    assert others == (["assertion-error"] if rule == "missing-table" else [])


@pytest.mark.parametrize(
    "fault",
    [
        "ALTER TABLE accounts.users DROP COLUMN nickname",
        "ALTER TABLE accounts.users ALTER nickname TYPE varchar(41)",
        "ALTER TABLE accounts.users ALTER email DROP NOT NULL",
        "ALTER TABLE accounts.users ALTER nickname SET NOT NULL",
        "ALTER TABLE accounts.users DROP CONSTRAINT users_org_id_region_fkey",
    ],
)
def test_the_remedy_typed_mends_the_fault(database: Database, session: Session, fault: str) -> None:
    database.execute(SCHEMA)
    database.execute(fault)
    (found,) = check(session, EXPECTED)
    database.execute(found.remedy.partition(": ")[2])
    assert check(session, EXPECTED) == ()


def test_a_foreign_key_elsewhere_is_named(database: Database, session: Session) -> None:
    database.execute(SCHEMA)
    database.execute("CREATE TABLE notes (org_id bigint REFERENCES accounts.users (id))")
    (found,) = check(session, '[tables.notes]\nforeign_keys = ["org_id -> accounts.orgs(id)"]')
    assert found.sentence.endswith("; there is org_id -> accounts.users(id)")


TYPES = {
    "int": "integer",
    "int8": "bigint",
    "int2": "smallint",
    "bool": "bool",
    "decimal(10, 2)": "numeric(10,2)",
    "numeric(7)": "numeric(7)",
    "float8": "float",
    "float4": "real",
    "float(10)": "float(10)",
    "varchar(12)": "varchar(12)",
    "varchar": "character varying",
    "char(3)": "char(3)",
    "char": "char",
    '"char"': '"char"',
    "bpchar": "bpchar",
    "timestamptz": "timestamptz",
    "timestamptz(3)": "timestamp(3) with time zone",
    "timestamp": "timestamp",
    "time": "time",
    "timetz(2)": "timetz(2)",
    "interval": "interval",
    "interval day to second(3)": "interval day to second(3)",
    "bit(4)": "bit(4)",
    "bit": "bit",
    "varbit(9)": "varbit(9)",
    "text[]": "text[]",
    "int[][]": "integer[]",
    "numeric(10,2)[]": "decimal(10,2)[]",
    "timestamptz[]": "timestamptz[]",
    "uuid": "uuid",
    "jsonb": "jsonb",
    "bytea": "bytea",
    "inet": "inet",
    "tstzrange": "tstzrange",
    "name": "name",
    "oid": "oid",
    "accounts.status": "accounts.status",
    "accounts.status[]": "accounts.status[]",
    "public.mood": "mood",
    "public.mood[]": "public.mood[]",
    'accounts."Odd Type"': 'accounts."Odd Type"',
}


@pytest.mark.parametrize("search_path", ["public", "accounts, public", "''"])
def test_types_are_the_same_however_written(each_database: Database, search_path: str) -> None:
    columns = ", ".join(f"c{number} {written}" for number, written in enumerate(TYPES))
    each_database.execute(
        "CREATE SCHEMA accounts; CREATE TYPE accounts.status AS ENUM ('a'); CREATE TYPE public.mood AS ENUM ('b');"
        f'CREATE TYPE accounts."Odd Type" AS (a int); CREATE TABLE accounts.types ({columns}, s accounts.status)'
    )
    each_database.execute(f'ALTER DATABASE "{each_database.name}" SET search_path = {search_path}')
    expected = "".join(f"c{number} = '{text}'\n" for number, text in enumerate(TYPES.values()))
    text = f'[tables."accounts.types".columns]\n{expected}s = "status"'
    at = frozenset({"r1"})
    with connect(parse_address(each_database.url), "test", 60) as session:
        found = verify(
            session, expected=at, actual=at, not_valid_before=frozenset(), expectations=parse(text)
        )
    assert found == ()


def test_a_type_of_the_same_name_elsewhere_is_another(database: Database, session: Session) -> None:
    database.execute(
        "CREATE SCHEMA a; CREATE SCHEMA b; CREATE TYPE a.status AS ENUM ('x'); CREATE TYPE b.status AS ENUM ('x');"
        "CREATE TABLE b.t (s a.status)"
    )
    for written in ("b.status", "status"):
        assert rules(check(session, f'[tables."b.t"]\ncolumns = {{ s = "{written}" }}')) == [
            ("wrong-type", "b.t.s")
        ]
    assert check(session, '[tables."b.t"]\ncolumns = { s = "a.status" }') == ()


def test_odd_names(database: Database, session: Session) -> None:
    database.execute(
        'CREATE SCHEMA "Sch.ema"; CREATE TABLE "Sch.ema"."t ""%s" ("ID %" int PRIMARY KEY, "A,b" int);'
        'CREATE INDEX "I %(x)s" ON "Sch.ema"."t ""%s" ("A,b");'
        'ALTER TABLE "Sch.ema"."t ""%s" ADD CONSTRAINT "c.%" CHECK ("A,b" > 0) NOT VALID'
    )
    text = """
        [tables.'"Sch.ema"."t ""%s"']
        columns = { "ID %" = "int not null", "A,b" = "int" }
        indexes = ["I %(x)s"]
        primary_key = ["ID %"]
        """
    (found,) = check(session, text)
    assert found.place == 'Sch.ema.t "%s.c.%'
    database.psql(found.remedy)
    assert check(session, text) == ()
    assert rules(check(session, "[tables.T]\n[tables.Lines]")) == [
        ("missing-table", "public.T"),
        ("missing-table", "public.Lines"),
    ]


def test_views_count_as_tables(database: Database, session: Session) -> None:
    database.execute(
        SCHEMA + "CREATE VIEW v AS SELECT * FROM lines; CREATE MATERIALIZED VIEW m AS TABLE lines;"
    )
    assert (
        check(session, '[tables.v]\ncolumns = { note = "text" }\n[tables.m]\ncolumns = { note = "text" }')
        == ()
    )
    database.execute("CREATE TABLE none ()")
    assert rules(check(session, '[tables.none]\ncolumns = { a = "int" }')) == [
        ("missing-column", "public.none.a")
    ]
