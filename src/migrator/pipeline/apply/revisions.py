"""The revisions as they run: time, observe, record and report each of Alembic's steps."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.outcome import Finding, RevisionResult, Severity
from migrator.pipeline.apply.attempt import Inputs, Part
from migrator.pipeline.apply.commits import RAW, OutsideConnections
from migrator.pipeline.apply.connection import Backend, MigrationConnection
from migrator.pipeline.apply.metrics.measurement import Measured
from migrator.pipeline.apply.metrics.observer import Observation
from migrator.pipeline.apply.repeatable import is_repeatable, outlives_a_rollback, resets_the_session
from migrator.pipeline.unexpected import sqlstate
from migrator.postgres.attached_code import refuse_code
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.runtime.output.progress import Heartbeat, Progress

log = logging.getLogger("migrator.apply")


@dataclass(frozen=True)
class Done:
    """The measurement of a revision, its seconds, and whether it rolled back its transaction."""

    seconds: float
    measured: Measured
    rolled_back: bool


class Steps:
    """The steps of one run: the running one, the finished ones, and what may be committed."""

    def __init__(self, inputs: Inputs, backend: Backend) -> None:
        self._inputs, self._backend = inputs, backend
        self._session, self._ledger_writer = inputs.session, inputs.ledger_writer
        self.findings: list[Finding] = []
        self._total = len(inputs.plan.revisions)
        self.no_way_back: Mapping[str, str] = {}
        self.results: list[tuple[RevisionResult, VersionTable]] = []
        """The results, each with its version table."""
        self.running = ""
        self.failure: BaseException | None = None
        self.committed_parts: list[Part] = []
        self.unrepeatable: set[Part] = set()
        """Those of :attr:`committed_parts` that must not run twice; the ledger knows them."""
        self.certain: set[Part] = set()
        """Those of :attr:`committed_parts` of which a statement is known to be committed."""
        self.anything_committed = False
        self.transactions: set[int] = set()
        """The ids of the transactions that it is known to have written in."""
        self._recorded_in: set[int] = set()  # those with a row of the ledger about a revision that is done
        self._connection: MigrationConnection | None = None
        self._observation: Observation | None = None
        self.table = VersionTable()
        self._inside_of = 0  # the process in which a revision's own function runs: not a child of it
        self.outside = OutsideConnections(lambda: self._inside, self.commits_elsewhere, self._takes_raw)
        self._raw_since = (
            ""  # the start of the transaction in which the revision took the driver's connection
        )
        self._unrepeatable = ""  # the first of its statements that must not run twice
        self._wrote = False  # such a statement has run in its transaction
        self._alone = False  # the version row needs a transaction of its own: no other is open
        self._asked = False  # a statement that commits by itself is running, and must not run twice
        self._noted = False  # the ledger knows that a part leaves the transaction
        self._rolled_back = False  # by the last revision: its transaction, with our settings
        self._reset = False  # a statement of it named a timeout, or reset settings or the role
        self._done = Done(0.0, Measured(), rolled_back=False)  # of the running revision
        self._transaction = 0
        self._next_transaction = 0  # if the revision before it ended in a transaction that continues
        self._held = 0  # the transaction in which the version table is locked
        self._began = self._started = time.monotonic()
        self.heartbeat = Heartbeat()
        self.progress = Progress(self._total, sys.stderr, enabled=not inputs.logs.is_json)

    @property
    def _inside(self) -> bool:
        return self._inside_of == os.getpid()

    @property
    def transactional(self) -> bool:
        """Whether the running revision began in a transaction."""
        return bool(self._transaction)

    def on(self, connection: MigrationConnection, observation: Observation) -> None:
        """Continue with another connection."""
        self._connection, self._observation = connection, observation
        self._transaction = self._next_transaction = 0

    def forget(self, pending: Sequence[str]) -> None:
        """Prepare for another pass over the version table: the work that it repeats was rolled back."""
        self.failure, self.running = None, ""
        self._transaction = self._next_transaction = 0
        self.results = [
            (result, table)
            for result, table in self.results
            if table != self.table or result.revision not in pending
        ]
        self._total = len(self.results) + len(pending)

    def wrap(self, steps: Sequence[Any]) -> None:
        """Time each step, and keep the running one for the error message."""
        for number, step in enumerate(steps, start=self._total - len(steps) + 1):
            self._wrap(step, number)

    def _wrap(self, step: Any, number: int) -> None:
        run = step.migration_fn
        revision = step.revision

        @functools.wraps(run)
        def timed(*arguments: Any, **options: Any) -> None:
            self._inputs.interruption.check()
            self._begin(revision.revision, f"{revision.revision} {_first_line(revision.doc)}", number)
            self._inside_of = os.getpid()
            try:
                run(*arguments, **options)
            except BaseException as error:
                self.failure = error
                raise
            finally:
                self._inside_of = 0
                self._look_at_raw()
                self._inputs.keep_logging()
            self._inputs.interruption.check()
            now = self._look()
            self._alone = not self._transaction or bool(self._connection and self._connection.commits_each)
            self._own_transaction("BEGIN")
            self._hold_version_table(now)

        step.migration_fn = timed

    def _begin(self, revision: str, what: str, number: int) -> None:
        self._transaction = self._next_transaction
        if self._connection is not None and (self._rolled_back or self._reset):
            self._backend.prepare(self._connection)
            self._rolled_back = self._reset = False
        if self._connection is not None and not self._transaction:
            self._transaction = self._connection.transaction()
        self.transactions |= {self._transaction} - {0}
        if self._observation is not None:
            self._observation.begins(self._transaction)
        # Only now: in autocommit, our own queries would count as a committed part of it.
        self.running, self._began = revision, time.monotonic()
        self._unrepeatable, self._wrote, self._asked, self._noted = "", False, False, False
        self._raw_since = ""
        self.outside.begins()
        self.progress.draw(number - 1, what)
        self.heartbeat.begins(f"{number} of {self._total}: {what}")

    def _look(self) -> int:
        """Read the measurement of the finished revision, and whether it rolled back; return the transaction
        after it.
        """
        seconds = time.monotonic() - self._began
        if self._observation is None:
            return 0
        measured, now = self._observation.ends()
        self._done = Done(seconds, measured, rolled_back=self._look_for_a_rollback(now))
        return now

    def _hold_version_table(self, transaction: int) -> None:
        """Check the version table again before the row is written, under a lock that blocks new triggers.

        The write runs the table's triggers, and a trigger can be created while a revision runs. Once
        per transaction is enough; ``transaction`` is the open one, 0 if each statement is its own.
        """
        if self._connection is None or self._connection.translates:
            return
        if 0 < transaction == self._held:
            return
        lock = f"LOCK TABLE ONLY {self.table.quoted} IN ROW EXCLUSIVE MODE"
        try:
            self._connection.tell(lock.replace(":", "\\:"))
        except Exception as error:
            if sqlstate(error) != _NO_TRANSACTION:  # the revision ended it without SQLAlchemy
                raise
        try:
            refuse_code(self._session, self.table, self._inputs.settings.role)
        except QueryFailed as error:
            if not error.lost:  # the migration continues while the control connection is lost
                raise
            log.info("the version table was not checked again: %s", error.text)
        self._held = transaction

    def _own_transaction(self, command: str) -> None:
        """Make one transaction of the version row and the ledger row, if each statement would be its own."""
        if self._connection is not None and self._alone:
            self._connection.tell(command)

    # -- written and committed work --------------------------------------------------------------------

    def committed(self) -> None:
        """Note a commit: the earlier work of the running revision is permanent."""
        self.anything_committed = True
        self._next_transaction = self._held = 0
        if self.running and not self._is_part:
            self.committed_parts.append(self._part)

    def committed_here(self) -> None:
        """Note a commit on the migration's connection: of the running revision, or of Alembic's and our statements
        after it.
        """
        if self._inside:
            self.committed()
        else:
            self.anything_committed = True
            self._next_transaction = self._held = 0

    def executes(self, statement: str, autocommit: bool) -> None:
        """Check a statement before it runs: one that leaves its transaction must not run twice."""
        self._asked = False  # the one before it failed, and the revision goes on
        if self._inside:
            self._reset = self._reset or resets_the_session(statement)
            if outlives_a_rollback(statement):
                self.commits_elsewhere(statement)
        if not self._inside or (self._wrote and not autocommit) or is_repeatable(statement):
            return
        self._unrepeatable = self._unrepeatable or statement
        if autocommit:
            self._asked = True
            self._note(self._session)
        else:
            self._wrote = True

    def executed(self) -> None:
        """Note that a statement is done."""
        if self._asked:
            self._asked = False
            self.certain.add(self._part)

    def is_elsewhere(self, connection: Any) -> bool:
        """Tell whether a revision runs and uses its own connection."""
        return self._inside and self._connection is not None and not self._connection.is_on(connection)

    def _takes_raw(self, connection: Any) -> None:
        """Note that the running revision takes the driver's connection, whose statements are not seen."""
        if self._connection is None or self.is_elsewhere(connection) or self._connection.commits_each:
            self.commits_elsewhere(RAW)
        elif not self._raw_since:
            self._raw_since = self._open_transaction()

    def _look_at_raw(self) -> None:
        """Note a possible commit if the revision left its transaction while it had the driver's connection."""
        since, self._raw_since = self._raw_since, ""
        if not since or self._open_transaction() == since:
            return
        self.look_for_commits()
        if not self._is_part:
            self.commits_elsewhere(RAW)

    def _open_transaction(self) -> str:
        """Return when the migration's open transaction began; empty if it is not known."""
        if not self._backend.pid:
            return ""
        try:
            return str(self._session.value(_OPEN_SINCE, (self._backend.pid,)) or "")
        except QueryFailed as error:
            log.debug("cannot ask for the transaction: %s", error.text)
            return ""

    def commits_elsewhere(self, statement: str) -> None:
        """Note that the running revision commits, or may, past our connection, which no rollback of ours undoes."""
        self._unrepeatable = self._unrepeatable or statement
        self._note(self._session)
        self.committed()

    def leaving(self) -> None:
        """Note in the transaction, before its commit, that it contains a part of the running revision."""
        if self._inside and self._wrote:
            self.certain.add(self._part)
            self._note(None)

    def _note(self, session: Session | None) -> None:
        """Record it in the ledger, once; continue if that is not possible."""
        if self._noted:
            return
        self._noted = True
        self.unrepeatable.add(self._part)
        statement = self._unrepeatable or _UNSEEN
        try:
            number = self._ledger_writer.partial(
                self.running, statement, upgrade=self._inputs.upgrade, session=session
            )
            self.transactions |= {number} - {0}
        except Exception as error:  # noqa: BLE001 - any driver
            log.warning("the ledger cannot record that a part of %s is committed: %s", self.running, error)

    @property
    def _part(self) -> Part:
        return Part(self.running, self.table)

    @property
    def _is_part(self) -> bool:
        return self._part in self.committed_parts

    def look_for_commits(self) -> None:
        """Ask the server whether the running revision's transaction was committed without SQLAlchemy."""
        if self.running and not self._is_part and self._status() == "committed":
            self.committed()
            self.certain.add(self._part)
            self._note(self._session)

    def _status(self) -> str:
        """Return the state of the transaction in which the running revision began; empty if it is unknown."""
        if not self._transaction:
            return ""
        try:
            return self._session.value("SELECT txid_status(%s)", (self._transaction,)) or ""
        except QueryFailed as error:
            log.debug("cannot ask for the transaction: %s", error.text)
            return ""

    def landed_somewhere(self) -> bool:
        """Tell whether a transaction with a revision's row in the ledger is committed."""
        asked = "SELECT pg_catalog.txid_status(%s)"
        try:
            return any(self._session.value(asked, (number,)) == "committed" for number in self._recorded_in)
        except QueryFailed as error:
            log.debug("cannot ask for the transactions: %s", error.text)
            return False

    def _look_for_a_rollback(self, now: int) -> bool:
        """Tell whether the running revision rolled back its transaction; ``now`` is the next one."""
        if now == self._transaction:
            return False
        self.look_for_commits()
        if self._status() != "aborted":
            return False
        self._rolled_back, self._held = True, 0
        finding = Finding(
            rule="rolled-back",
            severity=Severity.WARNING,
            place=self.running,
            sentence=f"{self.running} rolled back its own transaction: all that was done in it before is "
            "lost, also by earlier revisions",
            remedy="use a savepoint in the revision (op.get_bind().begin_nested()), and check what is "
            "missing",
        )
        self.findings.append(finding)
        log.warning("%s; %s", finding.sentence, finding.remedy, extra={"stage": "apply"})
        return True

    # -- after a step ----------------------------------------------------------------------------------

    def applied(self, **event: Any) -> None:
        """Record a finished step. Alembic calls it after the version row moved, before the commit.

        The ledger row is written here, in the transaction that moves the version row.
        """
        info = event["step"]
        if info.is_stamp:
            self._ledger_writer.stamped(event["heads"])
            log.info("stamped %s", ", ".join(sorted(event["heads"])) or "base")
            return
        done = self._done
        measured = ({"rolled_back": True} if done.rolled_back else {}) | done.measured.as_dict()
        result = RevisionResult(
            revision=self.running,
            direction="upgrade" if info.is_upgrade else "downgrade",
            message=_first_line(info.up_revision.doc) if info.up_revision else "",
            seconds=done.seconds,
            transactional=not self._is_part,
            no_way_back=self.no_way_back.get(self.running, ""),
            measured=measured,
        )
        self.results.append((result, self.table))
        self._next_transaction = self._ledger_writer.done(
            self.running, upgrade=info.is_upgrade, rows=event["heads"], seconds=done.seconds, details=measured
        )
        self.transactions |= {self._next_transaction} - {0}
        self._recorded_in |= {self._next_transaction} - {0}
        self._own_transaction("COMMIT")
        self.running, self._transaction = "", 0
        self.heartbeat.begins("the end of env.py")

    def report(self, **event: Any) -> None:
        """Log a finished step, after the hooks of ``env.py``."""
        if event["step"].is_stamp:
            return
        result, _ = self.results[-1]
        self.progress.clear()
        log.info(
            "%s %d of %d: %s %s (%.2f s, %.1f s in all)",
            "applied" if result.direction == "upgrade" else "reverted",
            len(self.results),
            self._total,
            result.revision,
            result.message,
            result.seconds,
            time.monotonic() - self._started,
            extra={"stage": "apply", "revision": result.revision, "seconds": round(result.seconds, 3)},
        )
        self.progress.draw(len(self.results), "")


_NO_TRANSACTION = "25P01"
_OPEN_SINCE = "SELECT coalesce(xact_start::text, state) FROM pg_stat_activity WHERE pid = %s"
"""Empty if another login, which env.py uses, may not be seen."""
_UNSEEN = "its transaction was committed on the driver's own connection"


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
