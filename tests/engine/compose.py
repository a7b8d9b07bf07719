"""Run the shipped compose recipes as people do: in their folder, with docker-compose or with `docker compose`.

A recipe runs in a copy of `compose/` and `migrations/`, so that a test may add a revision, and what a container writes
into the project does not end up in the tree.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.engine.containers import USER, unique, wait_for
from tests.engine.engine import CACHE, ROOT, Engine, call, find_program, has_compose_plugin, install, reach
from tests.engine.standins import BASE_IMAGE
from tests.support import leaks
from tests.support.ports import free_port

STANDALONE, PLUGIN = "docker-compose", "docker compose"
PLUGINS = CACHE / "docker-config" / "cli-plugins"
# Debian's package of compose 2, unpacked beside what is installed: it would take the place of docker-compose 1.29.
FETCH = """\
apt-get update -q
cd /tmp
apt-get download -q docker-compose
dpkg -x docker-compose_*.deb unpacked
install -m 755 unpacked/usr/libexec/docker/cli-plugins/docker-compose /plugins/partial
mv /plugins/partial /plugins/docker-compose
"""
BACKEND_SECONDS = 60


@dataclass(frozen=True)
class Program:
    """One way to type a compose command, and the environment that it needs."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Return what it says its version is, such as `1.29.2`."""
        said = call(*self.command, "version", "--short", environment=dict(self.environment))
        return said.stdout.strip().removeprefix("v")

    @property
    def major(self) -> int:
        """Return the first number of its version."""
        return int(self.version.split(".")[0])


def standalone() -> Program:
    """Return Debian's `docker-compose`: 1.29 in Debian 12, 2 in later ones."""
    if not find_program("docker-compose"):
        install("docker-compose")
    found = find_program("docker-compose")
    assert found is not None, "Debian's package docker-compose has no program docker-compose"
    return Program((found,))


def plugin(engine: Engine) -> Program:
    """Return `docker compose`; where the client lacks it, with Debian trixie's plugin, kept in the tree's cache."""
    if has_compose_plugin():
        return Program((engine.docker, "compose"))
    if not (PLUGINS / "docker-compose").exists():
        PLUGINS.mkdir(parents=True, exist_ok=True)
        engine.run("run", "--rm", "-v", f"{PLUGINS}:/plugins", BASE_IMAGE, "sh", "-euc", FETCH)
    return Program((engine.docker, "compose"), {"DOCKER_CONFIG": str(PLUGINS.parent)})


@dataclass
class Compose:
    """One recipe as a project of its own, on free ports, with the planted password as its secret."""

    engine: Engine
    program: Program
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    name: str = field(default_factory=lambda: unique("compose").replace("-", ""))
    port: int = field(default_factory=lambda: free_port())

    @property
    def root(self) -> Path:
        """Return the copy of the tree that the recipe is in."""
        return next(parent for parent in self.folder.parents if (parent / "compose").is_dir())

    @property
    def settings(self) -> dict[str, str]:
        """The environment of a compose command, beyond this process's own."""
        chosen = {**self.engine.settings, **self.program.environment}
        return {
            **chosen,
            "COMPOSE_PROJECT_NAME": self.name,
            "BACKEND_PORT": str(self.port),
            "COLUMNS": "250",  # 1.29 breaks the names in `ps` where a state is long
            **self.environment,
        }

    def command(self, *arguments: str) -> list[str]:
        """Return the command line."""
        first, *rest = self.program.command
        return [*reach(first, self.settings), *rest, *arguments]

    def run(self, *arguments: str, expect: int | None = 0, timeout: float = 180) -> CompletedProcess[str]:
        """Run a compose command in the recipe's folder; nothing that it writes may have the password in it."""
        command = self.command(*arguments)
        done = call(*command, expect=expect, timeout=timeout, environment=self.settings, folder=self.folder)
        assert leaks.find(done.stdout + done.stderr) is None
        return done

    def migrator(self, *arguments: str, expect: int | None = 0, service: str = "migrator") -> str:
        """Type `docker compose run --rm migrator ...`; return both streams. `-T`, for there is no terminal."""
        done = self.run("run", "--rm", "-T", service, *arguments, expect=expect)
        return done.stdout + done.stderr

    def container(self, service: str) -> dict[str, Any] | None:
        """Return what the engine knows of a service's container, or None where there is none."""
        labels = (f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}")
        filters = [f"--filter=label={label}" for label in labels]
        found = self.engine.run("ps", "-aq", *filters).stdout.split()
        if not found:
            return None
        return dict(json.loads(self.engine.run("inspect", found[0]).stdout)[0])

    def containers(self) -> list[dict[str, Any]]:
        """Return what the engine knows of all containers of this project."""
        found = self.engine.run(
            "ps", "-aq", f"--filter=label=com.docker.compose.project={self.name}"
        ).stdout.split()
        return list(json.loads(self.engine.run("inspect", *found).stdout)) if found else []

    def inspect(self, service: str) -> dict[str, Any]:
        """Return what the engine knows of a service's container, which there must be."""
        container = self.container(service)
        assert container is not None, service
        return container

    def logs(self, service: str) -> str:
        """Return what a service's container wrote."""
        container = self.container(service)
        return self.engine.logs(container["Id"]) if container else ""

    def exit_code(self, service: str) -> int | None:
        """Return the exit code of a service's container."""
        container = self.container(service)
        return container["State"]["ExitCode"] if container else None

    def never_started(self, service: str) -> bool:
        """Tell whether a service's container, if there is one, was made and never started."""
        container = self.container(service)
        return container is None or container["State"]["Status"] == "created"

    def psql(self, sql: str, database: str = USER, user: str = USER) -> list[str]:
        """Return the rows of a query."""
        client = ("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-U", user, "-d", database)
        return self.engine.run("exec", "-i", self.inspect("db")["Id"], *client, stdin=sql).stdout.splitlines()

    def get(self, path: str, port: int = 0) -> tuple[int, Any]:
        """Ask the backend; the status is 0 where nobody answers."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port or self.port}{path}", timeout=60
            ) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            return 0, None

    def up(self) -> None:
        """Type `up -d`, and show the logs where that fails."""
        done = self.run("up", "-d", expect=None)
        logs = "".join(self.engine.logs(container["Id"]) for container in self.containers())
        assert done.returncode == 0, done.stdout + done.stderr + logs

    def wait_for_backend(self, path: str = "/healthz", port: int = 0) -> None:
        """Wait until the backend answers."""
        wait_for(lambda: self.get(path, port)[0] == 200, BACKEND_SECONDS, "the backend answers")

    def assert_no_leak(self) -> None:
        """Search the logs of all services, and what the engine knows of them, for the planted password."""
        found = self.containers()
        assert found
        for container in found:
            assert leaks.find(self.engine.logs(container["Id"])) is None, container["Name"]
            assert leaks.find(json.dumps(container)) is None, container["Name"]

    def assert_locked_down(self) -> None:
        """Every service has a read-only root, no capability, no new privileges, and no user id 0."""
        for container in self.containers():
            host, name = container["HostConfig"], container["Name"]
            assert host["ReadonlyRootfs"] is True, name
            assert host["CapDrop"] == ["ALL"], name
            assert not host["CapAdd"], name
            assert host["SecurityOpt"] == ["no-new-privileges:true"], name
            assert container["Config"]["User"].split(":")[0] not in {"", "0", "root"}, name

    def down(self) -> None:
        """Remove all that this project made."""
        subprocess.run(
            self.command("down", "-v", "--remove-orphans", "-t", "2"),
            cwd=self.folder,
            env={**self.engine.process_environment, **self.settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what the recipes need into `folder`, readable for the containers' users."""
    for name in ("compose", "migrations"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    return folder


@contextmanager
def running(compose: Compose) -> Iterator[Compose]:
    """Give a project to a block, and remove all that it made after it."""
    try:
        yield compose
    finally:
        compose.down()
