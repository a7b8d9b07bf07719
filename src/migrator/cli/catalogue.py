"""The commands by group: what each does, how it is typed, and which settings matter to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """One command: its group, one line of help, its usage, an example, and the settings in its help.

    ``more`` appears only in the help of the command. ``settings`` are names of settings.
    """

    group: str
    help: str
    usage: str
    example: str
    settings: str = ""
    more: str = ""


_WAIT = "wait_timeout wait_for_database "
_LOCKED = _WAIT + "run_lock_timeout "
_PLACE = "backup_url s3_endpoint s3_region s3_path_style "
_APPLY = (
    _LOCKED
    + "lock_timeout lock_retries terminate_blockers_after statement_timeout transaction role"
    + " backup backup_url backup_verify backup_max_age on_failure discard_writes maintenance_window"
    + " edited drift invalid_indexes actor report_file "
)

COMMANDS: Mapping[str, Command] = {
    "upgrade": Command(
        "run",
        "wait, lock, back up, apply, verify (the default command)",
        "[REVISION]",
        "migrator upgrade head",
        _APPLY + "destination baseline allow_ahead retry",
    ),
    "downgrade": Command(
        "run",
        "revert revisions, with the same lock, backup and verify",
        "REVISION",
        "migrator downgrade -1",
        _APPLY,
        "`downgrade base` deletes the schema: it needs --yes.",
    ),
    "stamp": Command(
        "run",
        "set the version rows without running a revision",
        "REVISION",
        "migrator stamp 1a2b3c4d5e6f",
        _LOCKED + "version_table actor report_file",
    ),
    "verify": Command(
        "run",
        "check the schema: heads, verify.toml, and drift",
        "",
        "migrator verify",
        _WAIT + "destination drift drift_ignore verify_as_superuser version_table report_file",
        "Drift is a difference from the schema that the last run left.",
    ),
    "wait": Command(
        "run",
        "wait until Postgres answers a query, then exit",
        "",
        "migrator wait --wait-timeout 2m",
        _WAIT + "connect_timeout rotation_grace",
    ),
    "wait-for-current": Command(
        "run",
        "wait until no revision is pending; reads only",
        "",
        "migrator wait-for-current --wait-timeout 10m",
        _WAIT + "destination allow_ahead version_table",
        "For pods that need the schema and must not migrate it.",
    ),
    "sidecar": Command(
        "run",
        "upgrade, then stay and serve health and metrics",
        "[head|heads]",
        "migrator sidecar --sidecar-listen 0.0.0.0:8086",
        "sidecar_listen sidecar_interval sidecar_verify_interval destination allow_ahead "
        + _LOCKED
        + "backup backup_url on_failure",
        "It serves /livez, /readyz, /metrics and /. They report whether the database is at this "
        "image's heads.",
    ),
    "status": Command(
        "look",
        "show database, revision, pending revisions, last run",
        "",
        "migrator status --format json",
        _WAIT + "destination edited allow_ahead version_table backup_url",
    ),
    "check": Command(
        "look",
        "exit 3 if revisions are pending",
        "",
        "migrator check || echo pending",
        _WAIT + "destination edited allow_ahead version_table",
    ),
    "current": Command(
        "look", "show the revision that the database is at", "", "migrator current", _WAIT + "version_table"
    ),
    "ledger": Command(
        "look",
        "show who changed the schema, when and how, newest first",
        "",
        "migrator ledger --limit 50",
        _WAIT + "version_table",
    ),
    "repair": Command(
        "look",
        "accept edited revision files, or the schema as it is",
        "(--accept REVISION... | --accept-schema)",
        "migrator repair --accept 1a2b3c4d5e6f",
        _LOCKED + "drift_ignore version_table actor",
        "Later runs compare with what you accept.",
    ),
    "backup": Command(
        "backups",
        "make a verified backup now",
        "",
        "migrator backup --name before-sale",
        _LOCKED
        + _PLACE
        + "backup_verify backup_format backup_jobs backup_compression backup_exclude_table_data"
        + " backup_recipients backup_keep pg_bin",
    ),
    "backups": Command(
        "backups",
        "list the backups, or show one",
        "[show [BACKUP]]",
        "migrator backups show latest",
        _PLACE,
        "`backups show` also prints how to restore it by hand.",
    ),
    "verify-backup": Command(
        "backups",
        "verify a backup again: read it, or restore and compare it",
        "BACKUP",
        "migrator verify-backup latest --how restore",
        _PLACE + "backup_identity_file verify_as_superuser restore_jobs pg_bin",
    ),
    "restore": Command(
        "backups",
        "restore a backup: in place, beside it, or single tables",
        "BACKUP",
        "migrator restore latest --to shop_look",
        _LOCKED + _PLACE + "backup_identity_file restore_jobs keep_old pg_bin actor",
        "Without --to or --table it replaces the database, and needs --yes.",
    ),
    "prune": Command(
        "backups",
        "remove the backups that MIGRATOR_BACKUP_KEEP does not keep",
        "",
        "migrator prune --dry-run --keep last=5,daily=7,weekly=4,monthly=6",
        _PLACE,
    ),
    "history": Command("history", "list the revisions in this image, newest first", "", "migrator history"),
    "heads": Command("history", "list the heads of the history", "", "migrator heads"),
    "show": Command("history", "show one revision", "REVISION", "migrator show head"),
    "revision": Command(
        "history",
        "write a new revision file (Alembic's own command)",
        "...",
        'migrator revision --autogenerate -m "add orders"',
    ),
    "merge": Command(
        "history",
        "write a revision that merges heads (Alembic's own command)",
        "...",
        'migrator merge heads -m "one again"',
    ),
    "freeze": Command(
        "project",
        "write manifest.json, for review and for fast runs",
        "",
        "migrator freeze --check",
        "version_table bootstrap url_variable",
    ),
    "settings": Command("project", "show every setting, its value and its source", "", "migrator settings"),
    "completion": Command(
        "project",
        "print a shell completion script",
        "bash|zsh|tcsh",
        "migrator completion bash",
        more="For bash, write it to ~/.local/share/bash-completion/completions/migrator.\n"
        "It needs `pip install 'migrator[completion]'`; the image does without.",
    ),
    "alembic": Command(
        "project", "run Alembic's own command line", "...", "migrator alembic upgrade head --sql"
    ),
}
"""In the order of the help, by group."""

EXIT_CODES = (
    "Exit codes: 0 done; 3 pending; 20-24 nothing changed, a retry can help;\n"
    "10 and 30-39 nothing changed, fix it first; 40-43 the database may have changed.\n"
)


def overview() -> str:
    """Return the help of migrator: one screen, every command, no setting."""
    lines = [
        "usage: migrator [COMMAND] [OPTIONS]",
        "",
        "Take a Postgres database safely to the schema that the application needs.",
        "",
    ]
    group = ""
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines.append(f"{group}:")
        lines.append(f"  {name:<17} {command.help}")
    return "\n".join(
        [
            *lines,
            "",
            "`migrator COMMAND --help` shows its options and an example, `--help-all` also",
            "every setting. `migrator settings` shows their values, `--version` the version.",
            EXIT_CODES,
        ]
    )
