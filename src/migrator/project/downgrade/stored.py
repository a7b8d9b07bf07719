"""A downgrade as the ledger has it: a value, for an image that does not have the revision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredDowngrade:
    """How to revert one revision without its file: SQL statements, or the reason why there are none.

    ``search_path`` and ``role`` are those of the upgrade. They are never applied: a row sets no role
    and no path.
    """

    revision: str
    message: str
    parents: tuple[str, ...]
    depends_on: tuple[str, ...]
    rows_before: tuple[str, ...]
    rows_after: tuple[str, ...]
    statements: tuple[str, ...] | None
    reason: str
    image_version: str
    search_path: str
    role: str
