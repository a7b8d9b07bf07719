"""The command line: arguments in, exit code out; no logic."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

# Importing makes a hundred thousand objects that stay: looking at them again and again for garbage takes longer
# than a tenth of a run with nothing to do.  Here, before the first of our imports; this module is for programs only.
gc.set_threshold(50_000, *gc.get_threshold()[1:])

from migrator import logs, quiet, report, settings, surroundings  # noqa: E402
from migrator.errors import Interrupted, MigratorError  # noqa: E402
from migrator.interruption import Interrupt, Interruption  # noqa: E402
from migrator.outcome import ExitCode  # noqa: E402
from migrator.visible import json_text  # noqa: E402

if TYPE_CHECKING:
    import argparse

log = quiet.get_logger("migrator")

# command: (help, example)
COMMANDS: Mapping[str, tuple[str, str]] = {
    "upgrade": ("wait, lock, back up, apply, verify (the default command)", "migrator upgrade head"),
    "downgrade": ("go back, with the same lock, backup and verify", "migrator downgrade -1"),
    "stamp": ("set the version rows without running a revision", "migrator stamp 1a2b3c4d5e6f"),
    "current": ("show the revision that the database is at", "migrator current"),
    "history": ("list the revisions in this image, newest first", "migrator history"),
    "heads": ("list the heads of the history", "migrator heads"),
    "show": ("show one revision", "migrator show head"),
    "freeze": (
        "write manifest.json: what the image holds, for a diff and for fast runs",
        "migrator freeze --check",
    ),
    "check": ("exit 3 if revisions are pending", "migrator check || echo pending"),
    "status": ("show database, revision, what is pending, who is migrating", "migrator status --format json"),
    "wait": ("wait for Postgres to answer a query, and do nothing else", "migrator wait --wait-timeout 2m"),
    "wait-for-current": (
        "wait until nothing is pending, reading only: for pods that must not migrate",
        "migrator wait-for-current --wait-timeout 10m",
    ),
    "sidecar": (
        "upgrade, then stay: /livez, /readyz, /metrics and / say whether the database is at this image's heads",
        "migrator sidecar --sidecar-listen 0.0.0.0:8086",
    ),
    "backup": ("make a verified backup now", "migrator backup --name before-sale"),
    "verify-backup": (
        "prove a backup again: read all of it, or restore it into a scratch database and compare",
        "migrator verify-backup latest --how restore",
    ),
    "backups": (
        "list the backups, or show one and how to restore it by hand",
        "migrator backups show latest",
    ),
    "prune": (
        "remove the backups that MIGRATOR_BACKUP_KEEP does not keep",
        "migrator prune --dry-run --keep last=5,daily=7,weekly=4,monthly=6",
    ),
    "restore": ("bring a backup back", "migrator restore latest --to shop_look"),
    "verify": (
        "check the schema against the heads, verify.toml and what the last run left",
        "migrator verify",
    ),
    "ledger": ("show who changed the schema, when and how, newest first", "migrator ledger --limit 50"),
    "repair": (
        "accept the edited files of applied revisions as what was applied, or the schema as it is",
        "migrator repair --accept 1a2b3c4d5e6f",
    ),
    "revision": (
        "write a new revision file (Alembic's own command)",
        'migrator revision --autogenerate -m "add orders"',
    ),
    "merge": (
        "write a revision that joins heads (Alembic's own command)",
        'migrator merge heads -m "one again"',
    ),
    "settings": ("show every setting, its value, and where that comes from", "migrator settings"),
    "alembic": ("hand over to Alembic's own command line", "migrator alembic upgrade head --sql"),
}


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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    from migrator.arguments import make_parser

    return make_parser(COMMANDS)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; those of a container that is only started need no parser, which takes a while to make."""
    if not words or (words[0] == "upgrade" and len(words) <= 2 and words[-1][:1] not in {"-", ""}):
        plain: Any = types.SimpleNamespace(
            command="upgrade", revision=words[1] if len(words) == 2 else "head"
        )
        return cast("argparse.Namespace", plain)
    from migrator.arguments import make_parser

    return make_parser(COMMANDS, words).parse_args(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and never raises."""
    logs.protect_streams()
    as_json = False
    interruption = Interruption()
    try:
        interruption.install()
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        as_json = getattr(arguments, "format", "text") == "json"
        return _run(arguments, interruption)
    except MigratorError as error:
        return _say(error, as_json=as_json)
    except Interrupt as error:
        return _say(Interrupted(f"Interrupted by {error.name}.", next_step="run it again"), as_json=False)
    except BrokenPipeError:
        return int(ExitCode.OK)
    except Exception as error:
        from migrator.aftermath import translate

        known = translate(error)
        if known.code is ExitCode.INTERNAL:
            _ensure_logging()
            log.exception("unexpected")
        return _say(known, as_json=as_json)


def _run(arguments: argparse.Namespace, interruption: Interruption) -> int:
    command = arguments.command or "upgrade"
    flags = {item.name: getattr(arguments, item.name, None) for item in settings.options()}
    flags["config"] = os.pathsep.join(getattr(arguments, "config", None) or []) or None
    loaded = settings.load(
        {name: value for name, value in flags.items() if value is not None},
        os.environ,
        os.getcwd(),
        needs_target=command not in NO_TARGET,
    )
    # Only now, so that --help and a misspelt flag cost nothing: this imports psycopg2 and the rest.
    with surroundings.hidden("ssl"):
        import migrator.postgres  # noqa: F401 - see hidden()
    from migrator import commands

    run_id = commands.new_run_id()
    logs.redact.add(loaded.secrets)
    logging_ = logs.Logs(loaded.log_format, loaded.log_level, run_id)
    logging_.install_when_needed()
    if command != "upgrade":  # which alone has a short way, on which nobody says anything
        quiet.wake()
    for warning in loaded.warnings:
        log.warning("%s", warning)
    service = commands.make_service(loaded, arguments, logging_, interruption, run_id)
    answer = commands.HANDLERS[command](service, arguments)
    as_json = getattr(arguments, "format", "text") == "json"
    if as_json or answer.code in (ExitCode.OK, ExitCode.PENDING):
        # The sentence of a failure was the log's last line, and is not said twice.
        text = answer.render("json" if as_json else "text")
        print(text, end="\n" if text else "", flush=True)
    return int(answer.code)


def _say(error: MigratorError, *, as_json: bool) -> int:
    """Say a failure once, as the last line of the log, and wherever else an outcome is looked for."""
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
        print(text, flush=True)
    if os.environ.get("MIGRATOR_REPORT_FILE"):
        report.write_text(text, os.environ["MIGRATOR_REPORT_FILE"])
    report.write_termination_line(
        sentence, os.environ.get("MIGRATOR_TERMINATION_LOG", "/dev/termination-log")
    )
    return int(error.code)


def _ensure_logging() -> None:
    """Set logging up for a failure that came before the settings were known."""
    quiet.wake()
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

    An application that ``env.py`` imported may have started threads that never end: they must not keep the
    container alive after the work is done.  Nor is Alembic taken to pieces, module by module, by an interpreter that
    ends: that takes longer than all that a run with nothing to do does.  What was registered to run at the exit runs.
    """
    code = main()
    others = [
        item for item in threading.enumerate() if item is not threading.main_thread() and not item.daemon
    ]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            code = code or 0
    if others:
        _end_logging()
    else:
        atexit._run_exitfuncs()
    os._exit(code)
