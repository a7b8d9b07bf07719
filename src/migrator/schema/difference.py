"""What is different between two snapshots of a schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from migrator.schema.patterns import split
from migrator.schema.snapshot import Item, Snapshot


class Difference(NamedTuple):
    """One thing that is gone (``after`` is None), was not there (``before`` is None), or is another one now."""

    before: Item | None
    after: Item | None

    @property
    def item(self) -> Item:
        """Return what it is about."""
        if self.after is not None:
            return self.after
        if self.before is None:
            raise ValueError("a difference between nothing and nothing")
        return self.before

    @property
    def sentence(self) -> str:
        """Say what is different."""
        attributes = self.item.attributes
        if self.after is None:
            return "it is gone" + (f"; it was {attributes}" if attributes else "")
        if self.before is None:
            return "it was not there" + (f"; it is {attributes}" if attributes else "")
        if self.before.attributes != attributes:
            return f"it is {attributes or 'plain'} and was {self.before.attributes or 'plain'}"
        return "its definition changed"


def differences(before: Snapshot, after: Snapshot) -> tuple[Difference, ...]:
    """Compare two snapshots; what is part of a table that is gone, or new, goes without saying.

    Definitions are compared where both were taken in the same database under the same major: elsewhere Postgres may
    write the same ones otherwise.  What is in a schema of another application's counts in neither.
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
    """Return the schema that a thing is in, or is; empty for an extension."""
    return "" if item.kind == "extension" else split(item.relation or item.name)[0]


def _differ(one: Item, other: Item, exact: bool) -> bool:
    return one.attributes != other.attributes or (exact and one.definition != other.definition)


def _whole(items: Sequence[Item]) -> list[Item]:
    relations = {item.relation for item in items if item.is_relation}
    return [item for item in items if item.is_relation or item.relation not in relations]
