"""Time an up-to-date check in the container and on the host: the same files, Python and server.

    bin/setup && .venv/bin/python -m bench.container [--runs 30]

On the host the program runs in the image's file system, with chroot. Only the container differs (namespaces, cgroup,
seccomp, overlay, bridge). It needs root. `docker run` itself takes time: a program that does nothing runs in turn with
migrator, in both places, and its time is subtracted. Writes
``bench/results/container.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.engine import standins
from tests.engine.containers import USER, Postgres, running_postgres, secret_file
from tests.engine.engine import ROOT, Engine, sudo
from tests.support.projects import linear_history, write_project

from bench.measure import RESULTS

IMAGE = "migrator-bench:latest"
USER_ID = "10001:10001"
MIGRATOR = ("/opt/migrator/bin/python", "/opt/migrator/entrypoint.py", "upgrade")
NOTHING = ("/usr/bin/true",)
LIMIT = 60
"""Milliseconds that the container may take more than the host."""


@dataclass(frozen=True)
class Place:
    """A place in which programs run: it returns the seconds from start to exit."""

    name: str
    run: Callable[[Sequence[str]], float]


def timed(command: Sequence[str], environment: dict[str, str] | None = None) -> float:
    """Run a command that must succeed; return its wall time in seconds."""
    begun = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return seconds


@contextlib.contextmanager
def file_system(engine: Engine, project: Path) -> Iterator[Path]:
    """Unpack the image's files, with the project at /app."""
    folder = Path(tempfile.mkdtemp(prefix="migrator-bench-"))
    created = engine.run("create", IMAGE).stdout.strip()
    try:
        archive = folder.with_suffix(".tar")
        engine.run("export", "-o", str(archive), created)
        folder.chmod(0o755)
        sudo("tar", "-C", str(folder), "-xf", str(archive))
        archive.unlink()
        sudo("cp", "-a", f"{project}/.", str(folder / "app"))
        yield folder
    finally:
        engine.remove(created)
        sudo("rm", "-rf", "--one-file-system", str(folder))


def environment_of(engine: Engine) -> dict[str, str]:
    """Return the image's variables."""
    config = json.loads(engine.run("image", "inspect", IMAGE).stdout)[0]["Config"]
    return dict(pair.split("=", 1) for pair in config["Env"])


def on_the_host(engine: Engine, root: Path, address: dict[str, str]) -> Place:
    """Return the host: the image's files without a container."""
    environment = {**environment_of(engine), **address}

    def run(program: Sequence[str]) -> float:
        enter = [
            shutil.which("chroot", path="/usr/sbin:/usr/bin") or "chroot",
            f"--userspec={USER_ID}",
            str(root),
        ]
        return timed([*enter, "/usr/bin/env", "-C", "/app", *program], environment)

    return Place("host", run)


class Container:
    """The container; ``inside`` is the time from the program's start to its exit by the engine's clock."""

    def __init__(self, engine: Engine, server: Postgres, project: Path, address: dict[str, str]) -> None:
        self.engine = engine
        self.inside: dict[str, list[float]] = {}
        self.options = [
            *("--network", server.network, "-v", f"{project}:/app:ro", "--read-only", "--cap-drop", "ALL"),
            *("--security-opt", "no-new-privileges", "--log-driver", "none"),
            *(f"--env={name}={value}" for name, value in address.items()),
        ]

    def run(self, program: Sequence[str]) -> float:
        """Run a program in a new container; return how long `docker run` took."""
        name = f"migrator-bench-{os.getpid()}"
        command = [
            self.engine.docker,
            "run",
            "--name",
            name,
            *self.options,
            "--entrypoint",
            program[0],
            IMAGE,
        ]
        seconds = timed([*command, *program[1:]], self.engine.process_environment)
        state = json.loads(self.engine.run("inspect", name).stdout)[0]["State"]
        self.engine.remove(name)
        took = clock(state["FinishedAt"]) - clock(state["StartedAt"])
        self.inside.setdefault(program[0], []).append(took)
        return seconds


def clock(text: str) -> float:
    """Read the engine's time of day, which has nanoseconds."""
    return datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d*Z", r"\1+00:00", text)).timestamp()


def measure(places: Sequence[Place], runs: int) -> dict[tuple[str, str], list[float]]:
    """Run both programs in both places in turn, after one round of warm-up."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(runs + 1):
        for place in places:
            for name, program in (("nothing", NOTHING), ("migrator", MIGRATOR)):
                seconds = place.run(program)
                if number:
                    found.setdefault((place.name, name), []).append(seconds)
    return found


def table(found: dict[tuple[str, str], list[float]], container: Container) -> str:
    """Return the medians, and the container's share of them."""
    rows = [
        "| where | a program that does nothing, ms | migrator, ms | difference, ms |",
        "|---|---:|---:|---:|",
    ]
    differences = {}
    for place, what in (("host", "host (chroot)"), ("container", "container (`docker run`, all of it)")):
        nothing, migrator = found[place, "nothing"], found[place, "migrator"]
        differences[place] = [after - before for before, after in zip(nothing, migrator, strict=True)]
        rows.append(row(what, nothing, migrator, differences[place]))
    inside = {name: times[1:] for name, times in container.inside.items()}
    by_engine = [b - a for a, b in zip(inside[NOTHING[0]], inside[MIGRATOR[0]], strict=True)]
    rows.append(
        row(
            "container (start to exit, the engine's clock)",
            inside[NOTHING[0]],
            inside[MIGRATOR[0]],
            by_engine,
        )
    )
    more = [a - b for a, b in zip(differences["container"], differences["host"], strict=True)]
    ours, host = inside[MIGRATOR[0]], found["host", "migrator"]
    verdicts = (
        ("`docker run` of migrator, less that of nothing, less the same on the host", milliseconds(more)),
        ("start to exit by the engine's clock, less the host's", milliseconds(ours) - milliseconds(host)),
        ("the same of the fastest run in each place", (min(ours) - min(host)) * 1000),
    )
    rows += [
        "",
        "| more in the container than on the host | ms | at most, ms | holds |",
        "|---|---:|---:|---|",
    ]
    rows += [f"| {what} | {ms:.0f} | {LIMIT} | {'yes' if ms <= LIMIT else 'NO'} |" for what, ms in verdicts]
    return "\n".join(rows) + "\n"


def row(what: str, *columns: Sequence[float]) -> str:
    """Return a row of medians, each with its quartiles."""
    cells = []
    for times in columns:
        low, _, high = statistics.quantiles(times, n=4)
        cells.append(f"{milliseconds(times):.0f} ({low * 1000:.0f} to {high * 1000:.0f})")
    return f"| {what} | {' | '.join(cells)} |"


def milliseconds(times: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return statistics.median(times) * 1000


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine.provision())
        standins.ensure(engine)
        engine.build(ROOT, IMAGE)
        stack.callback(engine.run, "rmi", "-f", IMAGE, expect=None)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        server = stack.enter_context(running_postgres(engine, folder))
        project = write_project(folder / "project", revisions=linear_history(50))
        place = json.loads(engine.run("inspect", server.name).stdout)[0]["NetworkSettings"]["Networks"]
        address = {
            "POSTGRES_HOST": place[server.network]["IPAddress"],
            "POSTGRES_USER": USER,
            "POSTGRES_DB": server.create_database(),
            "POSTGRES_PASSWORD": secret_file(folder).read_text().strip(),
            "MIGRATOR_BACKUP": "off",
        }
        freeze = ["run", "--rm", "--user", "0", "-v", f"{project}:/app", IMAGE, "freeze"]
        engine.run(*freeze)
        container = Container(engine, server, project, address)
        container.run(MIGRATOR)  # brings the database to head
        container.inside.clear()
        root = stack.enter_context(file_system(engine, project))
        found = measure([on_the_host(engine, root, address), Place("container", container.run)], runs)
        text = table(found, container)
    load = os.getloadavg()[0]
    head = (
        f"`python -m bench.container`: medians (and quartiles) of {runs} interleaved rounds after one warm-up; "
        f"{os.cpu_count()} cores, load average {load:.1f} at the end. A frozen history of 50 revisions, nothing to do. "
        "The same files and the same Python in both places; the host's is a chroot into the image's file system.\n\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "container.md").write_text(head + text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
