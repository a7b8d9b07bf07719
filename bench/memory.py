"""Measure the memory of runs in containers with the manifests' limits.

    python -m bench.memory [GIGABYTES]      (default: 2) writes bench/results/memory.md

Each run gets the limit of k8s/components/job and no swap. Anonymous memory counts against it; the kernel
reclaims the page cache. The result is the highest of samples that are taken every 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.engine import standins
from tests.engine.containers import PASSWORD_FILE, USER, Postgres, running_postgres, secret_file, unique
from tests.engine.engine import ROOT, Engine
from tests.support.kubernetes import containers_of, documents, kustomize
from tests.support.projects import linear_history, write_project

IMAGE = "migrator:latest"
RESULT = ROOT / "bench" / "results" / "memory.md"
REVISIONS = 500
CGROUPS = Path("/sys/fs/cgroup")
ANONYMOUS = ("total_rss", "anon")  # as versions 1 and 2 call it
BATCH = 100_000  # rows of a thousand bytes that no program compresses: see FILL
TABLE = "CREATE EXTENSION pgcrypto; CREATE UNLOGGED TABLE big (n int, bytes bytea)"
FILL = "INSERT INTO big SELECT n, gen_random_bytes(1000) FROM generate_series(1, 100000) AS n"


@dataclass(frozen=True)
class Measured:
    """One run: its exit code, seconds, the highest anonymous memory in bytes, and whether the kernel killed it."""

    what: str
    code: int
    seconds: float
    highest: int
    killed: bool


def limit() -> str:
    """Return the memory limit of the container that migrates, as the manifest has it."""
    job = next(item for item in documents(kustomize(ROOT / "k8s/overlays/job")) if item["kind"] == "Job")
    (container,) = containers_of(job)
    return str(container["resources"]["limits"]["memory"])


class Bench:
    """An engine, a server, and one database after another."""

    def __init__(self, engine: Engine, server: Postgres, folder: Path) -> None:
        self.engine, self.server, self.folder = engine, server, folder
        self.secret = secret_file(folder)

    def run(self, what: str, database: str, project: Path, volume: str, *arguments: str) -> Measured:
        """Run the image with the manifest's limit."""
        allowed = limit().replace("Mi", "m")
        begun = time.monotonic()
        container = self.engine.started(
            *("--network", self.server.network, f"--memory={allowed}", f"--memory-swap={allowed}"),
            *("-v", f"{self.secret}:{PASSWORD_FILE}:ro", "-e", f"POSTGRES_PASSWORD_FILE={PASSWORD_FILE}"),
            *("-e", f"POSTGRES_HOST={self.server.name}", "-e", f"POSTGRES_USER={USER}"),
            *("-e", f"POSTGRES_DB={database}", "-v", f"{project}:/app:ro", "-v", f"{volume}:/backups"),
            *("--read-only", "--tmpfs=/tmp", IMAGE, *arguments),
        )
        sampler = Sampler(container)
        code = self.engine.wait(container, 3600)
        seconds = time.monotonic() - begun
        state = json.loads(self.engine.run("inspect", container).stdout)[0]["State"]
        if code:
            print(self.engine.logs(container)[-2000:], file=sys.stderr)
        self.engine.remove(container)
        return Measured(what, code, seconds, sampler.finish(), bool(state["OOMKilled"]))


class Sampler(threading.Thread):
    """Reads a container's memory.stat until it is stopped, under either version of cgroups."""

    def __init__(self, container: str) -> None:
        super().__init__(daemon=True)
        self.container, self.highest, self.over = container, 0, False
        self.start()

    def run(self) -> None:
        """Sample."""
        place = None
        while not self.over:
            place = place or next(CGROUPS.rglob(f"*{self.container}*/memory.stat"), None)
            with contextlib.suppress(OSError):  # the container has ended
                for line in place.read_text().splitlines() if place else ():
                    if line.split()[0] in ANONYMOUS:
                        self.highest = max(self.highest, int(line.split()[1]))
            time.sleep(0.02)

    def finish(self) -> int:
        """Return the highest, in bytes."""
        self.over = True
        self.join()
        return self.highest


def measure(bench: Bench, gigabytes: float) -> tuple[list[Measured], int]:
    """Return the runs, in the order of the table, and the bytes of the backups."""
    small = write_project(bench.folder / "small", revisions=linear_history(3))
    long = write_project(bench.folder / "long", revisions=linear_history(REVISIONS))
    bench.folder.chmod(0o755)
    found = []
    volume = unique("bench")
    try:
        one, many = bench.server.create_database(), bench.server.create_database()
        bench.run("", one, small, volume, "upgrade")
        found.append(bench.run("nothing to do", one, small, volume, "upgrade"))
        found.append(bench.run("wait-for-current", one, small, volume, "wait-for-current"))
        found.append(bench.run(f"{REVISIONS} revisions applied", many, long, volume, "upgrade"))
        found.append(bench.run(f"nothing to do, of {REVISIONS} revisions", many, long, volume, "upgrade"))
        bench.server.psql(TABLE, one)
        for _ in range(int(gigabytes * 1e6 / BATCH)):
            bench.server.psql(FILL, one)
        found.append(
            bench.run(
                f"backup of {gigabytes:g} GB of random bytes, written and read back",
                one,
                small,
                volume,
                "backup",
            )
        )
        found.append(bench.run("verify-backup latest", one, small, volume, "verify-backup", "latest"))
        sizes = ("--rm", "-v", f"{volume}:/backups:ro", "--entrypoint=du", IMAGE, "-sb", "/backups")
        return found, int(bench.engine.run("run", *sizes).stdout.split()[0])
    finally:
        bench.engine.run("volume", "rm", "-f", volume, expect=None)


def table(found: list[Measured], size: int) -> str:
    """Return the page."""
    lines = [
        "# Memory",
        "",
        f"By `python -m bench.memory`, each run in a container with the manifests' limit of {limit()} and no swap.",
        f"The backup takes {size / 1e9:.2f} GB.",
        "",
        "| run | exit code | seconds | anonymous memory, highest | killed for lack of memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for item in found:
        killed = "yes" if item.killed else "no"
        lines.append(
            f"| {item.what} | {item.code} | {item.seconds:.1f} | {item.highest / 2**20:.0f} MiB | {killed} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Return 0 if no run hit its limit."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    with Engine.provision() as engine, tempfile.TemporaryDirectory() as name:
        standins.ensure(engine)
        with running_postgres(engine, Path(name)) as server:
            found, size = measure(Bench(engine, server, Path(name)), gigabytes)
    text = table(found, size)
    RESULT.write_text(text)
    print(text)
    return int(any(item.killed or item.code for item in found))


if __name__ == "__main__":
    sys.exit(main())
