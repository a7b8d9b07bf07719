"""Products get a currency of their own, nullable until every writer fills it.

Revision ID: c82af6013d7e
Revises: 5e90c7d4b28a
Create Date: 2024-08-19 10:33:45
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "c82af6013d7e"
down_revision: str | Sequence[str] | None = "5e90c7d4b28a"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # No default: EUR would be a lie for the British shops, and one that nobody could find again.
    op.add_column("products", sa.Column("currency", sa.CHAR(3), nullable=True), schema="catalog")


def downgrade() -> None:
    op.drop_column("products", "currency", schema="catalog")
