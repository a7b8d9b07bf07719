"""The arguments: what each command takes, made of the settings and of Alembic's own options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from migrator import __version__, settings
from migrator.errors import SettingsError

EPILOG = """\
exit codes: 0 done; 20-24 nothing changed, trying again can help; 10 and 30-39 nothing changed, a person is
needed; 40-43 the database may have changed; `migrator COMMAND --help` shows an example of each command.
"""

_SWITCHES = frozenset(
    settings.flag_name(item) for item in settings.options() if isinstance(item.default, bool)
)


PASSED_ON = frozenset({"alembic", "revision", "merge"})
"""Commands whose arguments are Alembic's, all of them."""


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # A switch alone means true, and must not take the word after it, which may be the command.
        words = [f"{word}=true" if word in _SWITCHES else word for word in args or ()]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise SettingsError([message], next_step=f"{self.prog} --help")


def make_parser(
    commands: Mapping[str, tuple[str, str]], words: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Return the parser of ``commands`` (help and example by name); options may stand before or after the command.

    Where the ``words`` to parse are given, only commands among them get their options, which saves time.
    """
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
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (text, example) in commands.items():
        if words is not None and name not in words:
            subparsers.add_parser(name, help=text)
            continue
        command = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  {example}",
            parents=[] if name in PASSED_ON else [after],
            prefix_chars="\0" if name in PASSED_ON else "-",
            add_help=name not in PASSED_ON,
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
            help=f"{item.help} [{settings.default_text(item) or 'not set'}]".replace("%", "%%"),
        )


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "upgrade":
        parser.add_argument(
            "revision", nargs="?", default="head", help="head, heads, +2, an id or its prefix"
        )
    elif name == "sidecar":
        parser.add_argument(
            "revision",
            nargs="?",
            default="head",
            choices=("head", "heads"),
            help="heads, where there are several",
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
    if name == "verify-backup":
        parser.add_argument(
            "backup_id", metavar="backup", help="an id or name that `migrator backups` lists, or latest"
        )
        parser.add_argument("--how", choices=("read", "restore"), help="instead of MIGRATOR_BACKUP_VERIFY")
    if name == "backups":
        parser.add_argument(
            "backups_action",
            metavar="show",
            nargs="?",
            choices=("show",),
            help="show one, with how to restore it by hand",
        )
        parser.add_argument("backup_id", metavar="backup", nargs="?", help="its id or name, or latest")
    if name == "restore":
        parser.add_argument(
            "backup_id", metavar="backup", help="an id or name that `migrator backups` lists, or latest"
        )
        parser.add_argument(
            "--to", default="", metavar="NAME", help="restore into a new database of this name"
        )
        parser.add_argument(
            "--drop-old",
            action="store_true",
            help="drop the database that was replaced, once the restored one is seen in its place",
        )
        parser.add_argument(
            "--incomplete",
            action="store_true",
            help="also a backup whose tables are not all whole: those whose rows were left out are empty then",
        )
        parser.add_argument(
            "--table",
            dest="tables",
            action="append",
            default=[],
            metavar="TABLE",
            help="restore this table alone, into a schema of its own (may be given several times)",
        )
        parser.add_argument(
            "--into-schema", default="", metavar="SCHEMA", help="the schema for --table [restored_RUN]"
        )
    if name == "prune":
        parser.add_argument(
            "--keep",
            dest="backup_keep",
            default=argparse.SUPPRESS,
            metavar="POLICY",
            help="instead of MIGRATOR_BACKUP_KEEP",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="only show what would go, and why the rest stays"
        )
    if name == "ledger":
        parser.add_argument(
            "--limit", type=int, default=20, metavar="ROWS", help="how many rows to show [20]"
        )
    if name == "repair":
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument("--accept", nargs="+", metavar="REV", help="ids of revisions whose file was edited")
        what.add_argument(
            "--accept-schema", action="store_true", help="what the schema is now is what it should be"
        )
    if name in PASSED_ON:
        parser.add_argument("arguments", nargs="*")
