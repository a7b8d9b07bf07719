"""A script for psql, fed as it is made: what pg_restore writes as SQL, between our own first and last statements.

pg_restore runs in a thread of its own, so that psql (and with it a signal) is waited for in the main one.  The last
statements, COMMIT among them, are only written once pg_restore has ended well: whatever ends before that (either
program, a signal, we ourselves) leaves a script without a COMMIT, and psql's session rolls back.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrator import process
from migrator.backups.archive import RestoreStopped, without_oddities
from migrator.backups.clients import Client, last_words

_AHEAD = 16
"""Chunks (of a megabyte at most) that pg_restore may be ahead of psql."""
_KEPT = 1024
"""Bytes of what psql prints that are kept, at the beginning and at the end."""


@dataclass
class Ended:
    """What is known of psql's transaction, whatever became of it.

    ``said`` is what psql printed, ``sent`` whether the COMMIT is on its way.
    """

    said: bytes = b""
    sent: bool = False

    @property
    def transaction(self) -> tuple[int, int] | None:
        """Return the transaction's id and its session's; None where it has not come so far."""
        found = re.search(rb"migrator-transaction (\d+) (\d+)", self.said)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def whole(self) -> bool:
        """Whether nothing but the COMMIT was still to be done."""
        return b"migrator-whole" in self.said

    def note(self, chunk: bytes) -> None:
        """Take in what psql prints."""
        said = self.said + chunk
        self.said = said if len(said) <= 2 * _KEPT else said[:_KEPT] + said[-_KEPT:]


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


class _Ended(Exception):
    """Psql has ended: pg_restore need not go on."""


def run(
    client: Client,
    connection: str,
    environment: Mapping[str, str],
    reading: Sequence[str | Path],
    *,
    first: str,
    last: str,
    change: Callable[[bytes], bytes],
    ended: Ended,
) -> None:
    """Run ``first``, what pg_restore (with the arguments ``reading``) writes, and ``last``, in one transaction of psql.

    What pg_restore writes goes through ``change``, see :func:`statements`.  ``ended`` learns how it went.
    Raises :class:`~migrator.backups.archive.RestoreStopped`, and OSError where there is no psql.
    """
    with _output([client.pg_restore, "--file=-", *reading]) as chunks:

        def script() -> Iterator[bytes]:
            yield (BEGIN + first + "\n").encode()
            yield from statements(_lines(chunks), change)
            ended.sent = True
            yield (last + COMMIT).encode()

        finished = process.run(
            [
                client.folder / "psql",
                "--no-psqlrc",
                "--quiet",
                "--set=ON_ERROR_STOP=1",
                "--no-password",
                connection,
            ],
            environment=environment,
            feed=script(),
            on_output=ended.note,
        )
    if finished.status != 0:
        raise RestoreStopped(last_words(finished))


@contextlib.contextmanager
def _output(arguments: Sequence[str | Path]) -> Iterator[Iterator[bytes]]:
    """Run a program in a thread and yield an iterator over its stdout, which raises where it fails."""
    passed: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
    over = threading.Event()

    def put(item: bytes | BaseException | None) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                passed.put(item, timeout=0.1)
                return
        raise _Ended

    def work() -> None:
        try:
            finished = process.run(
                arguments, environment=process.base_environment(), on_output=put, pulse=look
            )
            put(None if finished.status == 0 else RestoreStopped(last_words(finished)))
        except _Ended:
            return
        except BaseException as error:  # noqa: BLE001 - handed over to the main thread, which raises it
            with contextlib.suppress(_Ended):
                put(error)

    def look() -> None:
        if over.is_set():
            raise _Ended

    def chunks() -> Iterator[bytes]:
        while (item := passed.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    worker = threading.Thread(target=work, name="pg_restore", daemon=True)
    worker.start()
    try:
        yield chunks()
    finally:
        over.set()
        worker.join()


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream after line ends: each item is one line or, in the middle of a long one, a part of it."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def statements(lines: Iterable[bytes], change: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """Put every line of SQL through ``change``, and leave the rows that are copied as they are.

    A line here ends where no quotation is open: a text of several lines, or a function, is one with what is before it.
    Raises :class:`~migrator.backups.archive.RestoreStopped` at what would end the transaction that all of it is in.
    """
    rows, blobs, quoted = False, False, Quoted()
    parts: list[bytes] = []
    for part in lines:
        if rows:
            rows = part != b"\\.\n"
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


_TRANSACTION = (b"BEGIN;\n", b"COMMIT;\n")
_BLOBS = re.compile(rb"-- Data for Name: (?:BLOBS|[0-9.]+); Type: BLOBS; ")
"""The large objects: the only thing that pg_restore puts into a transaction of its own."""


class Quoted:
    """Follow a script part by part, and tell whether a quotation is open, as psql sees it."""

    _OPENS = re.compile(
        rb"--.*|\"|(?<![\w$\x80-\xff])[eE]'|'|(?<![\w$\x80-\xff])\$(?:[A-Za-z_\x80-\xff][\w\x80-\xff]*)?\$"
    )
    _STRING, _ESCAPES, _IDENTIFIER = (
        re.compile(closes, re.DOTALL) for closes in (rb"'", rb"\\.|''|'", rb'"')
    )

    def __init__(self) -> None:
        self._closes: re.Pattern[bytes] | None = None
        self._string = self._STRING

    def open_after(self, line: bytes) -> bool:
        """Say whether one is open at the end of the next line."""
        if line == b"SET standard_conforming_strings = off;\n" and self._closes is None:
            self._string = self._ESCAPES
        place = 0
        while found := (self._closes or self._OPENS).search(line, place):
            place = found.end()
            if self._closes is None:
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
    """Return what takes out of a line of SQL what the server does not know (see archive.py)."""
    if server_major < 17:
        return lambda line: b"" if line == _UNKNOWN_SETTING else without_oddities(line)
    return without_oddities
