"""The functions of a revision: whether each is there, and whether its ``downgrade()`` does more than raise."""

from __future__ import annotations

import ast
import linecache
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from migrator.errors import HistoryError

_MOST_CHARACTERS = 200


def runnable(steps: Iterable[Any]) -> list[Any]:
    """Return Alembic's steps.

    Raises :class:`HistoryError` if one has no function to call, or its author excludes a downgrade.
    """
    made = list(steps)
    for step in made:
        file = Path(str(step.revision.path)).name
        if not callable(step.migration_fn):
            raise without_function(file, "upgrade" if step.is_upgrade else "downgrade")
        raises = "" if step.is_upgrade else what_it_raises(step.migration_fn)
        if raises:
            raise HistoryError(
                f"{file} cannot be reverted: its downgrade() is `{raises}`.",
                next_step="restore a backup: `migrator backups`; or write the code that reverts it",
            )
    return made


def without_function(file: str, function: str) -> HistoryError:
    """Return the error for a revision's file that lacks ``upgrade`` or ``downgrade``."""
    restore = "; or restore a backup: `migrator backups`" if function == "downgrade" else ""
    return HistoryError(
        f"{file} has no {function}() to run.",
        next_step=f"write it (`pass`, if there is nothing to do){restore}",
    )


def is_one_way(module: ModuleType) -> bool:
    """Tell whether a revision's file has no ``downgrade()``, or one that only raises."""
    downgrade = getattr(module, "downgrade", None)
    return not callable(downgrade) or bool(what_it_raises(downgrade))


def what_it_raises(function: Any) -> str:
    """Return the ``raise`` at the start of a function, as text; empty if it does something first.

    Authors mark a one-way revision so. The source is read; the function is not called.
    """
    if type(function) is not FunctionType:
        return ""
    code = function.__code__
    last = max((place[1] or 0 for place in code.co_positions()), default=0)
    text = "".join(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 : last])
    if "raise" not in text:  # almost always, and parsing takes longer
        return ""
    try:
        (tree,) = ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError):
        return ""
    body = tree.body if isinstance(tree, ast.FunctionDef) else []
    first = next((item for item in body if not _is_nothing(item)), None)
    return ast.unparse(first)[:_MOST_CHARACTERS] if isinstance(first, ast.Raise) else ""


def _is_nothing(statement: ast.stmt) -> bool:
    """Whether it is a docstring, an ellipsis or ``pass``."""
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass)
