"""Every command of the command line, in an order in which each has something to do."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.security.world import Call, World
from tests.support.forked import Forked
from tests.support.projects import Revision, write_project
from tests.support.runner import Running, migrator_command
from tests.support.servers import Database

REVISIONS = [
    Revision("r001", None, "CREATE TABLE public.t1 (id integer, note varchar)", "DROP TABLE public.t1"),
    Revision("r002", "r001", "CREATE TABLE public.t2 (id integer)", "DROP TABLE public.t2"),
    Revision("r003", "r002", "CREATE INDEX t2_id ON public.t2 (id)", "DROP INDEX public.t2_id"),
]
"""Nothing in these is looked up by a path: no canary that is called can be called by them."""

ASSERTIONS = """
[tables."public.t1"]
columns = { id = "integer", note = "character varying" }

[[assertions]]
name = 'no strangers'
sql = 'SELECT count(*) FROM public.t1'
expect = 0
"""


@dataclass(frozen=True)
class Step:
    """One command, and the settings that it gets."""

    words: str
    settings: Mapping[str, str] = field(default_factory=dict)
    older: bool = False
    """Whether the image is an older one, which knows r001 and r002 alone."""

    @property
    def command(self) -> str:
        """The name of the command."""
        return self.words.split()[0]

    def __str__(self) -> str:
        return self.words


_NO_BACKUP = {"MIGRATOR_BACKUP": "off"}
STEPS = [
    Step("wait"),
    Step("settings"),
    Step("completion bash"),
    Step("history"),
    Step("heads"),
    Step("show r002"),
    Step("freeze"),
    Step("status"),
    Step("check"),
    Step("current"),
    Step("wait-for-current --wait-timeout 1s"),
    Step("upgrade r001", {"MIGRATOR_BACKUP": "always", "MIGRATOR_BASELINE": "base"}),
    Step("upgrade r002", {"MIGRATOR_BACKUP": "always", "MIGRATOR_BACKUP_VERIFY": "restore"}),
    Step("check"),
    Step("upgrade", _NO_BACKUP),
    Step("upgrade"),
    Step("status"),
    Step("check"),
    Step("current"),
    Step("wait-for-current --wait-timeout 20s"),
    Step("verify"),
    Step("ledger"),
    Step("downgrade -1 --yes", _NO_BACKUP),
    Step("upgrade", _NO_BACKUP),
    Step("status", older=True),
    Step("upgrade", older=True),
    Step("downgrade r002 --yes", _NO_BACKUP, older=True),
    Step("stamp r003", _NO_BACKUP),
    Step("stamp r002", _NO_BACKUP),
    Step("upgrade", _NO_BACKUP),
    Step("repair --accept-schema"),
    Step("backup --name one"),
    Step("backups"),
    Step("backups show one"),
    Step("verify-backup one --how read"),
    Step("verify-backup one --how restore"),
    Step("restore one --table app.plain --into-schema beside"),
    Step("restore one --to {database}_copy"),
    Step("restore one --yes --drop-old"),
    Step("status"),
    Step("prune --dry-run --keep last=1"),
    Step("prune --keep last=1"),
    Step("sidecar --sidecar-listen 127.0.0.1:0"),
    Step("alembic current"),
    Step("revision -m another --rev-id r004"),
    Step("merge r003 -m one --rev-id r005"),
]


@dataclass(frozen=True)
class Answer:
    """What a step answered, without what differs between two runs of it, and the canaries that it called."""

    step: Step
    code: int | None
    stdout: str
    said: str
    calls: list[Call]

    def __str__(self) -> str:
        return f"$ migrator {self.step}\nexit code {self.code}\n{self.stdout}\n{self.said}"


@dataclass
class Scenario:
    """The steps, one after another, on one database."""

    world: World
    database: Database
    login: str
    folder: Path

    def prepare(self) -> None:
        """Write the project, and an older one."""
        files = {"verify.toml": ASSERTIONS}
        write_project(self.folder / "project", files, revisions=REVISIONS)
        write_project(self.folder / "older", files, revisions=REVISIONS[:2])

    def run(self, step: Step, source: Path | None = None) -> Answer:
        """Run one step to its end, with the code in ``source``; a sidecar is ended once it is there."""
        words = step.words.format(database=self.database.name).split()
        environment = {
            "PATH": "/usr/bin:/bin",
            "MIGRATOR_DATABASE_URL": self.world.server.url(self.database.name, self.login),
            "MIGRATOR_BACKUP_URL": (self.folder / "backups").as_uri(),
            "MIGRATOR_PG_BIN": str(self.world.server.bin),
            "MIGRATOR_LOG_FORMAT": "text",
            "MIGRATOR_TERMINATION_LOG": "",
            **step.settings,
        }
        cwd = self.folder / ("older" if step.older else "project")
        with self.world.calls() as calls:
            if step.command == "sidecar":  # which starts the installed command again
                code, stdout, stderr = self._stay(words, cwd, environment)
            elif source:
                code, stdout, stderr = _run_other(source, words, cwd, environment)
            else:
                out = Path(tempfile.mkdtemp(prefix="out-", dir=self.folder))
                running = Forked(*words, cwd=cwd, env=environment, out=out)
                code, stdout, stderr = running.finish(), running.stdout, running.stderr
        stdout, stderr = self.normal(stdout), self.normal(stderr)
        # That a backup has functions of a superuser's, which its login cannot make again, is true of hostile ones too.
        said = "\n".join(
            line
            for line in stderr.splitlines()
            if re.match(r"(WARNING|ERROR) ", line) and "may not create these again" not in line
        )
        return Answer(step, code, stdout, said, calls)

    def _stay(self, words: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
        """Run a sidecar until it is ready, then end it."""
        running = Running(migrator_command(), tuple(words), cwd, env, self.folder / "sidecar")
        try:
            running.wait_for("watching")
            running.send()
            running.finish()
        finally:
            running.end()
        return running.process.returncode, running.stdout, running.stderr

    def normal(self, text: str) -> str:
        """Return a text without names, ids, times and sizes of this run."""
        text = re.sub(
            r" \(role \w+ is not a superuser and may not create these again: [^\n]*; restore it as a superuser\)",
            "",
            text,
        )
        for name, word in (
            (self.database.name, "DATABASE"),
            (str(self.folder), "FOLDER"),
            (str(self.world.server.port), "PORT"),
            (str(self.world.server.bin), "PG_BIN"),
        ):
            text = text.replace(name, word)
        for pattern, word in _VARYING:
            text = pattern.sub(word, text)
        return text


_VARYING = [
    (re.compile(pattern), word)
    for pattern, word in (
        (r"(?m)^\d\d:\d\d:\d\d(\.\d+)? +", ""),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|[+-]\d\d(:?\d\d)?| UTC)?", "TIME"),
        (r"\b\d{8}T?\d{6}Z?(-\w+)*", "ID"),
        (r"\b[0-9a-f]{12,64}\b", "HASH"),
        (r"\b\d+(\.\d+)? ?(ms|s|min|m|h|bytes|B|kB|KB|MB|GB|KiB|MiB)\b", "MEASURE"),
        (r"\b(PostgreSQL|pg_dump) \d+\.\d+( \(Debian [^)]*\))?", r"\1 VERSION"),
        (r"\b(gzip|zstd):1\b", "COMPRESSION"),
        (r"\b\d+\.\d\d\b", "SECONDS"),
        (r"\b(public|mig|boss|evil)\.(alembic_version|migrator_ledger)( \d+)?", r"\2"),
        (r" {2,}", " "),
    )
]


def _run_other(source: Path, words: list[str], cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
    """Run the command of other code than the installed one."""
    command = [sys.executable, "-m", "migrator", *words]
    done = subprocess.run(
        command, cwd=cwd, env={**env, "PYTHONPATH": str(source)}, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr
