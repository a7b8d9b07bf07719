"""What cannot work, and every secret in plain, is refused before anything reaches a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.chart.checks import check
from tests.support.helm import LEAST, Helm, Refused, merged

ADDRESS = "postgresql://shop:planted@postgres/shop"
REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "an unknown key": ({"imagee": {}}, "imagee"),
    "an unknown key below": ({"backups": {"s3": {"bucket": "x"}}}, "bucket"),
    "an unknown mode": ({"mode": "cron"}, "/mode"),
    "no image": ({"image": {"repository": ""}}, "/image/repository"),
    "neither tag nor digest": ({"image": {"tag": ""}}, "/image"),
    "a tag that is a number": ({"image": {"tag": 1.4}}, "/image/tag"),
    "a short digest": ({"image": {"digest": "sha256:abc"}}, "/image/digest"),
    "no secret": ({"database": {"existingSecret": ""}}, "/database/existingSecret"),
    "an address as a value": ({"database": {"url": ADDRESS}}, "/database"),
    "an address in the secret's place": ({"database": {"existingSecret": ADDRESS}}, "existingSecret"),
    "a misspelt setting": ({"settings": {"MIGRATOR_LOCK_TIMOUT": "3s"}}, "MIGRATOR_LOCK_TIMOUT"),
    "an address among the settings": (
        {"settings": {"MIGRATOR_DATABASE_URL": ADDRESS}},
        "MIGRATOR_DATABASE_URL",
    ),
    "a setting with a value of its own": ({"settings": {"MIGRATOR_BACKUP_URL": "file:///x"}}, "BACKUP_URL"),
    "a setting that YAML reads as false": ({"settings": {"MIGRATOR_BACKUP": False}}, "MIGRATOR_BACKUP"),
    "a duration without a unit that exists": (
        {"settings": {"MIGRATOR_LOCK_TIMEOUT": "3 min"}},
        "LOCK_TIMEOUT",
    ),
    "a password in a variable": ({"extraEnv": [{"name": "PGPASSWORD", "value": "planted"}]}, "/extraEnv/0"),
    "an address in a variable": ({"extraEnv": [{"name": "SHOP", "value": ADDRESS}]}, "/extraEnv/0"),
    "a label that the pods are found by": (
        {"commonLabels": {"app.kubernetes.io/name": "shop"}},
        "app.kubernetes.io/name",
    ),
    "a label that the chart sets from the tag": (
        {"commonLabels": {"app.kubernetes.io/version": "1"}},
        "app.kubernetes.io/version",
    ),
    "another component": (
        {"podLabels": {"app.kubernetes.io/component": "web"}},
        "app.kubernetes.io/component",
    ),
    "another release": ({"podLabels": {"app.kubernetes.io/instance": "web"}}, "app.kubernetes.io/instance"),
    "another tool": ({"podLabels": {"app.kubernetes.io/managed-by": "me"}}, "app.kubernetes.io/managed-by"),
    "a label of Helm's": ({"podLabels": {"helm.sh/chart": "x"}}, "helm.sh/chart"),
    "an account that is a hook": (
        {"serviceAccount": {"annotations": {"helm.sh/hook-weight": "0"}}},
        "helm.sh/hook-weight",
    ),
    "a pod that is another hook": ({"podAnnotations": {"helm.sh/hook": "pre-install"}}, "helm.sh/hook"),
    "an account that is another hook of Argo CD's": (
        {
            "mode": "argocd",
            "backups": {"to": "none"},
            "serviceAccount": {"annotations": {"argocd.argoproj.io/sync-wave": "5"}},
        },
        "the chart sets argocd.argoproj.io/sync-wave",
    ),
    "the address's file twice": (
        {"extraEnv": [{"name": "MIGRATOR_DATABASE_URL_FILE", "value": "/etc/x"}]},
        "extraEnv: MIGRATOR_DATABASE_URL_FILE is there already",
    ),
    "the address beside its file": (
        {"extraEnv": [{"name": "MIGRATOR_DATABASE_URL", "valueFrom": {"secretKeyRef": {}}}]},
        "extraEnv: MIGRATOR_DATABASE_URL is there already",
    ),
    "the backups' place twice": (
        {"extraEnv": [{"name": "MIGRATOR_BACKUP_URL", "value": "file:///x"}]},
        "extraEnv: MIGRATOR_BACKUP_URL is there already",
    ),
    "a setting twice": (
        {
            "settings": {"MIGRATOR_LOCK_TIMEOUT": "3s"},
            "extraEnv": [{"name": "MIGRATOR_LOCK_TIMEOUT", "value": "4s"}],
        },
        "extraEnv: MIGRATOR_LOCK_TIMEOUT is there already",
    ),
    "a variable twice": (
        {"extraEnv": [{"name": "SHOP", "value": "a"}, {"name": "SHOP", "value": "b"}]},
        "extraEnv: SHOP is there already",
    ),
    "a volume of the chart's": (
        {"extraVolumes": [{"name": "migrator-scratch", "emptyDir": {}}]},
        "extraVolumes: migrator-scratch is there already",
    ),
    "a volume twice": (
        {"extraVolumes": [{"name": "x", "emptyDir": {}}, {"name": "x", "emptyDir": {}}]},
        "extraVolumes: x is there already",
    ),
    "a mount on the chart's": (
        {
            "extraVolumes": [{"name": "x", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "x", "mountPath": "/tmp/"}],
        },
        "extraVolumeMounts: /tmp/ is there already",
    ),
    "a folder of the node": ({"extraVolumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "hostPath"),
    "root": ({"podSecurity": {"runAsUser": 0}}, "/podSecurity/runAsUser"),
    "a password in the bucket's address": ({"backups": {"s3": {"url": "s3://a:b@c/d"}}}, "/backups/s3/url"),
    "a schedule of four fields": ({"drift": {"schedule": "1 2 3 4"}}, "/drift/schedule"),
    "a size without a unit that exists": ({"backups": {"claim": {"size": "5GB"}}}, "/backups/claim/size"),
    "a negative number": ({"backoffLimit": -1}, "/backoffLimit"),
    "nothing to run": ({"job": {"args": []}}, "/job/args"),
    "a privileged port": ({"sidecar": {"port": 80}}, "/sidecar/port"),
    "a hook without a volume": ({"mode": "hook"}, "backups.claim.existingClaim must name one"),
    "a sync without a volume": ({"mode": "argocd"}, "backups.claim.existingClaim must name one"),
    "a bucket without an address": ({"backups": {"to": "s3"}}, "backups.s3.url"),
    "a bucket's server behind a port that is shut": (
        {"backups": {"to": "s3", "s3": {"url": "s3://b/x", "endpoint": "https://minio:9000"}}},
        "networkPolicy.s3.ports does not let pods reach port 9000",
    ),
    "the same without TLS": (
        {"backups": {"to": "s3", "s3": {"url": "s3://b/x", "endpoint": "http://minio/"}}},
        "does not let pods reach port 80 ",
    ),
    "AWS behind a port that is shut": (
        {
            "backups": {"to": "s3", "s3": {"url": "s3://b/x"}},
            "networkPolicy": {"s3": {"ports": [9000]}},
        },
        "does not let pods reach port 443 ",
    ),
    "backups that are not made": (
        {"backups": {"to": "none"}, "verifyBackup": {"enabled": True}},
        "backups.to is none",
    ),
    "backups switched off twice": (
        {"backups": {"to": "none"}, "settings": {"MIGRATOR_BACKUP": "always"}},
        "take MIGRATOR_BACKUP out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str, helm: Helm) -> None:
    values, message = REFUSED[name]
    with pytest.raises(Refused, match=re.escape(message)):
        helm.template(merged(LEAST, values))


def test_without_values_it_says_which_are_missing(helm: Helm) -> None:
    with pytest.raises(Refused) as refused:
        helm.template({})
    assert "/image/repository" in str(refused.value)
    assert "/database/existingSecret" in str(refused.value)


def test_what_only_looks_alike_is_taken(helm: Helm) -> None:
    values = {
        "commonLabels": {"app.kubernetes.io/part-of": "shop", "team": "shop"},
        "podLabels": {"app.kubernetes.io/version": "1", "name": "shop"},
        "podAnnotations": {"sidecar.istio.io/inject": "false"},
        "serviceAccount": {
            "annotations": {"helm.sh/resource-policy": "keep", "argocd.argoproj.io/sync-wave": "1"}
        },
        "extraEnv": [{"name": "SHOP", "value": "a"}, {"name": "SHOP_FILE", "value": "/tmp/shop/b"}],
        "extraVolumes": [{"name": "shop", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "shop", "mountPath": "/tmp/shop"}],
    }
    check(helm.template(merged(LEAST, values)))


@pytest.mark.parametrize(
    ("endpoint", "ports"),
    [
        ("https://minio:9000", [9000]),
        ("https://minio:9000/base", [443, 9000]),
        ("http://minio", [80]),
        ("https://minio", [443, 9443]),
        ("https://[fd00::443]:9000", [9000]),
        ("https://[fd00::9000]", [443]),
        ("", [443]),
    ],
)
def test_a_bucket_behind_an_open_port_is_taken(endpoint: str, ports: list[int], helm: Helm) -> None:
    backups = {"to": "s3", "s3": {"url": "s3://b/x", "endpoint": endpoint}}
    helm.template(merged(LEAST, {"backups": backups, "networkPolicy": {"s3": {"ports": ports}}}))


def test_ports_do_not_matter_without_a_network_policy(helm: Helm) -> None:
    backups = {"to": "s3", "s3": {"url": "s3://b/x", "endpoint": "https://minio:9000"}}
    helm.template(merged(LEAST, {"backups": backups, "networkPolicy": {"enabled": False}}))
