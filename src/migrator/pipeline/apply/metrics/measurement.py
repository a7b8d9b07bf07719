"""The measurement of one revision, as values for the report and the ledger."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.runtime.logs import MASK, redact

MOST = 100
"""How many statements, relations and locks of one revision are kept; the rest is only counted."""

_LONGEST = 500  # characters of a statement
_LOOKED_AT = 4_000  # characters of a statement that are read for those
_PASSWORD = re.compile(r"(\bPASSWORD\s+E?)'(?:[^']|'')*'?", re.IGNORECASE)

STRENGTH = (
    *("AccessShareLock", "RowShareLock", "RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock"),
    *("ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock"),
)
"""Lock modes from the weakest: https://www.postgresql.org/docs/current/explicit-locking.html"""


def shown(statement: str) -> str:
    """Return a statement in one line of at most 500 characters, without what may be a secret."""
    text = redact(statement[:_LOOKED_AT])
    if "PASSWORD" in text.upper():
        text = _PASSWORD.sub(rf"\1'{MASK}'", text)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


@dataclass(frozen=True)
class Statement:
    """One statement: its text as :func:`shown`, its duration, and the number of rows that the driver gave."""

    text: str
    seconds: float
    rows: int | None


@dataclass(frozen=True)
class Lock:
    """The locks held on one relation at the end of the revision, the strongest first."""

    relation: str
    modes: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """The bytes of a relation (without TOAST and indexes) before and after; None where they are not known."""

    relation: str
    before: int | None
    after: int | None


@dataclass(frozen=True)
class Rows:
    """The rows of a table that were inserted, updated and deleted."""

    relation: str
    inserted: int
    updated: int
    deleted: int


@dataclass(frozen=True)
class Measured:
    """The measurement of one revision; ``transactional`` is False if something was committed within it.

    Then the locks are those of the last transaction only, and the rows come from the driver.
    ``statement_count`` and ``statement_seconds`` cover all statements, ``statements`` the first of
    them. ``sizes`` are those of the relations that it named, wrote to or rewrote; ``rewritten`` those
    with a new file.
    """

    seconds: float = 0.0
    transactional: bool = True
    statement_count: int = 0
    statement_seconds: float = 0.0
    statements: tuple[Statement, ...] = ()
    locks: tuple[Lock, ...] = ()
    rewritten: tuple[Size, ...] = ()
    rows: tuple[Rows, ...] = ()
    created: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data of bounded size; ``cut`` counts the omitted entries."""
        cut: dict[str, int] = {}

        def most(name: str, items: Sequence[Any]) -> list[Any]:
            if len(items) > MOST:
                cut[name] = len(items) - MOST
            return list(items[:MOST])

        document: dict[str, Any] = {
            "seconds": round(self.seconds, 6),
            "transactional": self.transactional,
            "statement_count": self.statement_count,
            "statement_seconds": round(self.statement_seconds, 6),
            "statements": [
                {"sql": item.text, "seconds": round(item.seconds, 6), "rows": item.rows}
                for item in self.statements[:MOST]
            ],
            "locks": {item.relation: list(item.modes) for item in most("locks", self.locks)},
            "rewritten": _sizes(most("rewritten", self.rewritten)),
            "rows": {
                item.relation: {
                    "inserted": item.inserted,
                    "updated": item.updated,
                    "deleted": item.deleted,
                }
                for item in most("rows", self.rows)
            },
            "created": most("created", self.created),
            "dropped": most("dropped", self.dropped),
            "sizes": _sizes(most("sizes", self.sizes)),
        }
        if self.statement_count > MOST:
            cut["statements"] = self.statement_count - MOST
        if cut:
            document["cut"] = cut
        return document


def _sizes(items: Sequence[Size]) -> dict[str, Mapping[str, int | None]]:
    return {item.relation: {"bytes_before": item.before, "bytes_after": item.after} for item in items}
