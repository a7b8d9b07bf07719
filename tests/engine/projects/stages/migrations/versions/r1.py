"""items"""

from alembic import op

revision = "r1"
down_revision = None


def upgrade():
    op.execute("CREATE TABLE items (id int PRIMARY KEY, note text NOT NULL)")
    op.execute("INSERT INTO items SELECT n, md5(n::text) FROM generate_series(1, 5000) AS n")


def downgrade():
    op.execute("DROP TABLE items")
