"""Fixtures: a container engine, the shipped images, a Postgres container, and the image against a database."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine import standins
from tests.engine.compose import PLUGIN, STANDALONE, Compose, Program, copy_of_the_tree, plugin, standalone
from tests.engine.containers import Migrator, Postgres, running_postgres, secret_file, unique
from tests.engine.engine import ROOT, Engine, tls_roots
from tests.engine.podman import Podman
from tests.engine.pods import Pods

IMAGE = "migrator:latest"
BACKEND_IMAGE = "migrator-example-backend:latest"
PGBOUNCER_IMAGE = "migrator-example-pgbouncer:latest"
S3_IMAGE = "migrator-example-s3:latest"
SLIM_IMAGE = "migrator:slim"
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
def slim_image(engine: Engine) -> str:
    """The variant without backup tools."""
    engine.build(ROOT, SLIM_IMAGE, "--build-arg=VARIANT=slim", f"--build-arg=MIGRATOR_VERSION={VERSION}")
    return SLIM_IMAGE


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
def pgbouncer_image(engine: Engine) -> str:
    """The pooler of compose/pgbouncer."""
    engine.build(ROOT / "compose" / "pgbouncer" / "pooler", PGBOUNCER_IMAGE)
    return PGBOUNCER_IMAGE


@pytest.fixture(scope="session")
def s3_image(engine: Engine) -> str:
    """The server of compose/s3."""
    engine.build(ROOT / "compose" / "s3" / "server", S3_IMAGE)
    return S3_IMAGE


@pytest.fixture(scope="session", params=[STANDALONE, PLUGIN])
def compose_program(request: pytest.FixtureRequest, engine: Engine) -> Program:
    """Each way to type a compose command."""
    return standalone() if request.param == STANDALONE else plugin(engine)


@pytest.fixture
def recipe(
    engine: Engine, image: str, backend_image: str, compose_program: Program, tmp_path: Path
) -> Iterator[Callable[[str], Compose]]:
    """Make a project of a folder below `compose/`, in a copy of the tree; it is taken down at the end."""
    made = []

    def make(folder: str) -> Compose:
        tree = copy_of_the_tree(tmp_path / "tree")
        secret = {"POSTGRES_PASSWORD_SECRET": str(secret_file(tmp_path))}
        compose = Compose(engine, compose_program, tree / "compose" / folder, secret)
        made.append(compose)
        return compose

    yield make
    for compose in made:
        compose.down()


@pytest.fixture(scope="session")
def podman(engine: Engine) -> Iterator[Podman]:
    """Podman, with Postgres's image."""
    with Podman.provision() as podman:
        podman.load(engine, standins.POSTGRES_IMAGE)
        yield podman


@pytest.fixture(scope="session")
def playground(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Pods:
    """A network for pods, and Postgres on it; all of it goes with podman's state."""
    pods = Pods(podman, unique("pods"), tmp_path_factory.mktemp("pods"))
    pods.start_postgres()
    return pods


@pytest.fixture
def pods(playground: Pods) -> Iterator[Pods]:
    """The network for pods; a test's own are removed after it, their logs searched for the password."""
    yield playground
    playground.remove_all()
