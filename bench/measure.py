"""Measure programs against each other on the same work: in turn (A B A B ...), medians, and the ratio of the medians.

Machines are noisy and shared, so a single time means little: use the ratio of the medians of interleaved
runs.  On a busy machine, use the ratio of the CPU times (the program's, not the server's).
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.servers import Database

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
Prepare = Callable[[], Mapping[str, str]]

HEADER = (
    "| work | with | s | migrator s | ratio | at most | CPU s | migrator CPU s | ratio"
    " | MB | migrator MB | ratio | at most |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


class Figures(NamedTuple):
    """Wall and CPU seconds of a run, and its peak memory in MB."""

    seconds: float
    cpu: float
    memory: float


@dataclass(frozen=True)
class Program:
    """A command and its working directory; ``prepare`` is called before each run and returns its variables."""

    command: Sequence[str]
    folder: Path
    prepare: Prepare

    def run(self) -> Figures:
        """Run it; raises SystemExit if it fails."""
        environment = {**clean_environment(), **self.prepare()}
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *self.command]
        done = subprocess.run(launcher, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(self.command)} failed in {self.folder}: {done.stderr[-2000:]}")
        code, seconds, cpu, kilobytes = done.stdout.split()
        if int(code) != 0:
            raise SystemExit(f"{' '.join(self.command)} ended with {code} in {self.folder}")
        return Figures(float(seconds), float(cpu), int(kilobytes) / 1024)


# A process begins with the peak memory of the one that forked it: what starts the program must be a small one.
_LAUNCHER = """
import os, sys, time
started = time.monotonic()
child = os.fork()
if not child:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
seconds = time.monotonic() - started
print(os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""


@dataclass(frozen=True)
class Limit:
    """The limits of the ratios; None without a promise."""

    seconds: float | None = None
    memory: float | None = None


def clean_environment() -> dict[str, str]:
    """Return our environment without variables that make Python compile its sources on each start."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def compile_sources() -> None:
    """Compile migrator's sources as an installation does."""
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", str(ROOT / "src")], check=True, env=clean_environment()
    )


def compare(
    work: str, runs: int, migrator: Program, others: Mapping[str, tuple[Program, Limit]]
) -> list[str]:
    """Run migrator and the others in turn, ``runs`` times after one round of warm-up; return a row for each other."""
    programs = {"migrator": migrator, **{name: program for name, (program, _) in others.items()}}
    found: dict[str, list[Figures]] = {name: [] for name in programs}
    for number in range(runs + 1):
        for name, program in programs.items():
            figures = program.run()
            if number:
                found[name].append(figures)
    middle = {name: Figures(*map(statistics.median, zip(*rows, strict=True))) for name, rows in found.items()}
    ours = middle["migrator"]
    rows = []
    for name, (_, limit) in others.items():
        other = middle[name]
        cells = [work, name]
        cells += [f"{other.seconds:.3f}", f"{ours.seconds:.3f}", f"{ours.seconds / other.seconds:.3f}"]
        cells += [_text(limit.seconds)]
        cells += [f"{other.cpu:.3f}", f"{ours.cpu:.3f}", f"{ours.cpu / other.cpu:.3f}"]
        cells += [f"{other.memory:.0f}", f"{ours.memory:.0f}", f"{ours.memory / other.memory:.2f}"]
        cells += [_text(limit.memory)]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def _text(limit: float | None) -> str:
    return "" if limit is None else f"{limit:g}"


def write(name: str, runs: int, rows: Sequence[str], note: str) -> None:
    """Write a table, and the machine it was measured on, to ``bench/results/``."""
    RESULTS.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    title = (
        f"Medians of {runs} interleaved runs, after one warm-up; Python {platform.python_version()},"
        f" {os.cpu_count()} cores, load average {load:.1f} at the end. {note}\n\n"
    )
    (RESULTS / f"{name}.md").write_text(title + "\n".join([*HEADER, *rows]) + "\n", encoding="utf-8")


def variables(database: Database) -> dict[str, str]:
    """Return the environment of a run on a database."""
    return {"DATABASE_URL": database.url, "MIGRATOR_BACKUP": "off"}
