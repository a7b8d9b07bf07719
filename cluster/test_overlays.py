"""Every shipped overlay is admitted by a real API server, and the CronJobs do what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.kubectl import is_true, terminated, wait_for
from cluster.shop import K8S, OVERLAYS, Shop, of_kind

SHIPPED = [K8S, *sorted(path.parent for path in (K8S / "overlays").glob("*/kustomization.yaml"))]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_the_api_server_admits_it_without_a_warning(shop: Shop, folder: Path) -> None:
    objects = [item for item in shop.rendered(folder) if item["kind"] != "Namespace"]
    for item in objects:
        item["metadata"].pop("namespace", None)  # the test's own, which is as restricted
    text = yaml.safe_dump_all(objects)
    answer = shop.kubectl.run("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
    assert answer.stdout.count("(server dry run)") == len(objects)
    assert answer.stderr == ""


def test_the_cronjobs_prove_the_backup_and_see_no_drift(shop: Shop) -> None:
    objects = shop.rendered(OVERLAYS / "cronjobs")
    of_kind(objects, "ConfigMap")["data"]["MIGRATOR_BACKUP"] = "always"
    shop.apply(*objects)
    wait_for(lambda: is_true(shop.kubectl.get("job", "shop-migrate"), "Complete"), 180, shop.explain)

    for name in ("shop-verify-backup", "shop-drift"):
        shop.kubectl.run("create", "job", f"{name}-now", f"--from=cronjob/{name}")
        job = f"{name}-now"
        wait_for(lambda job=job: is_true(shop.kubectl.get("job", job), "Complete"), 120, shop.explain)  # type: ignore[misc]
        (pod,) = shop.pods(f"job-name={job}")
        print(job, terminated(pod, "migrator").get("message"))
        print(shop.kubectl.logs(pod["metadata"]["name"], "migrator")[-1500:])
