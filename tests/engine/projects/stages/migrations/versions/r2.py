"""when items were done"""

from alembic import op

revision = "r2"
down_revision = "r1"


def upgrade():
    op.execute("ALTER TABLE items ADD COLUMN done timestamptz")
    op.execute("SELECT pg_advisory_xact_lock_shared(4711, 1)")


def downgrade():
    op.execute("ALTER TABLE items DROP COLUMN done")
