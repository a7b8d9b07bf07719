"""Apply the plan: go through the user's ``env.py``, and decide from what the attempt saw whether to go again."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from migrator.errors import AccessDenied, MigratorError
from migrator.outcome import Finding, RevisionResult
from migrator.pipeline.apply.attempt import (
    Attempt,
    Cause,
    Inputs,
    Landed,
    LockFailure,
    cause_of,
    cut_alike,
)
from migrator.pipeline.apply.blockers import Watch
from migrator.pipeline.apply.commits import watch_others
from migrator.pipeline.apply.connection import Backend
from migrator.pipeline.apply.decide import Again, Done, Failed, decide, none_committed, reason
from migrator.pipeline.apply.env_pass import EnvPass, Visits
from migrator.pipeline.apply.revisions import Steps
from migrator.postgres.connection_limit import refuse_too_few
from migrator.postgres.control_connection import reconnect_if_lost
from migrator.postgres.errors import ConnectFailed, QueryFailed, chain, sqlstate_of
from migrator.postgres.version_table import VersionTable
from migrator.runtime.output import stdio

log = logging.getLogger("migrator.apply")

_UNREADABLE = (ConnectFailed, QueryFailed, AccessDenied)


@dataclass(frozen=True)
class Applied:
    """How a plan went; ``rows`` of the version table are None if they cannot be read.

    ``revisions`` are the results that lasted, ``targets`` the target rows of every version table.
    """

    error: MigratorError | None
    version_table: VersionTable | None
    rows: frozenset[str] | None
    revisions: tuple[RevisionResult, ...]
    targets: Mapping[VersionTable, frozenset[str]]
    findings: tuple[Finding, ...]
    transactions: frozenset[int]
    ledger_rows: int
    failed_in: str
    committed_parts: tuple[str, ...]


def apply(inputs: Inputs) -> Applied:
    """Apply the plan through ``env.py``, as often as needed; call it with the interruption blocked.

    A signal ends an attempt, and nothing else here: the version rows are read whole, and the result is
    complete. It is blocked at the end.
    """
    attempts = Attempts(inputs)
    again = Again(0.0, "")  # the first time is like the others
    with attempts.watching:
        while True:
            attempt = attempts.go_through_env_py(again)
            decision = decide(attempt, inputs.settings, random.random())  # noqa: S311 - jitter, no secret
            if not isinstance(decision, Again):
                break
            again = decision
            log.warning("%s", again.sentence, extra={"stage": "apply"})
            del attempt  # its error keeps what env.py has left open
    return attempts.result(attempt, decision)


class Attempts:
    """The attempts of one run, and what lasts from one to the next: results, version tables, counts."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._backend = Backend(inputs)
        self._steps = Steps(inputs, self._backend)
        self._visits = Visits(inputs)
        settings = inputs.settings
        looks = min(0.5, (settings.lock_timeout or 2.0) / 5)  # several while one attempt waits for its lock
        self._watch = Watch(
            inputs.control,
            terminate_after=settings.terminate_blockers_after,
            interval=max(0.05, looks),
            bar=self._steps.progress,
        )
        self.watching = contextlib.ExitStack()  # from the first pass to the end of the last one
        self._prepared = False
        self._busy = self._losses = 0
        self._cut_after: list[float] = []

    def go_through_env_py(self, again: Again) -> Attempt:
        """Run ``env.py`` from the top, after the decided pause; return what that saw. Never raises."""
        inputs, interruption = self._inputs, self._inputs.interruption
        one = EnvPass(inputs, self._steps, self._visits, self._backend, self._watch)
        try:
            interruption.unblock()
            sleep(again.after, interruption.check)
            self._prepare()
            one.run()
            self.watching.close()  # the watch reconnects too, and only one may
            landed = self._read_again()
            if self._steps.results and landed and landed.rows == inputs.plan.before != inputs.plan.after:
                committed = self._steps.landed_somewhere()
                raise none_committed(self._steps.findings, committed=committed)
            interruption.block()
        except BaseException as error:  # noqa: BLE001 - a user's code may raise anything; it is in the attempt
            interruption.block()
            return self._failed(one, error, again.lock_failure)
        return Attempt(inputs.plan, landed=landed)

    def _prepare(self) -> None:
        """Do once, before ``env.py`` runs for the first time, what may fail or take long."""
        if self._prepared:
            return
        self._prepared = True
        refuse_too_few(self._inputs.session, 2, "A run")
        if self._inputs.plan.kind == "upgrade":
            downgrades = self._inputs.ledger_writer.render_downgrades(self._inputs.plan.revisions)
            self._steps.no_way_back = downgrades
        self.watching.enter_context(self._watch_everything())

    @contextlib.contextmanager
    def _watch_everything(self) -> Iterator[None]:
        """Watch the migration within the block, and cancel its statement when a signal comes."""
        steps = self._steps
        try:
            with (
                stdio.redirected(),
                steps.heartbeat,
                self._watch,
                watch_others(steps.is_elsewhere, steps.commits_elsewhere),
                steps.outside.watching(),
                self._inputs.interruption.on_signal(self._backend.cancel),
            ):
                yield
        finally:
            steps.progress.close()
            self._inputs.reinstall_logging()

    # -- after a failed attempt ------------------------------------------------------------------------

    def _failed(self, one: EnvPass, error: BaseException, retries: LockFailure | None) -> Attempt:
        """Return what a failed pass saw. The version rows are read after its connection is gone."""
        inputs, steps = self._inputs, self._steps
        inputs.reinstall_logging()
        cause, settled, landed = self._cause(one, error), True, None
        self._busy += cause is Cause.BUSY
        self._losses += cause is Cause.LOST
        if cause is not Cause.OTHER and not inputs.interruption.received:
            if cause is Cause.LOST:
                log.warning(
                    "the migration's connection was lost: %s",
                    reason(error).rstrip("."),
                    extra={"stage": "apply"},
                )
            try:
                landed = self._settle(one)
            except BaseException as another:  # noqa: BLE001 - a signal, or another run has taken the lock
                inputs.interruption.block()
                error = another
            settled = landed is not None
        signal = inputs.interruption.received  # a later one did not end this attempt
        landed = landed or self._read_finally()
        unfinished = landed.unfinished if landed else ()
        return Attempt(
            plan=inputs.plan,
            error=error,
            raised=steps.failure,
            cause=cause,
            settled=settled,
            signal=signal,
            landed=landed,
            connected=one.entered,
            entered=self._visits.version_table is not None,
            retries=retries,
            anything_committed=steps.anything_committed,
            failed_in=one.failed_in or steps.running,
            repeatable=steps.unrepeatable.isdisjoint(unfinished),
            certain=not steps.certain.isdisjoint(unfinished),
            busy=self._busy,
            losses=self._losses,
            cut_after=cut_alike(self._cut_after),
            blockers=self._watch.blockers,
            rolled_back_by=next((f.place for f in steps.findings if f.rule == "rolled-back"), ""),
            alike=len(set(self._visits.before.values())) < 2,
            backup_id=inputs.backup_id,
        )

    def _cause(self, one: EnvPass, error: BaseException) -> Cause:
        if not one.started:
            return Cause.OTHER
        error = self._steps.failure or error  # env.py may have ended in another way
        answers = self._inputs.session.answers
        found = cause_of(error, connected=one.entered, gone=one.gone, answers=answers)
        calls = self._backend.connection.calls if self._backend.connection and one.entered else None
        if (
            found is Cause.LOST
            and calls
            and self._inputs.control.never_lost
            and not any(map(sqlstate_of, chain(error)))
        ):
            self._cut_after.append(calls.failed_after)
        else:
            self._cut_after.clear()
        return found

    def _settle(self, one: EnvPass) -> Landed | None:
        """Wait until another attempt would be possible: the run lock is held, the last transaction has
        ended, the version rows are read. Return None if it is not.

        The server may stay away for long, so a signal ends the wait. Raises Interrupt and LockBusy.
        """
        interruption = self._inputs.interruption
        interruption.unblock()
        interruption.check()
        landed = None
        for last in (False, False, True):
            try:
                self._inputs.control.ensure()
                landed = self._read(uncertain=one.gone and not self._steps.transactional)
            except _UNREADABLE as failure:
                if isinstance(failure, QueryFailed) and failure.lost and not last:
                    continue  # the control connection was ended a moment later than the migration's
                log.warning("the database does not answer: %s", failure, extra={"stage": "apply"})
            else:
                if landed is None:
                    log.warning(
                        "the migration's connection does not end, so env.py is not run again",
                        extra={"stage": "apply"},
                    )
            break
        interruption.block()
        return landed

    def _read(self, *, uncertain: bool = False) -> Landed | None:
        """Read what landed after the connection is gone; None if it does not go.

        Before that, the rows are not final. With ``uncertain``, the last statement may have been committed
        although its answer was lost. Raises QueryFailed, ConnectFailed and AccessDenied.
        """
        if not self._backend.ended():
            return None
        if uncertain and self._steps.running:
            self._steps.committed()
        self._steps.look_for_commits()
        return self._visits.read(self._steps)

    def _read_finally(self) -> Landed | None:
        """Read what landed, if there is no further attempt; None if the server cannot be read."""
        self.watching.close()  # as after a good pass
        for again in (not self._inputs.interruption.received, False):
            try:
                reconnect_if_lost(self._inputs.session, 0)
                return self._read()
            except _UNREADABLE as failure:
                if not (again and isinstance(failure, QueryFailed)):  # it was lost a moment later
                    break
        return None

    def _read_again(self) -> Landed | None:
        """Read what landed without a failure, or what can be read after one; None if nothing can."""
        inputs = self._inputs
        try:
            reconnect_if_lost(
                inputs.session, 0 if inputs.interruption.received else inputs.settings.wait_timeout
            )
            return self._visits.read(self._steps)
        except _UNREADABLE:
            return None

    def result(self, attempt: Attempt, decision: Done | Failed) -> Applied:
        """Return how the plan went, from the last attempt."""
        steps = self._steps
        if attempt.error is not None:
            log.debug("apply failed", exc_info=attempt.error)
        table = self._visits.version_table
        landed = attempt.landed or (self._read_again() if table else None)
        return Applied(
            error=decision.error if isinstance(decision, Failed) else None,
            version_table=table,
            rows=landed.rows if landed else None,
            revisions=landed.results if landed else (),
            targets=self._visits.after,
            findings=tuple(steps.findings),
            transactions=frozenset(steps.transactions),
            ledger_rows=self._inputs.ledger_writer.number,
            failed_in=steps.running,
            committed_parts=attempt.unfinished,
        )


def sleep(seconds: float, check: Callable[[], None]) -> None:
    """Wait, and keep calling ``check``, which raises after a signal."""
    deadline = time.monotonic() + seconds
    check()
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        check()
