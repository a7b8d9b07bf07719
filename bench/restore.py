"""Time a restore of a pgbench database: migrator (which checks, compares and swaps) against plain ``pg_restore -j``.

    bin/setup && .venv/bin/python -m bench.restore [--runs 5] [--scale 135]

Both run in turn on the server's machine, and read the same backup with the same number of workers.
The plain run makes a database, restores and analyses it, as migrator does; it checks and compares nothing.
Writes ``bench/results/restore.md``.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from tests.support.servers import Database

from bench import pgbench
from bench.measure import RESULTS, Program, clean_environment, compile_sources
from bench.pgbench import MIGRATOR

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
    arguments = pgbench.arguments(__doc__)
    compile_sources()
    lines = []
    for title, database, folder in pgbench.databases(arguments.scale):
        by_hand, ours, jobs = measure(database, folder, arguments.runs)
        cells = [title, str(jobs), f"{by_hand:.2f}", f"{ours:.2f}", f"{ours / by_hand:.2f}", str(AT_MOST)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    note = (
        f"Medians of {arguments.runs} interleaved runs, after one warm-up; {os.cpu_count()} cores that the server "
        f"shares, load average {os.getloadavg()[0]:.1f} at the end. migrator's time is that of the whole command: "
        "Python's start, the checksum of the archive, pg_restore, counting and analysing, the swap, and the row in "
        "the ledger.\n\n"
    )
    (RESULTS / "restore.md").write_text(note + "\n".join((*HEADER, *lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
