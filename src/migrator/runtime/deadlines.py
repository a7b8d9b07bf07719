"""Notice a missing answer: a thread calls back when a wait takes too long.

A database driver waits for the server inside C, where no Python code runs. TCP keepalives notice a peer
that is gone. They do not notice a proxy, a firewall or a load balancer that acknowledges everything and
passes nothing on. A shutdown of the socket makes the driver's call return with an error, in any thread:
https://man7.org/linux/man-pages/man2/shutdown.2.html
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

ANSWER_TIMEOUT = 6.0
"""After so many seconds without an answer, the server is asked over another connection whether it still
works.
"""
PROBE_TIMEOUT = 4.0
"""Seconds for such a query, and for a query of the watch."""
PROBES = 3
"""So many unanswered queries end the wait: about half a minute of silence on every connection."""
CANCEL_TIMEOUT = 1.0
"""Seconds that the server gets, after a signal, to cancel a statement; then this side ends the wait."""


class Wait:
    """One wait; after ``seconds``, ``late`` is called with it.

    ``last`` is called instead when the end of the whole process is near.
    """

    def __init__(
        self,
        changed: threading.Condition,
        seconds: float,
        late: Callable[[Wait], None],
        last: Callable[[Wait], None],
    ) -> None:
        self._changed = changed
        self.began = time.monotonic()
        self.due = self.began + seconds
        self.late = late
        self.last = last
        self.warned = False
        self.over = False
        self.cut = False

    def end(self, shut: Callable[[], None]) -> None:
        """End the wait by force, unless it is over: ``shut`` makes the waiting call return."""

        def cut() -> None:
            self.cut = True
            shut()

        self.during(cut)

    def during(self, act: Callable[[], object]) -> None:
        """Do something quick unless the wait is over.

        The waiting thread stays in its wait meanwhile, so the action still concerns that wait.
        """
        with self._changed:
            if not self.over:
                act()


class Deadlines:
    """Calls back for waits that take too long; one thread for all of them, started by the first.

    A signal sets the moment in which all of them end (``ends``, time.monotonic()): after it, no wait
    starts.
    """

    def __init__(self) -> None:
        self.ends = math.inf
        self._changed = threading.Condition()
        self._waits: set[Wait] = set()
        self._wakes = math.inf
        self._thread: threading.Thread | None = None

    def end_at(self, moment: float) -> None:
        """End every wait at this moment, the running ones and those that start before it."""
        with self._changed:
            self.ends = min(self.ends, moment)
            self._changed.notify()

    @property
    def over(self) -> bool:
        """Whether no wait may start any more."""
        return time.monotonic() >= self.ends

    def left(self, deadline: float) -> float:
        """Return the seconds until a deadline, or until the end if that is sooner; negative afterwards."""
        return min(deadline, self.ends) - time.monotonic()

    @contextlib.contextmanager
    def limit(
        self, seconds: float, late: Callable[[Wait], None], last: Callable[[Wait], None] | None = None
    ) -> Iterator[Wait]:
        """Call ``late``, in its own thread, when the block takes longer than ``seconds``; ``last`` at the
        end.
        """
        wait = Wait(self._changed, seconds, late, last or late)
        with self._changed:
            self._waits.add(wait)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            elif min(wait.due, self.ends) < self._wakes:
                self._changed.notify()
        try:
            yield wait
        finally:
            with self._changed:
                wait.over = True
                self._waits.discard(wait)

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for wait in self._waits:
                    if self.ends <= now and not wait.warned:
                        wait.warned, wait.due = True, math.inf
                        threading.Thread(target=wait.last, args=(wait,), name="last", daemon=True).start()
                    elif wait.due <= now:
                        wait.due = math.inf  # once is enough
                        threading.Thread(target=wait.late, args=(wait,), name="late", daemon=True).start()
                self._wakes = min((wait.due for wait in self._waits), default=now + 60)
                if now < self.ends:
                    self._wakes = min(self._wakes, self.ends)
                self._changed.wait(None if self._wakes == math.inf else max(0.0, self._wakes - now))


DEADLINES = Deadlines()


def shut_down(descriptor: int) -> None:
    """End the connection behind a socket's descriptor, without closing the descriptor itself."""
    import socket

    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as same:
        same.shutdown(socket.SHUT_RDWR)


def keep_alive(descriptor: int) -> None:
    """Let the kernel notice within about 11 seconds that the peer of an idle TCP connection is gone.

    There is no TCP_USER_TIMEOUT: if the server reads slowly (a COPY to a slow disk), the kernel would
    end a working connection. https://man7.org/linux/man-pages/man7/tcp.7.html
    """
    import socket

    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as same:
        if same.family not in (socket.AF_INET, socket.AF_INET6):
            return
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
