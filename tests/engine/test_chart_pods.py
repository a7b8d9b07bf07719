"""The pods of the Helm chart run: podman plays them. What their manifests say is checked in tests/chart/."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine import ROOT, Engine
from tests.engine.pods import Pods, playable
from tests.support.helm import CHARTS, Helm
from tests.support.kubernetes import of_kind

pytestmark = pytest.mark.engine

MIGRATIONS_IMAGE = "shop-migrations:latest"
VALUES: Mapping[str, Any] = {
    "image": {"repository": "shop-migrations", "tag": "latest"},
    "database": {"existingSecret": "shop-database"},
    "verifyBackup": {"enabled": True},
    "drift": {"enabled": True},
}
MIGRATED = ["1"]


@pytest.fixture(scope="module", autouse=True)
def _images(engine: Engine, image: str, backend_image: str, playground: Pods) -> None:
    """Give podman the images that the charts name."""
    dockerfile = str(ROOT / "k8s" / "Dockerfile")
    engine.build(ROOT, MIGRATIONS_IMAGE, "-f", dockerfile, f"--build-arg=MIGRATOR_IMAGE={image}")
    playground.podman.load(engine, MIGRATIONS_IMAGE, backend_image)


class Played:
    """A database, and the pods of a rendering that use it."""

    def __init__(self, pods: Pods) -> None:
        self.pods, self.database = pods, pods.create_database()
        self.secret, self.claim = f"shop-database-{self.database}", f"backups-{self.database}"
        pods.secret(self.secret, pods.address(self.database))

    def run(self, item: Mapping[str, Any], *arguments: str) -> str:
        """Play the pod of an object, with other arguments if there are any; return its log once it has ended well."""
        name = f"{item['metadata']['name']}-{len(self.pods.playing)}-{self.database}"
        pod = self.pod(item, name)
        if arguments:
            pod["spec"]["containers"][0]["args"] = list(arguments)
        self.pods.play(pod)
        container = f"{name}-migrator"
        code = self.pods.wait(container)
        log = self.pods.podman.logs(container)
        assert code == 0, log
        return log

    def pod(self, item: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return an object's pod, playable."""
        return playable(copy.deepcopy(item), name, {}, claim=self.claim, secret=self.secret)

    def heads(self) -> list[str]:
        """Return how many version rows there are."""
        return self.pods.psql("SELECT count(*) FROM alembic_version", self.database)


@pytest.fixture
def played(pods: Pods) -> Played:
    """An empty database, and pods for it."""
    return Played(pods)


def test_the_jobs_pods_do_their_work(played: Played, tmp_path: Path) -> None:
    objects = Helm(tmp_path).template(VALUES)
    job = of_kind(objects, "Job")
    cron = {item["metadata"]["name"]: item for item in objects if item["kind"] == "CronJob"}
    assert "upgraded from base" in played.run(job)
    assert played.heads() == MIGRATED
    assert "Nothing to do" in played.run(job)
    assert "nothing is pending" in played.run(of_kind(objects, "Pod"))  # helm test
    assert "verified" in played.run(cron["shop-migrator-drift"])
    played.run(job, "backup")
    assert "is verified" in played.run(cron["shop-migrator-verify-backup"])


def test_another_charts_pod_starts_when_migrator_has_ended(played: Played, tmp_path: Path) -> None:
    helm, charts = Helm(tmp_path), tmp_path / "charts"
    shutil.copytree(CHARTS, charts)
    helm.run("dependency", "update", str(charts / "example-backend"))
    deployment = of_kind(helm.template({}, chart=charts / "example-backend"), "Deployment")
    name = f"shop-{played.database}"
    played.pods.play(played.pod(deployment, name))
    migrator, backend = (played.pods.inspect(f"{name}-{part}")["State"] for part in ("migrator", "backend"))
    assert migrator["ExitCode"] == 0
    assert migrator["FinishedAt"] <= backend["StartedAt"]
    assert backend["Status"] == "running"
    assert played.heads() == MIGRATED
