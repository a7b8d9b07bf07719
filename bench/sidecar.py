"""Measure a sidecar after its run: its memory, and the time of a query of the version rows.

    bin/setup && .venv/bin/python -m bench.sidecar [--revisions 500]

Beside it is the peak of a ``migrator upgrade`` process: one process for both would keep that memory.
Writes ``bench/results/sidecar.md``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.support.installations import binaries
from tests.support.projects import linear_history, write_project
from tests.support.runner import Runner
from tests.support.servers import running
from tests.support.sidecars import start

from bench.measure import RESULTS, Program, compile_sources

LOOKS = 50
HEADER = (
    "| revisions | `migrator upgrade`, peak MB | sidecar, resident MB | of that its own MB |"
    " once /metrics was asked for, resident MB | of that its own MB | a look, ms of CPU |",
    "|---|---|---|---|---|---|---|",
)


def _megabytes(pid: int, name: str) -> float:
    """Return a sum of /proc/PID/smaps_rollup in MB."""
    found = re.findall(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return sum(int(kilobytes) for kilobytes in found) / 1024


def _memory(pid: int) -> str:
    return f"{_megabytes(pid, 'Rss'):.0f} | {_megabytes(pid, 'Private_(?:Clean|Dirty)'):.0f}"


def measure(revisions: int, folder: Path) -> str:
    """Return a row of the table."""
    with running(binaries("debian")) as server:
        project = write_project(folder / "project", revisions=linear_history(revisions))
        first, second = server.create_database(), server.create_database()
        runner = Runner(folder)
        environment = runner.environment(first, {"MIGRATOR_BACKUP": "off"})
        command = [str(Path(sys.executable).with_name("migrator")), "upgrade"]
        peak = Program(command, project, lambda: environment).run().memory
        one = start(runner, project, second)
        one.wait_for(lambda: one.ask().status == 200, "ready")
        quiet = _memory(one.running.pid)
        before = one.metrics()
        looks = before["migrator_checks_total"] + LOOKS
        while one.metrics()["migrator_checks_total"] < looks:
            time.sleep(1)
        after = one.metrics()
        asked = _memory(one.running.pid)
        one.stop()
        runner.close()
    name = "process_cpu_seconds_total"
    made = after["migrator_checks_total"] - before["migrator_checks_total"]
    look = 1000 * (after[name] - before[name]) / made
    return f"| {revisions} | {peak:.0f} | {quiet} | {asked} | {look:.0f} |"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revisions", type=int, nargs="+", default=[3, 500])
    sizes = parser.parse_args().revisions
    compile_sources()
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            os.chmod(folder, 0o755)  # noqa: S103 - the server runs under an account of its own
            rows.append(measure(size, Path(folder)))
    text = "\n".join(["# The sidecar after its run", "", "`python -m bench.sidecar`", "", *HEADER, *rows, ""])
    print(text)
    (RESULTS / "sidecar.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
