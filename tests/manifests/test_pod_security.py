"""The rules that manifests and the chart are held to: a good pod passes, and each rule can fail."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate
import pytest

from migrator.outcome import ExitCode
from tests.support import kubernetes
from tests.support.kubernetes import (
    VERSIONS,
    hardening_violations,
    policy_violations,
    restricted_violations,
    validate,
)

GOOD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "good", "annotations": {"team": "shop"}},
    "spec": {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [],
        "containers": [
            {
                "name": "migrator",
                "image": "migrator",
                "env": [{"name": "MIGRATOR_LOG_FORMAT", "value": "json"}],
                "resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "128Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    },
}
POD, FIRST = ("spec",), ("spec", "containers", 0)
POD_CONTEXT, CONTEXT = (*POD, "securityContext"), (*FIRST, "securityContext")
BROKEN = {
    "hostProcess": ((*CONTEXT, "windowsOptions"), {"hostProcess": True}),
    "hostNetwork": ((*POD, "hostNetwork"), True),
    "hostPID": ((*POD, "hostPID"), True),
    "hostIPC": ((*POD, "hostIPC"), True),
    "privileged": ((*CONTEXT, "privileged"), True),
    "does not drop ALL": ((*CONTEXT, "capabilities"), {"drop": ["NET_RAW"]}),
    "adds the capability SYS_ADMIN": ((*CONTEXT, "capabilities"), {"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
    "volume host: hostPath": ((*POD, "volumes"), [{"name": "host", "hostPath": {"path": "/"}}]),
    "volume old: nfs": ((*POD, "volumes"), [{"name": "old", "nfs": {"server": "x", "path": "/"}}]),
    "hostPort 80": ((*FIRST, "ports"), [{"containerPort": 80, "hostPort": 80}]),
    "livenessProbe names a host": ((*FIRST, "livenessProbe"), {"httpGet": {"port": 80, "host": "10.0.0.1"}}),
    "preStop names a host": ((*FIRST, "lifecycle"), {"preStop": {"tcpSocket": {"port": 1, "host": "x"}}}),
    "AppArmor Unconfined": ((*POD_CONTEXT, "appArmorProfile"), {"type": "Unconfined"}),
    "migrator: AppArmor unconfined": (
        ("metadata", "annotations"),
        {"container.apparmor.security.beta.kubernetes.io/migrator": "unconfined"},
    ),
    "pod: SELinux": ((*POD_CONTEXT, "seLinuxOptions"), {"type": "spc_t"}),
    "migrator: SELinux": ((*CONTEXT, "seLinuxOptions"), {"user": "system_u"}),
    "procMount Unmasked": ((*CONTEXT, "procMount"), "Unmasked"),
    "sysctl kernel.msgmax": ((*POD_CONTEXT, "sysctls"), [{"name": "kernel.msgmax", "value": "1"}]),
    "allowPrivilegeEscalation": ((*CONTEXT, "allowPrivilegeEscalation"), None),
    "runAsNonRoot": ((*POD_CONTEXT, "runAsNonRoot"), None),
    "migrator: runAsNonRoot": ((*CONTEXT, "runAsNonRoot"), False),
    "pod: runAsUser 0": ((*POD_CONTEXT, "runAsUser"), 0),
    "migrator: runAsUser 0": ((*CONTEXT, "runAsUser"), 0),
    "seccomp None": ((*POD_CONTEXT, "seccompProfile"), {}),
    "pod: seccomp Unconfined": ((*POD_CONTEXT, "seccompProfile"), {"type": "Unconfined"}),
    "migrator: seccomp Unconfined": ((*CONTEXT, "seccompProfile"), {"type": "Unconfined"}),
}
LACKING = {
    "service account token": ((*POD, "automountServiceAccountToken"), None),
    "root filesystem": ((*CONTEXT, "readOnlyRootFilesystem"), False),
    "no limits of memory": ((*FIRST, "resources"), {"requests": {"memory": "1Mi"}}),
    "no requests of memory": ((*FIRST, "resources"), {"limits": {"memory": "1Mi"}}),
    "a whole secret": ((*FIRST, "envFrom"), [{"secretRef": {"name": "shop"}}]),
    "the secret DATABASE_URL": (
        (*FIRST, "env"),
        [{"name": "DATABASE_URL", "valueFrom": {"secretKeyRef": {"name": "shop", "key": "url"}}}],
    ),
}


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Return the good pod with one thing different; None takes it away."""
    pod = copy.deepcopy(GOOD)
    place: Any = pod
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return pod


def in_every_kind(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a pod as such, and as the template of the kinds that have one."""
    template = {"metadata": pod["metadata"], "spec": pod["spec"]}
    job = {"spec": {"template": template}}
    made = [{"kind": kind, "spec": {"template": template}} for kind in ("Deployment", "StatefulSet", "Job")]
    return [pod, *made, {"kind": "CronJob", "spec": {"jobTemplate": job}}]


def test_a_good_pod_passes() -> None:
    for document in in_every_kind(GOOD):
        assert restricted_violations(document) == []
        assert hardening_violations(document) == []
    assert restricted_violations({"kind": "Service", "spec": {}}) == []


@pytest.mark.parametrize("sentence", BROKEN)
def test_each_rule_of_the_profile_can_fail(sentence: str) -> None:
    for document in in_every_kind(changed(*BROKEN[sentence])):
        assert [found for found in restricted_violations(document) if sentence in found]


@pytest.mark.parametrize("kind", ["initContainers", "ephemeralContainers"])
def test_no_container_escapes_the_rules(kind: str) -> None:
    found = restricted_violations(changed((*POD, kind), [{"name": "other", "image": "x"}]))
    assert found == [
        "other: does not drop ALL capabilities",
        "other: allowPrivilegeEscalation is not false",
    ]


def test_a_container_may_say_what_its_pod_does_not() -> None:
    pod = changed(POD_CONTEXT, {})
    pod["spec"]["containers"][0]["securityContext"] |= {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "Localhost", "localhostProfile": "x"},
        "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
    }
    assert restricted_violations(pod) == []


@pytest.mark.parametrize("sentence", LACKING)
def test_each_rule_beyond_the_profile_can_fail(sentence: str) -> None:
    for document in in_every_kind(changed(*LACKING[sentence])):
        assert [found for found in hardening_violations(document) if sentence in found]


def test_the_three_newest_versions_are_checked() -> None:
    known = dict.fromkeys(kubernetes_validate.utils.all_versions())  # each is listed twice: strict, and not
    assert [version.removesuffix(".0") for version in known][-3:] == [*VERSIONS]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_field_is_an_error(version: str) -> None:
    validate(GOOD, version)
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationMessagePolice"):
        validate(changed((*FIRST, "terminationMessagePolice"), "File"), version)


def job(*rules: tuple[str, str, list[int]]) -> dict[str, Any]:
    """Return a Job with these rules about exit codes: action, operator, values."""
    made = [
        {
            "action": action,
            "onExitCodes": {"containerName": "migrator", "operator": operator, "values": values},
        }
        for action, operator, values in rules
    ]
    template = {"spec": {**GOOD["spec"], "restartPolicy": "Never"}}
    return {"kind": "Job", "spec": {"podFailurePolicy": {"rules": made}, "template": template}}


FINAL = [int(code) for code in kubernetes.FAILED_AT_ONCE]


def test_a_policy_that_follows_the_bands_passes() -> None:
    assert set(FINAL) == {10, *range(30, 44), 70}
    assert policy_violations(job(("FailJob", "In", FINAL))) == []


@pytest.mark.parametrize("code", FINAL)
def test_a_policy_that_forgets_a_code_is_found(code: int) -> None:
    found = policy_violations(job(("FailJob", "In", [value for value in FINAL if value != code])))
    assert found == [f"{code} ({ExitCode(code).name}) is tried again; that cannot help"]


@pytest.mark.parametrize("code", [20, 21, 22, 23, 24, 137, 143])
def test_a_policy_that_gives_up_too_early_is_found(code: int) -> None:
    found = policy_violations(job(("FailJob", "In", sorted([*FINAL, code]))))
    assert found == [f"{code} fails the Job; trying again can help"]


def test_what_the_api_server_would_refuse_is_found() -> None:
    refused = job(("FailJob", "In", [*reversed(FINAL)]))
    refused["spec"]["template"]["spec"] |= {"restartPolicy": "OnFailure", "containers": []}
    assert policy_violations(refused) == [
        "the values of a rule are in ascending order, each once, without 0",
        "a podFailurePolicy needs restartPolicy: Never",
        "there is no container migrator",
    ]


def test_the_first_rule_that_matches_counts() -> None:
    killed = [137, 143]
    retried = [20, 21, 22, 23, 24]
    rules = (("Ignore", "In", killed), ("Count", "In", retried), ("FailJob", "NotIn", killed))
    assert policy_violations(job(*rules)) == []
    assert len(policy_violations(job(*reversed(rules)))) == len(retried)
