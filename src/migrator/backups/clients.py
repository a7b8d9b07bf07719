"""Find pg_dump and pg_restore: the server's own major if it is installed, else the nearest newer one.

``pg_dump`` refuses a server with a newer major than its own, and ``pg_restore`` an archive of a newer
``pg_dump`` (https://www.postgresql.org/docs/current/app-pgdump.html#PG-DUMP-NOTES). Both are checked
here, before anything starts.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrator.config.database_url import ENVIRONMENT_NAMES, Target
from migrator.config.settings import Settings
from migrator.errors import BackupFailed, RestoreFailed
from migrator.postgres.errors import ConnectFailed, Refusal
from migrator.runtime import image_tags, resource_errors, subprocesses
from migrator.runtime.logs import redact

# Versioned folders come before PATH: Debian's wrapper in Perl there has its own choice.
_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/libexec/postgresql*")
_VERSION = re.compile(r"\(PostgreSQL\)\s+((\d+)\S*)")
_PROGRAMS = ("pg_dump", "pg_restore")
_VERSION_TIMEOUT = 20.0

# Parameters of a connection string without secrets; those with a variable use that.
_IN_ARGUMENTS = (
    frozenset(
        {
            *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
            *(
                "require_auth",
                "requirepeer",
                "sslcrldir",
                "sslcertmode",
                "sslsni",
                "ssl_max_protocol_version",
            ),
            *("load_balance_hosts", "gsslib", "gssdelegation"),
        }
    )
    - ENVIRONMENT_NAMES.keys()
)
_KEEPALIVES = {"keepalives_idle": "5", "keepalives_interval": "2", "keepalives_count": "3"}
_NOT_INHERITED = frozenset({"PGCLIENTENCODING", "PGDATA"})  # a dump is written in the database's encoding


@dataclass(frozen=True)
class Client:
    """A folder with a pg_dump and a pg_restore of one version."""

    folder: Path
    version: str
    major: int

    @property
    def pg_dump(self) -> Path:
        """Return the program that dumps."""
        return self.folder / "pg_dump"

    @property
    def pg_restore(self) -> Path:
        """Return the program that reads archives."""
        return self.folder / "pg_restore"


def parse_version(text: str) -> tuple[str, int] | None:
    """Read ``pg_dump (PostgreSQL) 17.2 (Debian ...)``, ``18beta1`` or ``19devel``; return version and major."""
    match = _VERSION.search(text)
    return (match[1], int(match[2])) if match else None


def installed(settings: Settings) -> list[Client]:
    """Return the available clients, each once; only those of MIGRATOR_PG_BIN if it is set."""
    clients = []
    for folder in _folders(settings):
        versions = {_version_of(folder / program)[0] for program in _PROGRAMS}
        found = versions.pop()
        if found is not None and not versions:
            clients.append(Client(folder, *found))
    return clients


def _folders(settings: Settings) -> Iterator[Path]:
    if settings.pg_bin:
        yield Path(settings.pg_bin)
        return
    seen: set[Path] = set()
    versioned = [folder for pattern in _FOLDERS for folder in sorted(Path("/").glob(pattern[1:]))]
    on_path = [Path(item) for item in os.environ.get("PATH", os.defpath).split(os.pathsep) if item]
    for folder in (*versioned, *on_path):
        program = folder / "pg_dump"
        if os.access(program, os.X_OK) and program.resolve() not in seen:
            seen.add(program.resolve())
            yield folder


def _stopped(settings: Settings) -> str:
    """Return why an existing program did not report its version; empty if none exists, or all did."""
    for folder in _folders(settings):
        for program in _PROGRAMS:
            why = _version_of(folder / program)[1]
            if why:
                return f"{folder / program} cannot be started: {why}"
    return ""


@functools.cache
def _version_of(program: Path) -> tuple[tuple[str, int] | None, str]:
    """Return a program's version and major, or None and the reason for a missing report, if it exists."""
    chunks: list[bytes] = []
    try:
        finished = subprocesses.run(
            [program, "--version"],
            environment=subprocesses.base_environment(),
            on_output=chunks.append,
            timeout=_VERSION_TIMEOUT,
        )
    except OSError as error:
        return None, resource_errors.cannot_start(error) if os.path.lexists(program) else ""
    except subprocesses.TimedOut as error:
        return None, str(error)
    if finished.status != 0:
        return None, last_words(finished)
    return parse_version(b"".join(chunks).decode("utf-8", "replace")), ""


def choose(clients: Sequence[Client], wanted: int, at_least: int = 0) -> Client | None:
    """Return the client of major ``wanted``, else the nearest newer one; never one older than ``at_least``."""
    lowest = max(wanted, at_least)
    fitting = [client for client in clients if client.major >= lowest]
    return min(fitting, key=lambda client: client.major, default=None)


def for_dump(
    settings: Settings,
    server_version: str,
    server_major: int,
    *,
    otherwise: str = "or set MIGRATOR_BACKUP=off to run without a backup",
) -> Client:
    """Return the client to dump a server with; raises :class:`BackupFailed` if none is new enough.

    ``otherwise`` is an alternative for its next step.
    """
    clients = installed(settings)
    client = choose(clients, server_major)
    if client is not None:
        return client
    raise BackupFailed(
        _explain(settings, clients, f"the server is PostgreSQL {server_version}", "dump"),
        next_step=f"{_remedy(settings, clients, server_major)}, {otherwise}",
    )


def for_restore(settings: Settings, server_major: int, archive_major: int) -> Client:
    """Return the client to restore an archive with; raises :class:`RestoreFailed` if none can read it."""
    clients = installed(settings)
    client = choose(clients, server_major, archive_major) or choose(clients, archive_major)
    if client is not None:
        return client
    raise RestoreFailed(
        _explain(settings, clients, f"the backup was written by pg_dump {archive_major}", "read"),
        next_step=_remedy(settings, clients, archive_major),
    )


def _explain(settings: Settings, clients: Sequence[Client], fact: str, verb: str) -> str:
    place = f" in {settings.pg_bin} (MIGRATOR_PG_BIN)" if settings.pg_bin else ""
    stopped = "" if clients else _stopped(settings)
    if stopped:
        return f"{stopped}; and {fact}."
    if not clients:
        return f"There is no pg_dump and pg_restore of one version{place}, and {fact}."
    newest = max(clients, key=lambda client: client.major)
    return (
        f"{fact[0].upper()}{fact[1:]}, and pg_dump is {newest.version}{place}: "
        f"an older client cannot {verb} it."
    )


def _remedy(settings: Settings, clients: Sequence[Client], major: int) -> str:
    if not clients and _stopped(settings):
        return "fix that and run again"
    return (
        f"use (or build on) {image_tags.with_client(major)}, the image with the PostgreSQL {major} "
        f"client, install postgresql-client-{major}, or set MIGRATOR_PG_BIN to a folder that has it"
    )


def remedy(error: Exception) -> str:
    """Return the fix if the maintenance database does not exist, mostly for a pooler; else an empty text."""
    if not isinstance(error, ConnectFailed) or error.refusal is not Refusal.NO_DATABASE:
        return ""
    return (
        "migrator creates databases from postgres or template1: route these through the pooler as "
        "well, or set MIGRATOR_DIRECT_URL to an address that goes around it"
    )


def environment(target: Target, application_name: str, connect_timeout: float) -> dict[str, str]:
    """Return a client's environment: the connection, password included, is passed only here.

    libpq's own variables are passed on too, because our own connections use them as well.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PG") and name not in _NOT_INHERITED and not name.endswith("_FILE")
    }
    return {
        **subprocesses.base_environment(),
        "PGCONNECT_TIMEOUT": str(max(2, math.ceil(connect_timeout))),
        **inherited,
        **{name: value for name, value in target.environment().items() if name not in _NOT_INHERITED},
        "PGAPPNAME": application_name,
    }


def connection_argument(target: Target, database: str) -> str:
    """Return ``--dbname=...`` with the database's name, which may hold any character, and no secret.

    It is a connection string, because a bare name with ``=`` would be read as one. It has keepalives,
    so that a lost server is noticed.
    """
    parameters = dict(_KEEPALIVES)
    parameters |= {key: value for key, value in target.parameters if key in _IN_ARGUMENTS}
    parameters["dbname"] = database
    pairs = (f"{key}={_conninfo_quote(value)}" for key, value in parameters.items())
    return "--dbname=" + " ".join(pairs)


def _conninfo_quote(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


_CAUSE = re.compile(r": error:|FATAL|^ERROR: ")  # psql puts nothing before an error in a script from stdin
_NO_CAUSE = "error: a worker process died unexpectedly"
"""The last line if a worker of pg_restore fails; its cause stands before it."""


def last_words(finished: subprocesses.Finished) -> str:
    """Return a failed client's message, in one line and without secrets."""
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.endswith(_NO_CAUSE)] or lines
    errors = [number for number, line in enumerate(lines) if _CAUSE.search(line)]
    told = lines[errors[-1] :] if errors else lines[-3:]
    text = " ".join(" ".join(told).split())
    if len(text) > 600:
        text = text[:600] + " ..."
    if not text:
        text = f"signal {-finished.status}" if finished.status < 0 else f"exit status {finished.status}"
    return redact(text)
