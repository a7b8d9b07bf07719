"""Backfill the currency of products from their organization.

Revision ID: 094de1b75fc6
Revises: c82af6013d7e
Create Date: 2024-09-02 09:48:26
"""

from collections.abc import Sequence

from alembic import op

revision: str = "094de1b75fc6"
down_revision: str | Sequence[str] | None = "c82af6013d7e"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # One UPDATE would hold the row locks of the whole table to its end. Each batch commits by itself, which
    # needs to be outside of a transaction. Killed half way, the revision is not recorded and runs again:
    # `currency IS NULL` lets it go on where it was. The loop is SQL, so that `upgrade --sql` has it too.
    with op.get_context().autocommit_block():
        op.execute(
            """
            DO $$
            DECLARE
                batch CONSTANT integer := 5000;
                done_to bigint := 0;
                page_end bigint;
            BEGIN
                LOOP
                    SELECT max(page.id) INTO page_end
                    FROM (
                        SELECT id FROM catalog.products WHERE id > done_to ORDER BY id LIMIT batch
                    ) AS page;
                    EXIT WHEN page_end IS NULL;

                    UPDATE catalog.products AS p
                    SET currency = o.home_currency
                    FROM accounts.organizations AS o
                    WHERE o.id = p.organization_id
                      AND p.id > done_to AND p.id <= page_end
                      AND p.currency IS NULL;
                    COMMIT;
                    done_to := page_end;
                END LOOP;
            END
            $$
            """
        )


def downgrade() -> None:
    """Keep the values: what was filled in here looks like what a seller typed, and the column is nullable."""
