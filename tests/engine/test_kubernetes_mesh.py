"""The order of things in a mesh: a stand-in for its proxy, behind the redirection that a mesh makes in a pod.

The redirection is Istio's: what the pod sends to Postgres goes to the proxy, unless the proxy's own user (1337) sends
it. With native sidecars the proxy is there before migrator; without them an init container comes first.
"""

from __future__ import annotations

import pytest

from migrator.outcome import ExitCode
from tests.engine.containers import wait_for
from tests.engine.engine import as_root, call
from tests.engine.pods import POSTGRES, Pods, playable
from tests.engine.test_kubernetes import Shop
from tests.engine.test_kubernetes import _images as images_of_the_manifests  # noqa: F401 - a fixture
from tests.engine.test_projects import PROJECTS

pytestmark = pytest.mark.engine

TO_POSTGRES = ["OUTPUT", "-p", "tcp", "--dport", "5432"]
TO_THE_PROXY = ["-m", "owner", "!", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15001"]


class Mesh:
    """The Job's pod, made and not started, in which connections to Postgres are redirected to a proxy."""

    def __init__(self, pods: Pods, wait_timeout: str) -> None:
        self.pods, self.shop = pods, Shop(pods, "overlays/job")
        self.shop.settings["data"]["MIGRATOR_WAIT_TIMEOUT"] = wait_timeout
        pod = playable(
            self.shop.named("shop-migrate"),
            f"mesh-{self.shop.database}",
            {},
            claim=self.shop.claim,
            secret=self.shop.secret,
        )
        self.name = str(pod["metadata"]["name"])
        self.container = f"{self.name}-migrator"
        pods.play(self.shop.settings, pod, start=False)
        infra = pods.podman.run(
            "pod", "inspect", "--format", "{{.InfraContainerID}}", self.name
        ).stdout.strip()
        pods.podman.run("start", infra)
        process = str(pods.inspect(infra)["State"]["Pid"])
        enter = as_root("nsenter", "-t", process, "-n", "iptables", "-t", "nat", "-A")
        call(*enter, *TO_POSTGRES, *TO_THE_PROXY)

    def start_proxy(self) -> str:
        """Start the proxy; return its container's name."""
        name = f"{self.name}-proxy"
        program = (PROJECTS / "proxy.py").read_text()
        options = (f"--pod={self.name}", f"--name={name}", "--user=1337", "--entrypoint=/usr/bin/python3")
        self.pods.podman.run(
            "run", "-d", *options, "migrator-example-backend:latest", "-c", program, POSTGRES
        )
        return name

    def start(self) -> None:
        """Start migrator."""
        self.pods.podman.run("start", self.container)

    def log(self) -> str:
        """Return what migrator has logged."""
        return self.pods.podman.logs(self.container)


def test_the_proxy_is_there_first(pods: Pods) -> None:
    mesh = Mesh(pods, "20s")
    proxy = mesh.start_proxy()
    mesh.start()
    assert pods.wait(mesh.container) == 0, mesh.log()
    # A Job's own container has ended by itself; that the proxy ends then is the native sidecar's doing.
    assert pods.inspect(proxy)["State"]["Status"] == "running"


def test_a_proxy_that_is_late_is_waited_for(pods: Pods) -> None:
    mesh = Mesh(pods, "60s")
    mesh.start()
    wait_for(lambda: "waiting for" in mesh.log(), 30, "migrator waits")
    mesh.start_proxy()
    assert pods.wait(mesh.container) == 0, mesh.log()


def test_without_native_sidecars_an_init_container_waits_for_a_proxy_that_comes_after_it(pods: Pods) -> None:
    mesh = Mesh(pods, "3s")
    mesh.start()
    assert pods.wait(mesh.container) == ExitCode.UNREACHABLE
    assert "Connection refused" in mesh.log()
