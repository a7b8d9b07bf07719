"""Write what is made from the chart's values.yaml: values.schema.json, and the table in README.md.

Run it as `python k8s/chart/generate.py` (`python docs/generate.py` does so too) after a change of values.yaml or of
migrator's settings; tests/chart/test_package.py fails while either is not current. In values.yaml, a comment `# --`
above a key describes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from migrator.config import settings
from migrator.config.value_parsers import boolean, duration, optional_duration, whole_number

CHART = Path(__file__).parent / "migrator"
BEGIN, END = "<!-- generated: values -->\n", "<!-- end -->"

# Secrets have no place in values: an address with a password, or a variable that is known to hold one.
# (`pattern` alone holds for every number, so that `not` would refuse them all.)
NO_PASSWORD = {"not": {"type": "string", "pattern": "://[^/@]*:[^/@]*@"}}
CONFIDENTIAL = (
    "(PASSWORD|PASSWD|SECRET|TOKEN|PRIVATE_KEY|ACCESS_KEY|ACCESS_KEY_ID"
    "|DATABASE_URL|DIRECT_URL|VERIFY_URL|DB_URL|DATABASE_URI)$"
)
NAME = "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
NAMED, PERHAPS_NAMED = {"pattern": f"^{NAME}$"}, {"pattern": f"^({NAME})?$"}
PREFIX = {"pattern": "^([a-z]([-a-z0-9]{0,36}[a-z0-9])?)?$"}
KEY = {"pattern": "^[-._a-zA-Z0-9]{1,253}$"}
ARGUMENTS = {"items": {"type": "string", "minLength": 1, **NO_PASSWORD}}
SIZE = {"pattern": "^[0-9]+(\\.[0-9]+)?([EPTGMk]|[EPTGM]i|Ki)?$"}
CRON = {"pattern": "^(@(hourly|daily|weekly|monthly|yearly|annually|midnight)|\\S+( \\S+){4})$"}
PORTS = {"minItems": 1, "items": {"type": "integer", "minimum": 1, "maximum": 65535}}
TEXTS = {"additionalProperties": {"type": "string"}}


def _without(keys: str) -> dict[str, Any]:
    """Return texts under any key but those that the chart sets itself, which would be there twice."""
    return {**TEXTS, "propertyNames": {"not": {"pattern": f"^({keys})"}}}


SELECTED = "app\\.kubernetes\\.io/(name|instance|component|managed-by)$|helm\\.sh/"
HOOK = "helm\\.sh/hook"
OBJECTS = {"items": {"type": "object"}}
# The volumes of the restricted Pod Security Standard.
VOLUMES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
USER = {"type": ["integer", "null"], "minimum": 1}
SECONDS = {"minimum": 1}

RULES: Mapping[str, Mapping[str, Any]] = {
    "mode": {"enum": ["job", "hook", "argocd", "none"]},
    "image": {
        "anyOf": [
            {"properties": {"tag": {"minLength": 1}}, "required": ["tag"]},
            {"properties": {"digest": {"minLength": 1}}, "required": ["digest"]},
        ]
    },
    "image.repository": {"pattern": "^[a-z0-9]([-a-z0-9._/:]*[a-z0-9])?$"},
    "image.tag": {"pattern": "^([A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?$"},
    "image.digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "imagePullSecrets": {
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string", **NAMED}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
    "nameOverride": PREFIX,
    "fullnameOverride": PREFIX,
    "commonLabels": _without(f"{SELECTED}|app\\.kubernetes\\.io/version$"),
    "podAnnotations": _without(HOOK),
    "podLabels": _without(SELECTED),
    "database.existingSecret": NAMED,
    "database.key": KEY,
    "database.directKey": {"pattern": "^[-._a-zA-Z0-9]{0,253}$"},
    "database.certificatesSecret": PERHAPS_NAMED,
    "extraEnv": {
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
                "value": {"type": "string", **NO_PASSWORD},
                "valueFrom": {"type": "object"},
            },
            "required": ["name"],
            "additionalProperties": False,
            "if": {"required": ["value"]},
            "then": {"properties": {"name": {"not": {"pattern": CONFIDENTIAL}}}},
        }
    },
    "extraVolumes": {"items": {"type": "object", "propertyNames": {"enum": ["name", *VOLUMES]}}},
    "extraVolumeMounts": OBJECTS,
    "backups.to": {"enum": ["claim", "s3", "none"]},
    "backups.claim.existingClaim": PERHAPS_NAMED,
    "backups.claim.size": SIZE,
    "backups.claim.storageClass": PERHAPS_NAMED,
    "backups.claim.accessModes": {
        "minItems": 1,
        "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]},
    },
    "backups.s3.url": {"pattern": "^(s3://[^/@]+(/.*)?)?$"},
    "backups.s3.endpoint": {"pattern": "^(https?://[^@]+)?$"},
    "backups.s3.pathStyle": {"enum": ["auto", "on", "off"]},
    "backups.s3.existingSecret": PERHAPS_NAMED,
    "scratch.sizeLimit": SIZE,
    "job.args": {"minItems": 1, **ARGUMENTS},
    "hook.args": {"minItems": 1, **ARGUMENTS},
    "hook.events": {
        "minItems": 1,
        "items": {"enum": ["pre-install", "pre-upgrade", "pre-rollback", "post-install", "post-upgrade"]},
    },
    "argocd.preSync.args": {"minItems": 1, **ARGUMENTS},
    "argocd.postSync.args": ARGUMENTS,
    "backoffLimit": {"type": ["integer", "null"], "minimum": 0},
    "activeDeadlineSeconds": {"type": ["integer", "null"], **SECONDS},
    "ttlSecondsAfterFinished": {"type": ["integer", "null"], "minimum": 0},
    "terminationGracePeriodSeconds": {"type": ["integer", "null"], **SECONDS},
    "verifyBackup.schedule": CRON,
    "verifyBackup.args": {"minItems": 1, **ARGUMENTS},
    "verifyBackup.databaseSecret": PERHAPS_NAMED,
    "verifyBackup.identitySecret": PERHAPS_NAMED,
    "drift.schedule": CRON,
    "drift.args": {"minItems": 1, **ARGUMENTS},
    "drift.databaseSecret": PERHAPS_NAMED,
    "initContainer.args": {"minItems": 1, **ARGUMENTS},
    "sidecar.port": {"minimum": 1024, "maximum": 65535},
    "sidecar.address": {"pattern": "^([0-9.]+|\\[[0-9a-f:]+\\])$"},
    "sidecar.startupSeconds": SECONDS,
    "waitForCurrent.timeout": {"pattern": "^[0-9.]+(ms|s|m|h|d)?$"},
    "waitForCurrent.databaseSecret": PERHAPS_NAMED,
    "serviceAccount.name": PERHAPS_NAMED,
    "serviceAccount.annotations": _without(HOOK),
    "networkPolicy.dns.ports": PORTS,
    "networkPolicy.dns.to": OBJECTS,
    "networkPolicy.postgres.ports": PORTS,
    "networkPolicy.postgres.to": OBJECTS,
    "networkPolicy.s3.ports": PORTS,
    "networkPolicy.s3.to": OBJECTS,
    "networkPolicy.extraEgress": OBJECTS,
    "resources": {"additionalProperties": True},
    "podSecurity.runAsUser": USER,
    "podSecurity.runAsGroup": USER,
    "podSecurity.fsGroup": USER,
    "nodeSelector": TEXTS,
    "tolerations": OBJECTS,
    "affinity": {"additionalProperties": True},
    "priorityClassName": PERHAPS_NAMED,
}
"""What a value must be, beyond the type of its default."""

# Settings that values of the chart's own make, or that would take the secrets and the logs elsewhere.
NOT_IN_SETTINGS = {
    "MIGRATOR_BACKUP_URL",
    "MIGRATOR_BACKUP_IDENTITY_FILE",
    "MIGRATOR_S3_ENDPOINT",
    "MIGRATOR_S3_REGION",
    "MIGRATOR_S3_PATH_STYLE",
    "MIGRATOR_SIDECAR_LISTEN",
}


class Value(NamedTuple):
    """A key of values.yaml: its dotted path, its default, and the comment above it."""

    path: str
    default: Any
    description: str


def values(text: str) -> list[Value]:
    """Return every key of values.yaml in its order, mappings with keys of their own before those keys."""
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("values.yaml is no mapping")
    return list(_walk(root, "", text.splitlines()))


def _walk(node: yaml.MappingNode, above: str, lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        path = f"{above}{key.value}"
        default = yaml.safe_load(yaml.serialize(value))
        description = _comment(lines, key.start_mark.line)
        yield Value(path, default, description)
        # A described mapping is one value, whatever is in it by default (resources).
        if isinstance(value, yaml.MappingNode) and not description:
            yield from _walk(value, f"{path}.", lines)


def _comment(lines: list[str], number: int) -> str:
    """Return the comment that begins with ``# --`` and ends above a line; empty where there is none."""
    found: list[str] = []
    for line in reversed(lines[:number]):
        text = line.strip()
        if not text.startswith("#"):
            return ""
        found.insert(0, text.lstrip("# ").removeprefix("--").strip())
        if text.startswith("# --"):
            return " ".join(found)
    return ""


def schema(found: list[Value]) -> dict[str, Any]:
    """Return the JSON schema (draft 7, which Helm 3 and 4 read) of the values."""
    root: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the migrator chart; made by k8s/chart/generate.py",
        "type": "object",
        # Helm adds `global` to a dependency's values, and a parent may switch the dependency by `enabled`.
        "properties": {"global": {"type": "object"}, "enabled": {"type": "boolean"}},
        "additionalProperties": False,
    }
    for value in found:
        place = root
        *above, name = value.path.split(".")
        for step in above:
            place = place["properties"][step]
        place["properties"][name] = settings_schema() if value.path == "settings" else _one(value)
        if value.description:
            place["properties"][name]["description"] = value.description
        # Helm takes a key with null out of the values, and templates would make 0 of it.
        if place["properties"][name].get("type") == "integer":
            place.setdefault("required", []).append(name)
    return root


def _one(value: Value) -> dict[str, Any]:
    kinds = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
    kind = "null" if value.default is None else kinds[type(value.default)]
    made: dict[str, Any] = {"type": kind}
    if kind == "object":
        made["additionalProperties"] = False
        if not value.description:
            made["properties"] = {}
    return {**made, **RULES.get(value.path, {})}


def settings_schema() -> dict[str, Any]:
    """Return the schema of `settings`: each variable that is no secret, with what it can be."""
    properties = {}
    for item in settings.OPTIONS:
        name = settings.variable_name(item)
        if not item.secret and name not in NOT_IN_SETTINGS:
            properties[name] = {**_setting(item.read), "description": item.help}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _setting(read: Any) -> dict[str, Any]:
    if choices := getattr(read, "choices", None):
        return {"enum": list(choices)}
    if read is boolean:
        return {"enum": [True, False, "true", "false"]}
    if read is whole_number:
        return {"type": ["integer", "string"], "minimum": 0, "maximum": 1000, "pattern": "^[0-9]{1,4}$"}
    if read in (duration, optional_duration):
        ends = "|none" if read is optional_duration else ""
        return {"type": ["integer", "string"], "minimum": 0, "pattern": f"^([0-9.]+ *(ms|s|m|h|d)?{ends})$"}
    return {"type": ["string", "integer"], **NO_PASSWORD}


def table(found: list[Value]) -> str:
    """Return the values as a Markdown table."""
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    for value in found:
        if value.description:
            default = json.dumps(value.default)
            text = "" if default == '""' else f"`{default}`"
            lines.append(f"| `{value.path}` |{f' {text} ' if text else ' '}| {value.description} |")
    return "".join(f"{line}\n" for line in lines)


def readme(page: str, rows: str) -> str:
    """Return README.md with a new table between its markers."""
    pattern = re.compile(f"({re.escape(BEGIN)}).*?({re.escape(END)})", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return pattern.sub(lambda found: f"{found[1]}{rows}{found[2]}", page, count=1)


def made() -> dict[Path, str]:
    """Return the files that are made here, with their texts."""
    found = values((CHART / "values.yaml").read_text(encoding="utf-8"))
    page = CHART / "README.md"
    return {
        CHART / "values.schema.json": json.dumps(schema(found), indent=2) + "\n",
        page: readme(page.read_text(encoding="utf-8"), table(found)),
    }


def main() -> None:
    """Write the files."""
    for path, text in made().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
