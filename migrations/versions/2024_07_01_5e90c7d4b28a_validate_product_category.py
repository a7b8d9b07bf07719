"""Prove that old products, too, refer to a category that exists.

Revision ID: 5e90c7d4b28a
Revises: f31b6a8d20e7
Create Date: 2024-07-01 13:22:17
"""

from collections.abc import Sequence

from alembic import op

revision: str = "5e90c7d4b28a"
down_revision: str | Sequence[str] | None = "f31b6a8d20e7"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # The constraint has refused new orphans since d9426ce07f58, so that this finds the last of them.
    op.execute(
        """
        UPDATE catalog.products AS p
        SET category_id = NULL
        WHERE p.category_id IS NOT NULL
          AND NOT EXISTS (SELECT FROM catalog.categories AS c WHERE c.id = p.category_id)
        """
    )
    # VALIDATE reads the table beside its readers and writers: SHARE UPDATE EXCLUSIVE.
    op.execute("ALTER TABLE catalog.products VALIDATE CONSTRAINT products_category_id_fkey")


def downgrade() -> None:
    # Nothing un-validates a constraint; it is made anew, in one statement, so that no gap opens between.
    op.execute(
        """
        ALTER TABLE catalog.products
            DROP CONSTRAINT products_category_id_fkey,
            ADD CONSTRAINT products_category_id_fkey
                FOREIGN KEY (category_id) REFERENCES catalog.categories (id) NOT VALID
        """
    )
