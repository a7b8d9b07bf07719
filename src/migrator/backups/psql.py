"""A script for psql, fed while it is made: pg_restore's SQL, between our own first and last statements.

pg_restore runs in its own thread, so the main thread waits for psql (and handles signals). The last
statements, with the COMMIT, are written only after pg_restore has ended well. If anything ends before
that (either program, a signal, this process), the script has no COMMIT, and psql's session rolls back.

pg_restore's SQL is read line by line: statements, rows, and text that a server does not know.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

from migrator.backups.clients import Client, Login, RestoreStopped, last_words
from migrator.postgres import search_path
from migrator.runtime import subprocesses
from migrator.runtime.threads import Gone, Pipe, background

_AHEAD = 16
"""Chunks (of at most a megabyte) that pg_restore may be ahead of psql."""
_KEPT = 1024
"""Bytes of psql's output that are kept, at the beginning and at the end."""


@dataclass
class Ended:
    """The known facts about psql's transaction, at any end.

    ``said`` is psql's output, ``sent`` whether the COMMIT is on its way.
    """

    said: bytes = b""
    sent: bool = False

    @property
    def transaction(self) -> tuple[int, int] | None:
        """Return the transaction's id and its session's; None if it did not get that far."""
        found = re.search(rb"migrator-transaction (\d+) (\d+)", self.said)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def whole(self) -> bool:
        """Tell whether only the COMMIT was left."""
        return b"migrator-whole" in self.said

    def note(self, chunk: bytes) -> None:
        """Take psql's output."""
        said = self.said + chunk
        self.said = said if len(said) <= 2 * _KEPT else said[:_KEPT] + said[-_KEPT:]


# pg_restore's output is in the encoding of the archive, and our own statements in ours.
_OURS = f"SET client_encoding = 'UTF8'; SET search_path = {search_path.SAFE};\n"
BEGIN = """
SELECT set_config(name, '0', false) FROM pg_settings
WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout');
BEGIN; SET LOCAL migrator.restoring = 'yes';
SELECT format('migrator-transaction %s %s', txid_current(), pg_backend_pid());
"""
COMMIT = """
DO $migrator$ BEGIN
  IF current_setting('migrator.restoring', true) IS DISTINCT FROM 'yes' THEN
    RAISE EXCEPTION 'the transaction has ended before all was restored';
  END IF;
END $migrator$;
SELECT 'migrator-whole';
COMMIT;
"""


def run(
    client: Client,
    login: Login,
    reading: Sequence[str | Path],
    *,
    first: str,
    last: str,
    change: Callable[[bytes], bytes],
    ended: Ended,
) -> None:
    """Run ``first``, the SQL from pg_restore (with the arguments ``reading``), and ``last``, in one
    transaction of psql.

    The SQL goes through ``change``, see :func:`statements`. ``ended`` records the result. Raises
    :class:`RestoreStopped`, and OSError if there is no psql.
    """
    with _output([client.pg_restore, "--file=-", *reading]) as chunks:

        def script() -> Iterator[bytes]:
            yield (_OURS + BEGIN + first + "\n").encode()
            yield from statements(lines(chunks), change)
            ended.sent = True
            yield ("\n" + _OURS + last + COMMIT).encode()

        finished = subprocesses.run(
            client.psql(login), environment=login.environment(), feed=script(), on_output=ended.note
        )
    if finished.status != 0:
        raise RestoreStopped(last_words(finished))


@contextlib.contextmanager
def _output(arguments: Sequence[str | Path]) -> Iterator[Iterator[bytes]]:
    """Run a program in a thread and yield an iterator over its stdout, which raises if the program fails."""
    passed = Pipe(_AHEAD)

    def work() -> None:
        try:
            finished = subprocesses.run(arguments, on_output=passed.put, pulse=passed.check)
            if finished.status != 0:
                raise RestoreStopped(last_words(finished))
        finally:
            with contextlib.suppress(Gone):
                passed.put(None)

    def chunks() -> Iterator[bytes]:
        while (chunk := passed.get()) is not None:
            yield chunk
        worker.result()

    worker = background("pg_restore", work)
    try:
        yield chunks()
    finally:
        passed.abandoned.set()
        futures.wait([worker])


_OPTIONS = re.compile(
    rb"^(ALTER [^\n]* ALTER COLUMN [^\n]* SET )\(([^\n()]*\bpg_attver=[^\n()]*)\);\n", re.MULTILINE
)


def without_oddities(sql: bytes) -> bytes:
    """Remove the options that only one kind of server has: ``ALTER COLUMN ... SET (pg_attver=3)``."""

    def rest(match: re.Match[bytes]) -> bytes:
        kept = [item for item in match[2].split(b", ") if not item.strip().startswith(b"pg_attver=")]
        return match[1] + b"(" + b", ".join(kept) + b");\n" if kept else b""

    return _OPTIONS.sub(rest, sql)


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream after line ends: each item is one line or, in the middle of a long one, a part of it."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def statements(script: Iterable[bytes], change: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """Put every line of SQL through ``change``, and leave copied rows unchanged.

    A line here ends outside of any quotation: a text of several lines, or a function, belongs to its
    statement. Raises :class:`RestoreStopped` at text that would end the surrounding transaction, and at
    a psql command.
    """
    rows, blobs, quoted = False, False, Quoted()
    parts: list[bytes] = []
    for part in script:
        if rows:
            rows = part != b"\\.\n"
            yield part
            continue
        if not parts and RESTRICTION.fullmatch(part):
            yield part
            continue
        parts.append(part)
        if quoted.open_after(part):
            continue
        line = b"".join(parts)
        parts.clear()
        if line in _TRANSACTION:
            if not blobs:
                raise RestoreStopped(f"unexpected: {line.decode().strip()}")
            continue
        if line.startswith(b"-- "):
            blobs = _BLOBS.match(line) is not None
        rows = line.startswith(b"COPY ") and line.endswith(b" FROM stdin;\n")
        yield change(line)
    yield b"".join(parts)


RESTRICTION = re.compile(rb"\\(?:un)?restrict [A-Za-z0-9]+\n")
"""With these, newer clients keep psql from obeying a dump's commands (CVE-2025-8714); migrator does so with
any client.
"""
_TRANSACTION = (b"BEGIN;\n", b"COMMIT;\n")
_BLOBS = re.compile(rb"-- Data for Name: (?:BLOBS|[0-9.]+); Type: BLOBS; ")
"""The large objects: the only part with its own transaction in pg_restore's SQL."""


class Quoted:
    """Follow a script part by part, and tell whether a quotation is open, as psql sees it.

    Raises :class:`RestoreStopped` at a backslash outside of quotations, the start of a psql command
    (``\\!`` runs a shell), and at a comment that could hide one. pg_restore writes neither.
    """

    _OPENS = re.compile(
        rb"--.*|\\|/\*|\"|(?<![\w$\x80-\xff])[eE]'|'|(?<![\w$\x80-\xff])\$(?:[A-Za-z_\x80-\xff][\w\x80-\xff]*)?\$"
    )
    _STRING, _ESCAPES, _IDENTIFIER = (
        re.compile(closes, re.DOTALL) for closes in (rb"'", rb"\\.|''|'", rb'"')
    )

    def __init__(self) -> None:
        self._closes: re.Pattern[bytes] | None = None
        self._string = self._STRING

    def open_after(self, line: bytes) -> bool:
        """Tell whether one is open at the end of the next line."""
        if line == b"SET standard_conforming_strings = off;\n" and self._closes is None:
            self._string = self._ESCAPES
        place = 0
        while found := (self._closes or self._OPENS).search(line, place):
            place = found.end()
            if self._closes is None:
                if found[0] in (b"\\", b"/*"):
                    raise RestoreStopped(f"no SQL of pg_restore: {line.decode(errors='replace').strip()}")
                self._closes = self._end_of(found[0])
            elif found[0] != b"''" and not found[0].startswith(b"\\"):
                self._closes = None
        return self._closes is not None

    def _end_of(self, opened: bytes) -> re.Pattern[bytes] | None:
        if opened.startswith(b"--"):
            return None
        if opened == b"'":
            return self._string
        if opened == b'"':
            return self._IDENTIFIER
        return self._ESCAPES if opened.endswith(b"'") else re.compile(re.escape(opened))


_UNKNOWN_SETTING = b"SET transaction_timeout = 0;\n"


def for_server(server_major: int) -> Callable[[bytes], bytes]:
    """Return the function that removes text from a line of SQL that the server does not know (see
    pg_restore.py).
    """
    if server_major < 17:
        return lambda line: b"" if line == _UNKNOWN_SETTING else without_oddities(line)
    return without_oddities
