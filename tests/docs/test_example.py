"""The example schema in `migrations/`, run by Alembic alone: each revision goes up, down and up again.

What is wrong here is wrong with the example. What migrator makes of it is tested elsewhere.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import tomllib
from pathlib import Path

import psycopg2
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from tests.support.servers import Database, Row

MIGRATIONS = Path(__file__).parents[2] / "migrations"
SCHEMAS = ("accounts", "audit", "catalog", "integrations", "sales")
BEFORE_BACKFILL = "c82af6013d7e"
BEFORE_UNIFIED = "6d1ce84a0f3b"
UNIFIED = "e20f97b3ac54"
ON_HOLD = "9af80d36c2e1"
PLATFORMS = ("amazon", "ebay", "etsy")

every_major = pytest.mark.parametrize("server", ["debian", "embedded", "embedded18"], indirect=True)


def alembic_config(database: Database | None = None) -> Config:
    """Return the config that migrator gives env.py; without a database, for what happens offline."""
    config = Config(output_buffer=io.StringIO())
    config.set_main_option("script_location", str(MIGRATIONS))
    if database is not None:
        # SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3, which need not be installed.
        url = make_url(database.url).set(drivername="postgresql+psycopg2")
        config.set_main_option("sqlalchemy.url", url.render_as_string(hide_password=False).replace("%", "%%"))
    return config


def history() -> list[Script]:
    return list(ScriptDirectory(str(MIGRATIONS)).walk_revisions())[::-1]


def parents(script: Script) -> tuple[str, ...]:
    down = script.down_revision
    return (down,) if isinstance(down, str) else tuple(down or ())


def upgrade(database: Database, revision: str = "head") -> None:
    command.upgrade(alembic_config(database), revision)


def downgrade(database: Database, revision: str) -> None:
    command.downgrade(alembic_config(database), revision)


def offline(direction: str, revisions: str) -> str:
    """Return what `alembic upgrade|downgrade --sql` writes."""
    config = alembic_config()
    getattr(command, direction)(config, revisions, sql=True)
    return config.output_buffer.getvalue()


def run_file(database: Database, sql: str) -> None:
    """Run SQL as an administrator would: `psql -f`, each statement by itself, stopping at an error."""
    done = subprocess.run(
        [str(database.server.bin / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-"],
        env={**os.environ, **database.environment()},
        input=sql,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def assert_nothing_left(database: Database) -> None:
    assert database.psql("SELECT version_num FROM public.alembic_version") == []
    assert database.psql(
        r"SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'"
    ) == [("public",)]
    tables = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind <> 'i'"
    assert database.psql(tables) == [("alembic_version",)]
    for catalog, namespace in (("pg_type", "typnamespace"), ("pg_proc", "pronamespace")):
        count = f"SELECT count(*) FROM {catalog} WHERE {namespace} = 'public'::regnamespace"
        # A table comes with a row type and the type of its arrays.
        assert database.psql(count) == [(2 if catalog == "pg_type" else 0,)]


@every_major
def test_up_down_and_up_again_is_the_same_schema(database: Database) -> None:
    upgrade(database)
    head = database.schema_dump()
    for schema in SCHEMAS:
        assert f"CREATE SCHEMA {schema};" in head
    assert "CREATE TABLE public.alembic_version" in head

    downgrade(database, "-1")
    assert database.schema_dump() != head
    upgrade(database)
    assert database.schema_dump() == head

    downgrade(database, "base")
    assert_nothing_left(database)
    upgrade(database)
    assert database.schema_dump() == head


@pytest.mark.parametrize("script", history(), ids=lambda script: script.module.__name__.removesuffix("_py"))
def test_every_revision_takes_back_exactly_what_it_did(database: Database, script: Script) -> None:
    for parent in parents(script):
        upgrade(database, parent)
    if not parents(script):
        upgrade(database, script.revision)
        downgrade(database, "base")
    without = database.schema_dump()
    heads = database.psql("SELECT version_num FROM alembic_version ORDER BY 1")

    upgrade(database, script.revision)
    having = database.schema_dump()
    assert database.psql("SELECT version_num FROM alembic_version") == [(script.revision,)]

    # Naming one parent of a merge opens both branches again.
    downgrade(database, parents(script)[0] if parents(script) else "base")
    assert database.psql("SELECT version_num FROM alembic_version ORDER BY 1") == heads
    assert database.schema_dump() == without

    upgrade(database, script.revision)
    assert database.schema_dump() == having


def test_the_branches_may_run_in_either_order(database: Database) -> None:
    branches = parents(next(script for script in history() if script.is_merge_point))
    dumps = []
    for order in (branches, branches[::-1]):
        for branch in order:
            upgrade(database, branch)
        upgrade(database)
        dumps.append(database.schema_dump())
        downgrade(database, "base")
    assert dumps[0] == dumps[1]


@every_major
def test_offline_sql_makes_and_unmakes_the_same_schema(database: Database) -> None:
    run_file(database, offline("upgrade", "head"))
    by_psql = database.schema_dump()
    rows_by_psql = counts(database)
    run_file(database, offline("downgrade", "head:base"))
    database.execute(
        "DROP TABLE IF EXISTS alembic_version"
    )  # --sql drops it at base; online Alembic keeps it
    assert counts(database) == {}

    upgrade(database)
    assert database.schema_dump() == by_psql
    assert counts(database) == rows_by_psql


def counts(database: Database) -> dict[str, int]:
    tables = database.psql(
        "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname = ANY (%s)",
        (list(SCHEMAS),),
    )
    return {table: database.psql(f"SELECT count(*) FROM {table}")[0][0] for (table,) in tables}


def test_the_demo_shop_gives_every_backup_rows(database: Database) -> None:
    upgrade(database)
    for table, count in counts(database).items():
        assert count > 0 or table == "audit.changes", table
    assert database.psql("SELECT count(*) FROM sales.daily_revenue")[0][0] > 0


# --- Data -------------------------------------------------------------------------------------------------


def platform_rows(database: Database) -> dict[str, list[Row]]:
    tables = [f"sales.{platform}_{suffix}" for platform in PLATFORMS for suffix in ("orders", "order_lines")]
    return {table: database.psql(f"SELECT * FROM {table} ORDER BY id") for table in tables}


def add_awkward_orders(database: Database) -> None:
    """Add what the demo shop lacks: Etsy, gaps between ids, NULLs, an order without lines, strange text."""
    database.execute(
        """
        INSERT INTO sales.etsy_orders (id, account_id, receipt_id, status, buyer_name, total, currency,
                                       ordered_at, is_gift, gift_message, imported_at, updated_at)
        SELECT n * 7, a.id, 'R' || n, 'paid', CASE n WHEN 1 THEN NULL ELSE E'Zoë O''Hara \\\\ "Z"' END, 19.99,
               'USD', timestamptz '2024-06-01 12:00:00.123456+02' + n * interval '1 day',
               (ARRAY[true, false, NULL])[n], (ARRAY[E'two\\nlines', '', NULL])[n],
               timestamptz '2024-06-05 00:00+00', timestamptz '2024-06-06 00:00+00'
        FROM (SELECT min(id) AS id FROM integrations.marketplace_accounts) AS a
        CROSS JOIN generate_series(1, 3) AS n
        """
    )
    database.execute(
        """
        INSERT INTO sales.etsy_order_lines (id, order_id, listing_id, product_id, quantity, unit_price)
        VALUES (50, 14, 'L1', NULL, 1, 19.99), (40, 7, 'L2', NULL, 2, 0)
        """
    )
    database.execute("DELETE FROM sales.amazon_orders WHERE id IN (3, 5)")
    database.execute("UPDATE sales.ebay_orders SET sales_record_number = NULL WHERE id = 2")


@every_major
def test_unifying_orders_and_going_back_loses_nothing(database: Database) -> None:
    upgrade(database, BEFORE_UNIFIED)
    add_awkward_orders(database)
    before = platform_rows(database)
    assert all(before.values())

    upgrade(database)
    unified = database.psql("SELECT * FROM sales.orders ORDER BY id")
    lines = database.psql("SELECT * FROM sales.order_lines ORDER BY id")
    assert len(unified) == sum(len(rows) for table, rows in before.items() if table.endswith("_orders"))
    assert len(lines) == sum(len(rows) for table, rows in before.items() if table.endswith("_lines"))

    downgrade(database, BEFORE_UNIFIED)
    assert platform_rows(database) == before

    upgrade(database)
    assert database.psql("SELECT * FROM sales.orders ORDER BY id") == unified
    assert database.psql("SELECT * FROM sales.order_lines ORDER BY id") == lines


def test_orders_that_came_after_unifying_go_back_too(database: Database) -> None:
    upgrade(database, BEFORE_UNIFIED)
    add_awkward_orders(database)
    before = platform_rows(database)
    upgrade(database)
    database.execute(
        """
        WITH placed AS (
            INSERT INTO sales.orders (account_id, marketplace, external_id, total, currency, placed_at,
                                      details)
            SELECT 1, o.marketplace, 'new-' || n, n, 'EUR', now(), o.details::jsonb
            FROM generate_series(1, 2) AS n
            CROSS JOIN (VALUES ('amazon', '{"is_prime": true}'), ('etsy', '{}')) AS o (marketplace, details)
            RETURNING id, external_id
        )
        INSERT INTO sales.order_lines (order_id, external_item_id, quantity, unit_price)
        SELECT id, 'item of ' || external_id, 1, 1 FROM placed
        """
    )
    downgrade(database, BEFORE_UNIFIED)
    after = platform_rows(database)
    for table, rows in before.items():
        assert after[table][: len(rows)] == rows, table
    added = {table: len(rows) - len(before[table]) for table, rows in after.items()}
    assert added == {
        "sales.amazon_orders": 2,
        "sales.amazon_order_lines": 2,
        "sales.ebay_orders": 0,
        "sales.ebay_order_lines": 0,
        "sales.etsy_orders": 2,
        "sales.etsy_order_lines": 2,
    }
    assert database.psql(
        """
        SELECT o.amazon_order_id, o.is_prime, o.fulfillment_channel, l.asin
        FROM sales.amazon_orders AS o JOIN sales.amazon_order_lines AS l ON l.order_id = o.id
        WHERE o.amazon_order_id LIKE 'new-%' ORDER BY 1
        """
    ) == [("new-1", True, None, "item of new-1"), ("new-2", True, None, "item of new-2")]
    for table, rows in after.items():
        # An identity column knows nothing of ids that were brought along, unless it is told.
        sequence = database.psql("SELECT nextval(pg_get_serial_sequence(%s, 'id'))", (table,))
        assert sequence == [(max(row[0] for row in rows) + 1,)], table


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ('details = \'{"coupon": "X"}\'', "details has keys without a column to go back to"),
        ("marketplace = 'shop'", "orders of a marketplace without a table to go back to"),
    ],
)
def test_going_back_is_refused_where_it_would_lose_something(
    database: Database, change: str, reason: str
) -> None:
    upgrade(database, UNIFIED)
    database.execute("INSERT INTO integrations.marketplaces (code, name) VALUES ('shop', 'Our own shop')")
    database.execute(f"UPDATE sales.orders SET {change} WHERE id = 1")
    before = database.dump()
    with pytest.raises(DBAPIError, match=reason):
        downgrade(database, "-1")
    assert database.dump() == before


def test_the_backfill_reaches_every_batch_and_keeps_what_is_there(database: Database) -> None:
    upgrade(database, BEFORE_BACKFILL)
    database.execute("UPDATE catalog.products SET currency = 'CHF' WHERE id = 1")
    database.execute(
        """
        INSERT INTO catalog.products (organization_id, sku, title, price)
        SELECT o.id, 'bulk-' || n, 'Bulk', 1 FROM accounts.organizations AS o, generate_series(1, 6000) AS n
        """
    )
    upgrade(database)
    assert database.psql(
        """
        SELECT o.home_currency, p.currency, count(*)
        FROM catalog.products AS p JOIN accounts.organizations AS o ON o.id = p.organization_id
        GROUP BY 1, 2 ORDER BY 1, 2
        """
    ) == [("EUR", "CHF", 1), ("EUR", "EUR", 6023), ("GBP", "GBP", 6024)]


def test_a_product_in_no_category_does_not_stop_the_foreign_key(database: Database) -> None:
    upgrade(database, "e47b90c2d615")
    database.execute(
        """
        INSERT INTO accounts.organizations (slug, name, home_currency) VALUES ('old', 'Old', 'EUR');
        INSERT INTO catalog.products (organization_id, category_id, sku, title, price)
        SELECT id, 4711, 'orphan', 'Orphan', 1 FROM accounts.organizations
        """
    )
    upgrade(database)
    assert database.psql("SELECT category_id FROM catalog.products WHERE sku = 'orphan'") == [(None,)]


def test_oauth_knows_the_marketplace_of_accounts_with_orders(database: Database) -> None:
    upgrade(database)
    assert database.psql(
        "SELECT display_name, marketplace FROM integrations.marketplace_accounts ORDER BY id"
    ) == [("Demo on Amazon", "amazon"), ("Demo on eBay", "ebay"), ("Demo on Amazon", "amazon")]
    with pytest.raises(psycopg2.IntegrityError, match="marketplace_accounts_connected_has_token"):
        database.execute("UPDATE integrations.marketplace_accounts SET connected_at = now()")


def test_an_interrupted_concurrent_index_is_built_again(database: Database) -> None:
    upgrade(database, UNIFIED)
    # What an interrupted CREATE INDEX CONCURRENTLY leaves behind.
    database.execute("CREATE INDEX orders_account_id_placed_at_idx ON sales.orders (account_id)")
    database.execute(
        "UPDATE pg_index SET indisvalid = false "
        "WHERE indexrelid = 'sales.orders_account_id_placed_at_idx'::regclass"
    )
    upgrade(database)
    assert database.psql(
        """
        SELECT indisvalid, pg_get_indexdef(indexrelid) FROM pg_index
        WHERE indexrelid = 'sales.orders_account_id_placed_at_idx'::regclass
        """
    ) == [
        (
            True,
            "CREATE INDEX orders_account_id_placed_at_idx ON sales.orders "
            "USING btree (account_id, placed_at DESC)",
        )
    ]


def test_orders_on_hold_become_pending_and_stay_on_record(database: Database) -> None:
    upgrade(database)
    others = "SELECT id, status::text FROM sales.orders WHERE id NOT IN (10, 11) ORDER BY id"
    before = database.psql(others)
    database.execute("UPDATE sales.orders SET status = 'on_hold' WHERE id IN (10, 11)")
    downgrade(database, f"{ON_HOLD}-1")
    assert database.psql("SELECT status::text FROM sales.orders WHERE id IN (10, 11)") == [("pending",)] * 2
    assert database.psql(others) == before
    assert database.psql(
        "SELECT row_id, before->>'status' FROM audit.changes WHERE relation = 'sales.orders' ORDER BY 1"
    ) == [(10, "on_hold"), (11, "on_hold")]


def test_triggers_keep_updated_at_and_the_audit_trail(database: Database) -> None:
    upgrade(database)
    changed = "SELECT id, nickname, updated_at > created_at FROM accounts.users ORDER BY id LIMIT 2"
    database.execute("UPDATE accounts.users SET nickname = nickname WHERE id = 1")
    assert database.psql(changed) == [(1, "owner", False), (2, "packer", False)]
    database.execute("UPDATE accounts.users SET nickname = 'boss' WHERE id = 1")
    assert database.psql(changed) == [(1, "boss", True), (2, "packer", False)]
    assert database.psql("SELECT after->>'nickname' FROM audit.changes ORDER BY id") == [
        ("owner",),
        ("boss",),
    ]


# --- verify.toml ------------------------------------------------------------------------------------------


def test_verify_toml_says_what_is_there(database: Database) -> None:
    upgrade(database)
    expectations = tomllib.loads((MIGRATIONS / "verify.toml").read_text())
    assert set(expectations["tables"]) == set(counts(database)), "every table is expected"
    for name, expected in expectations["tables"].items():
        columns = dict(database.psql(COLUMNS, (name,)))
        assert {c: columns.get(c) for c in expected["columns"]} == expected["columns"], name
        indexes = {index for (index,) in database.psql(VALID_INDEXES, (name,))}
        assert set(expected.get("indexes", ())) <= indexes, name
        keys = database.psql(KEYS, (name,))
        foreign = {
            re.sub(r"FOREIGN KEY \((.+?)\) REFERENCES (\S+\(.+?\)).*", r"\1 -> \2", text)
            for kind, text in keys
            if kind == "f"
        }
        assert set(expected.get("foreign_keys", ())) == foreign, name
        assert ("p", f"PRIMARY KEY ({', '.join(expected['primary_key'])})") in keys, name

    assert len(expectations["assertions"]) >= 4
    for assertion in expectations["assertions"]:
        assert database.psql(assertion["sql"])[0][0] == assertion["expect"], assertion["name"]


COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' not null' ELSE '' END
FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""
VALID_INDEXES = """
SELECT c.relname FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
WHERE i.indrelid = %s::regclass AND i.indisvalid
"""
KEYS = """
SELECT contype::text, pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = %s::regclass AND convalidated
"""
