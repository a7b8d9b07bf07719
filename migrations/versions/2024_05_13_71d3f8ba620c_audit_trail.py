"""Audit trail of users, and updated_at kept by the database.

Revision ID: 71d3f8ba620c
Revises: b05e7c49a1d3
Create Date: 2024-05-13 11:47:20
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "71d3f8ba620c"
down_revision: str | Sequence[str] | None = "b05e7c49a1d3"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TOUCHED_TABLES = (
    "accounts.organizations",
    "accounts.users",
    "catalog.products",
    "integrations.marketplace_accounts",
    "sales.amazon_orders",
    "sales.ebay_orders",
)


def upgrade() -> None:
    op.execute("CREATE SCHEMA audit")
    op.create_table(
        "changes",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("changed_by", sa.Text, server_default=sa.text("CURRENT_USER"), nullable=False),
        sa.Column("relation", sa.Text, nullable=False),
        sa.Column("row_id", sa.BigInteger, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("before", postgresql.JSONB, nullable=True),
        sa.Column("after", postgresql.JSONB, nullable=True),
        sa.PrimaryKeyConstraint("id", name="changes_pkey"),
        sa.CheckConstraint("action IN ('INSERT', 'UPDATE', 'DELETE')", name="changes_action_is_known"),
        schema="audit",
    )
    op.create_index("changes_relation_row_id_idx", "changes", ["relation", "row_id"], schema="audit")

    op.execute(
        """
        CREATE FUNCTION audit.touch_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NEW.updated_at := now();
            RETURN NEW;
        END
        $$
        """
    )
    for table in TOUCHED_TABLES:
        # WHEN: an import that writes the same row again is not a change, and must not look like one.
        op.execute(
            f"""
            CREATE TRIGGER touch_updated_at BEFORE UPDATE ON {table}
            FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
            EXECUTE FUNCTION audit.touch_updated_at()
            """
        )

    # Only users: an audit trail of marketplace_accounts would keep copies of credentials for ever.
    op.execute(
        """
        CREATE FUNCTION audit.record_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                INSERT INTO audit.changes (relation, row_id, action, after)
                VALUES (TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME, NEW.id, TG_OP, to_jsonb(NEW));
            ELSIF TG_OP = 'UPDATE' THEN
                INSERT INTO audit.changes (relation, row_id, action, before, after)
                VALUES (TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME, NEW.id, TG_OP, to_jsonb(OLD), to_jsonb(NEW));
            ELSE
                INSERT INTO audit.changes (relation, row_id, action, before)
                VALUES (TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME, OLD.id, TG_OP, to_jsonb(OLD));
            END IF;
            RETURN NULL;
        END
        $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER record_change AFTER INSERT OR UPDATE OR DELETE ON accounts.users
        FOR EACH ROW EXECUTE FUNCTION audit.record_change()
        """
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER record_change ON accounts.users")
    for table in reversed(TOUCHED_TABLES):
        op.execute(f"DROP TRIGGER touch_updated_at ON {table}")
    op.execute("DROP FUNCTION audit.record_change()")
    op.execute("DROP FUNCTION audit.touch_updated_at()")
    op.drop_table("changes", schema="audit")
    op.execute("DROP SCHEMA audit")
