"""Run migrator itself as a child process: the memory and imports of a command are gone when it ends.

An ``env.py`` imports an application, which may start threads, fork, set up logging, or hold the
interpreter for seconds. None of that delays the process that answers the probes. Processes that remain
after the command are killed. Daemons, which have their own session or process group, live on, and are
not waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.config import settings
from migrator.outcome import ExitCode
from migrator.runtime import subprocesses


@dataclass(frozen=True)
class ChildResult:
    """How a child ended: its exit status (negative: the signal that ended it), and its JSON answer."""

    status: int
    document: Mapping[str, Any]


def given_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings of the command line, as :func:`migrator.config.settings.load` takes them."""
    flags = {item.name: getattr(arguments, item.name, None) for item in settings.OPTIONS}
    flags["config"] = os.pathsep.join(getattr(arguments, "config", None) or []) or None
    return {name: value for name, value in flags.items() if value is not None}


class ChildProcess:
    """Starts migrator as this process was started: the same program, options and environment, another command."""

    def __init__(self, arguments: argparse.Namespace, *, json_logs: bool) -> None:
        self._words = [*_program(), *_options(arguments), f"--log-format={'json' if json_logs else 'text'}"]
        self._environment = dict(os.environ)
        # A command that only reads must not replace the run's own report.
        self._quiet = self._environment | {"MIGRATOR_REPORT_FILE": "", "MIGRATOR_TERMINATION_LOG": ""}
        self._pids: set[int] = set()
        self._ending = False
        self._lock = threading.Lock()

    def upgrade(self, revision: str) -> ChildResult:
        """Run the pipeline to its end, with logs to the same place."""
        return self._run(
            ["upgrade", *([revision] if revision else [])], self._environment, subprocesses.OURS, None
        )

    def look(self, command: str, wait: float, timeout: float) -> ChildResult:
        """Run a command that only reads, without its logs.

        ``wait`` is the number of seconds to wait for Postgres, ``timeout`` that for the whole command.
        Raises :class:`migrator.runtime.subprocesses.TimedOut`.
        """
        words = ["--report-file=", "--termination-log=", f"--wait-timeout={wait:g}", command]
        return self._run(words, self._quiet, subprocesses.DISCARDED, timeout)

    def end(self) -> None:
        """Pass a SIGTERM on to running and starting children."""
        with self._lock:
            self._ending = True
            for pid in self._pids:
                _terminate(pid)

    def _run(
        self, words: Sequence[str], environment: Mapping[str, str], stderr: int | None, timeout: float | None
    ) -> ChildResult:
        answer, pids = bytearray(), []

        def started(pid: int) -> None:
            pids.append(pid)
            with self._lock:
                self._pids.add(pid)
                if self._ending:
                    _terminate(pid)

        try:
            finished = subprocesses.run(
                [*self._words, "--format=json", *words],
                environment=environment,
                on_output=answer.extend,
                stderr=stderr,
                on_start=started,
                timeout=timeout,
            )
        finally:
            with self._lock:
                self._pids.difference_update(pids)
        return ChildResult(finished.status, _document(bytes(answer)))


def _terminate(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _program() -> list[str]:
    """Return the interpreter and its program: a script, or ``-m migrator``."""
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]]


def _options(arguments: argparse.Namespace) -> list[str]:
    """Return the given options, as arguments for the parser."""
    words = [f"--config={name}" for name in getattr(arguments, "config", None) or ()]
    if getattr(arguments, "section", None):
        words.append(f"--name={arguments.section}")
    for value in (*(getattr(arguments, "x_before", None) or ()), *(getattr(arguments, "x", None) or ())):
        words += ["-x", value]
    for item in settings.OPTIONS:
        value = getattr(arguments, item.name, None)
        if value is not None and item.name != "config":
            words.append(f"{settings.flag_name(item)}={value}")
    return words


def _document(answer: bytes) -> Mapping[str, Any]:
    """Return the JSON object that a child answered; a killed child answers nothing."""
    try:
        document = json.loads(answer)
    except ValueError:
        document = None
    return document if isinstance(document, dict) else {}


def exit_code(told: ChildResult) -> int:
    """Return the exit code for the child's end; for a signal, as shells write it."""
    return 128 - told.status if told.status < 0 else told.status or int(ExitCode.OK)
