"""Explain why Alembic cannot plan: several heads, an ambiguous number of steps, overlapping version rows."""

from __future__ import annotations

import contextlib
import re
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.errors import HistoryError
from migrator.project.history.functions import without_function

if TYPE_CHECKING:
    from migrator.project.history.history import History

_OVERLAP = re.compile(r"Requested revision (\S+) overlaps with other requested revisions (.+)")


@contextlib.contextmanager
def planning_errors(
    history: History, destination: str = "", kind: str = "", current: Sequence[str] = ()
) -> Iterator[None]:
    """Turn Alembic's errors about revisions into :class:`HistoryError`."""
    from alembic.util import CommandError

    try:
        yield
    except CommandError as error:
        text = " ".join(str(error).split()).rstrip(".")
        if "Multiple head" in text or "multiple heads" in text:
            hint = history.branch_hint("")
            raise HistoryError(
                f"The history has several heads ({', '.join(history.heads)}), so "
                f"{destination or 'head'!r} is ambiguous.",
                next_step="merge them (`migrator merge heads -m ...`), or run `migrator upgrade heads`"
                + (f"; {hint}" if hint else ""),
            ) from error
        if "Ambiguous" in text and kind:
            raise _ambiguous(history, destination, kind, current) from error
        next_step = "`migrator history` lists the revisions"
        if (overlap := _OVERLAP.match(text)) and {overlap[1], *overlap[2].split(", ")} <= set(current):
            superfluous = ", ".join(f"'{id}'" for id in overlap[2].split(", "))
            next_step = (
                f"the version table has a revision and its ancestor: delete the ancestor's row (WHERE version_num "
                f"IN ({superfluous})), if {overlap[1]} was applied"
            )
        raise HistoryError(f"{text}.", next_step=next_step) from error
    except AssertionError as error:  # Alembic's own, for a destination that it cannot use
        if not _raised_by_alembic(error):
            raise
        raise HistoryError(
            f"{destination!r} leads to no revision from {', '.join(current) or 'base'}.",
            next_step="`migrator history` lists the revisions",
        ) from error
    except AttributeError as error:  # Alembic takes both functions from the module when it makes the steps
        if isinstance(error.obj, types.ModuleType) and error.name in {"upgrade", "downgrade"}:
            raise without_function(Path(str(error.obj.__file__)).name, error.name) from error
        raise


def _ambiguous(history: History, destination: str, kind: str, current: Sequence[str]) -> HistoryError:
    """Return the error for a number of steps with more than one path, and a command for one of them."""
    label, named, number = re.fullmatch(r"(?:(.*)@)?(.*?)([+-]\d+)", destination).groups()  # type: ignore[union-attr]
    start = [item.revision for item in history.find(named)] if named else list(current)
    if len(start) > 1:
        place, ways = "the database is at several heads", start
        follow = (
            next((name for name in ways if history.alembic_revision(name).nextrev), ways[0])
            + f"@{number[0]}1"
        )
    else:
        place, ways = _fork(history, start[0] if start else "", up=number[0] == "+", label=label)
        follow = ways[0]
    return HistoryError(
        f"{destination} is ambiguous: {place} ({', '.join(ways)}).",
        next_step=f"name one of them, such as `migrator {kind} {follow}`",
    )


def _fork(history: History, name: str, *, up: bool, label: str | None) -> tuple[str, list[str]]:
    """Return where the history branches (or was merged) next from a revision, and into which revisions."""
    while True:
        script = history.alembic_revision(name) if name else None
        if script is None:
            ways = sorted(history.script.get_bases())
        else:
            ways = sorted(script.nextrev) if up else list(script._versioned_down_revisions)
        if label and up:
            lineage: Any = history.script.revision_map
            ways = [item.revision for item in lineage.filter_for_lineage(lineage.get_revisions(ways), label)]
        if len(ways) != 1:
            return f"the history {'branches' if up else 'was merged'} at {name or 'base'}", ways or [name]
        name = ways[0]


def _raised_by_alembic(error: BaseException) -> bool:
    """Tell whether a module of Alembic raised this, and not one of ours or of the project."""
    import alembic

    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(alembic.__file__).parent)
