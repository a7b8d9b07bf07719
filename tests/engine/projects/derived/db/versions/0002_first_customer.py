"""The first customer, with an id of the kind that the application makes."""

import sqlalchemy as sa
from alembic import op
from ulid import ULID

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    customers = sa.table("customers", sa.column("id"), sa.column("name"))
    # Which SQLAlchemy ran is kept as data, for the test to see that the application's own pin was used.
    op.bulk_insert(customers, [{"id": str(ULID()), "name": f"SQLAlchemy {sa.__version__}"}])


def downgrade() -> None:
    op.execute("DELETE FROM customers")
