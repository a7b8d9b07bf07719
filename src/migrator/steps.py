"""The revisions as they run: what is timed, observed, recorded and said around each of Alembic's steps."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from migrator.bookkeeping import Bookkeeper
from migrator.history.plain import is_plain
from migrator.migration_connection import MigrationConnection
from migrator.observation import Observation
from migrator.outcome import RevisionResult
from migrator.postgres import QueryFailed, Session
from migrator.report.progress import Heartbeat, Progress

log = logging.getLogger("migrator.apply")


class Steps:
    """The steps of one run: which one is under way, what was done, and what may be committed.

    ``check`` raises where the run was interrupted; ``take_back`` undoes what a revision did to logging and signals.
    """

    def __init__(
        self,
        session: Session,
        books: Bookkeeper,
        total: int,
        *,
        bar: bool,
        check: Callable[[], None],
        take_back: Callable[[], None],
    ) -> None:
        self._session = session
        self._books = books
        self._check = check
        self._take_back = take_back
        self._total = total
        self.no_way_back: Mapping[str, str] = {}
        self.results: list[RevisionResult] = []
        self.running = ""
        self.failure: BaseException | None = None
        self.committed_parts: list[str] = []
        self.anything_committed = False
        self.transactions: set[int] = set()
        """The ids of the transactions that it is known to have written in."""
        self._connection: MigrationConnection | None = None
        self._observation: Observation | None = None
        self._plain = False  # the running revision ends no transaction unseen
        self._transaction = 0
        self._next_transaction = 0  # where the revision before it ended in one that goes on
        self._began = self._started = time.monotonic()
        self.heartbeat = Heartbeat()
        self.progress = Progress(total, sys.stderr, enabled=bar)

    @property
    def transactional(self) -> bool:
        """Whether the running revision began in a transaction."""
        return bool(self._transaction)

    def on(self, connection: MigrationConnection, observation: Observation) -> None:
        """Go on with another connection."""
        self._connection, self._observation = connection, observation
        self._transaction = self._next_transaction = 0

    def forget(self, pending: Sequence[str], *, same: bool) -> None:
        """Make room for another pass: what it will run again was rolled back, unless it is another schema's."""
        self.failure, self.running = None, ""
        self._transaction = self._next_transaction = 0
        if same:
            self.results = [result for result in self.results if result.revision not in pending]
        self._total = len(self.results) + len(pending)

    def wrap(self, steps: Sequence[Any]) -> None:
        """Have each step timed, and known while it runs, for when something fails."""
        for number, step in enumerate(steps, start=self._total - len(steps) + 1):
            self._wrap(step, number)

    def _wrap(self, step: Any, number: int) -> None:
        run = step.migration_fn
        revision = step.revision

        @functools.wraps(run)
        def timed(*arguments: Any, **options: Any) -> None:
            self._check()
            self._plain = is_plain(run)
            self._begin(revision.revision, f"{revision.revision} {_first_line(revision.doc)}", number)
            try:
                run(*arguments, **options)
            except BaseException as error:
                self.failure = error
                raise
            finally:
                if not self._plain:  # which has no hand in logging, nor in signals
                    self._take_back()
            self._check()
            self._own_transaction("BEGIN")

        step.migration_fn = timed

    def _begin(self, revision: str, what: str, number: int) -> None:
        if not self._plain:
            self.flush()
        self._transaction = self._next_transaction
        if self._connection is not None and not self._transaction:
            self._transaction = self._connection.transaction()
        self.transactions |= {self._transaction} - {0}
        if self._observation is not None:
            self._observation.begins(self._transaction)
        # Only now: in autocommit, our own questions would count as a part of it that was committed.
        self.running, self._began = revision, time.monotonic()
        self.progress.draw(number - 1, what)
        self.heartbeat.begins(f"{number} of {self._total}: {what}")

    def _own_transaction(self, command: str) -> None:
        """Let the version row and the ledger's be one, where each statement is a transaction of its own."""
        if self._connection is not None and not self._transaction:
            self._connection.tell(command)

    # -- what is written, and committed ----------------------------------------------------------------

    def flush(self) -> int:
        """Write the rows of what is done, in its transaction; returns that, 0 where nothing waited.

        Called before anything that may end the transaction, or that may look at the ledger.
        """
        if self._observation is not None:
            self._observation.settle()
        number = self._books.flush()
        self.transactions |= {number} - {0}
        return number

    def committed(self) -> None:
        """Note that something became permanent: of the running revision, what it had done until then."""
        self.anything_committed = True
        self._next_transaction = 0
        if self.running and self.running not in self.committed_parts:
            self.committed_parts.append(self.running)

    def look_for_commits(self) -> None:
        """Ask the server whether the running revision's transaction was committed behind everybody's back."""
        if not self._transaction or not self.running:
            return
        try:
            status = self._session.value("SELECT txid_status(%s)", (self._transaction,))
        except QueryFailed as error:
            log.debug("cannot ask for the transaction: %s", error.text)
            return
        if status == "committed":
            self.committed()

    # -- when one is done ------------------------------------------------------------------------------

    def applied(self, **event: Any) -> None:
        """Record and say that a step is done; called by Alembic after the version row moved, before the commit."""
        info = event["step"]
        if info.is_stamp:
            self.flush()
            self._books.stamped(event["heads"])
            log.info("stamped %s", ", ".join(info.up_revision_ids) or "base")
            return
        seconds = time.monotonic() - self._began
        measured: dict[str, Any] = {}
        if self._observation is not None:
            self._observation.ends_for_now(lambda found: measured.update(found.as_dict()))
        result = RevisionResult(
            revision=self.running,
            direction="upgrade" if info.is_upgrade else "downgrade",
            message=_first_line(info.up_revision.doc) if info.up_revision else "",
            seconds=seconds,
            transactional=self.running not in self.committed_parts,
            no_way_back=self.no_way_back.get(self.running, ""),
            measured=measured,
        )
        self.results.append(result)
        self._books.done(
            self.running, upgrade=info.is_upgrade, rows=event["heads"], seconds=seconds, details=measured
        )
        lasts = bool(self._transaction) and result.transactional and self._plain
        if lasts and not self._books.full and len(event["ctx"].on_version_apply_callbacks) == 1:
            self._next_transaction = self._transaction
        else:
            self._next_transaction = self.flush()
        self._own_transaction("COMMIT")
        self.running, self._transaction = "", 0
        self.heartbeat.begins("the end of env.py")
        self._say(result)

    def _say(self, result: RevisionResult) -> None:
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


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
