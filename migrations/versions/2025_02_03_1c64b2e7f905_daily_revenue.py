"""Daily revenue, for the dashboard.

Revision ID: 1c64b2e7f905
Revises: 9af80d36c2e1
Create Date: 2025-02-03 10:20:15
"""

from collections.abc import Sequence

from alembic import op

revision: str = "1c64b2e7f905"
down_revision: str | Sequence[str] | None = "9af80d36c2e1"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # UTC, because a materialised view must not depend on the time zone of whoever refreshed it.
    op.execute(
        """
        CREATE MATERIALIZED VIEW sales.daily_revenue AS
        SELECT (o.placed_at AT TIME ZONE 'UTC')::date AS day,
               a.organization_id,
               o.marketplace,
               o.currency,
               count(*) AS orders,
               sum(o.total) AS revenue
        FROM sales.orders AS o
        JOIN integrations.marketplace_accounts AS a ON a.id = o.account_id
        WHERE o.status IN ('paid', 'shipped', 'delivered')
        GROUP BY 1, 2, 3, 4
        """
    )
    # REFRESH MATERIALIZED VIEW CONCURRENTLY asks for a unique index.
    op.create_index(
        "daily_revenue_key",
        "daily_revenue",
        ["organization_id", "day", "marketplace", "currency"],
        unique=True,
        schema="sales",
    )


def downgrade() -> None:
    op.execute("DROP MATERIALIZED VIEW sales.daily_revenue")
