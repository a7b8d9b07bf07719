"""The day on which an invoice was paid."""

import sqlalchemy as sa
from alembic import op

revision = "b93d20f7c615"
down_revision = "a4c8e1f05b62"
branch_labels = None
depends_on = None


def upgrade():
    op.add_column("invoices", sa.Column("paid_on", sa.Date()))


def downgrade():
    op.drop_column("invoices", "paid_on")
