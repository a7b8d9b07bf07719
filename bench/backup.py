"""Time a backup of a pgbench database: migrator, which also verifies it, against plain pg_dump.

    bin/setup && .venv/bin/python -m bench.backup [--runs 5] [--scale 135]

All run in turn, on the server's machine.  Writes ``bench/results/backup.md``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from tests.support.servers import Database

from bench import pgbench
from bench.measure import RESULTS, Program, compile_sources
from bench.pgbench import MIGRATOR

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
FLOOR = "COPY alone, thrown away"


@dataclass(frozen=True)
class Figures:
    """Medians: seconds of the command, bytes that were written, and seconds of migrator's backup itself."""

    seconds: float
    size: float
    inside: float


def measure(database: Database, folder: Path, runs: int) -> dict[str, Figures]:
    """Run all programs in turn, ``runs`` times after a warm-up; return their figures by name."""
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

    commands = {"migrator": [MIGRATOR, "backup"], PLAIN: ["sh", "-c", "pg_dump | gzip > $OUT/dump"]}
    commands |= {name: ["sh", "-c", line] for name, line in BY_HAND.items()}
    commands[FLOOR] = ["sh", "-c", "psql -qc 'COPY (TABLE pgbench_accounts) TO STDOUT' > /dev/null"]
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
    """Return the bytes below a folder, and the seconds of the backup that migrator reports (else 0)."""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    manifests = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return size, sum(manifest["seconds"] for manifest in manifests)


def rows_of(database: str, figures: dict[str, Figures]) -> list[str]:
    """Return the table's rows; the baseline is the fastest plain pg_dump with a file no larger than gzip's."""
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
    arguments = pgbench.arguments(__doc__)
    compile_sources()
    lines = []
    for title, database, folder in pgbench.databases(arguments.scale):
        lines += rows_of(title, measure(database, folder, arguments.runs))
        print("\n".join(lines), flush=True)
    note = (
        f"Medians of {arguments.runs} interleaved runs, after one warm-up; {os.cpu_count()} cores that the server "
        f"shares, load average {os.getloadavg()[0]:.1f} at the end. migrator's time is that of the whole command: "
        "Python's start, the revision, the lock, the dump, reading it back (checksum and "
        "pg_restore), and publishing it; its backup is that without what comes before the dump. In bold: the fastest "
        "line by hand whose dump is no bigger than gzip's. COPY alone: one session sends the biggest "
        "table's rows to a client that throws them away; no dump of it through one session is faster.\n\n"
    )
    (RESULTS / "backup.md").write_text(note + "\n".join((*HEADER, *lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
