"""The progress of a dump: the table, the share of the known size, and the speed.

pg_dump reports on stderr which table it starts (``--verbose``). The server knows the position inside a
table (``pg_stat_progress_copy``, PostgreSQL 14 and newer). A table's size on disk and its rows as text
are about the same, so a percentage is an estimate, and never 100 before the end. The catalogs know
sizes from the last VACUUM. A copy of an unknown table may belong to any table, and counts with the
bytes seen so far.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence

from migrator.backups.exported_snapshot import Relation, Sizes
from migrator.backups.manifest import human_size
from migrator.runtime.output.progress import Progress

LOGGER = logging.getLogger("migrator.backup")
EVERY = 15.0
"""Seconds between two lines in the log."""

VIEW_SINCE = 14
VIEW = """
SELECT p.relid::bigint, p.bytes_processed
  FROM pg_stat_progress_copy p JOIN pg_stat_activity a ON a.pid = p.pid
 WHERE a.application_name = %s AND p.datname = current_database()
"""

# Found anywhere in a line: a message comes after "pg_dump: ", and one of another worker may come in
# between.
_BEGINS = re.compile(r'dumping contents of table "(.*)"$')
_ENDS = re.compile(r"finished item \d+ TABLE DATA (.*)$")


class DumpProgress:
    """Combines the reports of pg_dump and the server for the log and a terminal's bar."""

    def __init__(
        self,
        database: str,
        tables: Sequence[Relation],
        sizes: Sizes,
        written: Callable[[], int],
        bar: Progress,
        *,
        jobs: int = 1,
    ) -> None:
        self._database = database
        self._names = {f"{table.schema}.{table.name}": table.shown for table in tables}
        self._short = {table.name: table.shown for table in tables}
        self._oids = {table.oid: table.shown for table in tables}
        self._sizes = {table.shown: sizes.tables.get(table.oid, 0) for table in tables}
        self._unknown = max(sizes.data - sum(sizes.tables.values()), 0)
        self._total = self._unknown + sum(self._sizes.values())
        self._written = written
        self._bar = bar
        self._jobs = jobs
        self._began = self._told = time.monotonic()
        self._line = b""
        self._running: list[str] = []
        self._inside: dict[str, int] = {}
        self._done = 0

    def on_stderr(self, chunk: bytes) -> None:
        *lines, self._line = (self._line + chunk).split(b"\n")
        self._line = self._line[-8192:]
        for line in lines:
            text = line.decode("utf-8", "replace")
            if begins := _BEGINS.search(text):
                self._begin(self._names.get(begins[1], ""))
            elif self._jobs > 1 and (ends := _ENDS.search(text)):
                self._end(self._short.get(ends[1], ""))

    def on_server(self, rows: Sequence[tuple[int, int]]) -> None:
        """Take the server's report of the running copies: a table's oid, and its bytes sent so far."""
        for oid, sent in rows:
            table = self._oids.get(oid)
            if table in self._running:
                self._inside[table] = min(sent, self._sizes[table] + self._unknown)

    def _begin(self, table: str) -> None:
        if self._jobs == 1:
            for earlier in list(self._running):
                self._end(earlier)
        if table:
            LOGGER.debug("backing up %s: %s (%s)", self._database, table, human_size(self._sizes[table]))
            self._running.append(table)

    def _end(self, table: str) -> None:
        if table in self._running:
            self._running.remove(table)
            self._done += max(self._sizes[table], self._inside.pop(table, 0))

    def close(self) -> None:
        self._bar.close()

    @property
    def bytes_done(self) -> int:
        """Return how much of the tables is dumped, in bytes as on the server."""
        return self._done + sum(self._inside.values())

    @property
    def percent(self) -> int:
        """Return its share of the whole."""
        return min(99, 100 * self.bytes_done // self._total) if self._total else 0

    def tell(self) -> None:
        """Draw the bar, and log it when that is due."""
        now = time.monotonic()
        table = self._running[0] if self._running else ""
        more = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
        speed = f"{human_size(self.bytes_done / max(now - self._began, 0.001))}/s"
        self._bar.draw(self.percent, f"backing up {table or self._database}{more}")
        self._bar.note(speed)
        if now - self._told < EVERY:
            return
        self._told = now
        self._bar.clear()
        whole, now_at = human_size(self._total), f", {table}{more}" if table else ""
        done, written = f"{self.percent} % of {whole}{now_at}", human_size(self._written())
        seconds = now - self._began
        LOGGER.info(
            "backing up %s: %s, %s, %s written after %.0f s", self._database, done, speed, written, seconds
        )
