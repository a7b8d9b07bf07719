"""Progress: a bar on a terminal, and everywhere a sign of life from a revision that takes long."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from types import TracebackType
from typing import TextIO

log = logging.getLogger("migrator.apply")

_WIDTH = 24


class Progress:
    """One line at the bottom of the terminal: how many of the revisions are done, and which one runs."""

    def __init__(self, total: int, stream: TextIO, *, enabled: bool) -> None:
        self._total = total
        self._stream = stream
        self._enabled = enabled and total > 0 and stream.isatty()

    def draw(self, done: int, doing: str) -> None:
        """Draw the bar with ``done`` revisions finished and ``doing`` under way."""
        if not self._enabled:
            return
        filled = _WIDTH * done // self._total
        line = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{self._total} {doing}"
        columns = shutil.get_terminal_size().columns
        self._stream.write(f"\r\x1b[K{line[: columns - 1]}")
        self._stream.flush()

    def clear(self) -> None:
        """Take the bar away, so that a log line can be written."""
        if self._enabled:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    close = clear


class Heartbeat:
    """Says every ``interval`` seconds which revision is still running, so that a silent log is no riddle."""

    def __init__(self, interval: float = 15.0) -> None:
        self._interval = interval
        self._stop = threading.Event()
        self._doing: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def begins(self, what: str) -> None:
        """Note what is under way from now on."""
        self._doing = (what, time.monotonic())

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _beat(self) -> None:
        while not self._stop.wait(self._interval):
            doing = self._doing
            if doing:
                seconds = time.monotonic() - doing[1]
                log.info("still running after %.0f s: %s", seconds, doing[0], extra={"stage": "apply"})
