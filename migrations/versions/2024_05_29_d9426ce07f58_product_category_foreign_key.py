"""Products refer to a category that exists: for new rows from now on, for old rows later.

Revision ID: d9426ce07f58
Revises: 71d3f8ba620c
Create Date: 2024-05-29 14:05:12
"""

from collections.abc import Sequence

from alembic import op

revision: str = "d9426ce07f58"
down_revision: str | Sequence[str] | None = "71d3f8ba620c"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # NOT VALID: the constraint starts at once, without reading the table while its writers wait. It is
    # validated in a revision, and so in a transaction, of its own: here, the scan would happen under the
    # lock that this statement takes, and NOT VALID would have won nothing.
    op.create_foreign_key(
        "products_category_id_fkey",
        "products",
        "categories",
        ["category_id"],
        ["id"],
        source_schema="catalog",
        referent_schema="catalog",
        postgresql_not_valid=True,
    )


def downgrade() -> None:
    op.drop_constraint("products_category_id_fkey", "products", schema="catalog", type_="foreignkey")
