"""How a run ended: exit codes, stage results, findings, and the outcome that holds them all."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple


class ExitCode(enum.IntEnum):
    """The exit codes of every command; an API, so a code never changes its meaning.

    Bands: 0 done; 3 only from ``check`` and ``status --exit-code``; 10 settings; 20s nothing changed
    and a retry can help; 30s nothing changed and manual action is required; 40s the database may have
    changed; 70 a defect in migrator.
    """

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "at the target revision and verified; nothing to do is OK too"
    PENDING = 3, "only from check and status --exit-code: revisions are pending"
    BAD_SETTINGS = 10, "settings or arguments are wrong; all problems listed"
    UNREACHABLE = 20, "no Postgres answered within the wait"
    LOCK_BUSY = 21, "another run held the lock for the whole lock wait; the message names its holder"
    BLOCKED = 22, "lock_timeout retries are used up; the message names the blocking sessions"
    INTERRUPTED = 23, "SIGTERM, SIGINT or SIGHUP; everything was rolled back"
    NOT_CURRENT = 24, "wait-for-current gave up"
    ACCESS_DENIED = 30, "credentials, privileges, TLS, or no such database"
    BAD_HISTORY = 31, "several heads, a missing parent, a revision that does not import, an ambiguous id"
    DATABASE_AHEAD = 32, "the database is at a revision this image does not know (older image)"
    UNVERSIONED = 33, "tables but no alembic_version: needs an explicit --baseline REV"
    TAMPERED = 34, "the file of an applied revision was edited"
    UNSAFE = 35, "the guard refused; its findings are listed"
    BACKUP_FAILED = 36, "no verified backup, so nothing was applied"
    DRIFTED = 37, "the live schema differs from the schema that the last run left"
    REHEARSAL_FAILED = 38, "the revisions failed on a copy; the database was not touched"
    ROLLED_BACK = 39, "a revision failed and everything was rolled back"
    PARTIAL = (
        40,
        "a revision failed after something was committed: other revisions, or a non-transactional "
        "part; the message names it",
    )
    VERIFY_FAILED = 41, "at the target revision, but a check failed"
    RESTORED = 42, "the run failed, and the database was restored from the backup"
    RESTORE_FAILED = 43, "a restore failed; the message says where the backup is"
    INTERNAL = 70, "a defect in migrator"


class Severity(enum.StrEnum):
    """How much a finding matters: an ``error`` fails the stage, a ``warning`` is only reported."""

    ERROR = "error"
    WARNING = "warning"


class Finding(NamedTuple):
    """One result of ``guard`` or ``verify``.

    ``rule`` is a stable kebab-case name. ``place`` is the relation, revision or setting. ``sentence``
    says what was found, ``remedy`` what to do.
    """

    rule: str
    severity: Severity
    place: str
    sentence: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.sentence}" + (f" ({self.remedy})" if self.remedy else "")


_NOTHING: Mapping[str, Any] = {}


class Status(enum.StrEnum):
    """How a stage ended. A skip is a value with a reason, not a silent branch."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


class StageResult(NamedTuple):
    """One stage of a run: how it ended, its duration in seconds, and JSON-ready ``details``."""

    stage: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    details: Mapping[str, Any] = _NOTHING


class RevisionResult(NamedTuple):
    """One revision that was applied (``upgrade``) or reverted (``downgrade``), and its duration in seconds.

    ``no_way_back`` says why it cannot be reverted without its file. ``measured`` is JSON-ready.
    """

    revision: str
    direction: str
    message: str
    seconds: float
    transactional: bool = True
    no_way_back: str = ""
    measured: Mapping[str, Any] = _NOTHING


class Outcome(NamedTuple):
    """How a run ended: the one value that every report is made from.

    ``others`` are the JSON-ready outcomes of the other databases of an ``env.py`` that migrates
    several. ``version_tables`` lists the tables of an ``env.py`` that uses several in one database.
    """

    run_id: str
    command: str
    code: ExitCode
    message: str
    next_step: str = ""
    target: str = ""
    started_at: str = ""
    seconds: float = 0.0
    migrator_version: str = ""
    image_version: str = ""
    before: tuple[str, ...] | None = None
    after: tuple[str, ...] | None = None
    heads: tuple[str, ...] = ()
    revisions: tuple[RevisionResult, ...] = ()
    backup: Mapping[str, Any] | None = None
    findings: tuple[Finding, ...] = ()
    stages: tuple[StageResult, ...] = ()
    others: tuple[Mapping[str, Any], ...] = ()
    version_table: str = ""
    version_tables: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON-ready data; ``code`` is the number and ``outcome`` its name."""
        document = self._asdict()
        document["code"] = int(self.code)
        document["outcome"] = self.code.name
        document["findings"] = [finding._asdict() for finding in self.findings]
        for name, results in (("stages", self.stages), ("revisions", self.revisions)):
            document[name] = [{**item._asdict(), "seconds": round(item.seconds, 3)} for item in results]
        document["seconds"] = round(self.seconds, 3)
        for name in ("others", "version_tables"):
            if not document[name]:
                del document[name]
        return document
