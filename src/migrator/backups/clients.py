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

from migrator import __version__
from migrator.backups.manifest import Backup
from migrator.config.database_url import ENVIRONMENT_NAMES, Target
from migrator.config.settings import Settings
from migrator.errors import BackupFailed, RestoreFailed
from migrator.postgres import connection_limit
from migrator.postgres.errors import ConnectFailed, Refusal
from migrator.postgres.session import Session
from migrator.runtime import resource_errors, subprocesses
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
        return self.folder / "pg_dump"

    @property
    def pg_restore(self) -> Path:
        return self.folder / "pg_restore"

    def psql(self, login: Login) -> list[str | Path]:
        """Return the arguments of a psql that reads a script and ends at the first error."""
        options = ("--no-psqlrc", "--quiet", "--no-password", "--set=ON_ERROR_STOP=1")
        return [self.folder / "psql", *options, login.argument]


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
        finished = subprocesses.run([program, "--version"], on_output=chunks.append, timeout=_VERSION_TIMEOUT)
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
        f"use (or build on) {image_with_client(major)}, the image with the PostgreSQL {major} "
        f"client, install postgresql-client-{major}, or set MIGRATOR_PG_BIN to a folder that has it"
    )


def full_image() -> str:
    """Return the full image of this version."""
    version = os.environ.get("MIGRATOR_IMAGE_VERSION") or __version__
    return f"migrator:{version.replace('+', '-')}"  # a tag has no plus


def image_with_client(major: int) -> str:
    """Return the image of this version that has the client programs of a PostgreSQL major."""
    return f"{full_image()}-pg{major}"


def remedy(error: Exception) -> str:
    """Return the fix if the maintenance database does not exist, mostly for a pooler; else an empty text."""
    if not isinstance(error, ConnectFailed) or error.refusal is not Refusal.NO_DATABASE:
        return ""
    return (
        "migrator creates databases from postgres or template1: route these through the pooler as "
        "well, or set MIGRATOR_DIRECT_URL to an address that goes around it"
    )


@dataclass(frozen=True)
class Login:
    """How a database is reached, by our sessions and by PostgreSQL's programs; ``timeout`` is in seconds."""

    target: Target
    application_name: str
    timeout: float

    def to(self, database: str) -> Login:
        """Return the same for another database of the server."""
        return Login(self.target.with_database(database), self.application_name, self.timeout)

    def connect(self) -> Session:
        """Open a session, which waits for room; raises ConnectFailed."""
        return connection_limit.connect(self.target, self.application_name, self.timeout)

    def environment(self, *options: str) -> dict[str, str]:
        """Return a client's environment: the connection, password included, is passed only here.

        libpq's own variables are passed on too, because our own connections use them as well.  ``options`` are added to
        PGOPTIONS.
        """
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("PG") and name not in _NOT_INHERITED and not name.endswith("_FILE")
        }
        given = {
            **subprocesses.base_environment(),
            "PGCONNECT_TIMEOUT": str(max(2, math.ceil(self.timeout))),
            **inherited,
            **{
                name: value for name, value in self.target.environment().items() if name not in _NOT_INHERITED
            },
            "PGAPPNAME": self.application_name,
        }
        every = " ".join(filter(None, (given.get("PGOPTIONS", ""), *options)))
        return {**given, "PGOPTIONS": every} if every else given

    @property
    def argument(self) -> str:
        """Return ``--dbname=...`` with the database's name, which may hold any character, and no secret.

        It is a connection string, because a bare name with ``=`` would be read as one. It has keepalives,
        so that a lost server is noticed.
        """
        parameters = dict(_KEEPALIVES)
        parameters |= {key: value for key, value in self.target.parameters if key in _IN_ARGUMENTS}
        parameters["dbname"] = self.target.database
        return "--dbname=" + " ".join(f"{key}={_conninfo_quote(value)}" for key, value in parameters.items())


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


_OF_A_ROLE = re.compile(
    r"Command was: (ALTER .* OWNER TO|GRANT|REVOKE|ALTER DEFAULT PRIVILEGES|SET SESSION AUTH|CREATE EVENT TRIGGER)"
)


_OF_RIGHTS = re.compile(r"permission denied|[Mm]ust be (superuser|owner|member|able)|[Oo]nly superuser")
AS_SUPERUSER = "restore as a superuser (a superuser's name in MIGRATOR_DATABASE_URL)"


class WouldLose(Exception):
    """Others have written since the backup, or may have; the message says which."""


def failed(backup: Backup, message: str, next_step: str) -> RestoreFailed:
    """Return the error of a restore that has changed nothing."""
    state = f"The database was not changed; the backup is {backup.place}."
    return RestoreFailed(message, next_step=next_step, state=state)


class RestoreStopped(Exception):
    """pg_restore failed; ``said`` is its last words.

    ``of_a_role``: whether an owner or a grant was the cause. ``of_rights``: whether the role may not do it.
    """

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = redact(" ".join(said.split()))[:800]
        self.of_a_role = bool(_OF_A_ROLE.search(self.said))
        self.of_rights = bool(_OF_RIGHTS.search(self.said))
