"""Fixtures: a container engine, the shipped images, a Postgres container, and the image against a database."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import standins
from tests.engine.containers import Migrator, Postgres, running_postgres
from tests.engine.engine import ROOT, Engine, tls_roots
from tests.engine.podman import Podman
from tests.engine.pods import Pods

IMAGE = "migrator:latest"
BACKEND_IMAGE = "migrator-example-backend:latest"
VERSION = "0.0.0+tests"
PLANTED_ROOTS = "planted-among-the-tls-roots"


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine that has the base images."""
    with Engine.provision() as engine:
        standins.ensure(engine)
        yield engine


@pytest.fixture(scope="session")
def image(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped image, built from the shipped Dockerfile, with marked TLS roots as its build secret."""
    roots = tmp_path_factory.mktemp("roots") / "roots.pem"
    roots.write_text(Path(tls_roots()).read_text() + f"\n# {PLANTED_ROOTS}\n")
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True, check=False
    ).stdout.strip()
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    labels = {"VERSION": VERSION, "REVISION": revision or "unknown", "CREATED": stamp}
    engine.build(
        ROOT,
        IMAGE,
        *(f"--build-arg=MIGRATOR_{name}={value}" for name, value in labels.items()),
        roots=str(roots),
    )
    return IMAGE


@pytest.fixture(scope="session")
def backend_image(engine: Engine) -> str:
    """The example's backend."""
    engine.build(ROOT / "compose" / "backend", BACKEND_IMAGE)
    return BACKEND_IMAGE


@pytest.fixture(scope="session")
def postgres(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """One Postgres container for the session; each test has a database of its own."""
    with running_postgres(engine, tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def migrator(engine: Engine, image: str, postgres: Postgres, tmp_path: Path) -> Iterator[Migrator]:
    """The image against an empty database."""
    migrator = Migrator(engine, image, postgres, postgres.create_database(), tmp_path)
    yield migrator
    migrator.close()


@pytest.fixture(scope="session")
def podman(engine: Engine) -> Iterator[Podman]:
    """Podman, with Postgres's image."""
    with Podman.provision() as podman:
        podman.load(engine, standins.POSTGRES_IMAGE)
        yield podman


@pytest.fixture(scope="session")
def playground(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Pods:
    """A network for pods, and Postgres on it; all of it goes with podman's state."""
    pods = Pods(podman, "shop", tmp_path_factory.mktemp("pods"))
    pods.start_postgres()
    return pods


@pytest.fixture
def pods(playground: Pods) -> Iterator[Pods]:
    """The network for pods; a test's own are removed after it, their logs searched for the password."""
    yield playground
    playground.remove_all()
