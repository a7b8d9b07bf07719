"""Time a backup of a pgbench database: migrator (which also proves it) against pg_dump by hand.

    bin/setup && .venv/bin/python -m bench.backup [--runs 5] [--scale 135]

Scale 135 is 2 GB.  pgbench's data are one big table, which pg_dump reads through one session however many workers it
has; with ``--partitions`` they are eight, as the tables of most databases are several.  All run on the same machine as
the server, in turn.  Writes ``bench/results/backup.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.installations import binaries
from tests.support.projects import linear_history, write_project
from tests.support.servers import Database, Server, running

from bench.measure import RESULTS, Program, clean_environment, compile_sources

MIGRATOR = [str(Path(sys.executable).with_name("migrator")), "backup"]
FASTER, OF_THE_BEST = 2.5, 1.15
HEADER = (
    "| database | with | s | MB | migrator s | MB | times as fast | its backup s | times as fast | at least |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
BY_HAND = {
    "custom, zstd:1": "pg_dump -Fc --compress=zstd:1 -f $OUT/dump",
    "custom, lz4": "pg_dump -Fc --compress=lz4 -f $OUT/dump",
    "custom, gzip:1": "pg_dump -Fc --compress=gzip:1 -f $OUT/dump",
    "directory, 2 workers, zstd:1": "pg_dump -Fd -j2 --compress=zstd:1 -f $OUT/dump",
}
PLAIN = "pg_dump, gzip"


@dataclass(frozen=True)
class Figures:
    """Medians: seconds of the command, bytes that were written, and seconds of migrator's backup itself."""

    seconds: float
    size: float
    inside: float


def fill(server: Server, name: str, scale: int, *options: str) -> Database:
    """Make a pgbench database."""
    database = server.create_database(name)
    command = [server.bin / "pgbench", "-i", "-q", "-s", str(scale), *options]
    environment = clean_environment() | database.environment()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return database


def measure(database: Database, folder: Path, runs: int) -> dict[str, Figures]:
    """Run all of them in turn, ``runs`` times after a warm-up; by name, migrator under its own."""
    out = folder / "out"
    environment = database.environment() | {
        "PATH": f"{database.server.bin}:{os.environ['PATH']}",
        "OUT": str(out),
        "DATABASE_URL": database.url,
        "MIGRATOR_BACKUP_URL": out.as_uri(),
        "MIGRATOR_PG_BIN": str(database.server.bin),
        "MIGRATOR_LOG_LEVEL": "warning",
    }

    def prepare() -> dict[str, str]:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return environment

    commands = {"migrator": MIGRATOR, PLAIN: ["sh", "-c", "pg_dump | gzip > $OUT/dump"]}
    commands |= {name: ["sh", "-c", line] for name, line in BY_HAND.items()}
    found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in commands}
    for number in range(runs + 1):
        for name, command in commands.items():
            seconds = Program(command, folder, prepare).run().seconds
            if number:
                found[name].append((seconds, *written(out)))
    return {
        name: Figures(*(statistics.median(column) for column in zip(*rows, strict=True)))
        for name, rows in found.items()
    }


def written(out: Path) -> tuple[int, float]:
    """Return how many bytes are below a folder, and how long migrator says that its backup took (else 0)."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    manifests = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return size, sum(manifest["seconds"] for manifest in manifests)


def rows_of(database: str, figures: dict[str, Figures]) -> list[str]:
    """Return the table's rows; the fastest by hand that is no bigger than gzip's is the one to be compared with."""
    ours, plain = figures["migrator"], figures[PLAIN]
    best = min(
        (name for name in BY_HAND if figures[name].size <= plain.size),
        key=lambda name: figures[name].seconds,
        default="",
    )
    rows = []
    for name, other in figures.items():
        if name == "migrator":
            continue
        least = FASTER if name == PLAIN else 1 / OF_THE_BEST if name == best else None
        cells = [
            database,
            f"**{name}**" if name == best else name,
            f"{other.seconds:.2f}",
            f"{other.size / 1e6:.1f}",
            f"{ours.seconds:.2f}",
            f"{ours.size / 1e6:.1f}",
            f"{other.seconds / ours.seconds:.2f}",
            f"{ours.inside:.2f}",
            f"{other.seconds / ours.inside:.2f}",
            "" if least is None else f"{least:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=int, default=135)
    arguments = parser.parse_args()
    compile_sources()
    lines = []
    settings = {"shared_buffers": "256MB", "max_wal_size": "4GB"}
    with tempfile.TemporaryDirectory() as place, running(binaries("zstd"), settings=settings) as server:
        folder = write_project(Path(place) / "project", revisions=linear_history(1))
        for title, options in {"one table": (), "8 partitions": ("--partitions=8",)}.items():
            database = fill(server, "bench", arguments.scale, *options)
            lines += rows_of(
                f"pgbench, scale {arguments.scale}, {title}", measure(database, folder, arguments.runs)
            )
            server.drop_database("bench")
            print("\n".join(lines), flush=True)
    note = (
        f"Medians of {arguments.runs} interleaved runs, after one warm-up; {os.cpu_count()} cores that the server "
        f"shares, load average {os.getloadavg()[0]:.1f} at the end. migrator's time is that of the whole command: "
        "Python's start, Alembic's import (for the revision), the lock, the dump, reading it back (checksum and "
        "pg_restore), and publishing it; its backup is that without what comes before the dump. In bold: the fastest "
        "line by hand whose dump is no bigger than gzip's.\n\n"
    )
    (RESULTS / "backup.md").write_text(note + "\n".join((*HEADER, *lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
