"""Seconds as a process lives through them: those in which the machine lets nobody work do not count.

    with Stopwatch() as watch:
        connect(target, "test", 1.0)
    assert watch.within(1.5)

A test that asserts on how long something takes asserts on what migrator does.  Where the whole machine stands still
(a virtual machine that is moved, a container at the end of its share of the processor), a thread that wakes up fifty
times a second does not wake up either, and the time that it misses is taken off.  Where it is merely slow, everything
takes longer, the start of an interpreter as well: `within` compares.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import TracebackType

_TICK = 0.02  # seconds
_START = 0.05  # seconds in which an idle machine starts and ends an interpreter


class Stopwatch:
    """Measures the time that passes in a block, less that in which nothing ran here."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ended: float | None = None
        self._missed = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="stopwatch", daemon=True)

    def __enter__(self) -> Stopwatch:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = time.monotonic()
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """How long the block has taken."""
        return (self._ended or time.monotonic()) - self._began - self.missed

    @property
    def missed(self) -> float:
        """Seconds in which nothing ran here."""
        return self._missed

    def within(self, limit: float, taken: float | None = None) -> bool:
        """Whether the block, or what says that it has taken so many seconds of it, took less than `limit` seconds."""
        seconds = self.seconds if taken is None else taken - self.missed
        return seconds < limit or seconds < limit * slowness()

    def _tick(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(_TICK):
            now = time.monotonic()
            late = now - before - _TICK
            if late > _TICK:  # less is what threads always wait for one another
                self._missed += late
            before = now


def slowness() -> float:
    """Return how many times as long as on an idle machine a process takes to start and end just now, at least 1."""
    began = time.monotonic()
    for _ in range(3):
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
    return max(1.0, (time.monotonic() - began) / 3 / _START)
