"""Unify the orders of all platforms in one table.

Revision ID: e20f97b3ac54
Revises: 6d1ce84a0f3b
Create Date: 2024-11-04 08:30:00
"""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "e20f97b3ac54"
down_revision: str | Sequence[str] | None = "6d1ce84a0f3b"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NOW = sa.text("now()")


@dataclass(frozen=True)
class Platform:
    """What a platform calls the things that all platforms have, and the columns that only it has."""

    name: str
    order_id: str
    buyer: str
    placed_at: str
    item_id: str
    details: dict[str, str]  # column: type
    touched: bool  # whether updated_at is kept by a trigger: etsy_orders came without one

    @property
    def orders(self) -> str:
        return f"sales.{self.name}_orders"

    @property
    def lines(self) -> str:
        return f"sales.{self.name}_order_lines"


PLATFORMS = (
    Platform(
        name="amazon",
        order_id="amazon_order_id",
        buyer="buyer_email",
        placed_at="purchase_date",
        item_id="asin",
        details={"fulfillment_channel": "text", "is_prime": "boolean"},
        touched=True,
    ),
    Platform(
        name="ebay",
        order_id="ebay_order_id",
        buyer="buyer_username",
        placed_at="creation_date",
        item_id="item_id",
        details={"sales_record_number": "integer"},
        touched=True,
    ),
    Platform(
        name="etsy",
        order_id="receipt_id",
        buyer="buyer_name",
        placed_at="ordered_at",
        item_id="listing_id",
        details={"is_gift": "boolean", "gift_message": "text"},
        touched=False,
    ),
)


def upgrade() -> None:
    # Taken before the first row is read: an order that came in between the copy and the DROP would be gone.
    tables = ", ".join(f"{p.orders}, {p.lines}" for p in PLATFORMS)
    op.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")

    create_unified_tables()
    copy_into_unified_tables()
    for platform in reversed(PLATFORMS):
        op.execute(f"DROP TABLE {platform.lines}")
        op.execute(f"DROP TABLE {platform.orders}")

    # After the copy, so that it keeps the times that the orders had.
    op.execute(
        """
        CREATE TRIGGER touch_updated_at BEFORE UPDATE ON sales.orders
        FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
        EXECUTE FUNCTION audit.touch_updated_at()
        """
    )
    # Autovacuum gets here in a minute or so; until then the planner would think that the table is empty.
    op.execute("ANALYZE sales.orders")
    op.execute("ANALYZE sales.order_lines")


def create_unified_tables() -> None:
    op.create_table(
        "orders",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("account_id", sa.BigInteger, nullable=False),
        sa.Column("marketplace", sa.Text, nullable=False),
        sa.Column("external_id", sa.Text, nullable=False, comment="the marketplace's own order number"),
        sa.Column(
            "status",
            postgresql.ENUM(name="order_status", schema="sales", create_type=False),
            server_default="pending",
            nullable=False,
        ),
        sa.Column("buyer", sa.Text, nullable=True),
        sa.Column("total", sa.Numeric(12, 2), nullable=False),
        sa.Column("currency", sa.CHAR(3), nullable=False),
        sa.Column("placed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("details", postgresql.JSONB, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("imported_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("legacy_id", sa.BigInteger, nullable=True, comment="id in the table of its platform"),
        sa.PrimaryKeyConstraint("id", name="orders_pkey"),
        sa.UniqueConstraint("marketplace", "external_id", name="orders_marketplace_external_id_key"),
        sa.ForeignKeyConstraint(
            ["account_id"], ["integrations.marketplace_accounts.id"], name="orders_account_id_fkey"
        ),
        sa.ForeignKeyConstraint(
            ["marketplace"], ["integrations.marketplaces.code"], name="orders_marketplace_fkey"
        ),
        schema="sales",
    )
    op.create_table(
        "order_lines",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("order_id", sa.BigInteger, nullable=False),
        sa.Column("external_item_id", sa.Text, nullable=False),
        sa.Column("product_id", sa.BigInteger, nullable=True),
        sa.Column("quantity", sa.Integer, nullable=False),
        sa.Column("unit_price", sa.Numeric(12, 2), nullable=False),
        sa.Column("legacy_id", sa.BigInteger, nullable=True, comment="id in the table of its platform"),
        sa.PrimaryKeyConstraint("id", name="order_lines_pkey"),
        sa.ForeignKeyConstraint(
            ["order_id"], ["sales.orders.id"], name="order_lines_order_id_fkey", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["product_id"], ["catalog.products.id"], name="order_lines_product_id_fkey", ondelete="SET NULL"
        ),
        sa.CheckConstraint("quantity > 0", name="order_lines_quantity_is_positive"),
        schema="sales",
    )
    op.create_index("order_lines_order_id_idx", "order_lines", ["order_id"], schema="sales")


def copy_into_unified_tables() -> None:
    orders = "\nUNION ALL\n".join(
        f"""
        SELECT account_id, '{p.name}', {p.order_id}, status, {p.buyer}, total, currency, {p.placed_at},
               jsonb_build_object({", ".join(f"'{column}', {column}" for column in p.details)}),
               imported_at, updated_at, id
        FROM {p.orders}
        """
        for p in PLATFORMS
    )
    # Ordered, so that ids follow time as they will from now on, and the same rows always get the same ids.
    op.execute(
        f"""
        INSERT INTO sales.orders (account_id, marketplace, external_id, status, buyer, total, currency,
                                  placed_at, details, imported_at, updated_at, legacy_id)
        {orders}
        ORDER BY 8, 2, 12
        """
    )
    lines = "\nUNION ALL\n".join(
        f"""
        SELECT o.id, l.{p.item_id}, l.product_id, l.quantity, l.unit_price, l.id
        FROM {p.lines} AS l
        JOIN sales.orders AS o ON o.marketplace = '{p.name}' AND o.legacy_id = l.order_id
        """
        for p in PLATFORMS
    )
    op.execute(
        f"""
        INSERT INTO sales.order_lines (order_id, external_item_id, product_id, quantity, unit_price,
                                       legacy_id)
        {lines}
        ORDER BY 1, 6
        """
    )


def downgrade() -> None:
    op.execute("LOCK TABLE sales.orders, sales.order_lines IN ACCESS EXCLUSIVE MODE")
    refuse_what_platform_tables_cannot_hold()
    op.execute("DROP TRIGGER touch_updated_at ON sales.orders")
    number_new_rows()
    for platform in PLATFORMS:
        create_platform_tables(platform)
        copy_into_platform_tables(platform)
    op.execute("DROP TABLE sales.order_lines")
    op.execute("DROP TABLE sales.orders")


def refuse_what_platform_tables_cannot_hold() -> None:
    """Raise in the database, so that `downgrade --sql` has the check as well."""
    names = ", ".join(f"'{p.name}'" for p in PLATFORMS)
    known = " ".join(
        f"WHEN '{p.name}' THEN ARRAY[{', '.join(repr(column) for column in p.details)}]" for p in PLATFORMS
    )
    op.execute(
        f"""
        DO $$
        BEGIN
            IF EXISTS (SELECT FROM sales.orders WHERE marketplace NOT IN ({names})) THEN
                RAISE EXCEPTION 'sales.orders has orders of a marketplace without a table to go back to'
                    USING HINT = 'Move them out of sales.orders first.';
            END IF;
            IF EXISTS (
                SELECT FROM sales.orders
                WHERE details - CASE marketplace {known} END <> jsonb_build_object()
            ) THEN
                RAISE EXCEPTION 'sales.orders.details has keys without a column to go back to'
                    USING HINT = 'Move them out of sales.orders.details first.';
            END IF;
        END
        $$
        """
    )


def number_new_rows() -> None:
    """Give the rows that came after the upgrade an id behind those that their platform already had."""
    op.execute(
        """
        UPDATE sales.orders AS o
        SET legacy_id = numbered.legacy_id
        FROM (
            SELECT id,
                   coalesce(max(legacy_id) OVER (PARTITION BY marketplace), 0)
                   + row_number() OVER (PARTITION BY marketplace, legacy_id IS NULL ORDER BY id) AS legacy_id
            FROM sales.orders
        ) AS numbered
        WHERE numbered.id = o.id AND o.legacy_id IS NULL
        """
    )
    op.execute(
        """
        UPDATE sales.order_lines AS l
        SET legacy_id = numbered.legacy_id
        FROM (
            SELECT l.id,
                   coalesce(max(l.legacy_id) OVER (PARTITION BY o.marketplace), 0)
                   + row_number() OVER (PARTITION BY o.marketplace, l.legacy_id IS NULL ORDER BY l.id)
                   AS legacy_id
            FROM sales.order_lines AS l
            JOIN sales.orders AS o ON o.id = l.order_id
        ) AS numbered
        WHERE numbered.id = l.id AND l.legacy_id IS NULL
        """
    )


def create_platform_tables(platform: Platform) -> None:
    """Create the platform's two tables, column by column as its own revision made them."""
    p = platform
    details = "".join(f"{column} {type_},\n" for column, type_ in p.details.items())
    op.execute(
        f"""
        CREATE TABLE {p.orders} (
            id bigint GENERATED BY DEFAULT AS IDENTITY,
            account_id bigint NOT NULL,
            {p.order_id} text NOT NULL,
            status sales.order_status DEFAULT 'pending' NOT NULL,
            {p.buyer} text,
            total numeric(12, 2) NOT NULL,
            currency char(3) NOT NULL,
            {p.placed_at} timestamptz NOT NULL,
            {details}
            imported_at timestamptz DEFAULT now() NOT NULL,
            updated_at timestamptz DEFAULT now() NOT NULL,
            CONSTRAINT {p.name}_orders_pkey PRIMARY KEY (id),
            CONSTRAINT {p.name}_orders_{p.order_id}_key UNIQUE ({p.order_id}),
            CONSTRAINT {p.name}_orders_account_id_fkey
                FOREIGN KEY (account_id) REFERENCES integrations.marketplace_accounts (id)
        )
        """
    )
    op.execute(f"CREATE INDEX {p.name}_orders_account_id_idx ON {p.orders} (account_id)")
    op.execute(
        f"""
        CREATE TABLE {p.lines} (
            id bigint GENERATED BY DEFAULT AS IDENTITY,
            order_id bigint NOT NULL,
            {p.item_id} text NOT NULL,
            product_id bigint,
            quantity integer NOT NULL,
            unit_price numeric(12, 2) NOT NULL,
            CONSTRAINT {p.name}_order_lines_pkey PRIMARY KEY (id),
            CONSTRAINT {p.name}_order_lines_order_id_fkey
                FOREIGN KEY (order_id) REFERENCES {p.orders} (id) ON DELETE CASCADE,
            CONSTRAINT {p.name}_order_lines_product_id_fkey
                FOREIGN KEY (product_id) REFERENCES catalog.products (id) ON DELETE SET NULL,
            CONSTRAINT {p.name}_order_lines_quantity_is_positive CHECK (quantity > 0)
        )
        """
    )
    op.execute(f"CREATE INDEX {p.name}_order_lines_order_id_idx ON {p.lines} (order_id)")
    if p.touched:
        op.execute(
            f"""
            CREATE TRIGGER touch_updated_at BEFORE UPDATE ON {p.orders}
            FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
            EXECUTE FUNCTION audit.touch_updated_at()
            """
        )


def copy_into_platform_tables(platform: Platform) -> None:
    p = platform
    columns = ", ".join(p.details)
    values = ", ".join(f"(details->>'{column}')::{type_}" for column, type_ in p.details.items())
    op.execute(
        f"""
        INSERT INTO {p.orders} (id, account_id, {p.order_id}, status, {p.buyer}, total, currency,
                                {p.placed_at}, {columns}, imported_at, updated_at)
        SELECT legacy_id, account_id, external_id, status, buyer, total, currency, placed_at,
               {values}, imported_at, updated_at
        FROM sales.orders
        WHERE marketplace = '{p.name}'
        ORDER BY legacy_id
        """
    )
    op.execute(
        f"""
        INSERT INTO {p.lines} (id, order_id, {p.item_id}, product_id, quantity, unit_price)
        SELECT l.legacy_id, o.legacy_id, l.external_item_id, l.product_id, l.quantity, l.unit_price
        FROM sales.order_lines AS l
        JOIN sales.orders AS o ON o.id = l.order_id
        WHERE o.marketplace = '{p.name}'
        ORDER BY l.legacy_id
        """
    )
    for table in (p.orders, p.lines):
        # The rows brought their ids with them, of which the identity column's sequence knows nothing.
        op.execute(
            f"""
            SELECT setval(pg_get_serial_sequence('{table}', 'id'), coalesce(max(id), 1), max(id) IS NOT NULL)
            FROM {table}
            """
        )
