"""A script for psql, fed while it is made: pg_restore's SQL, between our own first and last statements.

pg_restore runs in its own thread, so the main thread waits for psql (and handles signals). The last
statements, with the COMMIT, are written only after pg_restore has ended well. If anything ends before
that (either program, a signal, this process), the script has no COMMIT, and psql's session rolls back.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrator.backups.clients import Client, last_words
from migrator.backups.failures import RestoreStopped
from migrator.backups.sql_script import lines, statements
from migrator.postgres import search_path
from migrator.runtime import subprocesses

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


class _Ended(Exception):
    """Psql has ended: pg_restore can stop."""


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
    """Run a program in a thread and yield an iterator over its stdout, which raises if the program fails."""
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
            finished = subprocesses.run(
                arguments, environment=subprocesses.base_environment(), on_output=put, pulse=look
            )
            put(None if finished.status == 0 else RestoreStopped(last_words(finished)))
        except _Ended:
            return
        except BaseException as error:  # noqa: BLE001 - passed to the main thread, which raises it
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
