"""Time migrator against plain Alembic on the same work: runs in turn (A B A B ...), medians and ratios.

    bin/setup && .venv/bin/python -m bench.compare [--runs 10] [--revisions 100]

Machines are noisy and shared, so a single time means little; the ratio of the medians of interleaved runs is what
to look at.  The server is the embedded one, with fsync off: what is compared is the clients, not the disk.
Writes ``bench/results/compare.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.installations import embedded
from tests.support.projects import linear_history, write_project
from tests.support.servers import Database, Server, running

RESULTS = Path(__file__).parent / "results"
Prepare = Callable[[], Mapping[str, str]]


def timed(command: list[str], folder: Path, prepare: Prepare) -> tuple[float, float]:
    """Run a command on what ``prepare`` made; return its wall seconds and peak memory in MB."""
    environment = {**os.environ, **prepare()}
    started = time.monotonic()
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return seconds, usage.ru_maxrss / 1024


def pair(name: str, runs: int, folder: Path, prepare: Prepare) -> str:
    """Time ``migrator upgrade`` and ``alembic upgrade head`` in turn; return a row of the table."""
    programs = Path(sys.executable).parent
    commands = {
        "migrator": [str(programs / "migrator"), "upgrade"],
        "alembic": [str(programs / "alembic"), "upgrade", "head"],
    }
    found: dict[str, list[tuple[float, float]]] = {key: [] for key in commands}
    for number in range(runs + 1):
        for key, command in commands.items():
            figures = timed(command, folder, prepare)
            if number:  # the first pair warms caches
                found[key].append(figures)
    seconds = {key: statistics.median(item[0] for item in rows) for key, rows in found.items()}
    memory = {key: statistics.median(item[1] for item in rows) for key, rows in found.items()}
    cells = [
        name,
        f"{seconds['migrator']:.3f}",
        f"{seconds['alembic']:.3f}",
        f"{seconds['migrator'] / seconds['alembic']:.2f}",
        f"{memory['migrator']:.0f}",
        f"{memory['alembic']:.0f}",
        f"{memory['migrator'] / memory['alembic']:.2f}",
    ]
    row = f"| {' | '.join(cells)} |"
    print(row, flush=True)
    return row


def settings_for(database: Database) -> dict[str, str]:
    """Return the environment of a run on a database, for both commands."""
    return {"DATABASE_URL": database.url, "MIGRATOR_BACKUP": "off"}


def fresh(server: Server) -> Prepare:
    """Return what makes an empty database for each run, and drops the one before."""
    made: list[Database] = []

    def prepare() -> Mapping[str, str]:
        if made:
            server.drop_database(made.pop().name)
        made.append(server.create_database())
        return settings_for(made[0])

    return prepare


def main() -> None:
    """Run every pair and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--revisions", type=int, default=100)
    arguments = parser.parse_args()
    header = [
        "| work | migrator s | alembic s | ratio | migrator MB | alembic MB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(header))
    with tempfile.TemporaryDirectory() as place, running(embedded()) as server:
        folder = Path(place) / "project"
        write_project(folder, revisions=linear_history(arguments.revisions), env="own_variable")
        count = arguments.revisions
        rows = [pair(f"{count} revisions applied, backup off", arguments.runs, folder, fresh(server))]
        done = server.create_database()
        timed([str(Path(sys.executable).parent / "migrator")], folder, lambda: settings_for(done))
        rows.append(
            pair(f"nothing to do, {count} revisions", arguments.runs, folder, lambda: settings_for(done))
        )
    RESULTS.mkdir(exist_ok=True)
    title = (
        f"Medians of {arguments.runs} interleaved runs, after one warm-up; Python {platform.python_version()},"
        f" {os.cpu_count()} cores.\n\n"
    )
    (RESULTS / "compare.md").write_text(title + "\n".join([*header, *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
