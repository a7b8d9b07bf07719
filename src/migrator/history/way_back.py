"""The way back of a revision as plain SQL, for an image that has never seen the revision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.script import Script


@dataclass(frozen=True)
class WayBack:
    """The SQL of a ``downgrade()``, a statement an item, or None and the ``reason`` why it has no offline form.

    A statement has no semicolon of ours at its end.  ``COMMIT`` and ``BEGIN`` around an ``autocommit_block`` are
    items of their own.  Nothing is said of the version table: whoever runs the statements moves the row.
    """

    statements: tuple[str, ...] | None
    reason: str = ""


def offline_downgrade(script: Script) -> WayBack:
    """Render the revision's ``downgrade()`` without a database and without ``env.py``; never raises."""
    return WayBack(None, f"{script.revision} has not been rendered")
