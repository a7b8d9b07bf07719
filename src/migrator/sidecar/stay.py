"""The order of events in a sidecar: listen, run the pipeline, watch until it is stopped."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, NoReturn

from migrator.config import settings
from migrator.errors import Internal, Interrupted
from migrator.runtime.logs import redact
from migrator.runtime.output import report
from migrator.runtime.output.report import Answer
from migrator.runtime.signals import Interrupt
from migrator.runtime.threads import background
from migrator.service import MigrationService
from migrator.sidecar import web
from migrator.sidecar.board import Board
from migrator.sidecar.checks import JUDGING, Checker, Verifier
from migrator.sidecar.children import ChildProcess, ChildResult, exit_code, given_flags

if TYPE_CHECKING:
    from migrator.sidecar.metrics import Metrics

_FOR_THE_RUN = 0.5
"""Seconds that a sidecar may take to end after a signal, beyond those of the run, which has its own limit."""

log = logging.getLogger("migrator.sidecar")


def stay(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    """Serve the pages, run the pipeline, and after a good end check until SIGTERM, SIGINT or SIGHUP.

    A failed run ends the sidecar with the run's exit code, so the container's restart policy applies.
    Raises :class:`SettingsError` if it cannot listen on the address, before it runs anything.
    """
    web.library()
    mine = service.settings
    board = Board(patience=3 * mine.sidecar_interval + JUDGING + 4 * mine.connect_timeout)
    loopback = web.is_loopback(mine.sidecar_listen)
    pages = web.Application(board, _metrics(board), loopback=loopback)
    child = ChildProcess(arguments, json_logs=service.logs.is_json)
    service.interruption.limit += _FOR_THE_RUN
    with web.serving(pages, mine.sidecar_listen) as serving:
        run = Run(child, arguments.revision)
        try:
            with service.interruption.changing("migrator current"):
                told = run.end()
            if exit_code(told):
                return _failed(told, mine)
            if not service.logs.is_json:
                log.info("%s", told.document["message"])
            board.ran(told.document)
            _watch(service, child, board, arguments, serving)
        except Interrupt as error:
            return _stopped(error.name, run, mine)


def _metrics(board: Board) -> Callable[[], tuple[str, bytes]]:
    """Return the maker of the metrics; its library, as large as all the rest, is imported at the first
    request.
    """

    @functools.cache
    def made() -> Metrics:
        from migrator.sidecar.metrics import Metrics

        return Metrics(board)

    return lambda: made().text()


class Run:
    """The running pipeline, in a thread that waits for its process."""

    def __init__(self, child: ChildProcess, revision: str) -> None:
        self._kin, self._revision = child, revision
        self._ended: Future[ChildResult] | None = None

    def end(self) -> ChildResult:
        """Start it, unless it is started, and return how it ended."""
        if self._ended is None:
            self._ended = background("run", lambda: self._kin.upgrade(self._revision))
        told = self._ended.result()
        if told.status == 0 and "after" not in told.document:
            raise _defect("The run of the sidecar did not report how it ended.")
        return told

    def stop(self) -> ChildResult | None:
        """Pass SIGTERM on and return how it ended, after any time; None if it was not started."""
        self._kin.end()
        return self.end() if self._ended is not None else None


def _failed(told: ChildResult, mine: settings.Settings) -> Answer:
    """End like the run, which has logged the reason as its last line; unless it was killed."""
    if told.status < 0:
        _say_killed(told, mine)
    return Answer({}, "", exit_code(told))


def _stopped(name: str, run: Run, mine: settings.Settings) -> Answer:
    """End well after a run that ended well, even with the signal; else like the run."""
    told = run.stop()
    if told is None or told.status == -signal.SIGTERM:  # before it listened for signals
        raise Interrupted(f"Interrupted by {name}.", next_step="run it again")
    if exit_code(told):
        return _failed(told, mine)
    log.info("stopped by %s", name)
    return Answer({"stopped_by": name}, "")


def _say_killed(told: ChildResult, mine: settings.Settings) -> None:
    """Report for a killed process, which cannot report itself."""
    sentence = (
        f"The run was killed by {signal.Signals(-told.status).name}, as happens at a memory limit. The "
        "next run finishes the work. Next: start it again, with more memory"
    )
    log.error("%s", sentence, extra={"code": exit_code(told)})
    report.write_termination_line(sentence, mine.termination_log)


def _watch(
    service: MigrationService,
    child: ChildProcess,
    board: Board,
    arguments: argparse.Namespace,
    serving: threading.Thread,
) -> NoReturn:
    """Check on a schedule until a signal arrives; a thread that ends by itself is a defect."""
    flags, mine = given_flags(arguments), service.settings

    def load() -> settings.Settings:
        """Read the settings again: a secret's file may have a new password."""
        loaded = settings.load(flags, os.environ, os.getcwd())
        redact.add(loaded.secrets)
        return loaded

    stop = threading.Event()
    name = service.application_name
    checker = Checker(board, child, load, name, board.now.report or {})
    threads = [serving, _start("checks", lambda: checker.forever(stop))]
    interval = mine.sidecar_verify_interval
    if interval is not None:
        verifier = Verifier(board, child, mine)
        threads.append(_start("verify", lambda: verifier.forever(interval, stop)))
    log.info("watching %s every %g s", mine.required_target, mine.sidecar_interval)
    while all(thread.is_alive() for thread in threads):
        threads[1].join(1.0)
    dead = ", ".join(thread.name for thread in threads if not thread.is_alive())
    raise _defect(f"A thread of the sidecar ended by itself: {dead}.")


def _start(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def _defect(text: str) -> Internal:
    """Return the error for a defect of the sidecar, whose run may have changed the database."""
    return Internal(
        text,
        state="`migrator current` shows the state of the database.",
        next_step="start the sidecar again, and report this with the log at MIGRATOR_LOG_LEVEL=debug",
    )
