"""Orders from Amazon and eBay, each as its platform reports them.

Revision ID: 3fa2d86e1b94
Revises: e47b90c2d615
Create Date: 2024-03-18 09:02:51
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "3fa2d86e1b94"
down_revision: str | Sequence[str] | None = "e47b90c2d615"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NOW = sa.text("now()")
# create_type=False: two tables share the type, so neither may create it or take it away.
ORDER_STATUS = postgresql.ENUM(name="order_status", schema="sales", create_type=False)


def upgrade() -> None:
    op.execute("CREATE SCHEMA sales")
    op.execute(
        """
        CREATE TYPE sales.order_status AS ENUM
            ('pending', 'paid', 'shipped', 'delivered', 'refunded', 'cancelled')
        """
    )
    op.create_table(
        "amazon_orders",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("account_id", sa.BigInteger, nullable=False),
        sa.Column("amazon_order_id", sa.Text, nullable=False),
        sa.Column("status", ORDER_STATUS, server_default="pending", nullable=False),
        sa.Column("buyer_email", sa.Text, nullable=True),
        sa.Column("total", sa.Numeric(12, 2), nullable=False),
        sa.Column("currency", sa.CHAR(3), nullable=False),
        sa.Column("purchase_date", sa.DateTime(timezone=True), nullable=False),
        sa.Column("fulfillment_channel", sa.Text, nullable=True),
        sa.Column("is_prime", sa.Boolean, nullable=True),
        sa.Column("imported_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="amazon_orders_pkey"),
        sa.UniqueConstraint("amazon_order_id", name="amazon_orders_amazon_order_id_key"),
        sa.ForeignKeyConstraint(
            ["account_id"], ["integrations.marketplace_accounts.id"], name="amazon_orders_account_id_fkey"
        ),
        schema="sales",
    )
    op.create_index("amazon_orders_account_id_idx", "amazon_orders", ["account_id"], schema="sales")
    create_lines_table("amazon", "asin")
    op.create_table(
        "ebay_orders",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("account_id", sa.BigInteger, nullable=False),
        sa.Column("ebay_order_id", sa.Text, nullable=False),
        sa.Column("status", ORDER_STATUS, server_default="pending", nullable=False),
        sa.Column("buyer_username", sa.Text, nullable=True),
        sa.Column("total", sa.Numeric(12, 2), nullable=False),
        sa.Column("currency", sa.CHAR(3), nullable=False),
        sa.Column("creation_date", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sales_record_number", sa.Integer, nullable=True),
        sa.Column("imported_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="ebay_orders_pkey"),
        sa.UniqueConstraint("ebay_order_id", name="ebay_orders_ebay_order_id_key"),
        sa.ForeignKeyConstraint(
            ["account_id"], ["integrations.marketplace_accounts.id"], name="ebay_orders_account_id_fkey"
        ),
        schema="sales",
    )
    op.create_index("ebay_orders_account_id_idx", "ebay_orders", ["account_id"], schema="sales")
    create_lines_table("ebay", "item_id")


def create_lines_table(platform: str, item_column: str) -> None:
    """Create `sales.<platform>_order_lines`; item_column is the platform's own name for an article."""
    table = f"{platform}_order_lines"
    op.create_table(
        table,
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("order_id", sa.BigInteger, nullable=False),
        sa.Column(item_column, sa.Text, nullable=False),
        sa.Column("product_id", sa.BigInteger, nullable=True),
        sa.Column("quantity", sa.Integer, nullable=False),
        sa.Column("unit_price", sa.Numeric(12, 2), nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"{table}_pkey"),
        sa.ForeignKeyConstraint(
            ["order_id"], [f"sales.{platform}_orders.id"], name=f"{table}_order_id_fkey", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["product_id"], ["catalog.products.id"], name=f"{table}_product_id_fkey", ondelete="SET NULL"
        ),
        sa.CheckConstraint("quantity > 0", name=f"{table}_quantity_is_positive"),
        schema="sales",
    )
    op.create_index(f"{table}_order_id_idx", table, ["order_id"], schema="sales")


def downgrade() -> None:
    op.drop_table("ebay_order_lines", schema="sales")
    op.drop_table("ebay_orders", schema="sales")
    op.drop_table("amazon_order_lines", schema="sales")
    op.drop_table("amazon_orders", schema="sales")
    op.execute("DROP TYPE sales.order_status")
    op.execute("DROP SCHEMA sales")
