"""Accounts and catalog: who sells, and what.

Revision ID: 8c1d5f0a3be7
Revises:
Create Date: 2024-02-05 10:12:44
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "8c1d5f0a3be7"
down_revision: str | Sequence[str] | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

NOW = sa.text("now()")


def upgrade() -> None:
    op.execute("CREATE SCHEMA accounts")
    op.create_table(
        "organizations",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("slug", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("home_currency", sa.CHAR(3), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="organizations_pkey"),
        sa.UniqueConstraint("slug", name="organizations_slug_key"),
        schema="accounts",
    )
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("organization_id", sa.BigInteger, nullable=False),
        sa.Column("email", sa.Text, nullable=False),
        sa.Column("nickname", sa.Text, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="users_pkey"),
        sa.UniqueConstraint("email", name="users_email_key"),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["accounts.organizations.id"],
            name="users_organization_id_fkey",
            ondelete="CASCADE",
        ),
        sa.CheckConstraint("email = lower(email)", name="users_email_is_lower_case"),
        schema="accounts",
    )
    op.create_index("users_organization_id_idx", "users", ["organization_id"], schema="accounts")

    op.execute("CREATE SCHEMA catalog")
    op.create_table(
        "categories",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("parent_id", sa.BigInteger, nullable=True),
        sa.Column("slug", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="categories_pkey"),
        sa.UniqueConstraint("slug", name="categories_slug_key"),
        sa.ForeignKeyConstraint(["parent_id"], ["catalog.categories.id"], name="categories_parent_id_fkey"),
        schema="catalog",
    )
    op.create_table(
        "products",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("organization_id", sa.BigInteger, nullable=False),
        sa.Column("category_id", sa.BigInteger, nullable=True),
        sa.Column("sku", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("price", sa.Numeric(12, 2), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="products_pkey"),
        sa.UniqueConstraint("organization_id", "sku", name="products_organization_id_sku_key"),
        sa.ForeignKeyConstraint(
            ["organization_id"],
            ["accounts.organizations.id"],
            name="products_organization_id_fkey",
            ondelete="CASCADE",
        ),
        sa.CheckConstraint("price >= 0", name="products_price_is_not_negative"),
        schema="catalog",
    )
    op.execute(
        """
        INSERT INTO catalog.categories (slug, name)
        VALUES ('home', 'Home'), ('garden', 'Garden'), ('toys', 'Toys')
        """
    )
    op.execute(
        """
        INSERT INTO catalog.categories (parent_id, slug, name)
        SELECT parent.id, child.slug, child.name
        FROM (VALUES
            ('home', 'kitchen', 'Kitchen'),
            ('home', 'lighting', 'Lighting'),
            ('garden', 'garden-tools', 'Garden tools'),
            ('toys', 'puzzles', 'Puzzles')
        ) AS child (parent_slug, slug, name)
        JOIN catalog.categories AS parent ON parent.slug = child.parent_slug
        """
    )


def downgrade() -> None:
    op.drop_table("products", schema="catalog")
    op.drop_table("categories", schema="catalog")
    # Never CASCADE: a table in here that no revision made is somebody's, and has to stop the downgrade.
    op.execute("DROP SCHEMA catalog")
    op.drop_table("users", schema="accounts")
    op.drop_table("organizations", schema="accounts")
    op.execute("DROP SCHEMA accounts")
