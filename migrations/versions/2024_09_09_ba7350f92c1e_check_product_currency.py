"""Refuse new products without a currency.

Revision ID: ba7350f92c1e
Revises: 094de1b75fc6
Create Date: 2024-09-09 16:11:02
"""

from collections.abc import Sequence

from alembic import op

revision: str = "ba7350f92c1e"
down_revision: str | Sequence[str] | None = "094de1b75fc6"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # SET NOT NULL alone would read the whole table under ACCESS EXCLUSIVE, in front of every reader. A CHECK
    # that is NOT VALID starts without reading anything; the next revision takes it from there.
    op.execute(
        """
        ALTER TABLE catalog.products
            ADD CONSTRAINT products_currency_is_set CHECK (currency IS NOT NULL) NOT VALID
        """
    )


def downgrade() -> None:
    op.drop_constraint("products_currency_is_set", "products", schema="catalog", type_="check")
