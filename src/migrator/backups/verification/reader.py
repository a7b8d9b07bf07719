"""Let pg_restore read an archive while it is written, and count the rows in its output.

An archive that is encrypted on its way cannot be read here later. Counting needs no server, locks no table, and counts
exactly the dumped rows.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass

from migrator.backups import pg_restore
from migrator.backups.clients import Client, RestoreStopped
from migrator.backups.pg_restore import ENCODING
from migrator.backups.psql import RESTRICTION, Quoted
from migrator.postgres.quoting import codec
from migrator.runtime import subprocesses
from migrator.runtime.threads import Gone, Pipe, background

_AHEAD = 16
"""Chunks (of at most a megabyte) that the writer may be ahead of pg_restore."""


class Reader:
    """A pg_restore that decompresses and parses its input; ended on leaving.

    ``on_data`` gets its output, see :func:`pg_restore.read_whole`, in another thread.
    """

    def __init__(self, client: Client, on_data: Callable[[bytes], object] | None = None) -> None:
        self._chunks = Pipe(_AHEAD)

        def read() -> subprocesses.Finished:
            try:
                return pg_restore.read_whole(client, iter(self._chunks.get, None), on_data)
            finally:
                self._chunks.abandoned.set()

        self._finished = background("reader", read)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._chunks.abandoned.set()
        futures.wait([self._finished])

    def write(self, chunk: bytes | None) -> None:
        """Pass a chunk on, no faster than it is read; drop the rest after pg_restore has ended."""
        with contextlib.suppress(Gone):
            self._chunks.put(chunk)

    def finish(self) -> subprocesses.Finished:
        """Signal the end; return how pg_restore ended. Raises OSError if it could not be started."""
        self.write(None)
        return self._finished.result()


_NAME = rb'("(?:[^"]|"")*"|[^".( ]+)'
_COPY = re.compile(rb"COPY %s\.%s .*FROM stdin;\n" % (_NAME, _NAME), re.DOTALL)
_END = b"\n\\.\n"
_NO_STATEMENT = re.compile(rb"(?:(?:--[^\n]*)?\n)*")


@dataclass
class Held:
    """One table in an archive: its rows, and their size as text in bytes."""

    rows: int = 0
    size: int = 0


class Rows:
    """Counts the output of pg_restore with ``--section=data``, chunk by chunk.

    ``tables`` has the results, by schema and name; ``unread`` says why the rest could not be read, if
    so.
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[str, str], Held] = {}
        self.unread = ""
        self._data, self._at = b"", 0
        self._held: Held | None = None
        self._counted = 0  # bytes from _at on that are counted already: the end of the rows may begin there
        self._statement: list[bytes] = []
        self._quoted = Quoted()
        self._codec = "utf-8"

    def write(self, chunk: bytes) -> None:
        if self.unread:
            return
        self._data, self._at = self._data[self._at :] + chunk, 0
        try:
            while self._count(self._held) if self._held else self._read():
                pass
        except RestoreStopped as stopped:
            self.unread = stopped.said

    def _count(self, held: Held) -> bool:
        """Count rows; return whether their end was found."""
        end = self._data.find(_END, self._at)
        until = end + 1 if end >= 0 else len(self._data)
        counted = self._at + self._counted
        held.rows += self._data.count(b"\n", counted, until)
        held.size += until - counted
        if end < 0:
            self._at = max(self._at, until - len(_END) + 1)
            self._counted = until - self._at
            return False
        self._at, self._held = end + len(_END), None
        return True

    def _read(self) -> bool:
        """Read SQL; return whether rows begin."""
        while True:
            if not self._statement and (skipped := _NO_STATEMENT.match(self._data, self._at)):
                self._at = skipped.end()
            end = self._data.find(b"\n", self._at)
            if end < 0:
                return False
            line = self._data[self._at : end + 1]
            self._held = self._copied(line)
            if self._held:
                self._at, self._counted = end, 1
                return True
            self._at = end + 1

    def _copied(self, line: bytes) -> Held | None:
        """Return the table of the rows that begin after a line."""
        if not self._statement and RESTRICTION.fullmatch(line):
            return None
        self._statement.append(line)
        if self._quoted.open_after(line):
            return None
        statement = b"".join(self._statement)
        self._statement.clear()
        if encoding := ENCODING.match(statement):
            self._codec = codec(encoding[1].decode())
        if not (copy := _COPY.fullmatch(statement)):
            return None
        schema, name = (self._plain(part) for part in copy.groups())
        return self.tables.setdefault((schema, name), Held())

    def _plain(self, name: bytes) -> str:
        plain = name[1:-1].replace(b'""', b'"') if name.startswith(b'"') else name
        return plain.decode(self._codec, "surrogateescape")
