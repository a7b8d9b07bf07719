"""Explain an unreadable history: which file, and which line."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from migrator.errors import HistoryError
from migrator.project.loading import remedy


def unreadable(
    error: BaseException, said: Sequence[str], before: BaseException | None = None
) -> HistoryError:
    """Name the file that cannot be imported, the parent that is missing, or the revisions in a cycle.

    ``before`` is what ``env.py`` raised, which was loaded first.
    """
    from alembic.script.revision import CycleDetected

    if isinstance(error, CycleDetected):
        return HistoryError(
            f"The revisions form a cycle: {', '.join(error.revisions)}.",
            next_step="fix down_revision (or depends_on) in one of their files",
        )
    missing = [message for message in said if "is not present" in message]
    if isinstance(error, KeyError) and missing:
        return HistoryError(
            f"A parent is missing: {missing[0]}.",
            next_step="add the missing file to the image, or fix down_revision in the file that names it",
        )
    if isinstance(error, KeyError) and _raised_by_the_graph(error):
        return HistoryError(
            f"A dependency is missing: a revision's depends_on names {error.args[0]!r}, which no file has.",
            next_step="add the missing file to the image, or fix depends_on in the file that names it",
        )
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "versions" in Path(frame.filename).parts] or list(frames)
        place = f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
    first = f" Before that, env.py failed: {describe(before)}." if before is not None else ""
    return HistoryError(
        f"A revision file does not import: {place}: {describe(error)}.{first}",
        next_step=remedy(error, f"fix {place.split(',')[0]}, or add its imports to the image"),
    )


def describe(error: BaseException) -> str:
    """Return an error's class and text on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def raised_by_a_file(error: BaseException) -> bool:
    """Tell whether a revision file raised this during its import; other imports before it may fix that."""
    return not isinstance(error, SyntaxError) and not _raised_by_the_graph(error)


def _raised_by_the_graph(error: BaseException) -> bool:
    """Tell whether Alembic's own graph raised this, and not a revision file."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).parts[-3:] == ("alembic", "script", "revision.py")
