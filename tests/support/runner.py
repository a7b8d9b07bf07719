"""Run the real `migrator` command in a process of its own, and look at everything it lets out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import leaks
from tests.support.servers import Database

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180.0
"""Seconds after which what is waited for counts as never coming: many times what a busy machine takes."""


def migrator_command() -> list[str]:
    """Return the installed `migrator` script, as a user would run it."""
    script = Path(sys.executable).with_name("migrator")
    return [str(script)] if script.exists() else [sys.executable, "-m", "migrator"]


@dataclass(frozen=True)
class Result:
    """What a finished command left: its exit code and what it printed."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def answer(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.stdout)

    @property
    def logs(self) -> list[dict[str, Any]]:
        """The lines of stderr that are JSON objects."""
        parsed = (_object(line) for line in self.stderr.splitlines())
        return [line for line in parsed if line is not None]

    def __str__(self) -> str:
        command = " ".join(("migrator", *self.arguments))
        return f"$ {command}\nexit code {self.code} after {self.seconds:.2f} s\n{self.stdout}{self.stderr}"


def _object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


class Running:
    """A `migrator` that is still at work; its output goes to files, so that it can never block on a pipe."""

    def __init__(
        self, command: Sequence[str], arguments: tuple[str, ...], cwd: Path, env: Mapping[str, str], out: Path
    ) -> None:
        self.arguments = arguments
        out.mkdir(parents=True)
        self._stdout, self._stderr = out / "stdout", out / "stderr"
        self._began = time.monotonic()
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self._watch = leaks.ArgumentWatch(self.process.pid)
        self.result: Result | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout.read_text(errors="surrogateescape")

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return self._stderr.read_text(errors="surrogateescape")

    def send(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the command itself (not to what it started)."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as `kill -9` does, its children left to find out."""
        self.process.kill()

    def wait_for(self, text: str | Callable[[], object], *, ended: bool = False) -> None:
        """Wait until `text` stands in its output, or until the given function returns something true.

        Fails where the process ends first, unless it has `ended` already and what it did is waited for.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            over = not ended and self.process.poll() is not None  # before the look: its last words count
            late = time.monotonic() > deadline
            if text() if callable(text) else text in self.stdout + self.stderr:
                return
            if over or late:
                raise AssertionError(f"{text!r} did not come within {PATIENCE} s:\n{self.finish(1)}")
            time.sleep(0.02)

    def finish(self, timeout: float = PATIENCE) -> Result:
        """Wait for its end; kill all of it and fail if it takes longer than `timeout` seconds."""
        if self.result is not None:
            return self.result
        late = False
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
            self._kill_all()
        self._watch.finish()
        seconds = time.monotonic() - self._began
        self.result = Result(self.arguments, self.process.returncode, self.stdout, self.stderr, seconds)
        if late:
            raise AssertionError(f"still running after {timeout} s:\n{self.result}")
        return self.result

    def leaks(self) -> list[str]:
        """Return a sentence for each place in its output or arguments that showed the planted password."""
        found = self._watch.leaks()
        for name, text in (("stdout", self.stdout), ("stderr", self.stderr)):
            line = leaks.find(text)
            if line is not None:
                found.append(f"{name}: {line[:300]}")
        return found

    def _kill_all(self) -> None:
        for pid in reversed(leaks.process_tree(self.process.pid)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(PATIENCE)

    def end(self) -> None:
        """Kill what is left of it: the command if it still runs, and what it started and left behind."""
        if self.process.poll() is None:
            self._kill_all()
        self.finish()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Runner:
    """Start `migrator` with a clean environment; remember every run, to search them all for the password."""

    def __init__(self, tmp_path: Path, command: Sequence[str] | None = None) -> None:
        self.command = list(command or migrator_command())
        self.backups = tmp_path / "backups"
        self.runs: list[Running] = []
        self._tmp_path = tmp_path
        self._watched: set[Path] = {self.backups}

    def watch(self, *paths: Path) -> None:
        """Search these files or folders too, once the test is over."""
        self._watched.update(paths)

    def environment(self, database: Database | None, extra: Mapping[str, str | None]) -> dict[str, str]:
        """Return what a run gets: ours, a backup folder, the database, then `extra` (None takes away)."""
        env: dict[str, str | None] = {**os.environ, "MIGRATOR_BACKUP_URL": self.backups.as_uri()}
        if not Path(self.command[0]).name.startswith("migrator"):  # `-m migrator` without an installation
            env["PYTHONPATH"] = str(ROOT / "src")
        if database is not None:
            env |= {"MIGRATOR_DATABASE_URL": database.url, "MIGRATOR_PG_BIN": str(database.server.bin)}
        return {name: value for name, value in {**env, **extra}.items() if value is not None}

    def start(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        database: Database | None = None,
    ) -> Running:
        """Start the command and return while it runs."""
        folder = cwd or self._tmp_path
        environment = self.environment(database, env or {})
        for name in ("MIGRATOR_REPORT_FILE", "MIGRATOR_TERMINATION_LOG"):
            if name in environment:
                self.watch(folder / environment[name])
        out = self._tmp_path / "runs" / str(len(self.runs))
        run = Running(self.command, arguments, folder, environment, out)
        self.runs.append(run)
        return run

    def __call__(self, *arguments: str, timeout: float = PATIENCE, **options: Any) -> Result:
        """Run the command to its end; `cwd`, `env` and `database` are those of `start`."""
        return self.start(*arguments, **options).finish(timeout)

    def close(self) -> None:
        """End what still runs, then fail if any run gave the planted password away."""
        for run in self.runs:
            run.end()
        found = [leak for run in self.runs for leak in run.leaks()]
        found += leaks.find_in_files(self._watched)
        assert not found, "the planted password got out:\n" + "\n".join(found)
