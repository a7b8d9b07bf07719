"""The record of a run: the stages fill it in, and the end turns it into one outcome."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from migrator import __version__
from migrator.config.database_url import Target
from migrator.errors import MigratorError
from migrator.outcome import ExitCode, Finding, Outcome, RevisionResult, StageResult, Status
from migrator.postgres.version_table import VersionTable
from migrator.runtime.logs import get_logger

if TYPE_CHECKING:
    from migrator.ledger.table import Author
    from migrator.project import Plan

log = get_logger("migrator")


def new_run_id() -> str:
    """Return an id that sorts by time and does not repeat: ``20261121T074000Z-1a2b3c``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(3).hex()}"


class Record:
    """The known facts of a run so far."""

    def __init__(self, command: str, target: Target | None, run_id: str) -> None:
        self.command = command
        self.target = target
        self.run_id = run_id
        self.started_at = datetime.now(UTC)
        self._clock = time.monotonic()
        self.stages: list[StageResult] = []
        self.plan: Plan | None = None
        self.version_table: VersionTable | None = None
        self.visits: dict[VersionTable, frozenset[str]] = {}
        """The target rows of every version table of ``env.py``, if it has several."""
        self.home: VersionTable | None = None
        """The version table that is found without ``env.py``, if it uses several."""
        self.ahead = ""
        self.heads: tuple[str, ...] = ()
        self.before: tuple[str, ...] | None = None
        self.after: tuple[str, ...] | None = None
        self.revisions: tuple[RevisionResult, ...] = ()
        self.backup: Mapping[str, Any] | None = None
        self.backup_before_damage: str | None = None
        """The backup of the first run whose committed parts remain; empty if that run made none, None if
        there are no such parts.
        """
        self.findings: tuple[Finding, ...] = ()
        self.transactions: set[int] = set()
        """The ids of the transactions in which this run is known to have written since its backup."""
        self.ledger_rows = 0
        self.failed_in = ""
        self.committed_parts: tuple[str, ...] = ()
        self.failed_for: Mapping[str, str] | None = None
        """The facts about a reverted or restored failure for the next run; see on_failure.py."""
        self.restored = False
        self.schema: Mapping[str, Any] | None = None
        """The packed schema snapshot after the run, for its ledger; see drift.py."""
        self.drift = ""
        """The result of the comparison with the last snapshot; empty if there was none."""

    @property
    def application_name(self) -> str:
        """Return ``migrator/HOST RUN_ID`` in the 63 bytes that Postgres keeps."""
        host = os.environ.get("POD_NAME") or os.uname().nodename
        return f"migrator/{host[: 63 - len(self.run_id) - 10]} {self.run_id}"

    def author(self, actor: str) -> Author:
        """Return the author of this run's ledger rows."""
        from migrator.ledger.table import Author

        host = os.environ.get("POD_NAME") or os.uname().nodename
        return Author(self.run_id, actor, host, __version__, os.environ.get("MIGRATOR_IMAGE_VERSION", ""))

    @property
    def backup_id(self) -> str:
        """Return the id of this run's backup, or an empty string."""
        return str(self.backup["id"]) if self.backup else ""

    @property
    def rollback_backup_id(self) -> str:
        """Return the id of the newest backup without the leftovers of a failed run; an empty string if there
        is none.

        It is this run's backup, unless an earlier run has committed a part of a revision: this run's
        backup contains that part.
        """
        return self.backup_id if self.backup_before_damage is None else self.backup_before_damage

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage and keep how it ended; entries of the yielded dictionary become its details."""
        started = time.monotonic()
        details: dict[str, Any] = {}
        try:
            yield details
        except BaseException as error:
            reason = error.message if isinstance(error, MigratorError) else str(error)
            self.stages.append(
                StageResult(name, Status.FAILED, time.monotonic() - started, reason=reason, details=details)
            )
            raise
        seconds = time.monotonic() - started
        self.stages.append(StageResult(name, Status.DONE, seconds, details=details))
        log.debug("%s done in %.3f s", name, seconds, extra={"stage": name, **_loggable(details)})

    def skip(self, name: str, reason: str) -> None:
        """Record a skipped stage, and its reason."""
        self.stages.append(StageResult(name, Status.SKIPPED, reason=reason))
        log.info("no %s: %s", name, reason, extra={"stage": name})

    def succeeded(self) -> Outcome:
        """Return the outcome of a run that reached its target."""
        return self._outcome(ExitCode.OK, self._success(), self._next_step())

    def failed(self, error: MigratorError) -> Outcome:
        """Return the outcome of a run that ended in ``error``."""
        self.findings += tuple(finding for finding in error.findings if finding not in self.findings)
        return self._outcome(error.code, str(error), error.next_step)

    def _outcome(self, code: ExitCode, message: str, next_step: str) -> Outcome:
        return Outcome(
            run_id=self.run_id,
            command=self.command,
            code=code,
            message=message,
            next_step=next_step,
            target=str(self.target or ""),
            started_at=self.started_at.isoformat(timespec="milliseconds"),
            seconds=time.monotonic() - self._clock,
            migrator_version=__version__,
            image_version=os.environ.get("MIGRATOR_IMAGE_VERSION", ""),
            before=self.before,
            after=self.after,
            heads=self.heads,
            revisions=self.revisions,
            backup=self.backup,
            findings=self.findings,
            stages=tuple(self.stages),
            version_table=str(self.version_table or ""),
            version_tables=tuple(map(str, self.visits)),
        )

    def _success(self) -> str:
        after = _names(self.after)
        database = self.target.database if self.target else "the database"
        if self.command == "verify":
            return f"{database} is at {after}{_head(self.after, self.heads)}, verified; {self.drift}."
        if self.ahead:
            return (
                f"Nothing to do: {database} is at {after}, ahead of this image, and {self.ahead}; verified."
            )
        if self.before == self.after:
            backed_up = f"; backup {self.backup_id}" if self.backup_id else ""
            return f"Nothing to do: {database} is at {after}{_head(self.after, self.heads)}, verified{backed_up}."
        verb = {"upgrade": "upgraded", "downgrade": "downgraded", "stamp": "stamped"}.get(
            self.command, "brought"
        )
        count = len(self.revisions)
        if self.plan is not None and self.plan.baseline and not count:
            return f"{database} adopted at {after}{_head(self.after, self.heads)}, verified."
        revisions = f": {count} revision{'' if count == 1 else 's'}" if self.command != "stamp" else ""
        backup = f"backup {self.backup_id}" if self.backup_id else "no backup"
        skipped = [stage.reason for stage in self.stages if stage.stage == "backup" and stage.reason]
        return (
            f"{database} {verb} from {_names(self.before)} to {after}{_head(self.after, self.heads)}{revisions}"
            f" in {time.monotonic() - self._clock:.1f} s, verified; {backup}"
            f"{f' ({skipped[-1]})' if skipped and not self.backup_id else ''}."
        )

    def _next_step(self) -> str:
        if self.command != "downgrade" or self.before == self.after:
            return ""
        back = self.before[0] if self.before and len(self.before) == 1 else "heads"
        restore = (
            f"; to restore deleted data too: `migrator restore {self.backup_id} --yes`"
            if self.backup_id
            else ""
        )
        return f"to undo the downgrade: `migrator upgrade {back}`{restore}"


def _names(revisions: tuple[str, ...] | None) -> str:
    return ", ".join(revisions or ()) or "base"


def _head(revisions: tuple[str, ...] | None, heads: tuple[str, ...]) -> str:
    return " (head)" if revisions and set(revisions) == set(heads) else ""


def _loggable(details: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in details.items() if key not in {"name", "message", "args"}}
