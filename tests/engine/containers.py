"""Run the image as people run it, and search all that comes out for the planted password."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.engine import Engine
from tests.engine.standins import POSTGRES_IMAGE
from tests.support import PLANTED, leaks

USER = "shop"
READY_SECONDS = 60
PATIENCE = 180.0  # seconds
PASSWORD_FILE = "/run/secrets/postgres_password"


def unique(name: str) -> str:
    """Return a name that no other test uses."""
    return f"migrator-test-{name}-{uuid.uuid4().hex[:8]}"


def secret_file(folder: Path, content: str = PLANTED) -> Path:
    """Write a secret that a container's user can read, as compose needs it."""
    path = folder / f"secret-{uuid.uuid4().hex[:8]}"
    path.write_text(content + "\n")
    path.chmod(0o644)
    return path


@dataclass(frozen=True)
class Ran:
    """What a finished container left."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Both streams."""
        return self.stdout + self.stderr

    @property
    def answer(self) -> Any:
        """What it answered with `--format json`."""
        return json.loads(self.stdout)


@dataclass(frozen=True)
class Postgres:
    """A Postgres container on a network of its own; its password is the planted one."""

    engine: Engine
    name: str

    @property
    def network(self) -> str:
        """The network's name; the server's name on it is the container's."""
        return self.name

    def psql(self, sql: str, database: str = USER) -> list[str]:
        """Return the rows of a query, `|` between columns."""
        command = (
            "exec",
            "-i",
            self.name,
            "psql",
            "-XAtq",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            USER,
            "-d",
            database,
        )
        return self.engine.run(*command, stdin=sql).stdout.splitlines()

    def create_database(self) -> str:
        """Create an empty database; return its name."""
        name = f"d{uuid.uuid4().hex[:12]}"
        self.psql(f"CREATE DATABASE {name}")
        return name


@contextlib.contextmanager
def running_postgres(engine: Engine, folder: Path) -> Iterator[Postgres]:
    """Run Postgres, and remove all of it at the end."""
    server = Postgres(engine, unique("postgres"))
    engine.run("network", "create", server.network)
    try:
        engine.started(
            *("--name", server.name, "--network", server.network),
            *(
                "-v",
                f"{secret_file(folder)}:{PASSWORD_FILE}:ro",
                "-e",
                f"POSTGRES_PASSWORD_FILE={PASSWORD_FILE}",
            ),
            *("-e", f"POSTGRES_USER={USER}", POSTGRES_IMAGE),
        )
        wait_for(lambda: is_ready(server), READY_SECONDS, "Postgres answers")
        yield server
    finally:
        engine.remove(server.name)
        engine.run("network", "rm", server.network, expect=None)


def is_ready(server: Postgres) -> bool:
    """Tell whether the server answers over TCP, as it does only once it is initialised."""
    command = ("exec", server.name, "pg_isready", "-q", "-h", "127.0.0.1")
    return server.engine.run(*command, expect=None).returncode == 0


def wait_for(condition: Any, seconds: float, what: str) -> None:
    """Wait until `condition()` is true, or fail with what was waited for.

    `seconds` is what an idle machine never takes; one that has other things to do gets more.
    """
    seconds = max(seconds, PATIENCE)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not so after {seconds:g} s: {what}")
        time.sleep(0.2)


@dataclass
class Migrator:
    """The image against one database, with a fresh volume for its backups.

    The password reaches it by file. Logs, `docker inspect`, process arguments and the backups' manifests are
    searched for it: the first three when a container ends, the last by `close()`.
    """

    engine: Engine
    image: str
    server: Postgres
    database: str
    folder: Path
    volume: str = field(default_factory=lambda: unique("backups"))
    containers: list[str] = field(default_factory=list)

    @property
    def address(self) -> list[str]:
        """The options of `docker run` that tell the address."""
        return [
            *("--network", self.server.network, "-v", f"{self.volume}:/backups"),
            *("-v", f"{self._secret}:{PASSWORD_FILE}:ro", "-e", f"POSTGRES_PASSWORD_FILE={PASSWORD_FILE}"),
            *("-e", f"POSTGRES_HOST={self.server.name}", "-e", f"POSTGRES_USER={USER}"),
            *("-e", f"POSTGRES_DB={self.database}"),
        ]

    def __post_init__(self) -> None:
        self._secret = secret_file(self.folder)

    def psql(self, sql: str) -> list[str]:
        """Return the rows of a query on this database."""
        return self.server.psql(sql, self.database)

    def start(self, *arguments: str, options: Sequence[str] = (), image: str = "") -> str:
        """Start a run in the background; return the container's id."""
        container = self.engine.started(*self.address, *options, image or self.image, *arguments)
        self.containers.append(container)
        return container

    def run(self, *arguments: str, options: Sequence[str] = (), image: str = "", timeout: float = 300) -> Ran:
        """Run to the end."""
        begun = time.monotonic()
        container = self.start(*arguments, options=options, image=image)
        watch = leaks.ArgumentWatch(int(self.inspect(container)["State"]["Pid"]))
        try:
            self.engine.wait(container, timeout)
        finally:
            watch.finish()
        assert watch.leaks() == []
        return self.finished(container, time.monotonic() - begun)

    def finished(self, container: str, seconds: float = 0) -> Ran:
        """Return what an ended container left, which must not have the password in it."""
        inspected = self.inspect(container)
        logs = self.engine.run("logs", container)
        ran = Ran(inspected["State"]["ExitCode"], logs.stdout, logs.stderr, seconds)
        assert leaks.find(json.dumps(inspected)) is None
        assert leaks.find(ran.output) is None
        return ran

    def inspect(self, container: str) -> dict[str, Any]:
        """Return what the engine knows of a container."""
        return dict(json.loads(self.engine.run("inspect", container).stdout)[0])

    def backup_files(self) -> list[str]:
        """Return the names of the files in the backup volume."""
        shown = self._in_volume("find", "/backups", "-type", "f", "-printf", "%P\n")
        return sorted(shown.splitlines())

    def close(self) -> None:
        """Search the backups' manifests; remove the containers and the volume."""
        try:
            text = self._in_volume("find", "/backups", "-name", "*.json", "-exec", "cat", "{}", "+")
            assert leaks.find(text) is None
        finally:
            self.engine.remove(*self.containers)
            self.engine.run("volume", "rm", "-f", self.volume, expect=None)

    def _in_volume(self, program: str, *arguments: str) -> str:
        options = ("--rm", "--user", "0", "-v", f"{self.volume}:/backups:ro", "--entrypoint", program)
        return self.engine.run("run", *options, self.image, *arguments).stdout
