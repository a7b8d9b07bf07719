"""Inject one fault after another, check the invariants after each, and let the next run finish the work."""

from __future__ import annotations

import contextlib
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import APPLY_LOCK, LOCK_CLASS, RUN_LOCK
from tests.chaos import invariants
from tests.chaos.injections import NETWORK, SIGNALS, Injection, injection
from tests.chaos.invariants import must
from tests.chaos.world import UNDO_BY_HAND, World, world
from tests.support.forked import Forked
from tests.support.proxy import Proxy
from tests.support.servers import Database

WORKERS = 3
PATIENCE = 60.0
"""Seconds until the locks of a dead run are gone: the server looks after its client every 2 s while it works."""


@dataclass
class Report:
    """What came of a campaign."""

    seed: int
    done: int = 0
    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    missed: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.done} injections, {len(self.failures)} failures;"]
        lines.append(f"{self.missed} came after the run's end")
        by_fault: dict[str, dict[int, int]] = {}
        for (fault, code), count in sorted(self.codes.items()):
            by_fault.setdefault(fault, {})[code] = count
        lines += [f"  {fault}: {codes}" for fault, codes in by_fault.items()]
        return "\n".join([*lines, *self.failures])


def campaign(
    seed: int, *, injections: int = 0, seconds: float = 0, only: int | None = None, workers: int = WORKERS
) -> Report:
    """Run the injections of a seed: a number of them, or for some time, or one alone."""
    report = Report(seed)
    deadline = time.monotonic() + seconds if seconds else float("inf")
    numbers = iter([only] if only is not None else range(injections or 10**9))
    mutex = threading.Lock()

    def work(place: Path) -> None:
        with world(place / "world") as made:
            while time.monotonic() < deadline:
                with mutex:
                    number = next(numbers, None)
                if number is None:
                    return
                _one(made, injection(seed, number), place / str(number), report, mutex)

    with tempfile.TemporaryDirectory(prefix="migrator-chaos-") as folder:
        threads = [
            threading.Thread(target=work, args=(Path(folder) / f"worker{number}",))
            for number in range(1 if only is not None else workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return report


def _one(made: World, what: Injection, place: Path, report: Report, mutex: threading.Lock) -> None:
    """Do one injection, and keep what came of it."""
    trial = Trial(made, what, place)
    problem = ""
    try:
        trial.run()
    except Exception as error:  # noqa: BLE001 - kept for the report, and the next injection goes on
        problem = f"{type(error).__name__}: {error}"
    finally:
        trial.clean()
    with mutex:
        report.done += 1
        report.missed += trial.missed
        report.codes[what.fault, trial.code if trial.code is not None else 999] += 1
        if problem:
            report.failures.append(
                f"\n=== seed {report.seed}, {what}\n{problem}\n"
                + "\n".join(f"--- run {number}\n{run}" for number, run in enumerate(trial.runs, start=1))
            )


class Trial:
    """One run that is hit, and the two that come after it."""

    def __init__(self, made: World, what: Injection, place: Path) -> None:
        self.world, self.what, self.place = made, what, place
        self.backups = place / "backups"
        self.database: Database = made.database()
        self.runs: list[Forked] = []
        self.code: int | None = None
        self.missed = False
        self._proxy: Proxy | None = None

    def run(self) -> None:
        """Hit a run, check, let the next one finish, check, and let a third find nothing to do."""
        victim = self._victim()
        self.code = victim.code
        invariants.code_is_promised(self.what, victim.finish(1), victim.stderr)
        if not self.what.at_once:
            self._look(victim)
        second = self._start({})
        if second.finish(300) == ExitCode.UNSAFE:
            second = self._type_what_it_says(second)
        must(second.finish(300) == 0, f"the second run ended with {second.code}")
        if self.what.at_once:
            invariants.backups_whole(self.backups)
        invariants.nothing_held(self.database, PATIENCE)
        invariants.complete(self.database, whole=self.what.whole)
        before = self.database.psql("SELECT count(*) FROM migrator_ledger")
        third = self._start({})
        must(third.finish(300) == 0, f"the third run ended with {third.code}")
        must("Nothing to do" in third.stdout, "the third run did something")
        must(
            self.database.psql("SELECT count(*) FROM migrator_ledger") == before,
            "the third run wrote the ledger",
        )

    def _type_what_it_says(self, refused: Forked) -> Forked:
        """Do what a run says that does not go on by itself, to the letter; returns the run that then does."""
        _, _, next_step = refused.stderr.splitlines()[-1].partition(" Next: ")
        commands = [found.split() for found in re.findall(r"`migrator ([^`]+)`", next_step)]
        restores = [command for command in commands if command[0] == "restore"]
        again = [command for command in commands if "--retry" in command]
        must(again and bool(restores) == self.what.backup, f"it says what cannot be typed: {next_step}")
        if restores and self.what.number % 2:
            must(self._start({}, *restores[0]).finish(300) == 0, "the restore that it named failed")
            return self._start({})
        self.database.psql(UNDO_BY_HAND)
        return self._start({}, *again[0])

    def _look(self, victim: Forked) -> None:
        invariants.nothing_held(self.database, PATIENCE)
        reached = invariants.position(self.database, whole=self.what.whole)
        invariants.told_the_truth(victim.finish(1), victim.stderr, reached, self.database)
        invariants.backups_whole(self.backups)

    def _victim(self) -> Forked:
        """Start a run, do to it what is to be done, and wait for its end."""
        env = {}
        if self.what.fault in NETWORK:
            self._proxy = Proxy(self.world.server.port)
            env = self._proxy.environment(self.database)
        held = {"lock": _LOCK, "lock wait": _BUSY}.get(self.what.moment)
        holder = self._hold(held) if held else None
        run = self._start(env)
        while (
            self.what.lines and run.code is None and not any(line in run.stderr for line in self.what.lines)
        ):
            time.sleep(0.002)
        if self.what.moment == "index build" and not self.what.whole:  # which other transactions hold up
            holder = self._hold("LOCK TABLE items IN ROW EXCLUSIVE MODE")
            _until(lambda: run.code is not None or self.database.psql(_BUILDING), 3)
        time.sleep(self.what.delay)
        self.missed = run.code is not None
        with contextlib.closing(holder) if holder else contextlib.nullcontext():
            self._inject(run)
        run.finish(300)
        if self._proxy:
            self._proxy.resume()
        return run

    def _hold(self, sql: str) -> Any:
        """Hold a lock that the run will have to wait for."""
        session = self.database.connect(application_name="rival")
        session.cursor().execute(sql)
        return session

    def _start(self, env: dict[str, str], *command: str) -> Forked:
        backup = {
            "MIGRATOR_BACKUP_URL": self.backups.as_uri(),
            "MIGRATOR_BACKUP": "auto" if self.what.backup else "off",
        }
        out = self.place / f"run{len(self.runs) + 1}"
        run = self.world.run(self.database, self.what.env_file, {**backup, **env}, out, *command)
        self.runs.append(run)
        return run

    def _inject(self, run: Forked) -> None:
        fault, proxy, server = self.what.fault, self._proxy, self.world.server
        if fault in SIGNALS:
            run.send(signal.Signals[fault])
        elif fault.startswith("terminate "):
            ends = _TERMINATE[fault.removeprefix("terminate ")]
            self.missed |= not _until(lambda: self.database.psql(ends), 1.5)
        elif fault.startswith("restart "):
            server.restart(fault.removeprefix("restart "))
        elif fault == "busy":
            _until(lambda: run.code is not None, self.what.lasts)
        elif proxy is not None:
            _hit(proxy, fault, self.what.lasts, run)

    def clean(self) -> None:
        """End what still runs."""
        for run in self.runs:
            run.end()
        if self._proxy:
            self._proxy.close()
        server = self.world.server
        kept = "SELECT datname::text FROM pg_database WHERE datname ~ ('^' || %s || '(_|$)')"
        for (name,) in server.psql(kept, [self.database.name]):  # a restore sets one aside
            server.drop_database(name)


def _until(look: Callable[[], object], seconds: float) -> bool:
    """Look until there is something to see, or the time is over."""
    deadline = time.monotonic() + seconds
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(seen)


def _hit(proxy: Proxy, fault: str, lasts: float, run: Forked) -> None:
    """Do something to the network."""
    actions: dict[str, Callable[[], None]] = {
        "drop": proxy.drop,
        "reset": proxy.reset,
        "refuse": _refuse(proxy),
    }
    actions.get(fault, proxy.stall)()
    if fault == "stall" or fault == "refuse":
        time.sleep(lasts)
        proxy.resume()
    elif fault == "cut":
        run.finish(300)


def _refuse(proxy: Proxy) -> Callable[[], None]:
    def refuse() -> None:
        proxy.refuse()
        proxy.drop()

    return refuse


_LOCK = f"SELECT pg_advisory_lock({LOCK_CLASS}, {RUN_LOCK})"
_BUSY = "LOCK TABLE busy IN ACCESS SHARE MODE"
_BUILDING = "SELECT 1 FROM pg_stat_progress_create_index WHERE datname = current_database()"
_OURS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity a WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND application_name <> 'rival'"
)
_HOLDS = (
    f" AND {{}} (SELECT 1 FROM pg_locks l WHERE l.pid = a.pid AND locktype = 'advisory' AND classid = {LOCK_CLASS}"
    " AND granted AND objid IN ({}))"
)
_TERMINATE = {
    "control": _OURS + _HOLDS.format("EXISTS", RUN_LOCK),
    "applying": _OURS + _HOLDS.format("EXISTS", APPLY_LOCK),
    "dump": _OURS + _HOLDS.format("NOT EXISTS", f"{RUN_LOCK}, {APPLY_LOCK}"),
    "all": _OURS,
}
"""SQL that ends connections of the run, and returns no row while there is none."""
