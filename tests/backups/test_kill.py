"""Killed at any instant: nothing looks whole and is not, the right name holds a whole database, a rerun finishes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.backups import pg_restore
from migrator.backups.storage.open import open_store
from tests.support import leaks
from tests.support.servers import Database

from .conftest import Workbench

Bench = Callable[..., Workbench]
ROOT = Path(__file__).resolve().parents[2]
ROWS = "CREATE TABLE t AS SELECT g, md5(g::text) AS x FROM generate_series(1, 30000) g; CREATE INDEX ON t (x)"
POINTS = [round(0.55 * (number / 25) ** 1.5, 3) for number in range(26)]


def start(bench: Workbench, verb: str, *more: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start the worker and return when it is about to begin."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.backups.worker", verb, str(bench.folder.parent), *more],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "src"),
            "DATABASE_URL": bench.database.url,
            "MIGRATOR_BACKUP_URL": bench.folder.as_uri(),
            "MIGRATOR_PG_BIN": str(bench.database.server.bin),
            **variables,
        },
        stdout=subprocess.PIPE,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"ready\n"
    return worker


def running(pid: int) -> bool:
    """Whether a process lives; one that waits for init to reap it does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_after(worker: subprocess.Popen[bytes], number: int, seconds: float) -> int:
    """Send a signal after a while; return the exit status when the worker and all its children have gone."""
    time.sleep(seconds)
    tree = leaks.process_tree(worker.pid)
    worker.send_signal(number)
    worker.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in tree[1:]):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.01)
    return worker.returncode


def nobody_is_left(bench: Workbench) -> None:
    deadline = time.monotonic() + 60
    while bench.sessions():
        assert time.monotonic() < deadline, bench.sessions()
        time.sleep(0.02)


SHAPES = {
    "custom": ({"MIGRATOR_BACKUP_FORMAT": "custom", "MIGRATOR_RESTORE_JOBS": "1"}, POINTS),
    "directory": (
        {"MIGRATOR_BACKUP_FORMAT": "directory", "MIGRATOR_BACKUP_JOBS": "2", "MIGRATOR_RESTORE_JOBS": "2"},
        POINTS[::2],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_backup(number: int, shape: str, database: Database, workbench: Bench) -> None:
    database.execute(ROWS)
    variables, points = SHAPES[shape]
    bench = workbench(database, **variables)
    bench.folder.mkdir()
    codes = set()
    for seconds in points:
        codes.add(kill_after(start(bench, "back_up", **variables), number, seconds / 2))
        nobody_is_left(bench)
        for backup in open_store(bench.settings.backup_url).backups():
            assert pg_restore.checksum_of(Path(backup.place)) == (backup.sha256, backup.size_bytes)
        if number == signal.SIGTERM:
            assert not [name for name in bench.files() if name.endswith(".part")]
    whole = bench.back_up()
    assert whole.tables["public.t"].rows == 30000
    assert not [name for name in bench.files() if name.endswith(".part")]
    assert codes & {23, -9}, "no kill came in time"
    assert codes <= {0, 23 if number == signal.SIGTERM else -9}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_restore(number: int, shape: str, database: Database, workbench: Bench) -> None:
    database.execute(ROWS)
    before = database.dump()
    variables, points = SHAPES[shape]
    bench = workbench(database, **variables)
    assert bench.back_up().dump_format == shape
    database.execute("DELETE FROM t WHERE g % 2 = 0")
    broken = database.dump()
    swapped, codes = False, set()
    for seconds in points:
        codes.add(kill_after(start(bench, "restore", **variables), number, seconds))
        nobody_is_left(bench)
        now = database.dump()
        assert now in ((before,) if swapped else (before, broken))
        swapped = swapped or now == before
        half = {name for name in bench.databases() if "_restore_" in name}
        if number == signal.SIGTERM:
            assert half == set()
    assert bench.restore().rows == 30000
    assert database.dump() == before
    assert codes & {23, -9}, "no kill came in time"
    assert codes <= {0, 23 if number == signal.SIGTERM else -9}
