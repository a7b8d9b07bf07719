"""The order of things in a sidecar: listen, run the pipeline, watch until told to stop."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from migrator import quiet, report, settings
from migrator.answers import Answer
from migrator.errors import Internal, Interrupted
from migrator.interruption import Interrupt
from migrator.logs import redact
from migrator.service import MigrationService
from migrator.sidecar import web
from migrator.sidecar.board import Board
from migrator.sidecar.checks import JUDGING, Checker, Verifier
from migrator.sidecar.children import Kin, Told, exit_code, given_flags

if TYPE_CHECKING:
    from migrator.sidecar.metrics import Metrics

log = quiet.get_logger("migrator.sidecar")


def stay(service: MigrationService, arguments: argparse.Namespace) -> Answer:
    """Serve the pages, run the pipeline, and after a good end check on, until SIGTERM or SIGINT.

    A run that fails ends the sidecar with the run's exit code, for what restarts containers to decide upon.
    Raises :class:`SettingsError` where the address cannot be listened on, before anything is run.
    """
    web.library()
    mine = service.settings
    board = Board(patience=3 * mine.sidecar_interval + JUDGING + 4 * mine.connect_timeout)
    loopback = web.is_loopback(mine.sidecar_listen)
    pages = web.Application(board, _metrics(board), loopback=loopback)
    kin = Kin(arguments, json_logs=service.logs.is_json)
    with web.serving(pages, mine.sidecar_listen) as serving:
        told = _run(kin, arguments.revision)
        if told.status < 0:
            _say_killed(told, mine)
        if exit_code(told):
            return Answer({}, "", exit_code(told))  # the run has said why, last
        if "after" not in told.document:
            raise Internal("The run ended well, and did not say how.")
        if not service.logs.is_json:
            log.info("%s", told.document["message"])
        board.ran(told.document)
        return _watch(service, kin, board, arguments, serving)


def _metrics(board: Board) -> Callable[[], tuple[str, bytes]]:
    """Return what makes the metrics; its library, which is as large as all the rest, is imported when one asks."""

    @functools.cache
    def made() -> Metrics:
        from migrator.sidecar.metrics import Metrics

        return Metrics(board)

    return lambda: made().text()


def _run(kin: Kin, revision: str) -> Told:
    """Run the pipeline; a signal that arrives meanwhile is passed on, and its end waited for."""
    ended: list[Told] = []
    over = threading.Event()

    def work() -> None:
        try:
            ended.append(kin.upgrade(revision))
        finally:
            over.set()

    name = ""
    try:
        threading.Thread(target=work, name="run", daemon=True).start()
        over.wait()
    except Interrupt as error:
        name = error.name
        kin.end()
        over.wait()
    if not ended:
        raise Internal("The run could not be started.")
    if name and ended[0].status == -signal.SIGTERM:  # before it had begun to listen for signals
        raise Interrupted(f"Interrupted by {name}.", next_step="run it again")
    return ended[0]


def _say_killed(told: Told, mine: settings.Settings) -> None:
    """Say what nobody else could: a process that is killed says nothing."""
    sentence = (
        f"The run was killed by {signal.Signals(-told.status).name}, as happens at a memory limit."
        " What it left is found by the next run, which finishes the work. Next: start it again, with more memory"
    )
    log.error("%s", sentence, extra={"code": exit_code(told)})
    report.write_termination_line(sentence, mine.termination_log)


def _watch(
    service: MigrationService,
    kin: Kin,
    board: Board,
    arguments: argparse.Namespace,
    serving: threading.Thread,
) -> Answer:
    """Check on a schedule until a signal arrives; a thread that ends by itself is a defect."""
    flags, mine = given_flags(arguments), service.settings

    def load() -> settings.Settings:
        """Read the settings again: a secret's file may have a new password."""
        loaded = settings.load(flags, os.environ, os.getcwd())
        redact.add(loaded.secrets)
        return loaded

    stop = threading.Event()
    name = service.application_name
    checker = Checker(board, kin, load, name, board.now.report or {})
    threads = [serving, _start("checks", lambda: checker.forever(stop))]
    interval = mine.sidecar_verify_interval
    if interval is not None:
        verifier = Verifier(board, kin, mine)
        threads.append(_start("verify", lambda: verifier.forever(interval, stop)))
    log.info("watching %s every %g s", mine.required_target, mine.sidecar_interval)
    try:
        while all(thread.is_alive() for thread in threads):
            threads[1].join(1.0)
    except Interrupt as error:
        stop.set()
        kin.end()
        log.info("stopped by %s", error.name)
        return Answer({"stopped_by": error.name}, "")
    dead = ", ".join(thread.name for thread in threads if not thread.is_alive())
    raise Internal(f"A thread of the sidecar ended by itself: {dead}.")


def _start(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
