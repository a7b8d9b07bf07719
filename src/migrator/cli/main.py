"""The command line: arguments in, exit code out; signals and errors become an exit code."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

# Our imports make a hundred thousand objects that stay. Collecting garbage among them takes a tenth of an
# up-to-date check. This stands before the first of them; this module is for programs only.
gc.set_threshold(50_000, *gc.get_threshold()[1:])

from migrator.config import settings  # noqa: E402
from migrator.errors import Interrupted, MigratorError, Partial  # noqa: E402
from migrator.outcome import ExitCode  # noqa: E402
from migrator.runtime import logs  # noqa: E402
from migrator.runtime.escaping import json_text  # noqa: E402
from migrator.runtime.output import report, stdio  # noqa: E402
from migrator.runtime.signals import Interrupt, Interruption  # noqa: E402

if TYPE_CHECKING:
    import argparse

    from migrator.runtime.output.report import Answer

log = logs.get_logger("migrator")

NO_TARGET = frozenset(
    {
        "settings",
        "history",
        "heads",
        "show",
        "freeze",
        "backups",
        "verify-backup",
        "revision",
        "merge",
        "alembic",
    }
)
"""Commands that work without a database."""


REPORTED = frozenset({"upgrade", "downgrade", "stamp", "verify"})
"""Commands that always write a report (MIGRATOR_REPORT_FILE)."""


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. A container without arguments skips the parser, which takes a while to build."""
    if not words or (words[0] == "upgrade" and len(words) <= 2 and words[-1][:1] not in {"-", ""}):
        plain: Any = types.SimpleNamespace(command="upgrade", revision=words[1] if len(words) == 2 else "")
        return cast("argparse.Namespace", plain)
    from migrator.cli.parser import make_parser

    return cast("argparse.Namespace", make_parser(words).parse_args(words))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and never raises."""
    stdio.open_streams()
    interruption = Interruption()
    try:
        return _main(argv, interruption)
    except Exception as error:  # noqa: BLE001 - the machine cannot even report the failure
        return _bare_word(error, interruption)


def _bare_word(error: Exception, interruption: Interruption) -> int:
    """Report a failure without loading, opening or starting anything."""
    lacking = isinstance(error, (OSError, MemoryError, RuntimeError, ImportError))
    code = ExitCode.UNREACHABLE if lacking else ExitCode.INTERNAL
    state = (
        "The database was not changed." if lacking else "`migrator current` shows the state of the database."
    )
    if interruption.unsure:
        code, state = (
            ExitCode.PARTIAL,
            f"It is not known what was committed: `{interruption.unsure}` shows it.",
        )
    text = f"{code.name} ({int(code)}): {type(error).__name__}: {error}. {state}\n"
    sys.stderr.write(text)
    sys.stderr.flush()
    return int(code)


def _main(argv: Sequence[str] | None, interruption: Interruption) -> int:
    as_json = False
    interruption.last_word = lambda: _end_by_force(interruption)
    try:
        interruption.install()
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        as_json = getattr(arguments, "format", "text") == "json"
        return _run(arguments, interruption)
    except MigratorError as error:
        if _of_the_signal(error, interruption):
            return _interrupted(interruption)
        interruption.settle(int(error.code))
        return _say(error, as_json=as_json)
    except Interrupt:
        return _interrupted(interruption)
    except Exception as error:
        if _of_the_signal(error, interruption):
            return _interrupted(interruption)
        known = _meaning(error)
        if known.code is ExitCode.UNREACHABLE and interruption.unsure:
            known = Partial(
                known.message,
                state="It is not known what was committed.",
                next_step=f"`{interruption.unsure}` shows it",
            )
        if known.code is ExitCode.INTERNAL:
            _ensure_logging()
            log.exception("unexpected")
        interruption.settle(int(known.code))
        return _say(known, as_json=as_json)


def _meaning(error: Exception) -> MigratorError:
    from migrator.runtime import resource_errors

    if why := resource_errors.lack(error):  # it may be that nothing more can be loaded
        return resource_errors.without(why)
    from migrator.pipeline.unexpected import translate

    return translate(error)


def _run(arguments: argparse.Namespace, interruption: Interruption) -> int:
    command = arguments.command or "upgrade"
    if getattr(arguments, "no_color", False):
        os.environ["NO_COLOR"] = "1"
    if command == "completion":
        from migrator.cli import completion

        _write(completion.script(arguments.shell), wanted=True)
        return int(ExitCode.OK)
    flags = {item.name: getattr(arguments, item.name, None) for item in settings.OPTIONS}
    flags["config"] = os.pathsep.join(getattr(arguments, "config", None) or []) or None
    loaded = settings.load(
        {name: value for name, value in flags.items() if value is not None},
        os.environ,
        os.getcwd(),
        needs_target=command not in NO_TARGET,
    )
    # Imported late, so that --help and a mistyped flag cost nothing: this imports psycopg2 and the rest.
    with stdio.hidden("ssl"):
        import migrator.postgres.libpq  # noqa: F401 - it imports psycopg2; see hidden()
    from migrator.cli import commands

    run_id = commands.new_run_id()
    logs.redact.add(loaded.secrets)
    logging_ = logs.Logs(loaded.log_format, loaded.log_level, run_id)
    logging_.install_when_needed()
    if command == "alembic":  # a script with wrong characters is worse than no script
        getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="strict")
    if command != "upgrade":  # which alone has a fast path, and it logs nothing
        logs.set_up_now()
    for warning in loaded.warnings:
        log.warning("%s", warning)
    if command in REPORTED:
        report.forget(loaded.report_file)
    service = commands.make_service(loaded, arguments, logging_, interruption, run_id)
    as_json = getattr(arguments, "format", "text") == "json"
    interruption.tell = lambda outcome: _print(commands.tell(service, outcome), as_json=as_json)
    answer = commands.HANDLERS[command](service, arguments)
    interruption.settle(int(answer.code))
    _print(answer, as_json=as_json)
    return int(answer.code)


def _print(answer: Answer, *, as_json: bool) -> None:
    """Print an answer. The message of a failure is the log's last line already."""
    if as_json or answer.code in (ExitCode.OK, ExitCode.PENDING):
        text = answer.render("json" if as_json else "text")
        if not as_json and "logging" in sys.modules:  # not after an up-to-date check, which imports little
            from migrator.runtime import terminal

            text = terminal.coloured(text, sys.stdout)
        _write(text, wanted=as_json or not text)  # Alembic's own commands have printed it already


def _of_the_signal(error: Exception, interruption: Interruption) -> bool:
    if not interruption.received:
        return False
    from migrator.pipeline.context import of_a_signal

    return of_a_signal(error)


def _interrupted(interruption: Interruption, *, forced: bool = False) -> int:
    """Report a command that a signal ended: the server rolls back the open transaction.

    ``forced``: the main thread hangs, and this thread reports in its place.
    """
    if interruption.outcome is not None:
        outcome = interruption.outcome()
        interruption.settle(int(outcome.code), forced=forced)
        interruption.tell(outcome)
        return int(outcome.code)
    told: MigratorError = Interrupted(f"Interrupted by {interruption.received}.", next_step="run it again")
    if interruption.unsure:
        told = Partial(
            f"Interrupted by {interruption.received}.",
            state="It is not known what was committed.",
            next_step=f"`{interruption.unsure}` shows it",
        )
    interruption.settle(int(told.code), forced=forced)
    return _say(told, as_json=False)


def _end_by_force(interruption: Interruption) -> None:
    """Write the outcome for a main thread that hangs, and kill its child processes."""
    if "migrator.runtime.subprocesses" in sys.modules:
        from migrator.runtime.subprocesses import kill_all

        kill_all()
    for sentence in interruption.left:
        log.warning("%s", sentence)
    _interrupted(interruption, forced=True)


def _write(text: str, *, wanted: bool) -> None:
    """Print an answer. Warn if it was not written, unless the reader closed the pipe (``| head``).

    The exit code still says what happened to the database. ``wanted``: a program reads the answer, or
    it is a script.
    """
    print(text, end="\n" if text else "", flush=True)
    lost = getattr(sys.stdout, "lost", None)
    if lost is not None and (wanted or not isinstance(lost, BrokenPipeError)):
        log.warning("the answer was not fully written to stdout: %s", getattr(lost, "strerror", None) or lost)


def _say(error: MigratorError, *, as_json: bool) -> int:
    """Report a failure once, as the last line of the log and to every destination of an outcome."""
    _ensure_logging()
    sentence = f"{error.code.name} ({int(error.code)}): {error}"
    sentence += f" Next: {error.next_step}" if error.next_step else ""
    log.error("%s", sentence, extra={"code": int(error.code), "outcome": error.code.name})
    document = {
        "code": int(error.code),
        "outcome": error.code.name,
        "message": str(error),
        "next_step": error.next_step,
    }
    text = logs.redact(json_text(document, indent=2))
    if as_json:
        _write(text, wanted=True)
    if os.environ.get("MIGRATOR_REPORT_FILE"):
        report.write_text(text, os.environ["MIGRATOR_REPORT_FILE"])
    report.write_termination_line(
        sentence, os.environ.get("MIGRATOR_TERMINATION_LOG", "/dev/termination-log")
    )
    return int(error.code)


def _ensure_logging() -> None:
    """Set up logging for a failure before the settings are known."""
    logs.set_up_now()
    import logging

    if not logging.getLogger().handlers:
        wanted = os.environ.get("MIGRATOR_LOG_FORMAT", "auto").lower()
        logs.Logs(wanted if wanted in {"json", "text"} else "auto").install()


def _end_logging() -> None:
    if "logging" in sys.modules:
        import logging

        logging.shutdown()


def script() -> NoReturn:
    """Run as a program.

    An application that ``env.py`` imports may start threads that never end. They must not keep the
    container alive. The interpreter also skips its own teardown, which takes longer than an up-to-date
    check. Handlers registered with ``atexit`` do run.
    """
    try:
        code = main()
    except SystemExit as error:  # argparse's, after --help
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    others = [
        item for item in threading.enumerate() if item is not threading.main_thread() and not item.daemon
    ]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if others:
        _end_logging()
    else:
        atexit._run_exitfuncs()
    os._exit(code)
