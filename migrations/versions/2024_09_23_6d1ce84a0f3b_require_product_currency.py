"""Make the currency of products NOT NULL.

Revision ID: 6d1ce84a0f3b
Revises: ba7350f92c1e
Create Date: 2024-09-23 11:29:54
"""

from collections.abc import Sequence

from alembic import op

revision: str = "6d1ce84a0f3b"
down_revision: str | Sequence[str] | None = "ba7350f92c1e"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # The scan happens here, beside readers and writers. A valid CHECK is then proof enough for SET NOT NULL
    # (since PostgreSQL 12), which takes its ACCESS EXCLUSIVE lock only for an instant.
    op.execute("ALTER TABLE catalog.products VALIDATE CONSTRAINT products_currency_is_set")
    op.alter_column("products", "currency", nullable=False, schema="catalog")
    op.drop_constraint("products_currency_is_set", "products", schema="catalog", type_="check")


def downgrade() -> None:
    op.execute(
        """
        ALTER TABLE catalog.products
            ADD CONSTRAINT products_currency_is_set CHECK (currency IS NOT NULL) NOT VALID
        """
    )
    op.alter_column("products", "currency", nullable=True, schema="catalog")
