"""Every rendering is valid and restricted; hooks are in order; volumes with backups are kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.chart.checks import BACKUPS, EXTRAS, MATRIX, MODES, check, jobs, of
from tests.support.helm import CHART, LEAST, Helm, Refused, merged
from tests.support.kubernetes import VERSIONS, containers_of, of_kind, pod_of

EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))
OPENSHIFT = CHART / "ci" / "openshift-values.yaml"


@pytest.mark.parametrize("name", MATRIX)
def test_every_rendering_is_valid_and_restricted(name: str, helm: Helm) -> None:
    objects = helm.template(MATRIX[name])
    check(objects)
    expected = {"job": 1, "hook": 1, "argocd": 1, "none": 0}[MATRIX[name]["mode"]] + ("both" in name)
    assert len(list(of(objects, "Job"))) == expected
    assert len(list(of(objects, "CronJob"))) == 2 * ("watched" in name)
    assert len(list(of(objects, "PersistentVolumeClaim"))) == ("-made-" in name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_passes_the_linter_and_installs_on_the_newest_versions(path: Path, helm: Helm) -> None:
    helm.run("lint", "--strict", str(CHART), "-f", str(path))
    texts = {helm.text(path, "--kube-version", f"{version}.0") for version in VERSIONS}
    assert len(texts) == 1
    objects = helm.template(path)
    if path == OPENSHIFT:  # it hands a secret to env.py by a variable, which a pod of ours alone would not
        for item in jobs(objects):
            for container in containers_of(item):
                container["env"] = [one for one in container["env"] if one["name"] != "SHOP_DB_PASSWORD"]
        check([item for item in objects if item["kind"] != "Pod"])
    else:
        check(objects)


def test_an_old_kubernetes_is_refused(helm: Helm) -> None:
    with pytest.raises(Refused, match="kubeVersion"):
        helm.template(LEAST, "--kube-version", "1.30.0")


def test_every_example_is_in_the_readme() -> None:
    page = (CHART / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 5
    assert [path.name for path in EXAMPLES if f"(ci/{path.name})" not in page] == []


# -- order ------------------------------------------------------------------------------------------------


def annotations_of(item: dict[str, Any]) -> dict[str, str]:
    """Return an object's annotations."""
    return dict(item["metadata"].get("annotations", {}))


def two(objects: list[dict[str, Any]], kind: str) -> list[dict[str, str]]:
    """Return the annotations of the release's object of a kind, and of the hook's, whose names differ."""
    ours, hooks = of(objects, kind)
    assert hooks["metadata"]["name"] == f"{ours['metadata']['name']}-hook"
    (job, *_) = of(objects, "Job")
    pod = pod_of(job)
    assert pod is not None
    if kind == "ServiceAccount":
        assert pod["spec"]["serviceAccountName"] == hooks["metadata"]["name"]
    else:
        assert hooks["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert {**hooks["spec"], "podSelector": None} == {**ours["spec"], "podSelector": None}
    return [annotations_of(ours), annotations_of(hooks)]


@pytest.mark.parametrize("mode", ["hook", "hook-late"])
def test_what_a_hook_needs_is_there_before_it(mode: str, helm: Helm) -> None:
    objects = helm.template(merged(LEAST, MODES[mode], BACKUPS["claim"]))
    job = annotations_of(of_kind(objects, "Job"))
    for kind in ("ServiceAccount", "NetworkPolicy"):
        ours, needed = two(objects, kind)
        assert not any(name.startswith("helm.sh/") for name in ours)
        assert needed["helm.sh/hook"] == job["helm.sh/hook"]
        assert int(needed["helm.sh/hook-weight"]) < int(job["helm.sh/hook-weight"])
    assert job["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_argo_cd_expands_before_the_sync_and_contracts_after_it(helm: Helm) -> None:
    objects = helm.template(merged(LEAST, MODES["argocd-both"], BACKUPS["identity"]))
    hooks = {annotations_of(item)["argocd.argoproj.io/hook"]: item for item in of(objects, "Job")}
    assert [item["args"] for item in containers_of(hooks["PreSync"])] == [["upgrade", "8b20de"]]
    assert [item["args"] for item in containers_of(hooks["PostSync"])] == [["upgrade", "head"]]
    wave = int(annotations_of(hooks["PreSync"])["argocd.argoproj.io/sync-wave"])
    for kind in ("ServiceAccount", "NetworkPolicy"):
        ours, needed = two(objects, kind)
        assert ours == {}
        assert needed["argocd.argoproj.io/hook"] == "PreSync"
        assert int(needed["argocd.argoproj.io/sync-wave"]) < wave
    assert "helm.sh/hook" not in str(objects)


@pytest.mark.parametrize("name", [name for name in MATRIX if "-made-" in name])
def test_a_volume_with_backups_is_never_a_hook_and_outlives_the_release(name: str, helm: Helm) -> None:
    claim = annotations_of(of_kind(helm.template(MATRIX[name]), "PersistentVolumeClaim"))
    assert claim == {
        "helm.sh/resource-policy": "keep",
        "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
    }


def test_a_job_has_another_name_when_it_runs_something_else(helm: Helm) -> None:
    def name(*layers: Mapping[str, Any]) -> str:
        return str(of_kind(helm.template(merged(LEAST, *layers)), "Job")["metadata"]["name"])

    same, other = name(), name({"image": {"tag": "1.4.3"}})
    assert name() == same != other
    assert len({same, other, name({"job": {"args": ["downgrade", "-1"]}}), name({"backoffLimit": 3})}) == 4
    assert name({"commonLabels": {"team": "shop"}}) == same


def test_the_network_policy_is_for_all_of_the_charts_pods_and_lets_nobody_in(helm: Helm) -> None:
    objects = helm.template(merged(LEAST, BACKUPS["identity"], EXTRAS["watched"]))
    policy = of_kind(objects, "NetworkPolicy")["spec"]
    wanted = policy["podSelector"]["matchLabels"].items()
    pods = [pod for item in objects if (pod := pod_of(item))]
    assert len(pods) == 4
    assert all(wanted <= pod["metadata"]["labels"].items() for pod in pods)
    assert policy["ingress"] == []
    ports = [(rule.get("to"), [port["port"] for port in rule["ports"]]) for rule in policy["egress"]]
    assert [port["protocol"] for port in policy["egress"][0]["ports"]] == ["UDP", "TCP"]
    assert ports == [(None, [53, 53]), ([{"ipBlock": {"cidr": "10.1.2.3/32"}}], [5432]), (None, [443])]


def test_who_only_reads_has_its_own_address_and_no_backups(helm: Helm) -> None:
    objects = helm.template(merged(LEAST, BACKUPS["keys"], EXTRAS["watched"]))
    drift = next(item for item in of(objects, "CronJob") if item["metadata"]["name"].endswith("drift"))
    pod = pod_of(drift)
    assert pod is not None
    secrets = {volume["secret"]["secretName"] for volume in pod["spec"]["volumes"]}
    assert secrets == {"shop-reader", "certificates"}
    (container,) = containers_of(drift)
    assert not [
        one["name"] for one in container["env"] if one["name"].startswith(("AWS_", "MIGRATOR_BACKUP"))
    ]
    assert "MIGRATOR_DIRECT_URL_FILE" not in {one["name"] for one in container["env"]}
