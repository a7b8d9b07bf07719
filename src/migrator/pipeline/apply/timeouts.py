"""Which timeouts the statements get on the connection that ``env.py`` opened."""

from __future__ import annotations

import re
from typing import Any

# A comment or a string that contains it is harmless: the timeouts are lifted only for that one statement.
_CONCURRENTLY = re.compile(
    r"^\s*(?:CREATE|DROP|REINDEX|ALTER|REFRESH)\b.*\bCONCURRENTLY\b", re.IGNORECASE | re.DOTALL
)


def lift_timeouts_for_concurrent_builds(connection: Any) -> None:
    """Let ``CREATE INDEX CONCURRENTLY`` and its like wait as long as they need.

    They wait for every older transaction to end, and ``lock_timeout`` counts that as a wait for a lock.
    A timeout would leave an INVALID index. Their own lock, SHARE UPDATE EXCLUSIVE, blocks no reader and
    no writer, so the wait is free.
    https://www.postgresql.org/docs/current/sql-createindex.html#SQL-CREATEINDEX-CONCURRENTLY
    """
    from sqlalchemy import event

    kept: dict[str, str] = {}

    def before(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        if not _CONCURRENTLY.match(statement):
            return
        for name in ("lock_timeout", "statement_timeout"):
            cursor.execute(f"SHOW {name}")
            kept[name] = cursor.fetchone()[0]
            cursor.execute(f"SET {name} = 0")

    def after(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        while kept and _CONCURRENTLY.match(statement):
            name, value = kept.popitem()
            cursor.execute(f"SET {name} = '{value}'")

    event.listen(connection, "before_cursor_execute", before)
    event.listen(connection, "after_cursor_execute", after)
