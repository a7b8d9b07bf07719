"""Time a restore of a pgbench database: migrator (checked, compared, swapped in) against ``pg_restore -j`` by hand.

    bin/setup && .venv/bin/python -m bench.restore [--runs 5] [--scale 135]

Scale 135 is 2 GB.  Both read the same backup, with as many workers, on the same machine as the server, in turn.
pg_restore by hand makes a database, restores, and analyses it, as migrator does; it checks and compares nothing.
Writes ``bench/results/restore.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.support.installations import binaries
from tests.support.projects import linear_history, write_project
from tests.support.servers import Database, running

from bench.backup import fill
from bench.measure import RESULTS, Program, clean_environment, compile_sources

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
AT_MOST = 1.15
BY_HAND = (
    'createdb -T template0 by_hand && pg_restore -j "$JOBS" --exit-on-error -d by_hand "$DUMP"'
    " && psql -q -d by_hand -c ANALYZE"
)
HEADER = ("| database | workers | pg_restore s | migrator s | ratio | at most |", "|---|---|---|---|---|---|")


def measure(database: Database, folder: Path, runs: int) -> tuple[float, float, int]:
    """Restore ``runs`` times each, in turn, after a warm-up; returns medians in seconds, and the workers."""
    backups, jobs = folder / "backups", min(8, os.cpu_count() or 1)
    environment = database.environment() | {
        "PATH": f"{database.server.bin}:{os.environ['PATH']}",
        "DATABASE_URL": database.url,
        "MIGRATOR_BACKUP_URL": backups.as_uri(),
        "MIGRATOR_PG_BIN": str(database.server.bin),
        "MIGRATOR_LOG_LEVEL": "warning",
        "MIGRATOR_LEDGER": "off",
        "JOBS": str(jobs),
    }
    Program([MIGRATOR, "backup"], folder, lambda: clean_environment() | environment).run()
    (dump,) = (path for path in backups.iterdir() if path.suffix in (".dump", ".dir"))
    environment["DUMP"] = str(dump)

    def prepare() -> dict[str, str]:
        for (name,) in database.server.psql(
            "SELECT datname::text FROM pg_database WHERE datname = 'by_hand' OR datname LIKE %s",
            [database.name + "\\_before\\_%"],
        ):
            database.server.drop_database(name)
        database.server.psql("CHECKPOINT")
        return environment

    commands = {"migrator": [MIGRATOR, "restore", "latest", "--yes"], "by hand": ["sh", "-c", BY_HAND]}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(runs + 1):
        for name, command in commands.items():
            seconds = Program(command, folder, prepare).run().seconds
            if number:
                found[name].append(seconds)
    return statistics.median(found["by hand"]), statistics.median(found["migrator"]), jobs


def main() -> None:
    """Run the comparison and write the table."""
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
            by_hand, ours, jobs = measure(database, folder, arguments.runs)
            cells = [f"pgbench, scale {arguments.scale}, {title}", str(jobs), f"{by_hand:.2f}", f"{ours:.2f}"]
            lines.append(f"| {' | '.join((*cells, f'{ours / by_hand:.2f}', str(AT_MOST)))} |")
            print(lines[-1], flush=True)
            for (name,) in server.psql("SELECT datname::text FROM pg_database WHERE datname LIKE 'b%%'"):
                server.drop_database(name)
            for path in (folder / "backups").iterdir():
                path.rename(Path(place) / path.name)
    note = (
        f"Medians of {arguments.runs} interleaved runs, after one warm-up; {os.cpu_count()} cores that the server "
        f"shares, load average {os.getloadavg()[0]:.1f} at the end. migrator's time is that of the whole command: "
        "Python's start, the checksum of the archive, pg_restore, counting and analysing, the swap, and the row in "
        "the ledger.\n\n"
    )
    (RESULTS / "restore.md").write_text(note + "\n".join((*HEADER, *lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
