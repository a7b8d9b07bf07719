"""Index the orders of an account by time, without stopping those who write them.

Revision ID: 47cb5a9e61d8
Revises: e20f97b3ac54
Create Date: 2024-11-18 08:57:31
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "47cb5a9e61d8"
down_revision: str | Sequence[str] | None = "e20f97b3ac54"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # Alone in its revision: an autocommit block first commits whatever came before it. Were there other
    # DDL above, and this failed, that DDL would stay without alembic_version knowing about it.
    with op.get_context().autocommit_block():
        # A concurrent build that is interrupted leaves an index of this name behind, INVALID: kept up to
        # date by each write and used by no query. if_not_exists would find it, be content, and the
        # revision would count as applied. Removing the remains first makes a second try a real one.
        op.drop_index(
            "orders_account_id_placed_at_idx",
            "orders",
            schema="sales",
            postgresql_concurrently=True,
            if_exists=True,
        )
        op.create_index(
            "orders_account_id_placed_at_idx",
            "orders",
            ["account_id", sa.text("placed_at DESC")],
            schema="sales",
            postgresql_concurrently=True,
        )


def downgrade() -> None:
    with op.get_context().autocommit_block():
        # if_exists: this, too, can be interrupted after its work and before the revision is taken back.
        op.drop_index(
            "orders_account_id_placed_at_idx",
            "orders",
            schema="sales",
            postgresql_concurrently=True,
            if_exists=True,
        )
