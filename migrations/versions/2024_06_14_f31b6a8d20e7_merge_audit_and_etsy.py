"""Merge the audit and the Etsy branch, which were released in the same week.

Revision ID: f31b6a8d20e7
Revises: d9426ce07f58, a6c05d1e93f2
Create Date: 2024-06-14 09:15:40
"""

from collections.abc import Sequence

revision: str = "f31b6a8d20e7"
down_revision: str | Sequence[str] | None = ("d9426ce07f58", "a6c05d1e93f2")
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Do nothing: the branches touch different tables, so that they may run in either order."""


def downgrade() -> None:
    """Do nothing: going below this revision opens the two branches again."""
