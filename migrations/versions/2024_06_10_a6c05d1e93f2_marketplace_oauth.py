"""OAuth fields of marketplace accounts.

Revision ID: a6c05d1e93f2
Revises: 2b8ef4710ca9
Create Date: 2024-06-10 10:58:03
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "a6c05d1e93f2"
down_revision: str | Sequence[str] | None = "2b8ef4710ca9"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # All nullable, no default: the table is not rewritten, and an account that has not been through the
    # marketplace's consent page yet has nothing to say here.
    for column in (
        sa.Column("marketplace", sa.Text, nullable=True),
        sa.Column("marketplace_account_id", sa.Text, nullable=True, comment="the seller's id over there"),
        sa.Column("access_token", sa.Text, nullable=True, comment="encrypted by the backend"),
        sa.Column("refresh_token", sa.Text, nullable=True, comment="encrypted by the backend"),
        sa.Column("connected_at", sa.DateTime(timezone=True), nullable=True),
    ):
        op.add_column("marketplace_accounts", column, schema="integrations")

    # Until now, only the table that its orders were in told an account's marketplace. An account with orders
    # in two of them would be a mistake; verify.toml looks for one.
    for platform in ("amazon", "ebay", "etsy"):
        op.execute(
            f"""
            UPDATE integrations.marketplace_accounts AS a
            SET marketplace = '{platform}'
            WHERE EXISTS (SELECT FROM sales.{platform}_orders AS o WHERE o.account_id = a.id)
            """
        )

    op.create_foreign_key(
        "marketplace_accounts_marketplace_fkey",
        "marketplace_accounts",
        "marketplaces",
        ["marketplace"],
        ["code"],
        source_schema="integrations",
        referent_schema="integrations",
    )
    op.create_check_constraint(
        "marketplace_accounts_connected_has_token",
        "marketplace_accounts",
        "connected_at IS NULL OR (marketplace_account_id IS NOT NULL AND access_token IS NOT NULL)",
        schema="integrations",
    )
    # Not CONCURRENTLY: a few rows for each seller are indexed in no time, and in the revision's transaction.
    # Unique, so that no two organizations can hold tokens of one and the same seller account.
    op.create_index(
        "marketplace_accounts_marketplace_account_key",
        "marketplace_accounts",
        ["marketplace", "marketplace_account_id"],
        unique=True,
        schema="integrations",
    )


def downgrade() -> None:
    # The tokens go with their columns: sellers have to connect again. Only the backup still has them.
    op.drop_index(
        "marketplace_accounts_marketplace_account_key", "marketplace_accounts", schema="integrations"
    )
    op.drop_constraint(
        "marketplace_accounts_connected_has_token",
        "marketplace_accounts",
        schema="integrations",
        type_="check",
    )
    op.drop_constraint(
        "marketplace_accounts_marketplace_fkey",
        "marketplace_accounts",
        schema="integrations",
        type_="foreignkey",
    )
    for column in ("connected_at", "refresh_token", "access_token", "marketplace_account_id", "marketplace"):
        op.drop_column("marketplace_accounts", column, schema="integrations")
