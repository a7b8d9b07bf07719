"""Settings: environment, flags and ``[tool.migrator]`` in pyproject.toml make one frozen value.

One class is the only source of truth. The declaration of a field makes its flag, its ``MIGRATOR_*``
variable, its key in the file, its row in ``migrator settings`` and its row in the documentation.
Precedence: flag, environment, file, default. An empty variable counts as not set, because compose
writes ``${NAME:-}`` like that. All problems are found before any is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from migrator.config import value_parsers as to
from migrator.config.database_url import BadAddress, Target, parse, secrets_in
from migrator.config.sources import ADDRESS_VARIABLES as ADDRESS_VARIABLES
from migrator.config.sources import ADDRESSES, find_target, pick, read_file, resolve_files, unknown_variables
from migrator.config.sources import PASSWORD_VARIABLES as PASSWORD_VARIABLES
from migrator.config.sources import SECRET_VARIABLES as SECRET_VARIABLES
from migrator.config.sources import Option as Option
from migrator.config.sources import default_text as default_text
from migrator.config.sources import flag_name as flag_name
from migrator.config.sources import variable_name as variable_name
from migrator.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path


setting: Callable[..., Any] = Option  # a field has the type of its value, not that of its declaration
_HIDDEN: Mapping[str, Any] = {"flag": None, "secret": True}


class Settings(NamedTuple):
    """All settings of a run. Times are in seconds; None is "no limit" or "not set"."""

    database_url: str = setting(
        "", str, "the target's address (else DATABASE_URL, PG*, POSTGRES_*)", flag=None, secret=True
    )
    direct_url: str = setting(
        "", str, "the target's address that goes around a pooler", flag=None, secret=True
    )
    wait_timeout: float = setting(60.0, to.duration, "the total time to wait for Postgres", shown="60s")
    wait_for_database: bool = setting(False, to.boolean, "also wait until the database is created")
    rotation_grace: float = setting(
        60.0,
        to.duration,
        "Kubernetes: how long to retry a refused login if its secret is a mounted file, which may "
        "still be updated (never longer than the wait timeout)",
        shown="60s",
    )
    connect_timeout: float = setting(
        5.0, to.duration, "the longest time for one connection attempt", shown="5s"
    )
    run_lock_timeout: float = setting(600.0, to.duration, "how long to wait for another run", shown="10m")
    lock_timeout: float | None = setting(
        5.0, to.optional_duration, "Postgres's lock_timeout for the migration", shown="5s"
    )
    lock_retries: int = setting(
        10,
        to.whole_number,
        "how many times to retry a migration after a lock timeout, a deadlock or a serialization failure",
    )
    terminate_blockers_after: float | None = setting(
        None,
        to.optional_duration,
        "end sessions idle in transaction that have blocked the migration for this long",
        shown="none",
    )
    statement_timeout: float | None = setting(
        None, to.optional_duration, "Postgres's statement_timeout for the migration", shown="none"
    )
    backup: str = setting(
        "auto",
        to.choice("auto", "always", "off"),
        "auto (something pending and something to lose), always (also with nothing pending) or off",
    )
    backup_url: str = setting(
        "file:///backups", to.backup_url, "where backups are kept: file:///folder or s3://bucket/prefix"
    )
    backup_verify: str = setting(
        "read",
        to.choice("read", "restore"),
        "how to verify a backup: read (read it back and parse it) or restore (restore it into a "
        "scratch database, compare, and drop that)",
    )
    verify_url: str = setting(
        "",
        str,
        "another server for the scratch databases of verification (default: the target's server)",
        **_HIDDEN,
    )
    verify_as_superuser: bool = setting(
        False,
        to.boolean,
        "let a superuser verify backups by restore and run assertions, although that runs functions of "
        "other roles",
    )
    backup_recipients: str = setting(
        "",
        to.public_keys,
        "public keys (age1..., ssh-ed25519 ...) to encrypt backups to, separated by commas or lines",
    )
    backup_identity_file: str = setting("", to.path, "a file with the private key that decrypts backups")
    backup_keep: str = setting(
        "", to.keep, "which backups to keep, such as last=5,daily=7,weekly=4,monthly=6", shown="everything"
    )
    backup_format: str = setting(
        "auto",
        to.choice("auto", "custom", "directory"),
        "custom (one file), directory (a folder, written by several workers) or auto (by cores and sizes)",
    )
    backup_jobs: int = setting(
        0, to.worker_count, "how many tables pg_dump reads in parallel into a directory", shown="auto"
    )
    backup_compression: str = setting(
        "auto", to.compression, "zstd:N, gzip:N, lz4:N or auto (zstd:1, else gzip:1)"
    )
    backup_exclude_table_data: str = setting(
        "", to.table_patterns, "tables whose rows are excluded from backups, such as audit_log, logs.*"
    )
    backup_max_age: float | None = setting(
        None,
        to.optional_duration,
        "reuse a verified backup of the same revision up to this age instead of making one",
        shown="none",
    )
    s3_endpoint: str = setting("", to.web_address, "the address of an S3-compatible server (not for AWS)")
    s3_region: str = setting("", str, "the bucket's region (else AWS_REGION, AWS_DEFAULT_REGION, us-east-1)")
    s3_path_style: str = setting(
        "auto",
        to.choice("auto", "on", "off"),
        "the bucket in the path of addresses (on) or in their host name (off); auto is on with an endpoint",
    )
    aws_access_key_id: str = setting(
        "",
        str,
        "S3: the access key's id (not set: the platform's identity)",
        **_HIDDEN,
        variable="AWS_ACCESS_KEY_ID",
    )
    aws_secret_access_key: str = setting(
        "", str, "S3: the secret access key", **_HIDDEN, variable="AWS_SECRET_ACCESS_KEY"
    )
    aws_session_token: str = setting(
        "", str, "S3: the session token of a temporary key", **_HIDDEN, variable="AWS_SESSION_TOKEN"
    )
    pg_bin: str = setting(
        "", to.path, "a folder with pg_dump and pg_restore to use instead of the installed ones"
    )
    restore_jobs: int = setting(
        0,
        to.worker_count,
        "how many tables and indexes to restore in parallel: auto (one per core, at most 8) or a number",
        shown="auto",
    )
    keep_old: float | None = setting(
        None,
        to.optional_duration,
        "how long to keep NAME_before_RUN, the database that a restore replaced: a later restore drops "
        "it after that",
        shown="none",
    )
    on_failure: str = setting(
        "stop",
        to.choice("stop", "downgrade", "restore"),
        "when apply or verify fails after a commit: stop, downgrade (revert this run's revisions) or "
        "restore (restore the backup, unless others have written since)",
    )
    discard_writes: bool = setting(
        False,
        to.boolean,
        "restore on failure even if others have written since the backup: their writes are lost",
    )
    maintenance_window: bool = setting(
        False,
        to.boolean,
        "keep every other role out of the database from before the backup until the end of the run",
    )
    retry: bool = setting(
        False,
        to.boolean,
        "apply a revision again that failed in this same image and was reverted or restored",
    )
    baseline: str = setting(
        "", to.revision, "the revision of an existing schema without a version table (or 'base')"
    )
    destination: str = setting(
        "",
        to.goal,
        "where `upgrade` goes and what `check`, `status`, `verify`, `wait-for-current` and the sidecar look for: head"
        " (which it is where nothing is set), heads, a revision, or LABEL@head where one of several branches is meant",
    )
    version_table: str = setting(
        "", to.relation, "the version table, if it cannot be read from env.py: name or schema.name"
    )
    drift: str = setting(
        "warn",
        to.choice("warn", "refuse", "off"),
        "drift, a schema that differs from what the last run left: warn before revisions are applied, "
        "or refuse; off also turns it off for `migrator verify`, which otherwise exits with 37",
    )
    drift_ignore: str = setting(
        "",
        to.table_patterns,
        "tables that others create and change, such as partman.*, celery_*: not reported as drift",
    )
    drift_keep: int = setting(
        5, to.whole_number, "how many schema snapshots the ledger keeps besides the newest"
    )
    ledger: bool = setting(
        True,
        to.boolean,
        "keep migrator_ledger beside the version table: who changed the schema, when and how",
    )
    actor: str = setting(
        "", str, "who is responsible for a run, for the ledger (such as the CI job's address)"
    )
    invalid_indexes: str = setting(
        "rebuild",
        to.choice("rebuild", "report"),
        "an INVALID index that a killed run left: rebuild (drop it if a pending revision builds it) or "
        "report",
    )
    edited: str = setting(
        "refuse",
        to.choice("refuse", "cosmetic", "warn"),
        "applied revisions whose file was edited: refuse, cosmetic (allow comments and formatting) or warn",
    )
    allow_ahead: bool = setting(
        False, to.boolean, "start on a newer schema, unless that schema declares this image too old"
    )
    url_variable: str = setting(
        "", str, "the variable in which env.py expects the address, if it is not DATABASE_URL (several: a,b)"
    )
    bootstrap: str = setting(
        "",
        to.callable_name,
        "module:callable, a context manager that is entered with Alembic's Config before env.py loads",
    )
    role: str = setting("", to.role_name, "the role for the migration's SET ROLE; it owns the new objects")
    transaction: str = setting(
        "env.py",
        to.choice("env.py", "each", "all", "none"),
        "env.py (env.py decides), each (one transaction per revision), all (one for all of them) or "
        "none (transactional_ddl off)",
    )
    config: str = setting(
        "", to.path, "alembic.ini or pyproject.toml of the project", flag="-c", variable="ALEMBIC_CONFIG"
    )
    report_file: str = setting("", to.path, "where the JSON outcome is also written")
    termination_log: str = setting(
        "/dev/termination-log", to.path, "where the line for kubectl describe pod goes, if it is there"
    )
    sidecar_listen: str = setting(
        "127.0.0.1:8086", to.listen_address, "sidecar: the address for /livez, /readyz, /metrics and /"
    )
    sidecar_interval: float = setting(
        30.0, to.interval, "sidecar: how often to check whether the database is at the heads", shown="30s"
    )
    sidecar_verify_interval: float | None = setting(
        3600.0,
        to.optional_interval,
        "sidecar: how often to verify the schema, as `migrator verify` does",
        shown="1h",
    )
    log_format: str = setting(
        "auto", to.choice("auto", "json", "text"), "auto is text on a terminal and JSON elsewhere"
    )
    log_level: str = setting(
        "info", to.choice("debug", "info", "warning", "error"), "the lowest level that is logged"
    )

    # load() fills in the following fields; they are not settings.
    target: Target | None = None
    sources: Mapping[str, str] = {}
    warnings: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Render for a traceback: without the secrets."""
        shown = (f"{item.name}={getattr(self, item.name)!r}" for item in OPTIONS if not item.secret)
        return f"Settings(target={self.target!r}, {', '.join(shown)})"

    @property
    def goal(self) -> str:
        """Return the destination: every head, unless one is set."""
        return self.destination or "heads"

    @property
    def required_target(self) -> Target:
        """Return the target, for commands that require one."""
        if self.target is None:
            raise SettingsError([_NO_ADDRESS])
        return self.target


OPTIONS = tuple(
    option._replace(name=name)
    for name, option in Settings._field_defaults.items()
    if isinstance(option, Option)
)
# The default of a field is the default in its declaration, not the declaration itself.
Settings.__new__.__defaults__ = tuple(
    value.default if isinstance(value, Option) else value for value in Settings._field_defaults.values()
)

_NO_ADDRESS = (
    "no database address: set MIGRATOR_DATABASE_URL (or DATABASE_URL, POSTGRES_DB_URL, "
    "SQLALCHEMY_DATABASE_URI, PGHOST and PGDATABASE, POSTGRES_HOST and POSTGRES_DB)"
)


def load(
    flags: Mapping[str, str], environment: Mapping[str, str], folder: str | Path, *, needs_target: bool = True
) -> Settings:
    """Build the settings from flags (by field name), the environment, and ``folder``/pyproject.toml.

    Raises :class:`SettingsError` with every problem.
    """
    problems: list[str] = []
    variables = resolve_files(environment, problems)
    file_values, file_name = read_file(folder, OPTIONS, problems)
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}
    for item in OPTIONS:
        found = pick(item, flags, variables, file_values, file_name)
        sources[item.name] = "default" if found is None else found[1]
        if found is not None:
            try:
                values[item.name] = found[0] if item.secret else item.read(found[0])
            except ValueError as error:
                problems.append(f"{found[1]}: {error}")
    if values.get("verify_url"):
        try:
            parse(values["verify_url"])
        except BadAddress as error:
            problems.append(f"MIGRATOR_VERIFY_URL is not a database address: {error}")
    target = find_target(variables, sources, problems)
    if target is None and needs_target and not any("address" in problem for problem in problems):
        empty = [name for name in ADDRESS_VARIABLES if name in environment and not environment[name].strip()]
        hints = [f"{' and '.join(empty)} is empty"] if empty else []
        hints += [text for text in unknown_variables(environment, OPTIONS) if "_URL" in text]
        problems.append("; ".join([_NO_ADDRESS, *hints]))
    if problems:
        raise SettingsError(problems)
    if target is not None and (
        target.parameters or any(f"{name}_FILE" in environment for name in SECRET_VARIABLES)
    ):
        from migrator.config.secret_files import watched

        target = watched(target, sources["target"], environment, variables)
    # Also those of addresses that this run does not use: a user's env.py may print them.
    secrets = {text for name in ADDRESSES for text in secrets_in(variables.get(name, ""))}
    secrets |= {variables[name] for name in PASSWORD_VARIABLES if variables.get(name)}
    return Settings(
        **values,
        target=target,
        sources=sources,
        warnings=tuple(unknown_variables(environment, OPTIONS)),
        secrets=tuple(sorted(secrets, key=len, reverse=True)),
    )


def table(settings: Settings) -> list[dict[str, str]]:
    """Return every setting as a row: name, variable, flag, value (secrets hidden), source, default, help."""
    rows = []
    for item in OPTIONS:
        value = getattr(settings, item.name)
        if item.secret:
            set_here = settings.sources.get(item.name, "default") != "default"
            shown = settings.target if item.name.endswith("_url") else "***"
            shown = parse(value) if item.name == "verify_url" and value else shown
            text = str(shown) if shown is not None and set_here else ""
        else:
            text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        rows.append(
            {
                "name": item.name,
                "variable": variable_name(item),
                "flag": flag_name(item) or "",
                "value": text,
                "source": settings.sources.get(item.name, "default"),
                "default": default_text(item),
                "help": item.help,
            }
        )
    return rows
