"""Notice when a revision commits by itself: what it had done until then outlives its failure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_NO_STATEMENT = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"[^\"]*\"|(\$\w*\$).*?\1", re.DOTALL
)  # comments, strings, names, and the bodies of functions
# In the middle of a text only COMMIT: an END there ends a function's body.
_COMMIT = re.compile(r"^\s*(?:COMMIT|END)\b", re.IGNORECASE)
_SPEAKS_OF_ONE = re.compile(r"COMMIT|END", re.IGNORECASE)
_COMMIT_WITHIN = re.compile(r";\s*COMMIT\b", re.IGNORECASE)


def watch_statements(connection: Any, look: Callable[..., None]) -> None:
    """Call ``look`` with (connection, cursor, statement, ...) before each statement."""
    from sqlalchemy import event

    event.listen(connection, "before_cursor_execute", look)


def watch_ends(connection: Any, ahead: Callable[[], Any], undone: Callable[[], None]) -> None:
    """Call ``ahead`` before a commit through SQLAlchemy, or its first phase of two, and ``undone`` at a rollback."""
    from sqlalchemy import event

    event.listen(connection, "commit", lambda _: ahead())
    event.listen(connection, "prepare_twophase", lambda *_: ahead())
    event.listen(connection, "rollback", lambda _: undone())


def watch_commits(connection: Any, committed: Callable[[], None], *, every_statement: bool) -> None:
    """Call ``committed`` whenever what was done on a connection becomes permanent.

    That is at each commit through SQLAlchemy, at ``op.execute("COMMIT")``, and with ``every_statement`` (the
    connection is in autocommit) after each statement.  A COMMIT within a text of several statements counts from
    the start, for what follows it may fail.
    """
    from sqlalchemy import event

    def before(_: Any, __: Any, statement: str, *___: Any) -> None:
        if ";" in statement and _COMMIT_WITHIN.search(_NO_STATEMENT.sub(" ", statement)):
            committed()

    def after(_: Any, __: Any, statement: str, *___: Any) -> None:
        if every_statement or (
            _SPEAKS_OF_ONE.search(statement) and _COMMIT.search(_NO_STATEMENT.sub(" ", statement))
        ):
            committed()

    event.listen(connection, "before_cursor_execute", before)
    event.listen(connection, "after_cursor_execute", after)
    event.listen(connection, "commit", lambda _: committed())
