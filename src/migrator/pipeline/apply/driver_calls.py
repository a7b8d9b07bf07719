"""Know when the migration's connection waits for the server, and end a wait without an answer.

It wraps the calls of the driver, on the dialect of the one engine. SQLAlchemy has no event for the end
of a commit or of a failed statement. Statements of a revision on a raw cursor are not seen.
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
    """The calls of the driver on one connection: ``since`` is the start of the running call
    (time.monotonic()), or None.
    """

    def __init__(self, connection: Any) -> None:
        self.since: float | None = None
        self.failed_after = 0.0
        """The duration in seconds of the longest failed call."""
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
        """Run a statement on a driver cursor and return its first value, if any; it takes no parameters.

        It skips SQLAlchemy, whose events, caches and results take several times as long as a small
        query.
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
        """Return how many bytes the peer has not acknowledged yet; it changes while a statement is being
        sent.
        """
        answer = b"\0\0\0\0"
        with contextlib.suppress(OSError):
            answer = fcntl.ioctl(self._descriptor, termios.TIOCOUTQ, answer)
        return int(struct.unpack("i", answer)[0])

    def end(self) -> bool:
        """Shut the socket down, so that the call returns with an error; False if no call is running."""
        with self._leaving:
            if self.since is None or _inode(self._descriptor) != self._inode:
                return False
            shut_down(self._descriptor)
            return True

    def _executes(self, context: Any) -> bool:
        """Tell whether a statement belongs to this connection, by its context, the last argument of cursor
        calls.

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
    """Tell whether SQLAlchemy's connection has lost the driver's, as far as this side knows."""
    if connection.closed or connection.invalidated:
        return True
    raw = _driver_connection(connection.connection)
    closed = getattr(raw, "is_closed", None) or getattr(raw, "closed", False)
    return bool(closed() if callable(closed) else closed)


def _driver_connection(fairy: Any) -> Any:
    """Return the connection of psycopg2, psycopg or asyncpg; SQLAlchemy 1.4 has another name for it."""
    return getattr(fairy, "driver_connection", None) or getattr(fairy, "connection", None)


def _socket_of(fairy: Any) -> tuple[int, int]:
    """Return the descriptor of a connection's socket and its inode; -1 if the driver hides it."""
    raw = _driver_connection(fairy)
    try:
        own = hasattr(raw, "fileno")  # asyncpg has none
        descriptor = raw.fileno() if own else raw._transport.get_extra_info("socket").fileno()
    except (AttributeError, TypeError, ValueError, OSError):
        return -1, -1
    return descriptor, _inode(descriptor)


def _inode(descriptor: int) -> int:
    """Return a value that differs between two sockets with the same number."""
    try:
        return os.fstat(descriptor).st_ino if descriptor >= 0 else -1
    except OSError:
        return -2
