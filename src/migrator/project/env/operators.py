"""Alembic's own statements, with operators that no schema in the user's search_path can replace."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

_LOOK_FOR_TABLE = "SELECT pg_catalog.pg_class.relname "
_WRITE_VERSION = re.compile(
    r"(?:UPDATE|DELETE FROM) [^']+ (?:SET version_num='[^']*' )?WHERE [^']+\.version_num = '[^']*'"
)
_COMPARISONS = {" = ": " OPERATOR(pg_catalog.=) ", " != ": " OPERATOR(pg_catalog.<>) "}


def qualified(statement: str) -> str:
    """Return one of Alembic's own statements with its operators in pg_catalog; return any other unchanged.

    Alembic reads and writes the version table with operators that it leaves to the search_path. A role
    that may create objects in one of its schemas may have made ``=`` for ``"char"`` and text: an exact
    match wins.
    """
    if statement.startswith(_LOOK_FOR_TABLE) or _WRITE_VERSION.fullmatch(statement.strip()):
        for bare, named in _COMPARISONS.items():
            statement = statement.replace(bare, named)
    return statement


@contextlib.contextmanager
def operators_of_the_server() -> Iterator[None]:
    """Within the block, keep foreign operators out of Alembic's own statements, on any connection of
    ``env.py``.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def before(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return qualified(statement), parameters

    event.listen(Engine, "before_cursor_execute", before, retval=True)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", before)
