"""A progress bar on a terminal; nothing anywhere else."""

from __future__ import annotations

import shutil
from typing import TextIO

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
