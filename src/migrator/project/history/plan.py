"""What a command will do: the revisions in order, and the version rows before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from migrator.project.downgrade.stored import StoredDowngrade


@dataclass(frozen=True)
class Revision:
    """One revision file: its id, its parents, the first line of its message, and its path."""

    revision: str
    parents: tuple[str, ...]
    message: str
    path: str
    is_head: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan of a command: the revisions in order, and the version rows before and after.

    ``kept`` is the SQL from the ledger for each of them, with the version rows after it, if this image
    is older than the schema and lacks their files. ``one_way`` are those that have no ``downgrade()``,
    or one that only raises.
    """

    kind: str
    destination: str
    revisions: tuple[Revision, ...]
    before: frozenset[str]
    after: frozenset[str]
    baseline: str = ""
    stored_downgrades: tuple[tuple[StoredDowngrade, frozenset[str]], ...] = ()
    one_way: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Tell whether the plan is empty."""
        return not self.revisions and self.before == self.after


def revision_of(script: Any) -> Revision:
    parents = script.down_revision
    return Revision(
        revision=script.revision,
        parents=(parents,) if isinstance(parents, str) else tuple(parents or ()),
        message=(script.doc or "").split("\n")[0].strip(),
        path=str(script.path),
        is_head=bool(script.is_head),
        labels=tuple(sorted(script.branch_labels or ())),
    )


def rows_after(steps: Iterable[Any], before: Iterable[str]) -> frozenset[str]:
    """Return Alembic's version rows after the steps: its own bookkeeping runs without a database."""
    from alembic.runtime.migration import HeadMaintainer

    class Rehearsal(HeadMaintainer):
        def _insert_version(self, version: str) -> None:
            self.heads.add(version)

        def _delete_version(self, version: str) -> None:
            self.heads.discard(version)

        def _update_version(self, from_: str, to_: str) -> None:
            self.heads.discard(from_)
            self.heads.add(to_)

    nothing: Any = None
    maintainer = Rehearsal(nothing, before)
    for step in steps:
        maintainer.update_to_step(step)
    return frozenset(maintainer.heads)
