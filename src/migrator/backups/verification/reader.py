"""Let pg_restore read an archive while it is written: an archive that is encrypted on its way cannot be read
here later.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from migrator.backups import pg_restore
from migrator.backups.clients import Client
from migrator.runtime import subprocesses

_AHEAD = 16
"""Chunks (of at most a megabyte) that the writer may be ahead of pg_restore."""
_POLL = 0.1


class _GivenUp(Exception):
    """The dump failed, so the result is not needed."""


class Reader:
    """A pg_restore that decompresses and parses its input; ended on leaving.

    ``on_data`` gets its output, see :func:`pg_restore.read_whole`, in another thread.
    """

    def __init__(self, client: Client, on_data: Callable[[bytes], object] | None = None) -> None:
        self._client = client
        self._on_data = on_data
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
        self._given_up = threading.Event()
        self._finished: subprocesses.Finished | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._given_up.set()
        self._thread.join()

    def write(self, chunk: bytes) -> None:
        """Pass a chunk on, no faster than it is read; drop the rest after pg_restore has ended."""
        self._put(chunk)

    def finish(self) -> subprocesses.Finished:
        """Signal the end; return how pg_restore ended. Raises OSError if it could not be started."""
        self._put(None)
        while self._thread.is_alive():
            self._thread.join(_POLL)
        if self._finished is None:
            raise self._failure or OSError("pg_restore did not run")
        return self._finished

    def _put(self, chunk: bytes | None) -> None:
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._chunks.put(chunk, timeout=_POLL)
                return

    def _read(self) -> None:
        try:
            self._finished = pg_restore.read_whole(self._client, self._feed(), self._on_data)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that reads the result
            self._failure = error

    def _feed(self) -> Iterator[bytes]:
        while not self._given_up.is_set():
            with contextlib.suppress(queue.Empty):
                chunk = self._chunks.get(timeout=_POLL)
                if chunk is None:
                    return
                yield chunk
        raise _GivenUp
