"""The arguments of each command, besides the settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PASSED_ON = frozenset({"alembic", "revision", "merge"})
"""The commands that pass all arguments to Alembic."""


class Argument(NamedTuple):
    """One argument or option, as argparse takes it."""

    flags: tuple[str, ...]
    help: str
    keywords: Mapping[str, Any]


def _argument(*flags: str, help: str, **keywords: Any) -> Argument:
    return Argument(flags, help, keywords)


def _switch(flag: str, help: str) -> Argument:
    return _argument(flag, action="store_true", help=help)


def _revision(help: str, **keywords: Any) -> Argument:
    return _argument("revision", **{"metavar": "REVISION", "help": help, **keywords})


_BACKUP = _argument(
    "backup_id", metavar="BACKUP", help="an id or name that `migrator backups` lists, or latest"
)
_YES = _switch("--yes", "confirm that data is deleted or replaced")
_REST = _argument("arguments", nargs="*", help="Alembic's own arguments")

ARGUMENTS: Mapping[str, Sequence[Argument]] = {
    "upgrade": [
        _revision("head, heads, +2, an id or its prefix [MIGRATOR_DESTINATION]", nargs="?", default="")
    ],
    "sidecar": [
        _revision(
            "heads, where there are several [MIGRATOR_DESTINATION]",
            nargs="?",
            default="",
            choices=("", "head", "heads"),
            metavar="head|heads",
        )
    ],
    "downgrade": [_revision("an id or its prefix, head, -1, base"), _YES],
    "stamp": [_revision("an id or its prefix, head")],
    "show": [_revision("an id or its prefix, head")],
    "status": [_switch("--exit-code", "exit 3 if revisions are pending")],
    "freeze": [_switch("--check", "write nothing; exit 31 if it would change")],
    "backup": [
        _argument("--name", dest="backup_name", default="", metavar="TEXT", help="a name for the backup")
    ],
    "verify-backup": [
        _BACKUP,
        _argument(
            "--how",
            choices=("read", "restore"),
            metavar="read|restore",
            help="instead of MIGRATOR_BACKUP_VERIFY",
        ),
    ],
    "backups": [
        _argument(
            "backups_action",
            metavar="show",
            nargs="?",
            choices=("show",),
            help="show one backup, and how to restore it by hand",
        ),
        _argument("backup_id", metavar="BACKUP", nargs="?", help="its id or name, or latest"),
    ],
    "restore": [
        _BACKUP,
        _YES,
        _argument("--to", default="", metavar="NAME", help="restore into a new database of this name"),
        _switch("--drop-old", "drop the replaced database after the restored one answers under its name"),
        _switch(
            "--incomplete",
            "also restore a backup without the rows of some tables: those tables are empty afterwards",
        ),
        _argument(
            "--table",
            dest="tables",
            action="append",
            default=[],
            metavar="NAME",
            help="restore only this table, into its own schema (repeat it for several tables)",
        ),
        _argument("--into-schema", default="", metavar="NAME", help="the schema for --table [restored_RUN]"),
    ],
    "prune": [
        _argument(
            "--keep",
            dest="backup_keep",
            default=argparse.SUPPRESS,
            metavar="POLICY",
            help="instead of MIGRATOR_BACKUP_KEEP",
        ),
        _switch("--dry-run", "show which backups would be removed, and why the others stay"),
    ],
    "ledger": [_argument("--limit", type=int, default=20, metavar="N", help="how many rows to show [20]")],
    "repair": [
        _argument("--accept", nargs="+", metavar="REVISION", help="ids of revisions whose file was edited"),
        _switch("--accept-schema", "accept the schema as it is now as the expected schema"),
    ],
    "completion": [
        _argument("shell", choices=("bash", "zsh", "tcsh"), metavar="bash|zsh|tcsh", help="the shell")
    ],
    **{name: [_REST] for name in PASSED_ON},
}
"""By command."""
