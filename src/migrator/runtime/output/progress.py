"""Progress: a bar on a terminal, and everywhere a sign of life from a long revision."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from typing import TextIO

from migrator.runtime.escaping import visible

log = logging.getLogger("migrator.apply")

_WIDTH = 24
_EVERY = 15.0  # seconds


class Progress:
    """One line at the bottom of the terminal: the finished revisions, the running one, and the server's
    progress. Several threads may draw. With ``percent`` it shows a share of 100 instead of a count.
    """

    def __init__(self, total: int, stream: TextIO, *, enabled: bool, percent: bool = False) -> None:
        self._total = total
        self._percent = percent
        self._stream = stream
        self._enabled = enabled and total > 0 and stream.isatty()
        self._lock = threading.Lock()
        self._done = 0
        self._doing = ""
        self._note = ""
        self._shown = False

    def draw(self, done: int, doing: str) -> None:
        """Draw the bar with ``done`` finished revisions and ``doing`` as the running one."""
        with self._lock:
            self._done, self._doing, self._note = done, doing, ""
            self._draw()

    def note(self, text: str) -> None:
        """Show the server's progress on the bar, such as ``building index: scanning table, 42 %``; "" for
        nothing.
        """
        with self._lock:
            if self._doing and (text != self._note or not self._shown):
                self._note = text
                self._draw()

    def clear(self) -> None:
        """Remove the bar, so that a log line can be written."""
        with self._lock:
            if self._enabled:
                self._write("")
                self._shown = False

    def close(self) -> None:
        self.clear()
        self._enabled = False

    def _draw(self) -> None:
        if not self._enabled:
            return
        filled = _WIDTH * self._done // self._total
        note = f"({self._note}) " if self._note else ""
        count = f"{self._done} %" if self._percent else f"{self._done}/{self._total}"
        line = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {count} {visible(note + self._doing)}"
        self._write(line[: shutil.get_terminal_size().columns - 1])
        self._shown = True

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()


class Heartbeat:
    """Logs every 15 seconds which revision is still running."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._doing: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def begins(self, what: str) -> None:
        """Set the running revision."""
        self._doing = (what, time.monotonic())

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _beat(self) -> None:
        while not self._stop.wait(_EVERY):
            doing = self._doing
            if doing:
                seconds = time.monotonic() - doing[1]
                log.info("still running after %.0f s: %s", seconds, doing[0], extra={"stage": "apply"})
