"""The bar on a terminal: what the server says of a long statement, and who is in the way of it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.runtime.output.progress import Progress
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner, migrator_command
from tests.support.servers import Database

Project = Callable[..., Path]


class Terminal:
    """A pseudo-terminal, read as it is written to."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._master, 65536)
            except OSError:  # the last writer is gone
                return
            if not part:
                return
            self._parts.append(part)

    @property
    def text(self) -> str:
        return b"".join(self._parts).decode(errors="replace")

    def close(self) -> str:
        """Return all that was written."""
        os.close(self.slave)
        self._thread.join(60)
        os.close(self._master)
        return self.text


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def start(runner: Runner, folder: Path, database: Database, terminal: Terminal) -> subprocess.Popen[bytes]:
    env = runner.environment(database, {"MIGRATOR_BACKUP": "off", "COLUMNS": "200", "TERM": "xterm"})
    return subprocess.Popen([*migrator_command(), "upgrade"], cwd=folder, env=env, stderr=terminal.slave)


def upgrade_to_one(runner: Runner, folder: Path, database: Database) -> None:
    result = runner("upgrade", "r001", cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})
    assert result.code == 0, result


@pytest.mark.parametrize("concurrently", ["", "CONCURRENTLY "])
def test_the_servers_progress_stands_on_the_bar(
    database: Database, project: Project, run_migrator: Runner, terminal: Terminal, concurrently: str
) -> None:
    build = f"op.execute('CREATE INDEX {concurrently}slow_index ON t1 (slow(id))')"
    if concurrently:
        build = f"with op.get_context().autocommit_block():\n    {build}"
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", build, "", message="an index")])
    upgrade_to_one(run_migrator, folder, database)
    database.execute(
        "CREATE FUNCTION slow(n int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(0.004); RETURN n; END';"
        "INSERT INTO t1 SELECT n, repeat('x', 400) FROM generate_series(1, 600) n; ANALYZE t1"
    )
    run = start(run_migrator, folder, database, terminal)
    assert run.wait(180) == 0
    shown = terminal.close()
    bars = re.findall(r"\r\x1b\[K\[[#.]{24}\] 0/1 \(building index[^,]*, (\d+) %\) r002 an index", shown)
    assert bars, shown
    assert [int(percent) for percent in bars] == sorted(int(percent) for percent in bars)
    assert any(0 < int(percent) < 100 for percent in bars), bars
    assert re.search(r"the server: building index[^,]*, \d+ %", shown)


def test_who_is_in_the_way_stands_on_the_bar(
    database: Database, project: Project, run_migrator: Runner, terminal: Terminal
) -> None:
    alter = Revision("r002", "r001", "ALTER TABLE t1 ADD COLUMN b int", "")
    folder = project(revisions=[*linear_history(1), alter])
    upgrade_to_one(run_migrator, folder, database)
    reader = database.connect()
    reader.cursor().execute("SELECT * FROM t1")
    run = start(run_migrator, folder, database, terminal)
    deadline = time.monotonic() + 60
    while "(waiting for AccessExclusiveLock on t1) r002" not in terminal.text and time.monotonic() < deadline:
        time.sleep(0.05)
    reader.close()
    assert run.wait(180) == 0
    shown = terminal.close()
    assert "[........................] 0/1 (waiting for AccessExclusiveLock on t1) r002" in shown
    for line in re.split(r"[\r\n]+", shown):
        assert not re.search(r"\] \d/\d .*(?:blocked by|applied 1 of 1)", line), "a log line beside the bar"


def test_a_note_is_drawn_once_and_goes_with_its_revision(terminal: Terminal) -> None:
    with os.fdopen(os.dup(terminal.slave), "w") as stream:
        bar = Progress(2, stream, enabled=True)
        bar.note("nothing runs")
        bar.draw(0, "r001")
        bar.note("copying, 10 %")
        bar.note("copying, 10 %")
        bar.clear()
        bar.note("copying, 10 %")
        bar.draw(1, "r002")
        bar.close()
        bar.draw(2, "")
        bar.note("late")
    frames = [frame for frame in terminal.close().split("\r\x1b[K") if frame]
    dots, half = "." * 24, "#" * 12 + "." * 12
    assert frames == [
        f"[{dots}] 0/2 r001",
        f"[{dots}] 0/2 (copying, 10 %) r001",
        f"[{dots}] 0/2 (copying, 10 %) r001",
        f"[{half}] 1/2 r002",
    ]
