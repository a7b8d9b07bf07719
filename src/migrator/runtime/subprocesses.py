"""Child processes: arguments without secrets, output streamed, bounded in memory, always ended and reaped.

Only this module uses ``subprocess``. A child gets its environment explicitly, never its parent's. It
has its own process group, so its end also ends everything that it started. One ``select`` loop reads
its stdout and stderr: neither pipe can fill up and block it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import selectors
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

log = logging.getLogger("migrator")

STDERR_KEPT = 16 * 1024
"""How many of the last bytes of a child's stderr are kept."""
GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL; pg_dump needs a few milliseconds to cancel its query."""
PULSE = 2.5
"""Seconds between two calls of ``pulse``: half of the time in which a lost connection must be noticed."""
BEAT = 15.0
"""Seconds between two lines about a running child, if nothing else shows its progress."""
PIPED, OURS, DISCARDED = subprocess.PIPE, None, subprocess.DEVNULL
"""Where a child's stderr goes: to us, to our own stderr, or nowhere."""
LOOK = 0.2
"""Seconds between two checks whether the child has ended: a process that it left may keep its pipes open."""
_CHUNK = 1024 * 1024
_INHERITED = (
    "HOME",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "KRB5_CONFIG",
    "KRB5CCNAME",
)
_DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Finished:
    """How a child ended: its exit status (negative: the signal that ended it), and the end of its stderr."""

    program: str
    status: int
    stderr: str
    seconds: float


class TimedOut(Exception):
    """A child took longer than its timeout, and was ended."""

    def __init__(self, program: str, seconds: float) -> None:
        super().__init__(f"{program} did not end within {seconds:g} s")


def base_environment() -> dict[str, str]:
    """Return the environment that every child needs: the path of programs, and messages in English and UTF-8."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    path = os.environ.get("PATH", os.defpath)
    return kept | {"PATH": path, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}


def run(
    arguments: Sequence[str | Path],
    *,
    environment: Mapping[str, str] | None = None,
    feed: Iterable[bytes] | None = None,
    on_output: Callable[[bytes], object] | None = None,
    on_stderr: Callable[[bytes], object] | None = None,
    pulse: Callable[[], object] | None = None,
    on_start: Callable[[int], object] | None = None,
    stderr: int | None = PIPED,
    timeout: float | None = None,
) -> Finished:
    """Run a program to its end, and pass its stdout in chunks to ``on_output`` (discarded if None).

    ``environment`` is :func:`base_environment` unless it is given.
    ``feed`` yields the content of its stdin, no faster than the program reads. A program that ends, or
    closes its stdin, before it has read everything is no error; the unread rest stays in ``feed``.
    ``on_stderr`` gets the chunks of stderr; the end of stderr is always kept. ``on_start`` gets the
    child's process id. ``pulse`` is called every :data:`PULSE` seconds. Any exception meanwhile (from
    one of these, or from a signal handler) ends the child, reaps it and is raised again. A ``stderr``
    that is not :data:`PIPED` is not read. All output of the child is passed on. Processes that it
    leaves in its process group are killed after its end. They are not waited for, even if they left the
    group and hold the pipes open. Raises :class:`TimedOut` after ``timeout`` seconds, OSError if the
    program cannot be started.
    """
    started = time.monotonic()
    tail = bytearray()

    def read_stderr(chunk: bytes) -> None:
        tail.extend(chunk)
        del tail[:-STDERR_KEPT]
        if on_stderr is not None:
            on_stderr(chunk)

    child: subprocess.Popen[bytes] | None = None
    try:
        with uninterrupted():
            given = base_environment() if environment is None else environment
            child = _start(arguments, given, stderr, discard=on_output is None, fed=feed is not None)
            _running.add(child.pid)
        if on_start is not None:
            on_start(child.pid)
        deadline = None if timeout is None else started + timeout
        if pulse is None and stderr == PIPED:
            pulse = _heartbeat(Path(arguments[0]).name, started)
        if not _pump(child, _Feed(feed), on_output or (lambda _: None), read_stderr, pulse, deadline):
            raise TimedOut(Path(arguments[0]).name, timeout or 0.0)
    except BaseException:
        if child is not None:
            _end(child)
        raise
    finally:
        if child is not None:
            _running.discard(child.pid)
    return Finished(
        program=Path(arguments[0]).name,
        status=child.returncode,
        stderr=tail.decode("utf-8", "replace"),
        seconds=time.monotonic() - started,
    )


def _heartbeat(program: str, started: float) -> Callable[[], None]:
    """Return a function that reports from time to time that a program still runs."""
    said = started

    def beat() -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= BEAT:
            said = now
            log.info("%s is still running after %.0f s", program, now - started)

    return beat


_running: set[int] = set()


def kill_all() -> None:
    """Kill every child, with its process group: this process is about to end, in any state of its threads."""
    for pid in _running.copy():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def uninterrupted(*, forget: bool = False) -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back for a short section that must not be interrupted.

    A signal that arrived is handled at the end, or dropped if no interruptible work remains. It
    exchanges handlers and does not use a signal mask: a child would inherit the mask, and another
    thread could take the signal anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    arrived: list[tuple[int, FrameType | None]] = []
    previous: dict[signal.Signals, Any] = {}
    try:
        for number in _DEFERRED:
            handler = signal.getsignal(number)
            if callable(handler):
                previous[number] = handler
                signal.signal(number, lambda *event: arrived.append(event))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for event in [] if forget else arrived:
            previous[signal.Signals(event[0])](*event)


def _start(
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    stderr: int | None,
    *,
    discard: bool,
    fed: bool,
) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [str(argument) for argument in arguments],
        env=dict(environment),
        stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if discard else subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent(),
    )
    for pipe in (child.stdin, child.stdout):
        if pipe is not None and hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(OSError):  # an unprivileged user may be over its quota of pipe buffers
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _CHUNK)
    if child.stdin is not None:
        os.set_blocking(child.stdin.fileno(), False)
    return child


def _die_with_parent() -> Callable[[], None] | None:
    """Return the function that makes the child end when we are killed with SIGKILL; None if the system
    cannot.

    It runs between fork and exec, so all its needs are looked up here. prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()
    number = int(signal.SIGTERM)

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(127)

    return ask


class _Feed:
    """The unwritten rest of a child's stdin."""

    def __init__(self, chunks: Iterable[bytes] | None) -> None:
        self._chunks = iter(chunks or ())
        self._left = memoryview(b"")

    def write(self, pipe: int) -> bool:
        """Write as much as the pipe takes at once; return whether there may be more, which a closed pipe
        ends.
        """
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._left = memoryview(chunk)
        try:
            self._left = self._left[os.write(pipe, self._left) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            return False
        return True


def _pump(
    child: subprocess.Popen[bytes],
    feed: _Feed,
    on_output: Callable[[bytes], object],
    on_stderr: Callable[[bytes], object],
    pulse: Callable[[], object] | None,
    deadline: float | None,
) -> bool:
    """Serve the pipes until the child has ended; return whether it ended before the deadline."""
    with selectors.DefaultSelector() as selector:
        for stream, handle in ((child.stdout, on_output), (child.stderr, on_stderr)):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, handle)
        if child.stdin is not None:
            selector.register(child.stdin, selectors.EVENT_WRITE)
        if not _serve(child, selector, feed, pulse, deadline):
            return False
        try:
            child.wait(_left(deadline))
        except subprocess.TimeoutExpired:
            return False
        _end_what_is_left(child)
        _drain(selector)
    _close(child)
    return True


def _serve(
    child: subprocess.Popen[bytes],
    selector: selectors.BaseSelector,
    feed: _Feed,
    pulse: Callable[[], object] | None,
    deadline: float | None,
) -> bool:
    """Read and write until the pipes or the child have ended; return whether that was before the deadline."""
    beat = time.monotonic() + PULSE
    while selector.get_map() and child.poll() is None:
        left = _left(deadline)
        if left is not None and left <= 0:
            return False
        if pulse is not None and time.monotonic() >= beat:
            pulse()
            beat = time.monotonic() + PULSE
        for key, _ in selector.select(LOOK if left is None else min(left, LOOK)):
            if key.fileobj is child.stdin:
                if not feed.write(key.fd):
                    selector.unregister(key.fileobj)
                    child.stdin.close()
                continue
            chunk = os.read(key.fd, _CHUNK)
            if chunk:
                key.data(chunk)
            else:
                selector.unregister(key.fileobj)
    return True


def _drain(selector: selectors.BaseSelector) -> None:
    """Pass on the remaining output of an ended child, but nothing that another process writes later.

    ioctl(2), FIONREAD: all output of the child is in the pipe by now, so there is no wait.
    """
    for key in list(selector.get_map().values()):
        if key.events & selectors.EVENT_READ:
            answer = fcntl.ioctl(key.fd, termios.FIONREAD, bytes(4))
            left = int.from_bytes(answer, sys.byteorder)
            while left > 0 and (chunk := os.read(key.fd, min(left, _CHUNK))):
                left -= len(chunk)
                key.data(chunk)


def _end_what_is_left(child: subprocess.Popen[bytes]) -> None:
    """Kill the processes that a reaped child has left in its process group, and reap those that become ours,
    as for PID 1.

    Not SIGTERM: a fork has the handlers of its parent, and would clean up after it.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
        os.killpg(child.pid, signal.SIGKILL)
        while True:
            os.waitpid(-child.pid, 0)


def _close(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole process group and reap the child."""
    with uninterrupted():
        for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)
            try:
                child.wait(grace)
                break
            except subprocess.TimeoutExpired:
                continue
        _end_what_is_left(child)
        _close(child)
