"""Know when the migration's connection waits for the server, and end that wait where no answer will come.

The calls of the driver itself are wrapped, on the dialect of the one engine: SQLAlchemy has no event for the end of
a commit or of a failed statement.  What a revision runs on a raw cursor is not seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import struct
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

from migrator.runtime.deadlines import keep_alive, shut_down

_ON_A_CURSOR = ("do_execute", "do_executemany", "do_execute_no_params")
_ON_THE_CONNECTION = ("do_commit", "do_rollback")


class DriverCalls:
    """The calls of the driver on one connection: ``since`` when one is under way (time.monotonic()), or None."""

    def __init__(self, connection: Any) -> None:
        self.since: float | None = None
        self.failed_after = 0.0
        """How many seconds the longest call took that failed."""
        self._leaving = threading.Lock()
        self._fairy = connection.connection
        self._descriptor, self._inode = _socket_of(self._fairy)
        if self._descriptor >= 0:
            keep_alive(self._descriptor)
        for name in _ON_A_CURSOR:
            self._wrap(connection.dialect, name, lambda arguments: self._executes(arguments[-1]))
        for name in _ON_THE_CONNECTION:
            self._wrap(connection.dialect, name, lambda arguments: arguments[0] is self._fairy)

    def ask(self, sql: str) -> Any:
        """Run a statement on a cursor of the driver's and return its first value, if it has one; no parameters.

        Past SQLAlchemy, whose events, caches and results take several times as long as a small question itself.
        """
        cursor = self._fairy.cursor()
        try:
            self.since = time.monotonic()
            try:
                cursor.execute(sql)
                row = cursor.fetchone() if cursor.description else None
            finally:
                self._back()
        finally:
            cursor.close()
        return row[0] if row else None

    @property
    def unsent(self) -> int:
        """Return how many bytes the peer has not acknowledged yet; a statement that is still on its way changes it."""
        answer = b"\0\0\0\0"
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(self._descriptor, termios.TIOCOUTQ, answer)
        return int(struct.unpack("i", answer)[0])

    def end(self) -> bool:
        """Shut the socket down, so that the call returns with an error; False where none is under way."""
        with self._leaving:
            if self.since is None or _inode(self._descriptor) != self._inode:
                return False
            shut_down(self._descriptor)
            return True

    def _executes(self, context: Any) -> bool:
        """Whether a statement is this connection's, by its context, the last argument of the calls on a cursor.

        https://docs.sqlalchemy.org/en/20/core/internals.html#sqlalchemy.engine.ExecutionContext.root_connection
        """
        source = getattr(context, "root_connection", None)
        return source is not None and source.connection is self._fairy

    def _wrap(self, dialect: Any, name: str, ours: Callable[[tuple[Any, ...]], bool]) -> None:
        call = getattr(dialect, name)

        @functools.wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            if not ours(arguments):
                return call(*arguments, **options)
            self.since = began = time.monotonic()
            try:
                return call(*arguments, **options)
            except BaseException:
                self.failed_after = max(self.failed_after, time.monotonic() - began)
                raise
            finally:
                self._back()

        setattr(dialect, name, timed)

    def _back(self) -> None:
        with self._leaving:
            self.since = None


def gone(connection: Any) -> bool:
    """Whether SQLAlchemy's connection has lost the driver's, as far as this side knows."""
    if connection.closed or connection.invalidated:
        return True
    raw = _driver_connection(connection.connection)
    closed = getattr(raw, "is_closed", None) or getattr(raw, "closed", False)
    return bool(closed() if callable(closed) else closed)


def _driver_connection(fairy: Any) -> Any:
    """Return psycopg2's, psycopg's or asyncpg's own connection; SQLAlchemy 1.4 calls it otherwise."""
    return getattr(fairy, "driver_connection", None) or getattr(fairy, "connection", None)


def _socket_of(fairy: Any) -> tuple[int, int]:
    """Return the descriptor of a connection's socket and its inode; -1 where the driver does not show it."""
    raw = _driver_connection(fairy)
    try:
        own = hasattr(raw, "fileno")  # asyncpg's has none
        descriptor = raw.fileno() if own else raw._transport.get_extra_info("socket").fileno()
    except (AttributeError, TypeError, ValueError, OSError):
        return -1, -1
    return descriptor, _inode(descriptor)


def _inode(descriptor: int) -> int:
    """Return what tells one socket from another that got its number."""
    try:
        return os.fstat(descriptor).st_ino if descriptor >= 0 else -1
    except OSError:
        return -2
