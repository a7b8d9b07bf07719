"""Run the real command line in processes forked from one that has imported everything: a start costs milliseconds.

Fifty of them arrive within a fraction of a second, which is a harder race than fifty interpreters that load Alembic on
two cores, and three hundred runs that are killed do not take minutes to start.  Everything but the imports is as in
the installed command: arguments, environment, working directory, signals, exit code, files for its output.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_PRELOAD = [
    "migrator.cli.main",
    "migrator.cli.commands",
    "migrator.pipeline.apply.apply",
    "alembic.command",
    "alembic.runtime.environment",
    "sqlalchemy.dialects.postgresql.psycopg2",
    "logging.config",
    "tests.support.forked",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)
_mutex = threading.Lock()
"""Starting a process looks after all others, and two looks at one that has ended disagree about its exit code."""


class Forked:
    """One `migrator` at work in a process of its own."""

    def __init__(self, *arguments: str, cwd: Path, env: Mapping[str, str], out: Path | None = None) -> None:
        self.arguments = arguments
        self.folder = out or Path(tempfile.mkdtemp(prefix="migrator-forked-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._process = _context.Process(target=_run, args=(arguments, str(cwd), dict(env), str(self.folder)))
        with _mutex:
            self._process.start()
        while self.code is None and not (self.folder / "stdout").exists():
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's too."""
        return self._process.pid or 0

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return _text(self.folder / "stdout")

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return _text(self.folder / "stderr")

    @property
    def code(self) -> int | None:
        """Its exit code, a signal's number below zero, None while it runs."""
        with _mutex:
            return self._process.exitcode

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def finish(self, timeout: float = 120) -> int:
        """Wait for its end and return the exit code; kill it and fail if that takes longer."""
        deadline = time.monotonic() + timeout
        while (code := self.code) is None:
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"still running after {timeout} s:\n{self.stdout}{self.stderr}")
            time.sleep(0.005)
        return code

    def end(self) -> None:
        """Kill what is left of it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.code is None:
            time.sleep(0.005)

    def __str__(self) -> str:
        command = " ".join(("migrator", *self.arguments))
        return f"$ {command}\nexit code {self.code}\n{self.stdout}{self.stderr}"


def _text(path: Path) -> str:
    return path.read_text(errors="surrogateescape") if path.exists() else ""


def _run(arguments: tuple[str, ...], cwd: str, env: dict[str, str], out: str) -> None:
    """Become the command: in the child."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        target = os.open(os.path.join(out, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    sys.stdout, sys.stderr = (
        open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - they live as long as the process
        for descriptor in (1, 2)
    )
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["migrator", *arguments]
    from migrator.cli.main import script

    script()
