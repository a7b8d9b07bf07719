"""The command line: arguments in, exit code out; no logic."""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from migrator import __version__, logs, report, settings
from migrator.errors import Interrupted, MigratorError, SettingsError
from migrator.interruption import Interrupt, Interruption
from migrator.outcome import ExitCode

log = logging.getLogger("migrator")

EPILOG = """\
exit codes: 0 done; 20-24 nothing changed, trying again can help; 10 and 30-39 nothing changed, a person is
needed; 40-43 the database may have changed; `migrator COMMAND --help` shows an example of each command.
"""

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
    "backup": ("make a verified backup now", "migrator backup --name before-sale"),
    "backups": ("list the backups", "migrator backups"),
    "restore": ("bring a backup back", "migrator restore latest --to shop_look"),
    "verify": ("check the schema against the heads and verify.toml", "migrator verify"),
    "ledger": ("show who changed the schema, when and how, newest first", "migrator ledger --limit 50"),
    "repair": (
        "accept the edited files of applied revisions as what was applied",
        "migrator repair --accept 1a2b3c4d5e6f",
    ),
    "settings": ("show every setting, its value, and where that comes from", "migrator settings"),
    "alembic": ("hand over to Alembic's own command line", "migrator alembic upgrade head --sql"),
}


NO_TARGET = frozenset({"settings", "history", "heads", "show", "freeze", "backups", "alembic"})
"""Commands that work without a database."""


_SWITCHES = frozenset(
    settings.flag_name(item) for item in settings.options() if isinstance(item.default, bool)
)


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # A switch alone means true, and must not take the word after it, which may be the command.
        words = [f"{word}=true" if word in _SWITCHES else word for word in args or ()]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise SettingsError([message], next_step=f"{self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every option may stand before or after the command."""
    common, after = (_Parser(add_help=False, argument_default=argparse.SUPPRESS) for _ in range(2))
    _add_common(common, x="x_before")
    _add_common(after, x="x")
    parser = _Parser(
        prog="migrator",
        description="Take a Postgres database safely to the schema that the application needs.",
        epilog=EPILOG,
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"migrator {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (text, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  {example}",
            parents=[] if name == "alembic" else [after],
            prefix_chars="\0" if name == "alembic" else "-",
            add_help=name != "alembic",
            conflict_handler="resolve" if name == "backup" else "error",  # its --name is not Alembic's
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(name, command)
    return parser


def _add_common(parser: argparse.ArgumentParser, x: str) -> None:
    parser.add_argument("--format", choices=("text", "json"), help="how the answer on stdout looks")
    project = parser.add_argument_group("project (Alembic's own options)")
    project.add_argument(
        "-c", "--config", action="append", metavar="FILE", help="alembic.ini or pyproject.toml"
    )
    project.add_argument("-n", "--name", dest="section", metavar="NAME", help="section of the ini file")
    # argparse lets what stands after the command replace what stands before it: both count here.
    project.add_argument("-x", dest=x, action="append", metavar="KEY=VALUE", help="argument for env.py")
    group = parser.add_argument_group("settings (each also as a variable; `migrator settings` lists them)")
    for item in settings.options():
        flag = settings.flag_name(item)
        if flag is None or item.name == "config":
            continue
        boolean = isinstance(item.default, bool)
        group.add_argument(
            flag,
            dest=item.name,
            metavar=item.name.rsplit("_", 1)[-1].upper(),
            nargs="?" if boolean else None,
            help=f"{item.metadata['help']} [{settings.default_text(item) or 'not set'}]".replace("%", "%%"),
        )


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "upgrade":
        parser.add_argument(
            "revision", nargs="?", default="head", help="head, heads, +2, an id or its prefix"
        )
    elif name in {"downgrade", "stamp", "show"}:
        parser.add_argument(
            "revision", help="an id or its prefix, head" + (", -1, base" * (name == "downgrade"))
        )
    if name == "status":
        parser.add_argument("--exit-code", action="store_true", help="exit 3 if revisions are pending")
    if name == "freeze":
        parser.add_argument("--check", action="store_true", help="write nothing; exit 31 if it would change")
    if name in {"downgrade", "restore"}:
        parser.add_argument("--yes", action="store_true", help="do what deletes or replaces data")
    if name == "backup":
        parser.add_argument("--name", dest="backup_name", default="", help="a name to find it by")
    if name == "restore":
        parser.add_argument(
            "backup_id", metavar="backup", help="an id or name that `migrator backups` lists, or latest"
        )
        parser.add_argument(
            "--to", default="", metavar="NAME", help="restore into a new database of this name"
        )
    if name == "ledger":
        parser.add_argument(
            "--limit", type=int, default=20, metavar="ROWS", help="how many rows to show [20]"
        )
    if name == "repair":
        parser.add_argument(
            "--accept", nargs="+", required=True, metavar="REV", help="ids of revisions whose file was edited"
        )
    if name == "alembic":
        parser.add_argument("arguments", nargs="*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and never raises."""
    logs.protect_streams()
    arguments = argparse.Namespace()
    interruption = Interruption()
    try:
        interruption.install()
        arguments = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
        return _run(arguments, interruption)
    except MigratorError as error:
        return _say(error, as_json=getattr(arguments, "format", "text") == "json")
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
        return _say(known, as_json=getattr(arguments, "format", "text") == "json")


def _run(arguments: argparse.Namespace, interruption: Interruption) -> int:
    command = arguments.command or "upgrade"
    flags = {item.name: getattr(arguments, item.name, None) for item in settings.options()}
    flags["config"] = os.pathsep.join(getattr(arguments, "config", None) or []) or None
    loaded = settings.load(
        {name: value for name, value in flags.items() if value is not None},
        os.environ,
        Path.cwd(),
        needs_target=command not in NO_TARGET,
    )
    # Only now, so that --help and a misspelt flag cost nothing: this imports psycopg2 and the rest.
    from migrator import commands

    run_id = commands.new_run_id()
    logs.redact.add(loaded.secrets)
    logging_ = logs.Logs(loaded.log_format, loaded.log_level, run_id)
    logging_.install()
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
    text = logs.redact(json.dumps(document, indent=2, ensure_ascii=False))
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
    if not logging.getLogger().handlers:
        wanted = os.environ.get("MIGRATOR_LOG_FORMAT", "auto").lower()
        logs.Logs(wanted if wanted in {"json", "text"} else "auto").install()


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
        logging.shutdown()
    else:
        atexit._run_exitfuncs()
    os._exit(code)
