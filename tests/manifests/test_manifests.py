"""The manifests in k8s/: every overlay as kustomize renders it, checked as a platform team would review it."""

from __future__ import annotations

import base64
import functools
import ipaddress
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.kubernetes import (
    ROOT,
    VERSIONS,
    containers_of,
    documents,
    hardening_violations,
    kustomize,
    of_kind,
    pod_of,
    policy_violations,
    restricted_violations,
    validate,
)

Objects = list[dict[str, Any]]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml"))
ALL = ["", *(f"overlays/{name}" for name in OVERLAYS)]
ARGO_APPLICATIONS = {  # two of them share a namespace: what one mounts, the other makes
    "overlays/argocd": "overlays/argocd-foundation",
    "overlays/argocd-expand-contract": "overlays/argocd-foundation",
    "overlays/argocd-s3": "overlays/argocd-foundation-s3",
}
ADDRESS = "/etc/shop-database/url"


@functools.cache
def _text(name: str) -> str:
    return kustomize(K8S / name)


def rendered(name: str) -> Objects:
    """Return what `kubectl apply -k k8s/NAME` would send."""
    return documents(_text(name))


def composed(folder: Path, *parts: str) -> Objects:
    """Return what an overlay of one's own gives that is made of these folders of `k8s/`, components in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization"]
    for field, wanted in (("resources", False), ("components", True)):
        named = [part for part in parts if part.startswith("components/") is wanted]
        lines += [f"{field}:", *(f"  - {os.path.relpath(K8S / part, folder.resolve())}" for part in named)]
    (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
    return documents(kustomize(folder))


@pytest.fixture(params=ALL, ids=[name or "k8s" for name in ALL])
def objects(request: pytest.FixtureRequest) -> Objects:
    """Each overlay in turn."""
    return rendered(request.param)


def test_every_component_is_part_of_an_overlay() -> None:
    used = {
        Path(line.strip().removeprefix("- ")).name
        for name in OVERLAYS
        for line in (K8S / "overlays" / name / "kustomization.yaml").read_text().splitlines()
        if "components/" in line
    }
    assert used == set(COMPONENTS)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_object_is_valid(objects: Objects, version: str) -> None:
    assert objects
    for item in objects:
        validate(item, version)


def test_each_pod_is_admitted_where_only_restricted_ones_are(objects: Objects) -> None:
    for item in objects:
        assert restricted_violations(item) == []
        assert hardening_violations(item) == []


def test_the_namespace_admits_only_restricted_pods() -> None:
    labels = of_kind(rendered("overlays/job"), "Namespace")["metadata"]["labels"]
    modes = {mode: labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")}
    assert set(modes.values()) == {"restricted"}
    assert all(
        item["metadata"].get("namespace") == "shop"
        for item in rendered("overlays/job")
        if item["kind"] != "Namespace"
    )


def test_what_a_job_retries_is_what_the_exit_codes_say(objects: Objects) -> None:
    for item in objects:
        if item["kind"] in {"Job", "CronJob"}:
            assert policy_violations(item) == []


def test_disruptions_are_looked_at_before_codes() -> None:
    """A run that a drained node interrupts may have committed a part (40): the next one finishes it."""
    for item in rendered("overlays/job"):
        if item["kind"] in {"Job", "CronJob"}:
            spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
            first = spec["podFailurePolicy"]["rules"][0]
            assert first["action"] == "Ignore"
            assert first["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_a_job_ends_and_goes_away() -> None:
    job = of_kind(rendered("overlays/job"), "Job")["spec"]
    assert job["backoffLimit"] >= 1
    assert job["activeDeadlineSeconds"] >= 3600
    assert job["ttlSecondsAfterFinished"] >= 3600
    assert job["podReplacementPolicy"] == "Failed"


def references(item: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a pod refers to: kind and name."""
    pod = pod_of(item)
    if pod is None:
        return
    yield "ServiceAccount", pod["spec"]["serviceAccountName"]
    for volume in pod["spec"].get("volumes", []):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in containers_of(item):
        for source in container.get("envFrom", []):
            yield "ConfigMap", source["configMapRef"]["name"]


@pytest.mark.parametrize("name", ALL)
def test_everything_that_a_pod_refers_to_is_there(name: str) -> None:
    objects = rendered(name)
    around = rendered(ARGO_APPLICATIONS[name]) if name in ARGO_APPLICATIONS else []
    there = {(item["kind"], item["metadata"]["name"]) for item in [*objects, *around]}
    for item in objects:
        assert set(references(item)) - there == set(), item["metadata"]["name"]


@pytest.mark.parametrize("name", ALL)
def test_every_file_that_a_setting_names_is_mounted(name: str) -> None:
    objects = [*rendered(name), *rendered(ARGO_APPLICATIONS.get(name, name))]
    for item in rendered(name):
        volumes = {
            volume["name"]: volume for volume in (pod_of(item) or {"spec": {}})["spec"].get("volumes", [])
        }
        for container in containers_of(item):
            files = {
                f"{mount['mountPath']}/{key}"
                for mount in container.get("volumeMounts", [])
                for key in keys(objects, volumes[mount["name"]])
            }
            mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
            environment = environment_of(objects, container)
            named = {value for key, value in environment.items() if key.endswith("_FILE")}
            assert named <= files, item["metadata"]["name"]
            assert ADDRESS in named
            uses_backups = container.get("args", ["upgrade"])[0] in {"upgrade", "sidecar", "verify-backup"}
            if container["name"] == "migrator" and uses_backups:
                in_bucket = environment["MIGRATOR_BACKUP_URL"].startswith("s3://")
                assert in_bucket == ("AWS_SECRET_ACCESS_KEY_FILE" in environment)
                assert in_bucket != ("/backups" in mounts)
                assert "/tmp" in mounts  # the root filesystem is read-only
            else:
                assert "/backups" not in mounts  # those that only read the database hold no volume and no key
                assert "AWS_SECRET_ACCESS_KEY_FILE" not in environment


def keys(objects: Objects, volume: dict[str, Any]) -> list[str]:
    """Return the names of the files in a secret's volume."""
    wanted = volume.get("secret", {}).get("secretName")
    found = (item for item in objects if item["kind"] == "Secret" and item["metadata"]["name"] == wanted)
    return [key for item in found for key in item["data"]]


def environment_of(objects: Objects, container: dict[str, Any]) -> dict[str, str]:
    """Return the variables of a container that have a value."""
    sources = [source["configMapRef"]["name"] for source in container.get("envFrom", [])]
    maps = [
        item["data"]
        for item in objects
        if item["kind"] == "ConfigMap" and item["metadata"]["name"] in sources
    ]
    own = {
        variable["name"]: variable["value"] for variable in container.get("env", []) if "value" in variable
    }
    return {key: value for data in [*maps, own] for key, value in data.items()}


def test_a_new_address_rolls_the_pods() -> None:
    name = of_kind(rendered(""), "Secret")["metadata"]["name"]
    assert name.startswith("shop-database-")
    assert ("Secret", name) in set(references(of_kind(rendered(""), "Deployment")))


def migrator_of(objects: Objects, name: str) -> dict[str, Any]:
    """Return the container `migrator` of the object of a name."""
    (item,) = (item for item in objects if item["metadata"]["name"] == name and pod_of(item))
    (container,) = (container for container in containers_of(item) if container["name"] == "migrator")
    return container


def test_with_a_job_nobody_else_migrates() -> None:
    objects = rendered("overlays/job")
    assert migrator_of(objects, "shop-migrate")["args"] == ["upgrade", "head"]
    for name in ("shop-backend", "shop-worker"):
        assert migrator_of(objects, name)["args"][0] == "wait-for-current"
    assert migrator_of(objects, "shop-drift")["args"] == ["verify"]
    assert migrator_of(objects, "shop-verify-backup")["args"] == ["verify-backup", "latest"]


def test_a_sidecar_holds_the_backend_back_for_as_long_as_a_migration_takes() -> None:
    deployments = [item for item in rendered("overlays/sidecar") if item["kind"] == "Deployment"]
    (pod,) = (pod_of(item) for item in deployments if item["metadata"]["name"] == "shop-backend")
    assert pod is not None
    (sidecar,) = pod["spec"]["initContainers"]
    assert (sidecar["restartPolicy"], sidecar["args"]) == ("Always", ["sidecar"])
    startup, liveness = sidecar["startupProbe"], sidecar["livenessProbe"]
    assert startup["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    assert liveness["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert "readinessProbe" not in sidecar
    (port,) = sidecar["ports"]
    (listen,) = (item["value"] for item in sidecar["env"] if item["name"] == "MIGRATOR_SIDECAR_LISTEN")
    assert listen == f"0.0.0.0:{port['containerPort']}"


@pytest.mark.parametrize(
    ("mesh", "annotation"),
    [
        ("istio", "traffic.sidecar.istio.io/excludeOutboundPorts"),
        ("linkerd", "config.linkerd.io/skip-outbound-ports"),
    ],
)
def test_a_mesh_is_told_about_every_pod(tmp_path: Path, mesh: str, annotation: str) -> None:
    parts = [f"components/{name}" for name in ("job", "worker", "verify-backup", "drift", mesh)]
    objects = composed(tmp_path, "base", *parts)
    pods = {item["metadata"]["name"]: pod for item in objects if (pod := pod_of(item))}
    assert set(pods) == {"shop-backend", "shop-worker", "shop-migrate", "shop-verify-backup", "shop-drift"}
    for name, pod in pods.items():
        assert pod["metadata"]["annotations"].get(annotation) == "5432", name
    for item in objects:
        validate(item, VERSIONS[-1])


def selects(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    """Tell whether a NetworkPolicy is about a pod."""
    selector = policy["spec"]["podSelector"]
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    assert {item["operator"] for item in selector.get("matchExpressions", [])} <= {"In"}
    return exact and all(
        labels.get(item["key"]) in item["values"] for item in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize("name", [name for name in ALL if "NetworkPolicy" in _text(name)])
def test_each_pod_has_one_network_policy_that_lets_out_no_more_than_needed(name: str) -> None:
    objects = rendered(name)
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    for item in objects:
        pod = pod_of(item)
        if pod is None:
            continue
        (policy,) = (policy for policy in policies if selects(policy, pod["metadata"]["labels"]))
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
        waits_only = item["metadata"]["name"] == "shop-worker"  # nothing in it needs a bucket
        assert ports == ({53, 5432} if waits_only else {53, 5432, 443})
        incoming = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert incoming == ({8000, 8086} if item["metadata"]["name"] == "shop-backend" else set())


def test_the_policy_of_migrators_own_pods_is_about_no_other_pod() -> None:
    """What a user's container may reach is for its owner to say, in a file of its own."""
    objects = rendered("overlays/job")
    (policy,) = (
        item
        for item in objects
        if (item["kind"], item["metadata"]["name"]) == ("NetworkPolicy", "shop-migrator")
    )
    pods = {item["metadata"]["name"]: item for item in objects if pod_of(item)}
    about = {name for name, item in pods.items() if selects(policy, labels_of(item))}
    assert about == {"shop-migrate", "shop-verify-backup", "shop-drift"}
    assert {container["name"] for name in about for container in containers_of(pods[name])} == {"migrator"}


def labels_of(item: dict[str, Any]) -> dict[str, str]:
    """Return the labels of an object's pods."""
    pod = pod_of(item)
    assert pod is not None
    return dict(pod["metadata"]["labels"])


def test_a_bucket_is_let_through_over_ipv6_too_and_a_clouds_metadata_over_neither() -> None:
    metadata = {"0.0.0.0/0": ["169.254.169.254/32"], "::/0": ["fd00:ec2::254/128"]}
    for item in rendered("overlays/job-s3"):
        if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] != "shop-worker":
            (rule,) = (rule for rule in item["spec"]["egress"] if rule["ports"][0]["port"] == 443)
            blocks = {peer["ipBlock"]["cidr"]: peer["ipBlock"]["except"] for peer in rule["to"]}
            assert blocks == metadata
            for network, addresses in blocks.items():  # the API's own demand, which no schema holds
                for address in addresses:
                    assert ipaddress.ip_address(address.split("/")[0]) in ipaddress.ip_network(network)


def test_argo_cd_migrates_before_and_cleans_up_after() -> None:
    objects = rendered("overlays/argocd-expand-contract")
    hooks = {
        item["metadata"]["name"]: item["metadata"]["annotations"]["argocd.argoproj.io/hook"]
        for item in objects
        if item["kind"] == "Job"
    }
    assert hooks == {"shop-migrate": "PreSync", "shop-contract": "PostSync"}
    assert migrator_of(objects, "shop-migrate")["args"] == ["upgrade", "expand@head"]
    assert migrator_of(objects, "shop-contract")["args"] == ["upgrade", "heads"]
    assert not pod_of(of_kind(objects, "Deployment"))["spec"].get("initContainers")  # type: ignore[index]
    for item in objects:
        if item["kind"] == "Job":  # Argo CD would take one that is gone for a difference
            assert "ttlSecondsAfterFinished" not in item["spec"]
            policy = item["metadata"]["annotations"]["argocd.argoproj.io/hook-delete-policy"]
            assert policy == "BeforeHookCreation"


def test_argo_cd_never_deletes_the_backups() -> None:
    claim = of_kind(rendered("overlays/argocd-foundation"), "PersistentVolumeClaim")
    options = claim["metadata"]["annotations"]["argocd.argoproj.io/sync-options"]
    assert set(options.split(",")) == {"Prune=false", "Delete=false"}


@pytest.mark.parametrize("name", [name for name in ALL if name not in {"overlays/argocd-foundation"}])
def test_time_to_roll_back_is_given(name: str) -> None:
    for item in rendered(name):
        pod = pod_of(item)
        makes_changes = [
            container
            for container in containers_of(item)
            if container["name"] == "migrator"
            and container.get("args", ["upgrade"])[0] in {"upgrade", "sidecar"}
        ]
        if pod and makes_changes:
            assert pod["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_overlay_of_the_documentation_builds(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "howto" / "kubernetes" / "README.md").read_text()
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "Kustomization" in text)
    shutil.copytree(K8S, tmp_path / "migrator" / "k8s")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(block)
    (mine / "database-url.txt").write_text("postgresql://shop@elsewhere/shop")
    for name in ("access-key-id", "secret-access-key"):
        (mine / name).write_text("mine")

    objects = documents(kustomize(mine))

    for item in objects:
        validate(item, VERSIONS[-1])
    secret = next(item for item in objects if item["metadata"]["name"].startswith("shop-database"))
    assert base64.b64decode(secret["data"]["url"]) == b"postgresql://shop@elsewhere/shop"
    keys = next(item for item in objects if item["metadata"]["name"].startswith("shop-backups"))
    assert {base64.b64decode(value) for value in keys["data"].values()} == {b"mine"}
    images = {container["image"] for item in objects for container in containers_of(item)}
    assert images == {"registry.example/shop-migrations:1.4.2", "registry.example/shop-backend:1.4.2"}
    settings = of_kind(objects, "ConfigMap")["data"]
    assert settings["MIGRATOR_BACKUP_URL"] == "s3://your-bucket/shop"
    assert settings["MIGRATOR_LOCK_TIMEOUT"] == "3s"
    assert settings["MIGRATOR_DATABASE_URL_FILE"] == ADDRESS
    assert migrator_of(objects, "shop-migrate")["image"] == "registry.example/shop-migrations:1.4.2"
    there = {(item["kind"], item["metadata"]["name"]) for item in objects}
    assert all(set(references(item)) <= there for item in objects)


def test_a_deployment_of_ones_own_takes_the_foundation_and_the_buckets_components(tmp_path: Path) -> None:
    own = (K8S / "backend" / "deployment.yaml").read_text().replace("shop-backend", "api")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "deployment.yaml").write_text(own)
    (tmp_path / "own" / "kustomization.yaml").write_text("resources: [deployment.yaml]\n")
    shutil.copytree(K8S, tmp_path / "k8s")
    parts = ("s3-identity", "s3-key", "drift", "namespace")
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [k8s/foundation, own]\n"
        f"components: [{', '.join(f'k8s/components/{name}' for name in parts)}]\n"
        "secretGenerator: [{name: shop-backups, literals: [access-key-id=mine, secret-access-key=mine]}]\n"
    )
    objects = documents(kustomize(tmp_path))
    there = {(item["kind"], item["metadata"]["name"]) for item in objects}
    assert ("Deployment", "api") in there
    assert all(set(references(item)) <= there for item in objects)
    mounted = {mount["mountPath"] for mount in migrator_of(objects, "api")["volumeMounts"]}
    assert "/etc/shop-backups" in mounted
    assert "/backups" not in mounted


def test_the_key_of_a_shipped_overlay_is_replaced_by_whoever_builds_on_it(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [k8s/overlays/job-s3]\n"
        "secretGenerator: [{name: shop-backups, behavior: replace, literals: [access-key-id=mine]}]\n"
    )
    objects = documents(kustomize(tmp_path))
    (secret,) = (item for item in objects if item["metadata"]["name"].startswith("shop-backups"))
    assert secret["data"] == {"access-key-id": base64.b64encode(b"mine").decode()}
    assert secret["metadata"]["namespace"] == "shop"
    assert f"'secretName': '{secret['metadata']['name']}'" in str(objects)


def test_the_documentation_names_every_overlay_and_component() -> None:
    page = (ROOT / "docs" / "howto" / "kubernetes" / "README.md").read_text()
    assert [name for name in OVERLAYS if f"overlays/{name}`" not in page and f"`{name}`" not in page] == []
    assert [name for name in COMPONENTS if f"`{name}`" not in page] == []


def test_the_documented_figures_are_the_measured_ones() -> None:
    page = (ROOT / "docs" / "reference" / "memory.md").read_text()
    measured = (ROOT / "bench" / "results" / "memory.md").read_text()
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert "\n".join(rows) in page
    assert all(row.endswith("| no |") for row in rows[2:])
    limits = {
        container["resources"]["limits"]["memory"]
        for item in rendered("overlays/job")
        for container in containers_of(item)
        if container["name"] == "migrator" and container["args"][0] in {"upgrade", "verify-backup"}
    }
    assert {f"limit of {limit} and no swap" in measured for limit in limits} == {True}
