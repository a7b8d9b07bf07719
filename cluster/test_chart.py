"""The Helm chart, installed on a real API server: hooks, a change of mode, what fails, and pods of another chart."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.support.helm import CHART, CHARTS, Helm, Refused, merged

from cluster.kubectl import Object, terminated
from cluster.shop import HEADS, OVERLAYS, Shop, encoded, of_kind

MIGRATIONS = "app.kubernetes.io/component=migration"
WAIT = ("--wait=watcher", "--wait-for-jobs", "--timeout=120s")


class Releases:
    """Releases in a test's namespace, of images that the node has."""

    def __init__(self, shop: Shop, folder: Path) -> None:
        self.shop = shop
        self.helm = Helm(folder)
        self.access = (f"--kubeconfig={shop.kubectl.access}", f"--namespace={shop.name}")
        template = of_kind(shop.rendered(OVERLAYS / "job"), "Job")["spec"]["template"]["spec"]
        repository, _, tag = template["containers"][0]["image"].rpartition(":")
        self.values: Mapping[str, Any] = {
            "image": {"repository": repository, "tag": tag, "pullPolicy": "Never"},
            "database": {"existingSecret": "shop-database"},
            "backups": {"to": "none"},
        }
        self.say(shop.cluster.address_of(shop.database))

    def say(self, address: str) -> None:
        """Put an address into the Secret."""
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "shop-database"}}
        self.shop.kubectl.apply({**secret, "data": {"url": encoded(address)}})

    def upgrade(self, *layers: Mapping[str, Any], chart: Path = CHART, below: str = "") -> str:
        """Install or upgrade the release `shop` and wait for what it has; raises :class:`Refused` where it fails."""
        values = merged(self.values, *layers)
        path = self.helm.values(merged(*layers, {below: self.values}) if below else values)
        command = ("upgrade", "--install", "shop", str(chart), "-f", str(path))
        return self.helm.run(*command, *self.access, *WAIT)

    def said(self) -> list[str]:
        """Return the termination messages of the Jobs' pods, oldest first."""
        pods: list[Object] = self.shop.pods(MIGRATIONS)
        return [ended["message"] for pod in pods if (ended := terminated(pod, "migrator"))]


@pytest.fixture
def releases(shop: Shop, tmp_path: Path) -> Releases:
    """Helm in the test's namespace, which enforces restricted Pod Security."""
    return Releases(shop, tmp_path)


def test_a_release_goes_from_job_to_hook_and_back(releases: Releases, shop: Shop) -> None:
    releases.upgrade({"mode": "job"})
    assert shop.versions() == HEADS
    releases.upgrade({"mode": "hook"})
    assert "Nothing to do" in releases.said()[-1]
    assert [pod["spec"]["serviceAccountName"] for pod in shop.pods(MIGRATIONS)] == ["shop-migrator-hook"]
    releases.upgrade({"mode": "job", "job": {"args": ["upgrade", "heads"]}})
    accounts = {pod["spec"]["serviceAccountName"] for pod in shop.pods(MIGRATIONS)}
    assert accounts == {"shop-migrator", "shop-migrator-hook"}
    print(releases.helm.run("test", "shop", "--logs", *releases.access))


def test_a_hook_that_a_person_is_needed_for_fails_the_release_at_once(releases: Releases, shop: Shop) -> None:
    releases.say(shop.cluster.address_of(shop.database, "wrong"))
    with pytest.raises(Refused, match="Job Failed"):
        releases.upgrade({"mode": "hook"})
    (message,) = releases.said()
    assert message.startswith("ACCESS_DENIED (30)")
    releases.say(shop.cluster.address_of(shop.database))
    releases.upgrade({"mode": "hook"})
    assert shop.versions() == HEADS


def test_another_charts_pods_migrate_wait_and_have_a_sidecar(
    releases: Releases, shop: Shop, tmp_path: Path
) -> None:
    charts = tmp_path / "charts"
    shutil.copytree(CHARTS, charts)
    parent = charts / "example-backend"
    releases.helm.run("dependency", "update", str(parent))
    deployment = of_kind(shop.rendered(OVERLAYS / "job"), "Deployment")
    backend = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    for schema in ("initContainer", "waitForCurrent", "sidecar"):
        values = {"image": backend, "replicas": 3, "schema": schema, "migrator": {"mode": "none"}}
        releases.upgrade(values, chart=parent, below="migrator")
        assert shop.ready("shop", 3)
        assert shop.versions() == HEADS
        print(shop.kubectl.run("get", "pods").stdout)
