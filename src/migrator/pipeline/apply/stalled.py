"""Notice that the migration waits for an answer that will not come, and end the wait.

The server reports, over the control connection, that it has finished and waits for the client. The
driver waits for the server. So a message was lost: a proxy, a firewall or a failover swallowed it, and
TCP noticed nothing. migrator shuts the socket down, the driver raises, and
:mod:`migrator.pipeline.apply.attempts` finds out what was committed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from migrator.pipeline.apply.driver_calls import DriverCalls

log = logging.getLogger("migrator.watch")

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
