"""Hold each query of a command, one after another, on a network that falls silent, and send a signal then.

    python -m tests.chaos.holding                      # every query of every command, some minutes
    python -m tests.chaos.holding upgrade restore      # ... of these

A first run of the command through a proxy lists what it sends: each distinct query is a site, as is each connection.
For each site, a run on a database of its own is held there: either the query never reaches the server, or its answer
never comes back.  Nothing else passes either, on no connection.  Then comes SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrator.outcome import ExitCode
from tests.support.installations import debian
from tests.support.outcomes import left_behind
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, write_project
from tests.support.proxy import Proxy
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server, running

LIMIT = 6.0
"""Seconds from the signal to the end; five are promised, and a container engine takes its time too."""
WORKERS = 4
_OF_A_PROGRAM = 12
"""Of the queries of pg_dump and pg_restore, which are not ours, every so many is a site."""

HISTORY = [
    Revision("r001", None, "CREATE TABLE items (id int PRIMARY KEY, total int)", "DROP TABLE items"),
    Revision(
        "r002", "r001", "INSERT INTO items SELECT n, n FROM generate_series(1, 50) n", "DELETE FROM items"
    ),
    Revision("r003", "r002", "ALTER TABLE items ADD COLUMN note text", "ALTER TABLE items DROP COLUMN note"),
    Revision("r004", "r003", "CREATE TABLE made (id int)", "DROP TABLE made"),
]


@dataclass(frozen=True)
class Scene:
    """A command, and what it finds: ``before`` are commands that are run first, undisturbed, on the same database."""

    arguments: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = (("upgrade", "r003"),)
    env: dict[str, str] = field(default_factory=dict)
    stays: bool = False
    """Whether it does not end by itself."""


_NO_BACKUP = {"MIGRATOR_BACKUP": "off"}
_BACKED_UP = (("upgrade", "r003"), ("backup",))
SCENES: dict[str, Scene] = {
    "nothing-to-do": Scene(("upgrade",), (("upgrade",),)),
    "upgrade": Scene(("upgrade",), env=_NO_BACKUP),
    "upgrade-with-backup": Scene(("upgrade",)),
    "upgrade-with-proof": Scene(("upgrade",), env={"MIGRATOR_BACKUP_VERIFY": "restore"}),
    "upgrade-in-window": Scene(("upgrade",), env={**_NO_BACKUP, "MIGRATOR_MAINTENANCE_WINDOW": "true"}),
    "downgrade": Scene(("downgrade", "-1"), env=_NO_BACKUP),
    "stamp": Scene(("stamp", "r002"), env=_NO_BACKUP),
    "status": Scene(("status",)),
    "check": Scene(("check",), (("upgrade",),)),
    "verify": Scene(("verify",), (("upgrade",),)),
    "ledger": Scene(("ledger",)),
    "backup": Scene(("backup",)),
    "prune": Scene(("prune", "--keep", "last=1"), _BACKED_UP),
    "verify-backup": Scene(("verify-backup", "latest", "--how", "restore"), _BACKED_UP),
    "restore": Scene(("restore", "latest", "--yes"), _BACKED_UP),
    "restore-beside": Scene(("restore", "latest", "--to", "beside_{database}"), _BACKED_UP),
    "restore-tables": Scene(("restore", "latest", "--table", "public.items"), _BACKED_UP),
    "repair": Scene(("repair", "--accept", "r002"), (("upgrade",), ("edit",))),
    "repair-schema": Scene(("repair", "--accept-schema"), (("upgrade",),)),
    "wait-for-current": Scene(("wait-for-current",), (("upgrade",),)),
    "sidecar": Scene(
        ("sidecar",),
        env={**_NO_BACKUP, "MIGRATOR_SIDECAR_LISTEN": "127.0.0.1:0", "MIGRATOR_SIDECAR_INTERVAL": "200ms"},
        stays=True,
    ),
}


class Sites:
    """What a command sends, as the proxy's watch: a list of sites, and at ``wanted`` everything is held."""

    def __init__(self, wanted: str = "", lost: str = "") -> None:
        self._wanted, self._lost = wanted, lost
        self._programs: set[int] = set()
        self._connected: set[int] = set()
        self._of_programs = 0
        self.found: list[str] = []
        self.held = threading.Event()

    def __call__(self, number: int, data: bytes) -> str:
        """Note one piece; see :data:`tests.support.proxy.Watch`."""
        site = self._site(number, data)
        if not site or self.held.is_set():
            return ""
        if site not in self.found:
            self.found.append(site)
        if site != self._wanted:
            return ""
        self.held.set()
        return self._lost

    def _site(self, number: int, data: bytes) -> str:
        if number not in self._connected:
            self._connected.add(number)
            return f"connection {len(self._connected)}"
        text = data[5:].decode(errors="replace")
        if text.startswith("SELECT pg_catalog.set_config('search_path', '', false)"):
            self._programs.add(number)
        if number in self._programs:
            self._of_programs += 1
            wanted = self._of_programs % _OF_A_PROGRAM == 1
            return f"program {self._of_programs}" if wanted and self._of_programs < 100 else ""
        if data[:1] not in (b"Q", b"P"):
            return ""
        text = re.sub(r"(?s)\$migrator\$.*?\$migrator\$|E?'[^']*'", "'...'", text.replace("\0", " "))
        text = re.sub(r'"test_[^"]*"', "the database", text)
        return " ".join(re.sub(r"\d+", "0", text).split())[:160]


@dataclass
class Outcome:
    """How one held run ended; ``problem`` is empty where all is as it must be."""

    scene: str
    site: str
    lost: str
    seconds: float = 0.0
    code: int = 0
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.scene}, {self.lost} lost, {self.code} after {self.seconds:.1f} s, {self.site}: {self.problem}"


class Stage:
    """Where scenes are played: a server, a folder, and databases that the commands before have been run on."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self._count = 0
        self._mutex = threading.Lock()
        self._preparing = threading.Lock()
        self._prepared: dict[tuple[tuple[str, ...], ...], str] = {}

    def sites(self, name: str) -> list[str]:
        """Return the sites of a scene, in the order in which they first come."""
        sites = Sites()
        with self._playing(name) as (database, runner, project, env):
            with Proxy(self.server.port, watch=sites) as proxy:
                run = runner.start(
                    *self._words(name, database),
                    cwd=project,
                    database=database,
                    env=env | proxy.environment(database),
                )
                if SCENES[name].stays:
                    run.wait_for("watching postgresql://")
                    run.send()
                result = run.finish()
            if result.code:
                raise AssertionError(f"{name} does not work by itself: {result}")
        return sites.found

    def hold(self, name: str, site: str, lost: str, *, again: bool = True) -> Outcome:
        """Hold one run at a site, end it, and look how that went; ``again`` lets another one finish the work."""
        outcome = Outcome(name, site, lost)
        try:
            self._hold(outcome, again=again)
        except AssertionError as error:  # it never ended
            outcome.problem = str(error)
        return outcome

    def _hold(self, outcome: Outcome, *, again: bool) -> None:
        name, site, lost = outcome.scene, outcome.site, outcome.lost
        sites = Sites(site, lost)
        with self._playing(name) as (database, runner, project, env):
            before = rows(database)
            with Proxy(self.server.port, watch=sites) as proxy:
                run = runner.start(
                    *self._words(name, database),
                    cwd=project,
                    database=database,
                    env=env | proxy.environment(database),
                )
                while not sites.held.wait(0.05) and run.process.poll() is None:
                    pass
                if not sites.held.is_set():
                    outcome.problem = "" if run.finish().code == 0 else f"not held: {run.finish()}"
                    return
                with Stopwatch() as watch:
                    run.send(signal.SIGTERM)
                    result = run.finish(60)
                outcome.seconds, outcome.code = watch.seconds, result.code
                problems = [] if watch.within(LIMIT) else [f"took {watch.seconds:.1f} s"]
            problems += told(result, env)
            if left := left_behind(database):
                problems.append(f"left on the server: {left}")
            problems += truthful(result, before, rows(database))
            if again and not problems and not SCENES[name].stays:
                finished = runner(*self._words(name, database), cwd=project, database=database, env=env)
                # What a run before has done already may be refused, such as a schema that is there.
                if finished.code not in (0, *({43, 31} if result.code >= 40 else ())):
                    problems.append(f"the next run does not end well: {finished}")
            if problems:
                problems.append(str(result))
            outcome.problem = "; ".join(problems)

    def _words(self, name: str, database: Database) -> list[str]:
        return [word.format(database=database.name) for word in SCENES[name].arguments]

    @contextlib.contextmanager
    def _playing(self, name: str) -> Iterator[tuple[Database, Runner, Path, dict[str, str]]]:
        with self._mutex:
            self._count += 1
            folder = self.folder / str(self._count)
        folder.mkdir()
        scene = SCENES[name]
        runner = Runner(folder)
        project = write_project(folder / "project", revisions=HISTORY)
        told = folder / "terminated"
        told.touch()
        env = {
            "MIGRATOR_TERMINATION_LOG": str(told),
            "MIGRATOR_REPORT_FILE": str(folder / "report.json"),
            "MIGRATOR_LOG_FORMAT": "json",
            **scene.env,
        }
        database = self._prepare(scene.before, runner, project)
        if ("edit",) in scene.before:
            edited = next((project / "migrations" / "versions").glob("*r002*"))
            edited.write_text(edited.read_text().replace("1, 50", "1, 60"))
        try:
            yield database, runner, project, env
        finally:
            for run in runner.runs:
                run.end()
            for (each,) in self.server.psql(
                "SELECT datname FROM pg_database WHERE datname LIKE %s", (f"%{database.name}%",)
            ):
                self.server.drop_database(each)
            shutil.rmtree(folder, ignore_errors=True)

    def _prepare(self, before: tuple[tuple[str, ...], ...], runner: Runner, project: Path) -> Database:
        """Return a database on which commands were run; one that has no backup is a copy of the first like it."""
        words = [each for each in before if each != ("edit",)]
        if ("backup",) in words:
            return self._run_all(words, runner, project)
        with self._preparing:
            if before not in self._prepared:
                self._prepared[before] = self._run_all(words, runner, project).name
        return self.server.create_database(template=self._prepared[before])

    def _run_all(self, words: Sequence[Sequence[str]], runner: Runner, project: Path) -> Database:
        database = self.server.create_database()
        for each in words:
            done = runner(*each, cwd=project, database=database, env=_NO_BACKUP)
            if done.code:
                raise AssertionError(str(done))
        return database


def rows(database: Database) -> dict[str, Any]:
    """Return what a run may change: the version rows, and what the revisions make."""
    return {
        "version": database.psql("SELECT version_num FROM alembic_version"),
        "tables": database.psql(
            "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND oid >= 16384"
            " AND relname <> 'migrator_ledger' ORDER BY 1"
        ),
        "columns": database.psql("SELECT count(*) FROM pg_attribute WHERE attrelid = 'items'::regclass"),
    }


def told(result: Result, env: dict[str, str]) -> list[str]:
    """Return what is wrong with how the end was told: in the log, in the report, and to Kubernetes."""
    problems = []
    # psycopg2 prints, and drops, an exception that comes while it decodes the server's words.
    traced = "Traceback" in result.stderr and "in decode" not in result.stderr
    if result.code < 0 or traced:
        problems.append("it crashed")
    if result.code == 0:
        return problems
    report, line = Path(env["MIGRATOR_REPORT_FILE"]), Path(env["MIGRATOR_TERMINATION_LOG"]).read_text()
    code = json.loads(report.read_text())["code"] if report.exists() else None
    if code != result.code:
        problems.append(f"the report says {code}")
    if f"({result.code})" not in line:
        problems.append(f"the termination log says {line!r}")
    if not result.logs or result.logs[-1].get("code") != result.code:
        problems.append("the last line of the log is another")
    return problems


def truthful(result: Result, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is wrong with the code, given what the database was like, and is now."""
    allowed = {0, ExitCode.INTERRUPTED, ExitCode.PARTIAL, ExitCode.RESTORE_FAILED}
    problems = [] if result.code in allowed else [f"exit code {result.code}"]
    if result.code == ExitCode.INTERRUPTED and before != after:
        problems.append(f"nothing was changed, it says, but it was {before} and is {after}")
    if result.code == ExitCode.PARTIAL and before == after and "not known" not in result.stderr:
        problems.append("something was committed, it says, and nothing is different")
    return problems


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """Start a server, and make a folder."""
    folder = Path(tempfile.mkdtemp(prefix="migrator-holding-"))
    with running(debian(), settings={"max_connections": "100"}) as server:
        yield Stage(server, folder)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(
    names: Sequence[str],
    choose: Callable[[list[str]], list[str]] = lambda sites: sites,
    *,
    lost: Sequence[str] = ("question", "answer"),
    again: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> list[Outcome]:
    """Hold the runs of these scenes at the sites that are chosen; return how each ended."""
    with stage() as where, ThreadPoolExecutor(WORKERS) as pool:

        def hold(job: tuple[str, str, str]) -> Outcome:
            outcome = where.hold(*job, again=again)
            say(str(outcome))
            return outcome

        found = list(pool.map(where.sites, names))
        jobs = [
            (name, site, lost[number % len(lost)])
            for name, sites in zip(names, found, strict=True)
            for number, site in enumerate(choose(sites))
        ]
        return list(pool.map(hold, jobs))


def main() -> int:
    """Return 0 where every run ended in time, and told the truth."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.holding", description=__doc__)
    parser.add_argument("scenes", nargs="*", choices=[[], *SCENES], help="all of them by default")
    given = parser.parse_args()
    outcomes = []
    for way in ("question", "answer"):
        outcomes += sweep(given.scenes or list(SCENES), lost=[way], say=lambda text: print(text, flush=True))
    wrong = [outcome for outcome in outcomes if outcome.problem]
    print(f"{len(outcomes)} held, {len(wrong)} wrong: {Counter(outcome.scene for outcome in wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
