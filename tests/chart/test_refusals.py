"""What cannot work, and every secret in plain, is refused before anything reaches a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

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
