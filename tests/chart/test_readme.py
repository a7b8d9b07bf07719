"""What the chart's page says about passwords, meshes and the drift CronJob, tried."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.chart.checks import BACKUPS, EXTRAS, check, of
from tests.support.helm import CHART, LEAST, Helm, Refused, merged
from tests.support.kubernetes import containers_of, of_kind, pod_of

PAGE = (CHART / "README.md").read_text(encoding="utf-8")


def values(about: str) -> dict[str, Any]:
    """Return the values in the page's only YAML block with a text."""
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if about in text)
    found = yaml.safe_load(block)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("mesh", "postgres", "namespace", "ports"),
    [
        ("istio", "traffic.sidecar.istio.io/excludeOutboundPorts", "istio-system", [15012]),
        ("linkerd", "config.linkerd.io/skip-outbound-ports", "linkerd", None),
    ],
)
def test_a_proxy_reaches_its_control_plane_and_leaves_postgres_alone(
    mesh: str, postgres: str, namespace: str, ports: list[int] | None, helm: Helm
) -> None:
    objects = helm.template(
        merged(LEAST, EXTRAS["watched"], values(f"{mesh}-system" if ports else "linkerd.io"))
    )
    check(objects)
    pods = [pod for item in objects if (pod := pod_of(item))]
    assert len(pods) == 4
    # The test's pod has them on the object itself; pod_of() returns metadata of a template, or of the pod.
    assert [pod["metadata"]["annotations"][postgres] for pod in pods] == ["5432"] * 4
    *_, rule = of_kind(objects, "NetworkPolicy")["spec"]["egress"]
    (peer,) = rule["to"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}
    assert ([port["port"] for port in rule["ports"]] if "ports" in rule else None) == ports


def test_the_page_says_what_a_restricted_namespace_makes_of_a_mesh() -> None:
    assert "`NET_ADMIN`" in PAGE
    assert "CNI plugin" in PAGE


# -- passwords --------------------------------------------------------------------------------------------

ADDRESS = "postgresql://shop:planted@postgres/shop"


@pytest.mark.parametrize(
    "given",
    [
        {"settings": {"MIGRATOR_BASELINE": ADDRESS}},
        {"extraEnv": [{"name": "SHOP", "value": ADDRESS}]},
        {"job": {"args": ["upgrade", ADDRESS]}},
        *(
            {"extraEnv": [{"name": f"A_{end}", "value": "x"}]}
            for end in ("PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY")
        ),
    ],
)
def test_the_two_forms_of_passwords_that_the_page_names_are_refused(
    given: dict[str, Any], helm: Helm
) -> None:
    with pytest.raises(Refused, match="'not' failed"):
        helm.template(merged(LEAST, given))


def test_those_that_it_says_are_not_recognised_are_not(helm: Helm) -> None:
    assert "`host=db password=...`, `-x password=...`" in PAGE
    plain = [{"name": "SHOP", "value": "host=db password=planted"}]
    objects = helm.template(
        merged(LEAST, {"extraEnv": plain, "job": {"args": ["-x", "password=planted", "upgrade", "head"]}})
    )
    (container,) = containers_of(of_kind(objects, "Job"))
    assert container["env"][-1] == plain[0]
    assert "password=planted" in container["args"]


def test_the_drift_job_only_verifies_and_the_page_says_what_that_sees(helm: Helm) -> None:
    objects = helm.template(merged(LEAST, BACKUPS["claim"], {"drift": {"enabled": True}}))
    (job,) = of(objects, "CronJob")
    assert [container["args"] for container in containers_of(job)] == [["verify"]]
    (row,) = (line for line in PAGE.splitlines() if line.startswith("| `drift.enabled`"))
    assert "a schema that differs from what the last run left" in row
