"""Invoices."""

import sqlalchemy as sa
from alembic import op

revision = "a4c8e1f05b62"
down_revision = None
branch_labels = None
depends_on = None


def upgrade():
    op.create_table(
        "invoices",
        sa.Column("number", sa.Text(), primary_key=True),
        sa.Column("total", sa.Numeric(12, 2), nullable=False),
        sa.CheckConstraint("total >= 0", name="invoices_total_check"),
    )
    op.execute("INSERT INTO invoices (number, total) VALUES ('2025-0001', 119.00)")


def downgrade():
    op.drop_table("invoices")
