"""Orders from Etsy.

Revision ID: 2b8ef4710ca9
Revises: b05e7c49a1d3
Create Date: 2024-05-21 17:31:58
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "2b8ef4710ca9"
down_revision: str | Sequence[str] | None = "b05e7c49a1d3"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NOW = sa.text("now()")
ORDER_STATUS = postgresql.ENUM(name="order_status", schema="sales", create_type=False)


def upgrade() -> None:
    op.execute("INSERT INTO integrations.marketplaces (code, name) VALUES ('etsy', 'Etsy')")
    op.create_table(
        "etsy_orders",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("account_id", sa.BigInteger, nullable=False),
        sa.Column("receipt_id", sa.Text, nullable=False),
        sa.Column("status", ORDER_STATUS, server_default="pending", nullable=False),
        sa.Column("buyer_name", sa.Text, nullable=True),
        sa.Column("total", sa.Numeric(12, 2), nullable=False),
        sa.Column("currency", sa.CHAR(3), nullable=False),
        sa.Column("ordered_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("is_gift", sa.Boolean, nullable=True),
        sa.Column("gift_message", sa.Text, nullable=True),
        sa.Column("imported_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="etsy_orders_pkey"),
        sa.UniqueConstraint("receipt_id", name="etsy_orders_receipt_id_key"),
        sa.ForeignKeyConstraint(
            ["account_id"], ["integrations.marketplace_accounts.id"], name="etsy_orders_account_id_fkey"
        ),
        schema="sales",
    )
    op.create_index("etsy_orders_account_id_idx", "etsy_orders", ["account_id"], schema="sales")
    op.create_table(
        "etsy_order_lines",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("order_id", sa.BigInteger, nullable=False),
        sa.Column("listing_id", sa.Text, nullable=False),
        sa.Column("product_id", sa.BigInteger, nullable=True),
        sa.Column("quantity", sa.Integer, nullable=False),
        sa.Column("unit_price", sa.Numeric(12, 2), nullable=False),
        sa.PrimaryKeyConstraint("id", name="etsy_order_lines_pkey"),
        sa.ForeignKeyConstraint(
            ["order_id"], ["sales.etsy_orders.id"], name="etsy_order_lines_order_id_fkey", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["product_id"],
            ["catalog.products.id"],
            name="etsy_order_lines_product_id_fkey",
            ondelete="SET NULL",
        ),
        sa.CheckConstraint("quantity > 0", name="etsy_order_lines_quantity_is_positive"),
        schema="sales",
    )
    op.create_index("etsy_order_lines_order_id_idx", "etsy_order_lines", ["order_id"], schema="sales")


def downgrade() -> None:
    op.drop_table("etsy_order_lines", schema="sales")
    op.drop_table("etsy_orders", schema="sales")
    op.execute("DELETE FROM integrations.marketplaces WHERE code = 'etsy'")
