"""The shipped compose file: up, up again, a wrong password, one step back and up again."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.engine.containers import PASSWORD_FILE, USER, secret_file, unique, wait_for
from tests.engine.engine import ROOT, Engine, call, find_program, reach
from tests.support import leaks

pytestmark = pytest.mark.engine

FILE = ROOT / "compose" / "docker-compose.yml"
HEAD, BEFORE_HEAD = "1c64b2e7f905", "9af80d36c2e1"
REVISION = "SELECT version_num FROM alembic_version"
QUICK_SECONDS = 15


@dataclass
class Compose:
    """The shipped compose file as a project of its own, on a free port."""

    engine: Engine
    name: str = field(default_factory=lambda: unique("compose").replace("-", ""))
    port: int = field(default_factory=lambda: free_port())
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, expect: int | None = 0, timeout: float = 180) -> CompletedProcess[str]:
        """Run a compose command."""
        settings = {**self.engine.settings, "BACKEND_PORT": str(self.port), **self.environment}
        own = find_program("docker-compose")
        program = [*reach(own, settings)] if own else [*reach(self.engine.docker, settings), "compose"]
        command = [*program, "-f", str(FILE), "-p", self.name, *arguments]
        return call(*command, expect=expect, timeout=timeout, environment=settings)

    def container(self, service: str) -> dict[str, Any] | None:
        """Return what the engine knows of a service's container, or None where there is none."""
        labels = (f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}")
        filters = [f"--filter=label={label}" for label in labels]
        found = self.engine.run("ps", "-aq", *filters).stdout.split()
        if not found:
            return None
        return dict(json.loads(self.engine.run("inspect", found[0]).stdout)[0])

    def logs(self, service: str) -> str:
        """Return what a service's container wrote."""
        container = self.container(service)
        return self.engine.logs(container["Id"]) if container else ""

    def exit_code(self, service: str) -> int | None:
        """Return the exit code of a service's container."""
        container = self.container(service)
        return container["State"]["ExitCode"] if container else None

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what the engine knows of a service's container, which there must be."""
        container = self.container(service)
        assert container is not None, service
        return container

    def psql(self, sql: str) -> list[str]:
        """Return the rows of a query."""
        command = (
            "exec",
            "-i",
            self.inspect("db")["Id"],
            "psql",
            "-XAtq",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            USER,
            "-d",
            USER,
        )
        return self.engine.run(*command, stdin=sql).stdout.splitlines()

    def get(self, path: str) -> tuple[int, Any]:
        """Ask the backend."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except (urllib.error.URLError, ConnectionError):
            return 0, None

    def wait_for_backend(self) -> None:
        """Wait until the backend answers."""
        wait_for(lambda: self.get("/healthz")[0] == 200, 30, "the backend answers")

    def assert_no_leak(self) -> None:
        """Search the logs of all services, and what the engine knows of them, for the planted password."""
        for service in ("db", "migrator", "backend"):
            assert leaks.find(self.logs(service)) is None
            assert leaks.find(json.dumps(self.container(service))) is None

    def down(self) -> None:
        """Remove all that this project made."""
        self.run("down", "-v", "--remove-orphans", "-t", "5", expect=None)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def shop(
    engine: Engine, image: str, backend_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """The shop, up, with the planted password as its secret."""
    secret = secret_file(tmp_path_factory.mktemp("secrets"))
    compose = Compose(engine, environment={"POSTGRES_PASSWORD_SECRET": str(secret)})
    try:
        up = compose.run("up", "-d", expect=None)
        assert up.returncode == 0, up.stderr + compose.logs("migrator") + compose.logs("db")
        compose.wait_for_backend()
        yield compose
    finally:
        compose.down()


def run_by_hand(shop: Compose, *arguments: str) -> CompletedProcess[str]:
    """Type `docker run ... migrator` against the compose project's database."""
    options = [
        *("--network", f"{shop.name}_default", "-v", f"{shop.name}_backups:/backups"),
        *("-v", f"{ROOT / 'migrations'}:/app/migrations:ro"),
        *("-v", f"{shop.environment['POSTGRES_PASSWORD_SECRET']}:{PASSWORD_FILE}:ro"),
        *("-e", "POSTGRES_HOST=db", "-e", f"POSTGRES_USER={USER}", "-e", f"POSTGRES_DB={USER}"),
        *("-e", f"POSTGRES_PASSWORD_FILE={PASSWORD_FILE}"),
    ]
    result = shop.engine.run("run", "--rm", *options, "migrator", *arguments, expect=None)
    assert leaks.find(result.stdout + result.stderr) is None
    return result


def test_up_migrates_before_the_backend_starts(shop: Compose) -> None:
    assert shop.exit_code("migrator") == 0, shop.logs("migrator")
    status, shops = shop.get("/")
    assert status == 200
    assert [row["slug"] for row in shops] == ["demo-shop", "demo-shop-uk"]
    assert all(row["products"] == 24 and row["orders"] > 0 for row in shops)
    assert shop.get("/revenue")[0] == 200
    assert shop.psql(REVISION) == [HEAD]

    migrator, backend = shop.inspect("migrator"), shop.inspect("backend")
    assert migrator["State"]["FinishedAt"] <= backend["State"]["StartedAt"]
    shop.assert_no_leak()


def test_up_again_does_nothing_quickly(shop: Compose) -> None:
    before = shop.psql("SELECT count(*) FROM pg_class")

    shop.run("up", "-d", timeout=QUICK_SECONDS)

    wait_for(lambda: shop.inspect("migrator")["State"]["Status"] == "exited", 30, "migrator has ended")
    state = shop.inspect("migrator")
    assert state["State"]["ExitCode"] == 0
    log = shop.engine.run("logs", "--since", state["State"]["StartedAt"], state["Id"])
    assert "Nothing to do" in log.stdout
    assert "applied" not in log.stdout + log.stderr
    assert shop.psql("SELECT count(*) FROM pg_class") == before
    assert shop.get("/")[0] == 200
    shop.assert_no_leak()


def test_one_step_down_by_hand_with_its_backup_and_up_again(shop: Compose) -> None:
    down = run_by_hand(shop, "downgrade", "-1")
    assert down.returncode == 0, down.stderr
    assert shop.psql(REVISION) == [BEFORE_HEAD]
    assert shop.psql("SELECT to_regclass('sales.daily_revenue') IS NULL") == ["t"]
    assert shop.get("/revenue")[0] == 503
    said = down.stdout + down.stderr
    assert "upgrade" in said.partition(BEFORE_HEAD)[2], said  # how to come back
    assert "backup" in said, said

    backups = run_by_hand(shop, "backups", "--format", "json")
    assert backups.returncode == 0, backups.stderr
    assert HEAD in backups.stdout, backups.stdout

    up = run_by_hand(shop, "upgrade")
    assert up.returncode == 0, up.stderr
    assert shop.psql(REVISION) == [HEAD]
    assert shop.get("/revenue")[0] == 200


def test_a_wrong_password_keeps_the_backend_from_starting(
    engine: Engine, image: str, backend_image: str, tmp_path: Path
) -> None:
    compose = Compose(engine)  # out of the box: the committed development password
    try:
        compose.run("up", "-d", "db")
        wait_for(lambda: compose.inspect("db")["State"]["Health"]["Status"] == "healthy", 60, "healthy")

        compose.environment = {"POSTGRES_PASSWORD_SECRET": str(secret_file(tmp_path))}
        refused = compose.run("up", "-d", expect=None)

        assert refused.returncode != 0
        assert compose.exit_code("migrator") == 30, compose.logs("migrator")
        backend = compose.container("backend")
        assert backend is None or backend["State"]["Status"] == "created"
        compose.assert_no_leak()

        compose.environment = {}
        compose.run("up", "-d", "--force-recreate")  # compose 2 does not see that a secret has another file
        compose.wait_for_backend()
        assert compose.get("/")[0] == 200
    finally:
        compose.down()
