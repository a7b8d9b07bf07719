"""There and back is exact: every definition and every row, of real schemas, and onto newer majors.

What is compared is what pg_dump writes, and a checksum over every table's rows that is none of migrator's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg2
import pytest

from migrator.backups.storage.open import open_store
from migrator.backups.verification import verify_new, verify_stored
from tests.docs.test_example import upgrade
from tests.histories.projects import HISTORIES, History
from tests.support.servers import Database, Row, Server

from .conftest import APPLICATION, RICH, Workbench

Bench = Callable[..., Workbench]

TABLES = """
SELECT format('%I.%I', schemaname, tablename) FROM pg_tables
 WHERE schemaname !~ '^pg_' AND schemaname <> 'information_schema' ORDER BY 1
"""
CHECKSUM = "SELECT count(*), md5(string_agg(md5(t::text), '' ORDER BY md5(t::text))) FROM ONLY {} t"
BULK = """
INSERT INTO sales.orders (account_id, marketplace, external_id, buyer, total, currency, placed_at, details)
SELECT o.account_id, o.marketplace, 'bulk-' || n, E'B\\u00fcyer\\t' || n, n / 100.0, 'EUR',
       timestamptz '2024-01-01' + n * interval '7 minutes', jsonb_build_object('n', n, 'tags', ARRAY['a', NULL])
  FROM (SELECT * FROM sales.orders ORDER BY id LIMIT 1) o, generate_series(1, 60000) n;
INSERT INTO sales.order_lines (order_id, external_item_id, quantity, unit_price)
SELECT id, 'line', 1 + id % 5, total FROM sales.orders WHERE external_id LIKE 'bulk-%';
DELETE FROM sales.order_lines WHERE external_item_id = 'line' AND order_id % 10 = 0;
UPDATE sales.orders SET buyer = NULL WHERE external_id LIKE 'bulk-%7'
"""
BREAK = """
DO $$ DECLARE one record; BEGIN
  FOR one IN SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables
              WHERE schemaname !~ '^pg_' AND schemaname <> 'information_schema' ORDER BY 1 LOOP
    EXECUTE 'TRUNCATE ' || one.name || ' CASCADE';
    EXECUTE 'ALTER TABLE ' || one.name || ' ADD COLUMN broken integer';
  END LOOP;
END $$
"""


def checksums(database: Database) -> dict[str, Row]:
    """Return the number of rows and a checksum over them, by table."""
    return {name: database.psql(CHECKSUM.format(name))[0] for (name,) in database.psql(TABLES)}


def there_and_back(database: Database, bench: Workbench) -> int:
    """Back up, prove by restoring, break, restore; return how many rows there are."""
    schema, everything = database.schema_dump(), database.dump()
    rows = checksums(database)
    backup = bench.back_up()
    assert [(done.how, done.ok, done.why) for done in backup.proofs] == [
        ("read", True, ""),
        ("restore", True, ""),
    ]
    database.execute(BREAK)
    assert database.schema_dump() != schema
    assert checksums(database) != rows
    bench.restore()
    assert database.schema_dump() == schema
    assert checksums(database) == rows
    assert database.dump() == everything
    return sum(table.rows or 0 for table in backup.tables.values())


@pytest.mark.parametrize(
    ("server", "shape"), [("debian", "directory"), ("embedded", "custom")], indirect=["server"]
)
def test_the_example(database: Database, workbench: Bench, shape: str) -> None:
    upgrade(database)
    for statement in BULK.split(";\n"):
        database.execute(statement)
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_FORMAT=shape)
    assert there_and_back(database, bench) > 100_000


VALUES = {
    "integer": "n",
    "bigint": "n",
    "smallint": "n",
    "text": "'row ' || n",
    "character varying": "left('row ' || n, {size})",
    "boolean": "n % 2 = 0",
    "double precision": "n / 3.0",
    "numeric": "n / 7.0",
    "timestamp without time zone": "timestamp '2020-01-01' + n * interval '1.5 hours'",
    "timestamp with time zone": "timestamptz '2020-01-01 00:00Z' + n * interval '1.5 hours'",
    "json": "json_build_object('n', n)",
    "jsonb": "jsonb_build_object('n', n)",
    "bytea": "decode(md5(n::text), 'hex')",
    "uuid": "md5(n::text)::uuid",
    "USER-DEFINED": '(enum_range(NULL::"{size}"))[1]',
}
"""What a column of a type is given in row n: the same everywhere, so that foreign keys find what they refer to."""


def fill(database: Database, rows: int) -> int:
    """Put rows into as many tables as take them; return into how many."""
    columns = database.psql(
        "SELECT table_name, array_agg(column_name::text), array_agg(data_type::text),"
        " array_agg(coalesce(character_maximum_length::text, udt_name::text))"
        "  FROM information_schema.columns JOIN pg_tables"
        "   ON schemaname = table_schema AND tablename = table_name"
        " WHERE table_schema = 'public' AND table_name <> 'alembic_version' AND is_generated = 'NEVER'"
        " GROUP BY table_name"
    )
    waiting = {row[0]: row[1:] for row in columns}
    filled = 0
    for _ in range(8):  # a table comes after those that it refers to
        for table, (names, types, lengths) in list(waiting.items()):
            known = [
                (n, VALUES[t].format(size=size))
                for n, t, size in zip(names, types, lengths, strict=True)
                if t in VALUES
            ]
            listed = ", ".join(f'"{name}"' for name, _ in known)
            values = ", ".join(value for _, value in known)
            try:
                database.execute(
                    f'INSERT INTO "{table}" ({listed}) SELECT {values} FROM generate_series(1, {rows}) n'
                    " ON CONFLICT DO NOTHING"
                )
            except psycopg2.Error:
                continue
            del waiting[table]
            filled += 1
    return filled


@pytest.mark.histories
@pytest.mark.parametrize("history", HISTORIES[:2], ids=lambda history: str(history.name))
def test_a_real_history(history: History, database: Database, workbench: Bench, tmp_path: Path) -> None:
    history.install().plain_upgrade(database, tmp_path)
    assert fill(database, 2000) >= 8
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore")
    assert there_and_back(database, bench) > 20_000


@pytest.mark.parametrize(
    ("older", "newer"), [("debian", "embedded"), ("debian", "embedded18"), ("embedded", "embedded18")]
)
def test_onto_a_newer_major(
    older: str, newer: str, servers: Callable[[str], Server], workbench: Bench
) -> None:
    """Dumped by the old server's pg_dump, proven on the new one with all rows hashed there."""
    source, other = servers(older), servers(newer)
    database = source.create_database()
    try:
        database.execute(RICH)
        bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore")
        backup = bench.back_up()
        there = workbench(database, MIGRATOR_VERIFY_URL=other.url("postgres"), MIGRATOR_PG_BIN=str(other.bin))
        store = open_store(there.settings.backup_url, there.settings)
        found = verify_stored.verify(
            store,
            backup,
            there.settings,
            verify_new.RESTORE,
            run_id="20260101T000000Z-abcdef",
            application_name=APPLICATION,
        )
        assert found.proofs[-1].ok
        assert found.proofs[-1].server_version.startswith(str(other.major))
        assert "contents" not in found.proofs[-1].why  # every table's rows were hashed on both
    finally:
        source.drop_database(database.name)
