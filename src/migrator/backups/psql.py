"""A script for psql, fed as it is made: what pg_restore writes as SQL, between our own first and last statements.

pg_restore runs in a thread of its own, so that psql (and with it a signal) is waited for in the main one.  The last
statements, COMMIT among them, are only written once pg_restore has ended well: whatever ends before that (either
program, a signal, we ourselves) leaves a script without a COMMIT, and psql's session rolls back.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from migrator import process
from migrator.backups.archive import RestoreStopped, without_oddities
from migrator.backups.clients import Client, last_words

_AHEAD = 16
"""Chunks (of a megabyte at most) that pg_restore may be ahead of psql."""
Rewrite = Callable[[Iterable[bytes]], Iterable[bytes]]


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
    rewrite: Rewrite = lambda lines: lines,
) -> None:
    """Run ``first``, what pg_restore (with the arguments ``reading``) writes, and ``last``, in one psql.

    ``rewrite`` gets the lines of pg_restore, and returns those to be run.
    Raises :class:`~migrator.backups.archive.RestoreStopped`, and OSError where there is no psql.
    """
    with _output([client.pg_restore, "--file=-", *reading]) as chunks:

        def script() -> Iterator[bytes]:
            yield first.encode() + b"\n"
            yield from rewrite(_lines(chunks))
            yield last.encode() + b"\n"

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


def without_copied_rows(lines: Iterable[bytes], change: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """Put every line of SQL through ``change``, and leave the rows that are copied as they are."""
    rows = False
    for line in lines:
        if rows:
            rows = line != b"\\.\n"
            yield line
        else:
            rows = line.startswith(b"COPY ") and line.endswith(b" FROM stdin;\n")
            yield change(line)


_UNKNOWN_SETTING = b"SET transaction_timeout = 0;\n"


def for_server(server_major: int) -> Callable[[bytes], bytes]:
    """Return what takes out of a line of SQL what the server does not know (see archive.py)."""
    if server_major < 17:
        return lambda line: b"" if line == _UNKNOWN_SETTING else without_oddities(line)
    return without_oddities
