"""Know when the migration's connection waits for the server, and end a wait without an answer.

:class:`DriverCalls` wraps the calls of the driver, on the dialect of the one engine. SQLAlchemy has no
event for the end of a commit or of a failed statement. Statements of a revision on a raw cursor are not
seen.

:class:`LostAnswer` ends a wait for an answer that will not come. The server reports, over the control
connection, that it has finished and waits for the client. The driver waits for the server. So a message was
lost: a proxy, a firewall or a failover swallowed it, and TCP noticed nothing. migrator shuts the socket
down, the driver raises, and the attempt ends as after any lost connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import struct
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

from migrator.runtime.deadlines import keep_alive, shut_down

log = logging.getLogger("migrator.watch")

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
    raw = driver_connection(connection.connection)
    closed = getattr(raw, "is_closed", None) or getattr(raw, "closed", False)
    return bool(closed() if callable(closed) else closed)


def driver_connection(fairy: Any) -> Any:
    """Return the connection of psycopg2, psycopg or asyncpg; SQLAlchemy 1.4 has another name for it."""
    return getattr(fairy, "driver_connection", None) or getattr(fairy, "connection", None)


def _socket_of(fairy: Any) -> tuple[int, int]:
    """Return the descriptor of a connection's socket and its inode; -1 if the driver hides it."""
    raw = driver_connection(fairy)
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


_STATE = """
SELECT state LIKE 'idle%%' AND wait_event = 'ClientRead',
       coalesce(extract(epoch FROM clock_timestamp() - state_change)::float8, 0)
FROM pg_stat_activity WHERE pid = %s
"""
_AFTER = 5.0
"""After so many seconds of waiting for each other, the answer counts as lost."""
_SENDING = 30.0
"""The same while a part of the statement is still unsent: a large statement may take longer."""
_SILENCE = 30.0
"""After so many seconds without any answer, the migration's connection is given up too.

It is longer than a usual failover of a virtual address or restart of a proxy. A refused connection, an
unknown name, or one client too many is not silence.
"""


class LostAnswer:
    """Compares the server's report of the migration's session with the driver's wait."""

    def __init__(self) -> None:
        self._calls: DriverCalls | None = None
        self._seen: tuple[float, int] | None = None
        self._since = self._worked = 0.0

    def follow(self, calls: DriverCalls | None) -> None:
        """Start to watch the calls of this connection."""
        self._calls, self._seen = calls, None

    def look(self, ask: Callable[[str, tuple[int]], list[tuple[bool, float]]], pid: int) -> None:
        """Compare once; end the wait if both sides have waited for each other for too long."""
        calls = self._calls
        since = calls.since if calls else None
        now = time.monotonic()
        if calls is None or since is None or now - since < _AFTER:
            self._seen = None
            return
        rows = ask(_STATE, (pid,))
        if not rows or not rows[0][0] or rows[0][1] < _AFTER:
            self._seen = None
            return
        unsent = calls.unsent
        if self._seen != (since, unsent):
            self._seen, self._since, self._worked = (since, unsent), now, time.process_time()
            return
        waited, worked = now - self._since, time.process_time() - self._worked
        # A driver that still prepares a large statement is working; one that waits is not.
        if waited >= (_SENDING if unsent else _AFTER / 2) and worked < waited / 2:
            self._end(
                calls,
                f"the server and the migration have waited for each other for {rows[0][1]:.0f} s: an "
                "answer was lost",
            )

    def give_up(self, silent_since: float | None) -> None:
        """End the wait if no connection has answered for too long."""
        calls = self._calls
        now = time.monotonic()
        if calls is None or calls.since is None or silent_since is None:
            return
        if now - silent_since >= _SILENCE and now - calls.since >= _SILENCE:
            self._end(calls, f"nothing has answered for {now - silent_since:.0f} s")

    def _end(self, calls: DriverCalls, why: str) -> None:
        if calls.end():
            self._calls = self._seen = None
            log.warning("%s; ending the migration's connection", why, extra={"stage": "apply"})
