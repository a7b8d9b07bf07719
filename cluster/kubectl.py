"""kubectl: what is applied, what the cluster says of it, and waiting until it says something else."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tests.engine.engine import call

Object = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Kubectl:
    """kubectl with an access to one cluster, in one namespace."""

    program: Path
    access: Path
    namespace: str = "default"

    def within(self, namespace: str) -> Kubectl:
        """Return the same in another namespace."""
        return Kubectl(self.program, self.access, namespace)

    def run(
        self, *arguments: str, stdin: str | None = None, expect: int | None = 0, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of kubectl."""
        options = (f"--kubeconfig={self.access}", f"--namespace={self.namespace}")
        return call(str(self.program), *options, *arguments, stdin=stdin, expect=expect, timeout=timeout)

    def is_ready(self) -> bool:
        """Tell whether the API server says that it is ready."""
        return self.run("get", "--raw", "/readyz", expect=None, timeout=20).returncode == 0

    def has(self, kind: str, name: str, namespace: str) -> bool:
        """Tell whether there is an object of this name."""
        return self.within(namespace).run("get", kind, name, expect=None).returncode == 0

    def apply(self, *objects: Object) -> None:
        """Create or change objects."""
        self.run("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def get(self, kind: str, name: str) -> Object:
        """Return one object."""
        return dict(json.loads(self.run("get", kind, name, "-o", "json").stdout))

    def list(self, kind: str, selector: str = "") -> list[Object]:
        """Return the objects of a kind, oldest first."""
        options = ("--sort-by=.metadata.creationTimestamp", *([f"-l{selector}"] if selector else []))
        return list(json.loads(self.run("get", kind, *options, "-o", "json").stdout)["items"])

    def describe(self, kind: str, name: str) -> str:
        """Return what `kubectl describe` prints."""
        return self.run("describe", kind, name).stdout

    def logs(self, pod: str, container: str, *, previous: bool = False) -> str:
        """Return what a container wrote: that one, or the one before its last restart."""
        options = ("--previous",) if previous else ()
        return self.run("logs", pod, "-c", container, *options).stdout

    def delete(self, kind: str, name: str, *options: str) -> None:
        """Delete an object, and wait until it is gone unless told not to."""
        self.run("delete", kind, name, *options)


def wait_for(condition: Callable[[], T], seconds: float, what: Callable[[], str]) -> T:
    """Wait until `condition()` is true and return it, or fail with what `what()` then says."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not so after {seconds:g} s:\n{what()}")
        time.sleep(0.5)
    return found


def state(pod: Object, container: str) -> Object:
    """Return a container's status in a pod, whichever kind of container it is; empty before it has one."""
    status = pod.get("status", {})
    listed = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return next((item for item in listed if item["name"] == container), {})


def terminated(pod: Object, container: str) -> Object:
    """Return how a container ended last; empty if it has not."""
    status = state(pod, container)
    for moment in ("state", "lastState"):
        ended = status.get(moment, {}).get("terminated")
        if ended:
            return dict(ended)
    return {}


def is_true(item: Object, condition: str) -> bool:
    """Tell whether an object's condition is true."""
    conditions = item.get("status", {}).get("conditions", [])
    return any(entry["type"] == condition and entry["status"] == "True" for entry in conditions)
