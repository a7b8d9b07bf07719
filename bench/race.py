"""Time how long many waiting runs take to exit after the run that applied.

    bin/setup && .venv/bin/python -m bench.race [--runs 10] [--racers 50]

All start at once on a database with pending revisions.  The last revision waits until every other run waits for the
run lock.  So the time is that from the exit of the run that applied to the last exit, without the start of fifty
interpreters.  Writes ``bench/results/race.md``.
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
from pathlib import Path

from tests.support.installations import embedded
from tests.support.projects import Revision, linear_history, write_project
from tests.support.servers import Database, running

RESULTS = Path(__file__).parent / "results"
GATE = 42
HELD = (
    f"DO $$ BEGIN WHILE NOT pg_try_advisory_lock_shared({GATE}) LOOP PERFORM pg_sleep(0.02); END LOOP; END $$"
)
TARGET = 1.5  # seconds


def race(folder: Path, database: Database, racers: int) -> tuple[float, float]:
    """Start the racers; return the seconds to the last exit from the exit of the one that applied, and from the
    moment when its last revision could end: on few cores the others already leave while it still exits.
    """
    command = [str(Path(sys.executable).with_name("migrator")), "upgrade"]
    environment = {**os.environ, "DATABASE_URL": database.url, "MIGRATOR_BACKUP": "off"}
    gate = database.connect()
    gate.autocommit = True
    gate.cursor().execute("SELECT pg_advisory_lock(%s)", (GATE,))
    with tempfile.TemporaryDirectory() as place:
        logs = [Path(place) / str(number) for number in range(racers)]
        children = {}
        for path in logs:
            with path.open("wb") as log:
                child = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=log
                )
            children[child.pid] = (child, path)
        _until_all_wait(logs, racers - 1)
        gate.close()
        opened = time.monotonic()
        ended = {}
        while len(ended) < racers:
            pid, status = os.wait()
            ended[pid] = time.monotonic()
            children[pid][0].returncode = os.waitstatus_to_exitcode(status)
        failed = [path.read_text() for child, path in children.values() if child.returncode != 0]
        if failed:
            raise SystemExit(f"{len(failed)} of {racers} runs failed; the first:\n{failed[0]}")
        (winner,) = [
            pid for pid, (_, path) in children.items() if "waiting for the run lock" not in path.read_text()
        ]
    last = max(ended.values())
    return last - ended[winner], last - opened


def _until_all_wait(logs: list[Path], wanted: int) -> None:
    deadline = time.monotonic() + 180
    while sum("waiting for the run lock" in path.read_text() for path in logs) < wanted:
        if time.monotonic() > deadline:
            raise SystemExit("the runs did not come to wait within 180 s")
        time.sleep(0.1)
    time.sleep(1)  # the last one is past its first line of log, too


def main() -> None:
    """Race, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--racers", type=int, default=50)
    arguments = parser.parse_args()
    found = []
    settings = {"max_connections": "300"}
    with tempfile.TemporaryDirectory() as place, running(embedded(), settings=settings) as server:
        revisions = [*linear_history(20), Revision("r021", "r020", HELD)]
        folder = write_project(Path(place) / "project", revisions=revisions, env="own_variable")
        for number in range(arguments.runs + 1):
            database = server.create_database()
            figures = race(folder, database, arguments.racers)
            server.drop_database(database.name)
            print("{:.2f} s; {:.2f} s".format(*figures), "" if number else "(not counted)", flush=True)
            if number:  # the first one warms caches
                found.append(figures)
    header = "| work | median s | slowest s | target s |\n|---|---|---|---|\n"
    rows = (
        ("from the exit of the one that applied to the last exit", [item[0] for item in found], str(TARGET)),
        ("from the end of the last revision to the last exit", [item[1] for item in found], ""),
    )
    table = header + "".join(
        f"| {arguments.racers} racing runs: {what} | {statistics.median(times):.2f} | {max(times):.2f} | {target} |\n"
        for what, times, target in rows
    )
    print(table)
    RESULTS.mkdir(exist_ok=True)
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    text = f"{arguments.runs} races after one to warm up; {machine}.\n\n{table}"
    (RESULTS / "race.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
