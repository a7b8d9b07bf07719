"""Work in a thread of its own, and bytes on their way from one thread to another."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
_POLL = 0.1  # seconds between two checks of the other end


def background(name: str, work: Callable[[], Result]) -> Future[Result]:
    """Do something in a daemon thread; the future has its result or its error."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Gone(OSError):
    """The other end is gone."""


class Pipe:
    """Chunks from one thread to another, a few at a time; a file-like object for readers of bytes."""

    def __init__(self, most: int) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(most)
        self._rest = memoryview(b"")
        self._ended = False
        self.abandoned = threading.Event()

    def check(self) -> None:
        """Raise :class:`Gone` if one end was given up."""
        if self.abandoned.is_set():
            raise Gone("the other end is gone")

    def put(self, chunk: bytes | None) -> None:
        """Pass a chunk on (None: the end), waiting for room; raises if the reader is gone."""
        while True:
            self.check()
            with contextlib.suppress(queue.Full):
                self._queue.put(chunk, timeout=_POLL)
                return

    def get(self) -> bytes | None:
        """Take a chunk, waiting for one; None at the end."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL)
            self.check()

    def read(self, size: int = -1) -> bytes:
        """Return at most ``size`` bytes, none at the end."""
        while not self._rest and not self._ended:
            chunk = self.get()
            self._ended = chunk is None
            self._rest = memoryview(chunk or b"")
        taken = bytes(self._rest[: size if size >= 0 else None])
        self._rest = self._rest[len(taken) :]
        return taken

    def write(self, chunk: bytes) -> int:
        self.put(bytes(chunk))
        return len(chunk)

    def flush(self) -> None:
        """Do nothing: the chunks are on their way."""
