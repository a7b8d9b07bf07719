"""Notice when a revision commits by itself: what it had done until then outlives its failure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# In the middle of a text only COMMIT: an END there ends a function's body.
_COMMIT = re.compile(r"^\s*(?:COMMIT|END)\b|;\s*COMMIT\b", re.IGNORECASE)


def watch_commits(connection: Any, committed: Callable[[], None], *, every_statement: bool) -> None:
    """Call ``committed`` whenever what was done on a connection becomes permanent.

    That is at each commit through SQLAlchemy, at ``op.execute("COMMIT")``, and with ``every_statement`` (the
    connection is in autocommit) after each statement.
    """
    from sqlalchemy import event

    def after(_: Any, __: Any, statement: str, *___: Any) -> None:
        if every_statement or _COMMIT.search(statement):
            committed()

    event.listen(connection, "after_cursor_execute", after)
    event.listen(connection, "commit", lambda _: committed())
