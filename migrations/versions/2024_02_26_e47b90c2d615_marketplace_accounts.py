"""Marketplaces, and the accounts that our sellers have there.

Revision ID: e47b90c2d615
Revises: 8c1d5f0a3be7
Create Date: 2024-02-26 15:40:09
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "e47b90c2d615"
down_revision: str | Sequence[str] | None = "8c1d5f0a3be7"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NOW = sa.text("now()")


def upgrade() -> None:
    op.execute("CREATE SCHEMA integrations")
    op.create_table(
        "marketplaces",
        sa.Column("code", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("code", name="marketplaces_pkey"),
        schema="integrations",
    )
    op.create_table(
        "marketplace_accounts",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("organization_id", sa.BigInteger, nullable=False),
        sa.Column("display_name", sa.Text, nullable=False),
        sa.Column("country", sa.CHAR(2), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="marketplace_accounts_pkey"),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["accounts.organizations.id"],
            name="marketplace_accounts_organization_id_fkey",
            ondelete="CASCADE",
        ),
        schema="integrations",
    )
    op.create_index(
        "marketplace_accounts_organization_id_idx",
        "marketplace_accounts",
        ["organization_id"],
        schema="integrations",
    )
    op.execute(
        "INSERT INTO integrations.marketplaces (code, name) VALUES ('amazon', 'Amazon'), ('ebay', 'eBay')"
    )


def downgrade() -> None:
    op.drop_table("marketplace_accounts", schema="integrations")
    op.drop_table("marketplaces", schema="integrations")
    op.execute("DROP SCHEMA integrations")
