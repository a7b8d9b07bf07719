"""Podman, for `podman play kube`: Debian's, with its state in the tree's cache, settings for small machines."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.engine.engine import CACHE, Engine, as_root, call, find_program, install, reach, sudo

# netavark drives iptables in Debian 12, and nft, which it only suggests, in Debian 13.
PACKAGES = ("podman", "catatonit", "netavark", "aardvark-dns", "iptables", "nftables")
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""


@dataclass(frozen=True)
class Podman:
    """One podman, apart from any other on the machine."""

    command: tuple[str, ...]

    def run(
        self, *arguments: str, expect: int | None = 0, timeout: float = 120, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a podman command."""
        return call(*self.command, *arguments, expect=expect, timeout=timeout, stdin=stdin)

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        found = re.search(r"(\d+)\.(\d+)", self.run("--version").stdout)
        assert found is not None
        return int(found[1]), int(found[2])

    def load(self, engine: Engine, *images: str) -> None:
        """Copy images from the other engine."""
        save = [*reach(engine.docker, engine.settings), "save", *images]
        with subprocess.Popen(save, stdout=subprocess.PIPE, env=engine.process_environment) as source:
            subprocess.run(
                [*self.command, "load"], stdin=source.stdout, check=True, capture_output=True, timeout=180
            )

    def logs(self, container: str) -> str:
        """Return all that a container wrote, both streams."""
        result = self.run("logs", container, expect=None)
        return result.stdout + result.stderr

    @classmethod
    @contextlib.contextmanager
    def provision(cls) -> Iterator[Podman]:
        """Yield podman, installed where it is missing; remove all of its state at the end."""
        install(*PACKAGES)
        CACHE.mkdir(parents=True, exist_ok=True)
        state = Path(tempfile.mkdtemp(prefix="podman-", dir=CACHE))
        runroot = Path(tempfile.mkdtemp(prefix="migrator-podman-"))
        configuration = state / "containers.conf"
        # Its networks are its own, too: the end of another one's tests would remove them. Their names have to be
        # unique all the same, for the server of names is one for all.
        configuration.write_text(f'{CONFIGURATION}network_config_dir = "{state / "networks"}"\n')
        folders = (f"--root={state / 'root'}", f"--runroot={runroot}")
        program = as_root("env", f"CONTAINERS_CONF={configuration}", str(find_program("podman")), *folders)
        podman = cls(tuple(program))
        try:
            yield podman
        finally:
            podman.run("pod", "rm", "-a", "-f", "-t", "0", expect=None)
            podman.run("rm", "-a", "-f", "-t", "0", expect=None)
            podman.run("network", "prune", "-f", expect=None)
            podman.run("unmount", "-a", "-f", expect=None)
            for folder in (state, runroot):
                call(*as_root("umount", "-l", *mounts(folder)), expect=None)
                sudo("rm", "-rf", "--one-file-system", str(folder))


def mounts(folder: Path) -> list[str]:
    """Return what is mounted below a folder, innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    return sorted((point for point in points if point.startswith(f"{folder}/")), key=len, reverse=True)
