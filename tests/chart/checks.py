"""The matrix of values, and what holds for every rendering of it."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from migrator.cli.parser import make_parser
from migrator.config import settings
from tests.support.helm import CHART, LEAST, merged
from tests.support.kubernetes import (
    VERSIONS,
    containers_of,
    hardening_violations,
    pod_of,
    policy_violations,
    restricted_violations,
    validate,
)

MODES: Mapping[str, Mapping[str, Any]] = {
    "job": {"mode": "job"},
    "hook": {"mode": "hook"},
    "hook-late": {
        "mode": "hook",
        "hook": {"weight": 20, "events": ["pre-upgrade"], "args": ["upgrade", "+1"]},
    },
    "argocd": {"mode": "argocd"},
    "argocd-both": {
        "mode": "argocd",
        "argocd": {"preSync": {"args": ["upgrade", "8b20de"]}, "postSync": {"args": ["upgrade", "head"]}},
    },
    "none": {"mode": "none"},
}
BACKUPS: Mapping[str, Mapping[str, Any]] = {
    "made": {"backups": {"to": "claim"}},
    "claim": {"backups": {"claim": {"existingClaim": "shop-backups"}}},
    "identity": {"backups": {"to": "s3", "s3": {"url": "s3://backups/shop"}}},
    "keys": {
        "backups": {"to": "s3", "s3": {"url": "s3://backups/shop", "existingSecret": "keys", "region": "eu"}}
    },
    "no-backups": {"backups": {"to": "none"}},
}
EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "watched": {
        "verifyBackup": {"enabled": True, "identitySecret": "identity", "timeZone": "Etc/UTC"},
        "drift": {"enabled": True, "databaseSecret": "shop-reader"},
        "database": {"directKey": "direct", "certificatesSecret": "certificates"},
        "settings": {"MIGRATOR_LOCK_TIMEOUT": "3s", "MIGRATOR_WAIT_TIMEOUT": 1000000, "MIGRATOR_RETRY": True},
        "networkPolicy": {"postgres": {"to": [{"ipBlock": {"cidr": "10.1.2.3/32"}}]}},
    },
    "bare": {
        "podSecurity": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
        "serviceAccount": {"create": False},
        "networkPolicy": {"enabled": False},
        "activeDeadlineSeconds": None,
        "fullnameOverride": "a-name-that-is-as-long-as-names-may-be",
    },
}
MATRIX = {
    "-".join(names): merged(LEAST, MODES[names[0]], BACKUPS[names[1]], EXTRAS[names[2]])
    for names in itertools.product(MODES, BACKUPS, EXTRAS)
    # What is refused, and tested as such below.
    if not (names[1] == "made" and names[0] not in {"job", "none"})
    and not (names[1] == "no-backups" and names[2] == "watched")
}


def jobs(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the Jobs and CronJobs."""
    return [item for item in objects if item["kind"] in {"Job", "CronJob"}]


def check(objects: list[dict[str, Any]]) -> None:
    """Assert what holds for every rendering."""
    for item in objects:
        place = f"{item['kind']} {item['metadata']['name']}"
        valid(json.dumps(item))
        assert restricted_violations(item) == [], place
        assert hardening_violations(item) == [], place
        assert item["metadata"]["namespace"] == "default", place
        longest = {"CronJob": 52, "Job": 63, "Pod": 63}.get(item["kind"], 253)
        assert len(item["metadata"]["name"]) <= longest, place
        if pod_of(item):
            check_pod(item)
    for job in jobs(objects):
        assert policy_violations(job) == []
    accounts = {item["metadata"]["name"] for item in objects if item["kind"] == "ServiceAccount"} | {
        "default"
    }
    assert {pod["spec"]["serviceAccountName"] for pod in map(pod_of, objects) if pod} <= accounts
    assert all(item["automountServiceAccountToken"] is False for item in of(objects, "ServiceAccount"))


@functools.cache
def valid(text: str) -> None:
    """Assert that an object is valid in each version; many are in several renderings."""
    for version in VERSIONS:
        validate(json.loads(text), version)


def of(objects: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a kind."""
    return (item for item in objects if item["kind"] == kind)


def check_pod(item: dict[str, Any]) -> None:
    """Assert that a pod's mounts have volumes, its arguments parse, and its settings are accepted."""
    pod = pod_of(item)
    assert pod is not None
    volumes = [volume["name"] for volume in pod["spec"].get("volumes", [])]
    assert len(volumes) == len(set(volumes))
    mounted = set()
    for container in containers_of(item):
        mounts = container["volumeMounts"]
        mounted |= {mount["name"] for mount in mounts}
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
        if container["name"] == "backend":
            continue
        make_parser().parse_args(container["args"])
        check_settings(container)
    assert mounted == set(volumes), "a mount has no volume, or a volume is mounted nowhere"


def check_settings(container: dict[str, Any]) -> None:
    """Assert that migrator takes what the container sets, with the files' contents in their place."""
    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names))
    environment = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    files = {name: path for name, path in environment.items() if name.endswith("_FILE")}
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    for name, path in files.items():
        assert str(Path(path).parent) in places, path
        del environment[name]
    assert "MIGRATOR_DATABASE_URL_FILE" in files
    environment["MIGRATOR_DATABASE_URL"] = "postgresql://shop:secret@postgres/shop"
    known = {settings.variable_name(item) for item in settings.OPTIONS}
    assert {name for name in environment if name.startswith("MIGRATOR_")} <= known
    settings.load({}, environment, CHART)
