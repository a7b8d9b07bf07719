"""Notice an answer that does not come: a thread that calls back when a wait takes longer than it was given.

A database driver waits for the server inside C, where nothing of Python's runs.  TCP keepalives notice a peer that
is gone; they do not notice a proxy, a firewall or a load balancer that acknowledges everything and passes nothing
on.  Shutting the socket down makes the driver's call return with an error, whichever thread it runs in:
https://man7.org/linux/man-pages/man2/shutdown.2.html
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

PATIENCE = 6.0
"""Seconds without an answer after which the server is asked, over another connection, whether it still works on it."""
PROBE = 4.0
"""Seconds that such a question may take, and that a question of the watch may take."""
PROBES = 3
"""So many of them without an answer end the wait: about half a minute of silence on every connection."""
TELL = 1.0
"""Seconds that the server gets, after a signal, to cancel a statement; then the wait for it ends on this side."""


class Wait:
    """One thing that is waited for; ``seconds`` is how long it may take before ``late`` is called with this.

    ``last`` is called in its place when the end of the whole process is near.
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

        The waiting thread does not leave its wait meanwhile, so that what is acted on is still what it waits on.
        """
        with self._changed:
            if not self.over:
                act()


class Deadlines:
    """Calls back for waits that take too long; one thread for all of them, started by the first.

    A signal sets the moment in which all of them end (``ends``, time.monotonic()): after it, no wait begins.
    """

    def __init__(self) -> None:
        self.ends = math.inf
        self._changed = threading.Condition()
        self._waits: set[Wait] = set()
        self._wakes = math.inf
        self._thread: threading.Thread | None = None

    def end_at(self, moment: float) -> None:
        """End every wait at this moment, those that are under way and those that begin until then."""
        with self._changed:
            self.ends = min(self.ends, moment)
            self._changed.notify()

    @property
    def over(self) -> bool:
        """Whether no wait may begin any more."""
        return time.monotonic() >= self.ends

    def left(self, deadline: float) -> float:
        """Return the seconds until a deadline, or until the end where that comes first; negative afterwards."""
        return min(deadline, self.ends) - time.monotonic()

    @contextlib.contextmanager
    def limit(
        self, seconds: float, late: Callable[[Wait], None], last: Callable[[Wait], None] | None = None
    ) -> Iterator[Wait]:
        """Call ``late``, in a thread of its own, when the block takes longer than ``seconds``; ``last`` at the end."""
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
    """End the connection that a socket's descriptor stands for, without closing the descriptor itself."""
    import socket

    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as same:
        same.shutdown(socket.SHUT_RDWR)


def keep_alive(descriptor: int) -> None:
    """Let the kernel notice within about 11 seconds that the peer of an idle TCP connection is gone.

    No TCP_USER_TIMEOUT: where the server reads slowly (a COPY into a slow disk), the kernel would end a
    connection that is alive.  https://man7.org/linux/man-pages/man7/tcp.7.html
    """
    import socket

    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as same:
        if same.family not in (socket.AF_INET, socket.AF_INET6):
            return
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
