"""Programs that run in the background: started with a log of their own, ended by their process id."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STOP_SECONDS = 20


class NotReady(Exception):
    """A program ended, or did not become ready in time; carries the end of its log."""


@contextlib.contextmanager
def running(
    name: str, *command: str, logs: Path, ready: Callable[[], bool], seconds: float
) -> Iterator[None]:
    """Run a program until the block ends; `ready` is asked until it says so, for at most `seconds`."""
    log = logs / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait(name, process, log, ready, seconds)
        yield
    finally:
        _stop(process)


def _wait(
    name: str, process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool], seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NotReady(f"{name} is not ready:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.3)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_on_sigterm() -> None:
    """Have SIGTERM end this program as Ctrl-C does: what it started is stopped first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def listens(port: int) -> bool:
    """Tell whether something accepts connections on a port of the loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
