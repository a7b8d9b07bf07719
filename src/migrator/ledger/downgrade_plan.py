"""Choose which downgrades of the ledger to run for ``-1``, ``base`` or a revision that this image lacks.

:mod:`.queries` reads them, and ``pipeline/apply/downgrade_from_ledger.py`` runs them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Sequence

from migrator.errors import HistoryError
from migrator.project.downgrade.stored import StoredDowngrade


def choose(
    ways: Sequence[StoredDowngrade], rows: Collection[str], destination: str, heads: Collection[str]
) -> tuple[StoredDowngrade, ...]:
    """Return the revisions to revert, newest first, so that the database ends at ``destination``.

    That may be ``base``, ``-N``, a revision or its unique prefix, or ``head`` for this image's
    ``heads``. Raises :class:`HistoryError` if the ledger does not have all the SQL.
    """
    if destination == "base":
        chosen = list(ways)
    elif re.fullmatch(r"-\d+", destination):
        if len(rows) > 1:
            raise HistoryError(
                f"The database is at several heads ({', '.join(sorted(rows))}), so {destination} is "
                "ambiguous.",
                next_step="name the revision to go back to",
            )
        chosen = list(ways[: -int(destination)])
    else:
        wanted = heads if destination in {"head", "heads"} else [_resolve(ways, destination)]
        stay = _ancestors(ways, wanted)
        beyond = set(wanted) - {way.revision for way in ways}
        if beyond:
            raise _unknown(", ".join(sorted(beyond)))
        related = _descendants(ways, wanted) if destination not in {"head", "heads"} else None
        chosen = [
            way for way in ways if way.revision not in stay and (related is None or way.revision in related)
        ]
    missing = [
        f"{way.revision} ({way.reason or 'not migrated by migrator'})"
        for way in chosen
        if way.statements is None
    ]
    if missing:
        raise HistoryError(
            f"The ledger has no SQL to revert {'; '.join(missing)}.",
            next_step="downgrade with an image that has these revisions, or restore a backup: `migrator backups`",
        )
    return tuple(chosen)


def refuse_other_paths(chosen: Iterable[StoredDowngrade], path: str) -> None:
    """Raise :class:`HistoryError` if a revision was applied with another search_path than the user's
    ``path``.

    Names without a schema would mean other tables, and no row may set a session's path.
    """
    there = _schemas(path)
    other = next((way for way in chosen if way.search_path and _schemas(way.search_path) != there), None)
    if other is None:
        return
    option = shlex.quote("-c search_path=" + other.search_path.replace("\\", "\\\\").replace(" ", "\\ "))
    raise HistoryError(
        f"{other.revision} was applied with the search_path {other.search_path}, and here it is {path}: "
        "the names in its SQL may mean other tables.",
        next_step=f"if that path is right: PGOPTIONS={option}, and run the same command again; else downgrade "
        "with an image that has the revision",
    )


def _schemas(path: str) -> list[str]:
    return [name.strip() for name in path.split(",")]


def rows_after(
    ways: Sequence[StoredDowngrade], chosen: Iterable[StoredDowngrade], rows: Collection[str]
) -> list[frozenset[str]]:
    """Return the version rows after each step; raises :class:`HistoryError` if a step does not fit."""
    now = frozenset(rows)
    steps = []
    for way in chosen:
        gone = frozenset(way.rows_after) - frozenset(way.rows_before)
        if not gone <= now:
            raise HistoryError(
                f"{way.revision} cannot be reverted: the database is at {', '.join(sorted(now)) or 'base'}.",
                next_step="downgrade with an image that has the revision",
            )
        back = frozenset(way.rows_before) - frozenset(way.rows_after)
        rest = now - gone
        implied = _ancestors(ways, rest)
        now = rest | {row for row in back if row not in implied}
        steps.append(now)
    return steps


def _resolve(ways: Sequence[StoredDowngrade], name: str) -> str:
    exact = [way.revision for way in ways if way.revision == name]
    found = exact or [way.revision for way in ways if way.revision.startswith(name)]
    if len(found) != 1:
        raise _unknown(name)
    return found[0]


def _unknown(name: str) -> HistoryError:
    return HistoryError(
        f"The ledger has no applied revision {name!r}.",
        next_step="`migrator ledger` lists the applied revisions",
    )


def _ancestors(ways: Sequence[StoredDowngrade], names: Iterable[str]) -> set[str]:
    parents = {way.revision: (*way.parents, *way.depends_on) for way in ways}
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += parents.get(name, ())
    return seen


def _descendants(ways: Sequence[StoredDowngrade], names: Iterable[str]) -> set[str]:
    start = set(names)
    return {way.revision for way in ways if start & _ancestors(ways, [way.revision])}
