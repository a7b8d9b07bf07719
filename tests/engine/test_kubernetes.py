"""The shipped manifest runs: podman plays its pod. What it says is checked in tests/test_manifests.py."""

from __future__ import annotations

import base64
import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.containers import wait_for
from tests.engine.engine import ROOT, Engine
from tests.engine.podman import Podman
from tests.engine.standins import POSTGRES_IMAGE
from tests.support import leaks
from tests.support.kubernetes import documents, kustomize, of_kind

pytestmark = pytest.mark.engine

K8S = ROOT / "k8s"
MIGRATIONS_IMAGE = "shop-migrations:latest"
NETWORK = "shop"
PASSWORD = "planted-pw%40in:k8s"  # as it stands in the address
DECODED = "planted-pw@in:k8s"


@pytest.fixture(scope="module")
def rendered() -> list[dict[str, Any]]:
    """What `kubectl kustomize k8s` makes of the folder."""
    return documents(kustomize(K8S))


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))  # noqa: S104 - podman binds there, too
        return int(probe.getsockname()[1])


def for_podman(rendered: list[dict[str, Any]], podman: Podman, port: int) -> list[dict[str, Any]]:
    """Return the manifest as podman can play it; what it cannot is changed here, and nothing else.

    The Deployment becomes its own pod (podman takes the restart policy for init containers, too, and removes
    them by default), the port is published, and the Secret holds this test's address.
    """
    address = f"postgresql://shop:{PASSWORD}@postgres:5432/shop"
    secret, deployment = of_kind(rendered, "Secret"), of_kind(rendered, "Deployment")
    secret["data"] = {"url": base64.b64encode(f"{address}\n".encode()).decode()}
    template = deployment["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"]["name"] = "shop-backend"
    pod["metadata"]["annotations"] = {"io.podman.annotations.init.container.type": "always"}
    pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["containers"][0]["ports"][0]["hostPort"] = port
    for volume in pod["spec"]["volumes"]:
        if "secret" in volume:
            volume["secret"]["optional"] = False  # podman 4.3 crashes without it
    objects = [of_kind(rendered, "ConfigMap"), of_kind(rendered, "PersistentVolumeClaim"), pod]
    if podman.version >= (4, 4):
        return [secret, *objects]
    # podman 4.3 does not decode a Secret's data when it mounts it.
    raw = {**secret, "data": {"url": f"{address}\n"}}
    podman.run("secret", "create", secret["metadata"]["name"], "-", stdin=json.dumps(raw))
    return objects


@pytest.fixture(scope="module")
def podman(engine: Engine, image: str, backend_image: str) -> Iterator[Podman]:
    """Podman with the three images, and Postgres as `postgres` on the pod's network."""
    engine.build(ROOT, MIGRATIONS_IMAGE, "-f", str(K8S / "Dockerfile"), f"--build-arg=MIGRATOR_IMAGE={image}")
    with Podman.provision() as podman:
        podman.load(engine, MIGRATIONS_IMAGE, backend_image, POSTGRES_IMAGE)
        podman.run("network", "create", NETWORK)
        settings = {"POSTGRES_USER": "shop", "POSTGRES_DB": "shop", "POSTGRES_PASSWORD": DECODED}
        variables = [f"--env={name}={value}" for name, value in settings.items()]
        podman.run("run", "-d", "--name=postgres", f"--network={NETWORK}", *variables, POSTGRES_IMAGE)
        yield podman


def test_podman_runs_it_migrator_first(
    podman: Podman, rendered: list[dict[str, Any]], tmp_path: Path
) -> None:
    port = free_port()
    manifest = tmp_path / "pod.yaml"
    manifest.write_text(yaml.safe_dump_all(for_podman(rendered, podman, port)))

    played = podman.run("play", "kube", f"--network={NETWORK}", str(manifest), expect=None, timeout=120)

    log = podman.logs("shop-backend-migrator")
    assert played.returncode == 0, played.stderr + log
    states = {
        name: json.loads(podman.run("inspect", f"shop-backend-{name}").stdout)[0]
        for name in ("migrator", "backend")
    }
    assert states["migrator"]["State"]["ExitCode"] == 0, log
    assert states["migrator"]["State"]["FinishedAt"] <= states["backend"]["State"]["StartedAt"]
    assert states["migrator"]["HostConfig"]["ReadonlyRootfs"] is True
    assert states["migrator"]["Config"]["User"].split(":")[0] == "10001"

    def shops() -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
            return list(json.load(response))

    def answers() -> bool:
        try:
            return bool(shops())
        except OSError:
            return False

    wait_for(answers, 30, "the backend answers")
    assert [row["slug"] for row in shops()] == ["demo-shop", "demo-shop-uk"]
    for text in (log, podman.logs("shop-backend-backend"), json.dumps(states)):
        for secret in (PASSWORD, DECODED):
            assert leaks.find(text, secret) is None
