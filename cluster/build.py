"""Build Kubernetes and etcd from their published Go modules, in the versions that components/go.mod locks."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = Path(__file__).with_name("components")
CACHE = ROOT / ".cache" / "k8s"
PROGRAMS = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
}


def version() -> str:
    """Return Kubernetes' version as go.mod has it, such as `v1.35.4`."""
    found = re.search(r"k8s\.io/kubernetes (v\S+)", (COMPONENTS / "go.mod").read_text())
    assert found is not None
    return found[1]


def programs() -> Path:
    """Return the folder with the programs, building those that the locked versions do not have there yet."""
    locked = hashlib.sha256((COMPONENTS / "go.mod").read_bytes() + (COMPONENTS / "go.sum").read_bytes())
    folder = CACHE / f"{version()}-{locked.hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PROGRAMS.items():
        if not (folder / name).exists():
            _build(package, folder / name)
    return folder


def _build(package: str, program: Path) -> None:
    print(f"k8s-cluster: building {program.name}", file=sys.stderr, flush=True)
    # Without a version, the API server would refuse to say what it can do.
    major, minor, _ = version().removeprefix("v").split(".")
    stamps = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in stamps.items())
    partial = program.with_suffix(".partial")
    options = ("-mod=readonly", "-trimpath", f"-ldflags=-s -w {flags}", "-o", str(partial))
    subprocess.run(
        ["nice", "-n", "19", "go", "build", *options, package],
        cwd=COMPONENTS,
        env={
            "GOCACHE": str(CACHE / "go-build"),
            **os.environ,
            "CGO_ENABLED": "0",
            "GOFLAGS": "-buildvcs=false",
        },
        check=True,
    )
    partial.rename(program)


if __name__ == "__main__":
    print(programs())
