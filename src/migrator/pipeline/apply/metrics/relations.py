"""Relations as a transaction sees and locks them: read from rows, compared, and ordered."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from migrator.pipeline.apply.metrics.measurement import STRENGTH, Size

COLUMNS = (
    "CAST(CAST(c.relnamespace AS pg_catalog.regnamespace) AS pg_catalog.text), CAST(c.relname AS pg_catalog.text),"
    " CAST(c.relkind AS pg_catalog.text), c.relfilenode::bigint"
)
"""The columns of a relation, with ``c`` as its row of pg_class."""

Counted = tuple[int, int, int]
NONE: Counted = (0, 0, 0)


@dataclass(frozen=True)
class Relation:
    """The last known state of a relation: name and kind (empty: it is gone), file, and size in bytes.

    ``modes`` are the transaction's locks on it, ``counted`` the rows that it has written so far.
    """

    name: str
    kind: str
    file: int | None
    size: int | None
    modes: frozenset[str] = frozenset()
    counted: Counted = NONE


NOTHING = Relation("", "", None, None)


def relations(rows: Sequence[Any]) -> dict[int, Relation]:
    """Return the relations in rows that have one for each lock; those of TOAST follow their table."""
    found: dict[int, Relation] = {}
    for _, oid, mode, schema, name, kind, file, *counted, size in rows:
        if oid is None or schema == "pg_toast":
            continue
        if oid in found:
            size = found[oid].size if size is None else size
            found[oid] = replace(found[oid], modes=found[oid].modes | {mode}, size=size)
            continue
        modes = frozenset([mode] if mode else [])
        if name is None:
            found[oid] = replace(NOTHING, modes=modes)
            continue
        place = schema.replace('"', "")
        inserted, updated, deleted = (number or 0 for number in counted)
        found[oid] = Relation(f"{place}.{name}", kind, file, size, modes, (inserted, updated, deleted))
    return found


def strength(modes: Collection[str]) -> int:
    """Return the index of the strongest mode, -1 for none."""
    return max((STRENGTH.index(mode) for mode in modes if mode in STRENGTH), default=-1)


def by_strength(modes: Collection[str]) -> tuple[str, ...]:
    """Return the modes, the strongest first."""
    return tuple(sorted(modes, key=lambda mode: (-strength((mode,)), mode)))


def rewritten(changed: list[tuple[Relation, Relation]]) -> list[Size]:
    """Return the relations with another file now; indexes only if no table has one, because they follow their
    table.
    """
    moved = [(old, new) for old, new in changed if new.file and old.file is not None and old.file != new.file]
    tables = [(old, new) for old, new in moved if new.kind in ("r", "m")]
    return [Size(new.name, old.size, new.size) for old, new in tables or moved]


def sizes(changed: list[tuple[Relation, Relation]], created: list[Relation]) -> list[Size]:
    """Return the sizes of tables and materialized views that were written to; new ones start at zero."""
    kept = [
        Size(new.name or old.name, old.size, new.size if new.kind else 0)
        for old, new in changed
        if (new.kind or old.kind) in ("r", "m") and (new.size is not None or not new.kind)
    ]
    return kept + [Size(new.name, 0, new.size) for new in created if new.kind in ("r", "m")]
