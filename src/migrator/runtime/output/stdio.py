"""stdin, stdout and stderr: safe to write to, without secrets, and restored after ``env.py``."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, cast

from migrator.runtime.redaction import RedactingStream, protect_streams


def open_streams() -> None:
    """Make stdin, stdout and stderr streams that are writable in any state, and that mask secrets.

    A closed one becomes /dev/null: otherwise the next file or socket would get its number, and every
    print would go there. A character outside of an encoding is written as JSON escapes it: ``\\u00e9``.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    codecs.register_error(_ESCAPE, _escape)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            closed = OSError(errno.EBADF, "it was closed")
            nowhere = open(os.devnull, "w", encoding="utf-8", errors=_ESCAPE)  # noqa: SIM115 - for good
            setattr(sys, name, RedactingStream(nowhere, closed))
        elif type(stream) is io.TextIOWrapper and stream.fileno() == number:
            setattr(sys, name, _patient(stream, number))
    protect_streams()
    for name in ("stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))


def _patient(stream: io.TextIOWrapper, number: int) -> TextIO:
    """Return a stream like ``stream`` that waits for its reader, even if another process made it
    non-blocking.
    """
    stream.flush()
    raw = io.BufferedWriter(_Patient(number, "w", closefd=False))
    return io.TextIOWrapper(
        raw,
        encoding=stream.encoding,
        errors=_ESCAPE,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Patient(io.FileIO):
    def write(self, data: Any) -> int:
        while True:
            written = cast("int | None", super().write(data))
            if written is not None:
                return written
            import select

            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            poll.poll()


_ESCAPE = "migrator.escape"


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    numbers = (int.from_bytes(units[place : place + 2], "big") for place in range(0, len(units), 2))
    return "".join(f"\\u{number:04x}" for number in numbers), error.end


@contextlib.contextmanager
def redirected() -> Iterator[None]:
    """Restore the working directory, the warning filters and the standard streams after the block.

    Within it all prints go to the logs, also those of child processes and C libraries: stdout is for a
    command's answer.
    """
    folder = os.getcwd()
    stdout, stderr = sys.stdout, sys.stderr
    stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = stderr
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        with contextlib.suppress(ValueError, OSError):  # a stream of another program
            stdout.flush()  # prints through the stream that Alembic's Config had kept
        os.dup2(answers, 1)
        os.close(answers)
        with contextlib.suppress(OSError):
            os.chdir(folder)


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Hide a module within the block, unless it is loaded already.

    It is for ``ssl`` during the import of psycopg2. psycopg2 loads it only to let Python set OpenSSL's
    callbacks for threads. OpenSSL has ignored them since 1.1, psycopg2 works without them
    (``libcrypto_threads_init`` in its psycopgmodule.c), and ``ssl`` takes longer to load than all of
    psycopg2. It works only with one thread: another thread's import would fail.
    """
    if module in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[module] = None
    try:
        yield
    finally:
        del modules[module]
