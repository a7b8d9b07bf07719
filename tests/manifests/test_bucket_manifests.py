"""Backups in a bucket: what the components of k8s/ make of it, with the platform's identity and with Argo CD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.manifests.test_manifests import Objects, composed, environment_of, references, rendered
from tests.support.kubernetes import VERSIONS, containers_of, of_kind, pod_of, restricted_violations, validate

KEY = {
    "AWS_ACCESS_KEY_ID_FILE": "/etc/shop-backups/access-key-id",
    "AWS_SECRET_ACCESS_KEY_FILE": "/etc/shop-backups/secret-access-key",
}
WAYS = {
    "init container": [],
    "sidecar": ["sidecar", "worker"],
    "Job": ["job", "worker", "verify-backup", "drift"],
}


def there(objects: Objects) -> set[tuple[str, str]]:
    """Return the kind and the name of each object."""
    return {(item["kind"], item["metadata"]["name"]) for item in objects}


def keys_of(objects: Objects, item: dict[str, Any]) -> dict[str, str]:
    """Return what an object's containers are told about a key."""
    named = [environment_of(objects, container) for container in containers_of(item)]
    return {name: value for each in named for name, value in each.items() if name.startswith("AWS_")}


@pytest.mark.parametrize("way", WAYS)
def test_with_the_platforms_identity_there_is_a_bucket_and_neither_key_nor_volume(
    tmp_path: Path, way: str
) -> None:
    objects = composed(tmp_path, "base", *(f"components/{name}" for name in (*WAYS[way], "s3-identity")))

    kinds = [item["kind"] for item in objects]
    assert "PersistentVolumeClaim" not in kinds
    assert of_kind(objects, "Secret")["metadata"]["name"].startswith("shop-database-")
    assert of_kind(objects, "ConfigMap")["data"]["MIGRATOR_BACKUP_URL"] == "s3://shop-backups/shop"
    pods = [item for item in objects if pod_of(item)]
    assert len(pods) == {"init container": 1, "sidecar": 2, "Job": 5}[way]
    for item in pods:
        validate(item, VERSIONS[-1])
        assert restricted_violations(item) == []
        assert ("ServiceAccount", "shop-migrator") in set(references(item)) <= there(objects)
        assert keys_of(objects, item) == {}
        volumes = {volume["name"] for volume in pod_of(item)["spec"].get("volumes", [])}  # type: ignore[index]
        assert volumes <= {"database", "scratch"}
        mounts = {m["name"] for container in containers_of(item) for m in container["volumeMounts"]}
        assert mounts <= volumes


def test_with_argo_cd_the_key_is_there_before_the_hooks_and_has_a_name_that_stays(tmp_path: Path) -> None:
    before = rendered("overlays/argocd-foundation-s3")
    assert there(before) == {
        ("ServiceAccount", "shop-migrator"),
        ("ConfigMap", "shop-migrator"),
        ("Secret", "shop-database"),
        ("Secret", "shop-backups"),
    }
    two_branches = ("overlays/argocd-expand-contract", "components/s3-identity", "components/s3-key")
    for objects, hooks in (
        (rendered("overlays/argocd-s3"), 1),
        (composed(tmp_path, *two_branches), 2),
    ):
        assert {item["kind"] for item in objects} == {"Service", "Deployment", "Job"}
        jobs = [item for item in objects if item["kind"] == "Job"]
        assert len(jobs) == hooks
        for job in jobs:
            validate(job, VERSIONS[-1])
            assert keys_of([*before, *objects], job) == KEY
            assert ("Secret", "shop-backups") in set(references(job)) <= there(before)
        for item in objects:
            assert not any(kind == "PersistentVolumeClaim" for kind, _ in references(item))
