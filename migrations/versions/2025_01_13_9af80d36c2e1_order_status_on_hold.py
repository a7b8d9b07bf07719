"""Orders can be on hold while their marketplace reviews the payment.

Revision ID: 9af80d36c2e1
Revises: 47cb5a9e61d8
Create Date: 2025-01-13 14:36:48
"""

from collections.abc import Sequence

from alembic import op

revision: str = "9af80d36c2e1"
down_revision: str | Sequence[str] | None = "47cb5a9e61d8"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Allowed in a transaction since PostgreSQL 12, but nothing may use the value before it is committed. So
    # whatever does (a default, a partial index, an UPDATE) belongs in a later revision.
    op.execute("ALTER TYPE sales.order_status ADD VALUE 'on_hold' AFTER 'pending'")


def downgrade() -> None:
    # Postgres cannot take a value out of an enum, so the type is built again without it. The older code
    # knows one state before payment; which orders were on hold stays on record in the audit trail.
    op.execute("LOCK TABLE sales.orders IN ACCESS EXCLUSIVE MODE")
    op.execute(
        """
        INSERT INTO audit.changes (relation, row_id, action, before, after)
        SELECT 'sales.orders', id, 'UPDATE', '{"status": "on_hold"}', '{"status": "pending"}'
        FROM sales.orders
        WHERE status = 'on_hold'
        """
    )
    op.execute("ALTER TYPE sales.order_status RENAME TO order_status_with_on_hold")
    op.execute(
        """
        CREATE TYPE sales.order_status AS ENUM
            ('pending', 'paid', 'shipped', 'delivered', 'refunded', 'cancelled')
        """
    )
    # The default is a value of the old type and does not convert by itself.
    op.execute(
        """
        ALTER TABLE sales.orders
            ALTER COLUMN status DROP DEFAULT,
            ALTER COLUMN status TYPE sales.order_status
                USING (CASE status WHEN 'on_hold' THEN 'pending' ELSE status::text END)::sales.order_status,
            ALTER COLUMN status SET DEFAULT 'pending'
        """
    )
    op.execute("DROP TYPE sales.order_status_with_on_hold")
