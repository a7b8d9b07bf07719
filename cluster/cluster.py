"""The whole cluster: control plane, node, the example's images, and a Postgres in a namespace of its own."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.engine import standins
from tests.engine.engine import Engine

from cluster.build import CACHE, ROOT, programs
from cluster.control_plane import control_plane
from cluster.kubectl import Kubectl, is_true, wait_for
from cluster.node import Node, address, node
from cluster.services import NotReady

PREFIX = "migrator-k8s-cluster"
IMAGES = ("migrator:latest", "shop-migrations:latest", "migrator-example-backend:latest")
POSTGRES_SECONDS = 120
UNREACHABLE = "10.244.255.254"  # a pod's address that no pod has


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `host` is the address of its Postgres, whose superuser is `shop`."""

    node: Node
    kubectl: Kubectl
    host: str
    password: str
    volumes: Path

    def psql(self, sql: str, database: str = "shop") -> list[str]:
        """Return the rows of a query, `|` between columns."""
        command = ("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "shop", "-d", database)
        postgres = self.kubectl.within("database")
        return postgres.run("exec", "-i", "postgres", "--", *command, stdin=sql).stdout.splitlines()

    def address_of(self, database: str, password: str = "", host: str = "") -> str:
        """Return a database's address as a pod reaches it, or with something wrong in it."""
        return f"postgresql://shop:{password or self.password}@{host or self.host}:5432/{database}"


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Build what is missing, start the cluster, and stop all of it at the end."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with _only_one():
        yield from _cluster()


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Hold what two clusters would share: the bridge, its addresses, and the folder with what the last one left."""
    with (CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotReady("another cluster runs from this folder; end it first") from None
        yield


def _cluster() -> Iterator[Cluster]:
    binaries = programs()
    for old in CACHE.glob("state-*"):
        shutil.rmtree(old, ignore_errors=True)
    state = Path(tempfile.mkdtemp(prefix="state-", dir=CACHE))
    run = Path(tempfile.mkdtemp(prefix="mk8s-"))
    try:
        with (
            Engine.provision() as engine,
            control_plane(binaries, state, address()) as plane,
            node(binaries, plane, state, run, engine) as machine,
        ):
            _load_images(machine, engine)
            yield _with_postgres(machine, plane.kubectl, state / "volumes")
    finally:
        shutil.rmtree(run, ignore_errors=True)
        for folder in ("containerd", "etcd", "volumes"):  # the logs stay
            shutil.rmtree(state / folder, ignore_errors=True)


def _load_images(node: Node, engine: Engine) -> None:
    """Build the shipped images, under names of our own, and copy them to the node under those of the manifests."""
    standins.ensure(engine)
    migrator, migrations, backend = (f"{PREFIX}-{image.partition(':')[0]}" for image in IMAGES)
    engine.build(ROOT, migrator)
    engine.build(
        ROOT, migrations, "-f", str(ROOT / "k8s" / "Dockerfile"), f"--build-arg=MIGRATOR_IMAGE={migrator}"
    )
    engine.build(ROOT / "compose" / "backend", backend)
    for built, name in zip((migrator, migrations, backend), IMAGES, strict=True):
        node.load(engine, f"{built}:latest", name)
    node.load(engine, standins.POSTGRES_IMAGE)


def _with_postgres(node: Node, kubectl: Kubectl, volumes: Path) -> Cluster:
    """Run Postgres as a pod; there is no DNS in this cluster, so it is reached by its address."""
    password = secrets.token_hex(8)
    pods = kubectl.within("database")
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "database"}})
    wait_for(
        lambda: kubectl.has("serviceaccount", "default", "database"), 30, lambda: "no service account yet"
    )
    pods.apply(_postgres(password))

    def ready() -> bool:
        return is_true(pods.get("pod", "postgres"), "Ready")

    wait_for(ready, POSTGRES_SECONDS, lambda: pods.describe("pod", "postgres"))
    return Cluster(node, kubectl, pods.get("pod", "postgres")["status"]["podIP"], password, volumes)


def _postgres(password: str) -> dict[str, object]:
    probe = {"exec": {"command": ["pg_isready", "-q", "-h", "127.0.0.1"]}, "periodSeconds": 1}
    container = {
        "name": "postgres",
        "image": standins.POSTGRES_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["postgres", "-c", "max_connections=300"],
        "env": [
            {"name": "POSTGRES_USER", "value": "shop"},
            {"name": "POSTGRES_PASSWORD", "value": password},
        ],
        "readinessProbe": probe,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "postgres", "labels": {"app.kubernetes.io/name": "postgres"}},
        "spec": {"containers": [container]},
    }
