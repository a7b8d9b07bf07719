"""Another chart depends on ours, and puts migrator's containers into its own pods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from migrator.cli.catalogue import COMMANDS
from tests.chart.checks import BACKUPS, EXTRAS, MODES, check, check_pod, of
from tests.support.helm import LEAST, Helm, Refused, merged
from tests.support.kubernetes import (
    VERSIONS,
    containers_of,
    hardening_violations,
    of_kind,
    restricted_violations,
    validate,
)


@pytest.mark.parametrize("schema", ["initContainer", "sidecar", "waitForCurrent"])
@pytest.mark.parametrize("extras", ["plain", "watched", "bare"])
def test_another_chart_puts_them_into_its_pods(schema: str, extras: str, helm: Helm, parent: Path) -> None:
    values = {"schema": schema, "migrator": EXTRAS[extras]}
    if extras == "bare":
        values = {
            "schema": schema,
            "migrator": {"settings": {"MIGRATOR_LOCK_TIMEOUT": "1s"}, "enabled": True},
        }
    objects = helm.template(values, chart=parent)
    deployment = of_kind(objects, "Deployment")
    deployment["metadata"]["namespace"] = "default"
    for version in VERSIONS:
        validate(deployment, version)
    assert restricted_violations(deployment) == hardening_violations(deployment) == []
    assert not list(of(objects, "Job"))
    first, backend = containers_of(deployment)
    assert backend["name"] == "backend"
    if schema != "sidecar" or "sidecar" in COMMANDS:
        check_pod(deployment)
    check_settings_names(first)
    # The container is restricted by itself, whatever the pod around it says.
    del deployment["spec"]["template"]["spec"]["securityContext"]
    assert not [
        text for text in restricted_violations(deployment) if "backend" not in text and "pod" not in text
    ]


def check_settings_names(container: dict[str, Any]) -> None:
    """Assert that the container of a kind is the kind's."""
    arguments = container["args"][0]
    assert (container["name"], arguments) in {
        ("migrator", "upgrade"),
        ("migrator", "sidecar"),
        ("wait-for-schema", "wait-for-current"),
    }


def test_the_sidecar_holds_the_backend_back(helm: Helm, parent: Path) -> None:
    deployment = of_kind(helm.template({"schema": "sidecar"}, chart=parent), "Deployment")
    sidecar, _ = containers_of(deployment)
    assert sidecar["restartPolicy"] == "Always"
    environment = {item["name"]: item["value"] for item in sidecar["env"]}
    (port,) = sidecar["ports"]
    assert environment["MIGRATOR_SIDECAR_LISTEN"] == f"0.0.0.0:{port['containerPort']}"
    assert sidecar["startupProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}
    assert sidecar["livenessProbe"]["httpGet"] == {"path": "/livez", "port": port["name"]}
    assert sidecar["startupProbe"]["periodSeconds"] * sidecar["startupProbe"]["failureThreshold"] == 14400
    assert "readinessProbe" not in sidecar


@pytest.mark.parametrize("schema", ["initContainer", "sidecar", "waitForCurrent"])
def test_pods_do_not_wait_for_a_job_that_waits_for_them(schema: str, helm: Helm, parent: Path) -> None:
    both = merged(MODES["argocd-both"], BACKUPS["identity"])
    with pytest.raises(Refused, match=rf"migrator\.{schema} goes to the heads.*postSync"):
        helm.template({"schema": schema, "migrator": both}, chart=parent)


def test_two_databases_are_two_dependencies(helm: Helm, parent: Path) -> None:
    chart = yaml.safe_load((parent / "Chart.yaml").read_text())
    (one,) = chart["dependencies"]
    chart["dependencies"] = [{**one, "alias": "orders"}, {**one, "alias": "users"}]
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    (parent / "templates" / "deployment.yaml").unlink()
    helm.run("dependency", "update", str(parent))
    databases = {
        alias: merged(LEAST, {"mode": "job", "database": {"existingSecret": alias}})
        for alias in ("orders", "users")
    }
    objects = helm.template(databases, chart=parent)
    check(objects)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))
    assert {name.rpartition("-")[0] for kind, name in names if kind == "Job"} == {"shop-orders", "shop-users"}


@pytest.mark.parametrize("schema", ["initContainer", "sidecar", "waitForCurrent"])
def test_its_pods_have_the_platforms_identity(schema: str, helm: Helm, parent: Path) -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/shop-backups"}
    ours = merged(BACKUPS["identity"], {"serviceAccount": {"annotations": role}})
    objects = helm.template({"schema": schema, "migrator": ours}, chart=parent)
    account = of_kind(objects, "ServiceAccount")["metadata"]
    pod = of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    assert (account["annotations"], account["name"]) == (role, pod["serviceAccountName"])
    page = (parent.parent / "migrator" / "README.md").read_text(encoding="utf-8")
    line = 'serviceAccountName: {{ include "migrator.serviceAccountName" .Subcharts.migrator | quote }}'
    assert line in page
    assert line in (parent / "templates" / "deployment.yaml").read_text(encoding="utf-8")


def test_its_pods_may_have_an_account_of_their_own(helm: Helm, parent: Path) -> None:
    own = {"serviceAccount": {"create": False, "name": "backend"}}
    objects = helm.template({"migrator": own}, chart=parent)
    assert of_kind(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "backend"
    assert not list(of(objects, "ServiceAccount"))
