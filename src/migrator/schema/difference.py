"""The differences between two snapshots of a schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from migrator.schema.patterns import split
from migrator.schema.snapshot import Item, Snapshot


class Difference(NamedTuple):
    """One difference: it is gone (``after`` is None), is new (``before`` is None), or has changed."""

    before: Item | None
    after: Item | None

    @property
    def item(self) -> Item:
        """Return the item of the difference."""
        if self.after is not None:
            return self.after
        if self.before is None:
            raise ValueError("a difference between nothing and nothing")
        return self.before

    @property
    def sentence(self) -> str:
        """Return the difference as text."""
        attributes = self.item.attributes
        if self.after is None:
            return "it is gone" + (f"; it was {attributes}" if attributes else "")
        if self.before is None:
            return "it was not there" + (f"; it is {attributes}" if attributes else "")
        if self.before.attributes != attributes:
            return f"it is {attributes or 'plain'} and was {self.before.attributes or 'plain'}"
        return "its definition changed"


def differences(before: Snapshot, after: Snapshot) -> tuple[Difference, ...]:
    """Compare two snapshots; parts of a table that is gone, or new, are not listed.

    Definitions are compared only if both are from the same database and major version: otherwise
    Postgres may print the same definition differently. Schemas of another application are ignored.
    """
    if before.text == after.text:
        return ()
    exact = before.place == after.place and None not in before.place and before.major == after.major
    hidden = before.hidden | after.hidden
    old, new = (
        {item.key: item for item in snapshot.items if not hidden or schema_of(item) not in hidden}
        for snapshot in (before, after)
    )
    gone = [item for key, item in old.items() if key not in new]
    came = [item for key, item in new.items() if key not in old]
    changed = [
        Difference(item, new[key])
        for key, item in old.items()
        if key in new and _differ(item, new[key], exact)
    ]
    found = [
        *(Difference(item, None) for item in _whole(gone)),
        *changed,
        *(Difference(None, item) for item in _whole(came)),
    ]
    return tuple(found)


def schema_of(item: Item) -> str:
    """Return the schema of an item, or its own name for a schema; empty for an extension."""
    return "" if item.kind == "extension" else split(item.relation or item.name)[0]


def _differ(one: Item, other: Item, exact: bool) -> bool:
    return one.attributes != other.attributes or (exact and one.definition != other.definition)


def _whole(items: Sequence[Item]) -> list[Item]:
    relations = {item.relation for item in items if item.is_relation}
    return [item for item in items if item.is_relation or item.relation not in relations]
