"""The stages of a run: each function calls one stage, and writes its result into the run's record.

:func:`nothing_to_do` decides whether anything is pending.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from migrator.backups.manifest import summary
from migrator.errors import BackupFailed, Internal
from migrator.ledger.edited_files import judge
from migrator.ledger.writer import LedgerWriter
from migrator.outcome import Finding
from migrator.pipeline import run_rows
from migrator.pipeline.apply.apply import apply as apply_plan
from migrator.pipeline.apply.attempt import Inputs
from migrator.pipeline.apply.downgrade_from_ledger import Reversal
from migrator.pipeline.context import Run, rows_now
from migrator.pipeline.drift import before_apply
from migrator.pipeline.maintenance_window import reopen_after_death
from migrator.pipeline.on_failure import refuse_again, refuse_one_way, refuse_to_repeat
from migrator.pipeline.stages import guard as guarding
from migrator.pipeline.stages.backup import back_up as make_backup
from migrator.pipeline.stages.backup import check_client, decide, reusable, tidy_up, why_reused
from migrator.pipeline.stages.inspect import Inspection, asking
from migrator.pipeline.stages.inspect import inspect as look_at
from migrator.pipeline.stages.invalid_indexes import clear, clear_after_death, left_behind
from migrator.pipeline.stages.lock import APPLY_LOCK, LOCK_CLASS, lock, regain
from migrator.pipeline.stages.standbys import wait_for_standbys
from migrator.pipeline.stages.wait import log_in_again, wait
from migrator.pipeline.verification import verify_run
from migrator.postgres.control_connection import ControlConnection
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.project import History, Plan
from migrator.schema import catalog
from migrator.schema.expectations import Expectations, read

Wanted = Expectations | None
"""The content of ``verify.toml``, None if there is none."""


def load(this: Run) -> tuple[History, Wanted]:
    """Read the revision files and ``verify.toml``, without the database."""
    history = History(this.project, this.settings.required_target, read_only=this.request.kind == "verify")
    this.reinstall_logging()  # the imports of a revision file may have set up their own logging and signals
    this.record.heads = history.heads
    return history, read(history.location / "verify.toml")


@contextlib.contextmanager
def connected(this: Run, history: History) -> Iterator[tuple[Run, Session]]:
    """Wait for Postgres, and yield the session with the run for the address that answered."""
    with this.record.stage("wait") as details:
        session, attempts = wait(this.settings.required_target, this.settings, this.application_name)
        details.update(attempts=attempts, server_version=session.facts.version)
    this = _aim(this, session, history)
    with contextlib.closing(session), this.interruption.on_signal(session.cancel):
        if this.request.kind != "verify":
            reopen_after_death(this, session)
        yield this, session


def _aim(this: Run, session: Session, history: History) -> Run:
    """Continue with the connected target: its file may have been replaced during the wait."""
    if session.target != this.settings.target:
        history.set_target(session.target)
        this.record.target = session.target
    return replace(this, settings=this.settings._replace(target=session.target))


@contextlib.contextmanager
def run_lock(this: Run, session: Session, history: History, found: Inspection) -> Iterator[Inspection]:
    """Hold the run lock within the block, and yield the pending work."""
    if not _why_no_backup(this, found):
        check_client(session, this.settings)
    with contextlib.ExitStack() as stack:
        with this.record.stage("lock") as details:
            # Another run may have done the work while this one waited.
            held = stack.enter_context(
                lock(
                    session,
                    this.settings,
                    look=lambda: _work_done(this, session, history),
                    session_ends=lambda: this.record.restored,
                )
            )
            details.update(waited=round(held.waited, 3))
        if held.seen is None:
            reopen_after_death(this, session)
        yield inspect(this, session, history, settled=True, locked=True, seen=held.seen)


def inspect(
    this: Run,
    session: Session,
    history: History,
    *,
    settled: bool | None = None,
    locked: bool = False,
    seen: Inspection | None = None,
) -> Inspection:
    """Find the pending work, unless it was ``seen`` just now under the lock that is still held."""
    settled = this.request.kind == "verify" if settled is None else settled
    findings: tuple[Finding, ...] = ()
    with this.record.stage("inspect") as details:
        found = seen or _look(this, session, history, settled=settled, locked=locked)
        details.update(
            current=found.current, pending=[revision.revision for revision in found.plan.revisions]
        )
        if not nothing_to_do(this, found):  # else there is nothing to lose: the up-to-date check need not ask
            details.update(tables=found.tables)
        if this.request.kind != "stamp":
            details["edited"] = [edit.entry.revision for edit in found.edits]
            findings = judge(found.edits, this.settings.edited)
    record = this.record
    record.plan, record.before, record.after = found.plan, found.current, found.current
    record.version_table, record.ahead = found.version_table, found.ahead
    if found.where.several:
        record.home = found.where.home
        record.visits = _wanted(this, history, found)
    record.findings += tuple(finding for finding in findings if finding not in record.findings)
    return found


def _wanted(this: Run, history: History, found: Inspection) -> dict[VersionTable, frozenset[str]]:
    """Return the target rows of each of several version tables."""
    plan = found.plan
    return {
        place: rows if history.unknown(rows) else history.plan(plan.kind, plan.destination, rows).after
        for place, rows in found.where.visits.items()
    }


def _look(
    this: Run, session: Session, history: History, *, settled: bool, locked: bool = False
) -> Inspection:
    return look_at(
        session,
        history,
        this.settings,
        "upgrade" if this.request.kind == "verify" else this.request.kind,
        this.request.destination,
        read_only=this.request.kind == "verify",
        settled=settled,
        ask=asking(session, history, this.settings, this.reinstall_logging, locked=locked),
    )


def _work_done(this: Run, session: Session, history: History) -> Inspection | None:
    """Return a result that shows that another run has done the work; None while work remains."""
    found = _look(this, session, history, settled=True)
    return found if nothing_to_do(this, found) else None


def nothing_to_do(this: Run, found: Inspection) -> bool:
    """Tell whether no revision is pending and no backup was requested."""
    return found.plan.empty and found.sure and this.settings.backup != "always"


def confirm(this: Run, session: Session, history: History, found: Inspection, expectations: Wanted) -> None:
    """Verify without pending revisions, and update the ledger."""
    verify_run(this, session, found.version_table, expectations, history)
    run_rows.settle_up(this, session, history, found)


def refuse(this: Run, session: Session, history: History, found: Inspection) -> None:
    """Raise if this run would repeat an earlier failure, or could not be reverted as MIGRATOR_ON_FAILURE
    says.
    """
    refuse_one_way(this, found)
    refuse_again(this, session, history, found)
    refuse_to_repeat(this, session, found)
    wait_for_standbys(session, this.settings.wait_timeout)


def guard(this: Run, session: Session, found: Inspection) -> None:
    """Check for destructive plans and for drift."""
    record = this.record
    with record.stage("guard"):
        record.findings += guarding.guard(found.plan, yes=this.request.yes, tables=found.tables)
        record.findings += before_apply(session, this.settings, kind=this.request.kind, at=found.current)


def _why_no_backup(this: Run, found: Inspection) -> str:
    pending = not found.plan.empty and this.request.kind != "stamp"
    return decide(this.settings.backup, pending, found.empty)


def back_up(this: Run, session: Session, found: Inspection) -> None:
    """Make the backup, unless there is a reason to skip it or an earlier one is as good."""
    reason = _why_no_backup(this, found)
    recent = None if reason else reusable(session, this.settings, found.current, found.version_table)
    if recent is not None:
        this.record.backup, reason = summary(recent), why_reused(recent)
    if reason:
        this.record.skip("backup", reason)
        return
    with this.record.stage("backup") as details:
        log_in_again(session, this.settings, this.application_name)
        try:
            backup = make_backup(
                session,
                this.settings,
                run_id=this.record.run_id,
                revisions=found.current,
                application_name=this.application_name,
            )
        except BackupFailed as error:
            if session.answers():
                raise
            # The server went away, and pg_dump with it.
            raise QueryFailed(error.message, lost=True) from error
        this.record.backup = summary(backup)
        details.update(id=backup.id, size_bytes=backup.size_bytes)


def clear_invalid_indexes(
    this: Run, session: Session, found: Inspection, expectations: Expectations | None
) -> None:
    """Check for indexes of an earlier run before apply; drop those that a pending revision builds."""
    if found.plan.empty or found.plan.stored_downgrades or this.request.kind == "stamp":
        return
    rebuild = this.settings.invalid_indexes == "rebuild"
    this.record.findings += clear(
        session,
        found.plan,
        rebuild=rebuild,
        allowed=expectations.allowed_invalid_indexes if expectations else (),
    )
    left = left_behind(session, found.version_table, found.plan) if this.settings.ledger else ()
    if left and this.record.backup_before_damage is None:
        this.record.backup_before_damage = left[0].backup_id
    if rebuild:
        clear_after_death(session, found.plan, left)


def begin(this: Run, session: Session, found: Inspection) -> frozenset[str]:
    """Record the start of the run in the ledger; return the constraints that are NOT VALID before it."""
    run_rows.begin(this, session, found)
    not_valid = catalog.not_valid_constraints(session)
    this.interruption.check()
    return not_valid


def apply(
    this: Run, session: Session, history: History, found: Inspection, plan: Plan
) -> VersionTable | None:
    """Run a plan, or the downgrade from it; return the version table that ``env.py`` really uses."""
    record = this.record
    if plan.empty:
        record.skip("apply", "nothing is pending")
        return found.version_table
    if plan.stored_downgrades:
        return _downgrade_from_ledger(this, session, found)
    back = plan is not found.plan
    inputs = Inputs(
        session=session,
        control=ControlConnection(session, lambda: regain(session), this.settings.wait_timeout),
        history=history,
        settings=this.settings,
        plan=plan,
        logs=this.logs,
        interruption=this.interruption,
        ledger_writer=LedgerWriter(
            record.author(this.settings.actor),
            history,
            command=f"{plan.kind if back else this.request.kind} {plan.destination}",
            backup_id=record.backup_id,
            enabled=this.settings.ledger,
            after=record.ledger_rows,
        ),
        apply_lock=(LOCK_CLASS, APPLY_LOCK),
        known={} if back else found.where.visits,
        about=found.where.about,
        backup_id=record.rollback_backup_id,
    )
    with record.stage("downgrade" if back else "apply"):
        log_in_again(session, this.settings, this.application_name)
        this.interruption.block()  # the record must be complete, also after a signal
        was, record.after = record.after, None  # not known until it is read
        applied = apply_plan(inputs)
        if applied.version_table is None:
            record.after = was
        else:
            record.version_table = applied.version_table
            record.after = None if applied.rows is None else tuple(sorted(applied.rows))
            record.revisions += applied.revisions
            if found.where.several or len(applied.targets) > 1:
                record.visits |= applied.targets
        record.transactions |= applied.transactions
        record.ledger_rows = applied.ledger_rows
        record.findings += applied.findings
        if not back:
            record.failed_in, record.committed_parts = applied.failed_in, applied.committed_parts
        if applied.error is not None:
            raise applied.error
    this.interruption.unblock()
    this.interruption.check()
    return applied.version_table


def _downgrade_from_ledger(this: Run, session: Session, found: Inspection) -> VersionTable | None:
    """Downgrade with the SQL from the ledger, for revisions that this image does not have."""
    record, table = this.record, found.version_table
    if table is None:
        raise Internal("a plan from a ledger without a version table")
    author = record.author(this.settings.actor)
    reversal = Reversal(
        session,
        this.settings,
        table,
        author,
        f"downgrade {found.plan.destination}",
        apply_lock=(LOCK_CLASS, APPLY_LOCK),
    )
    record.after = None  # not known until it is read
    try:
        with record.stage("apply") as details:
            details["from"] = "ledger"
            reversal.run(found.plan, this.application_name, this.interruption)
    finally:
        record.revisions = tuple(reversal.results)
        now = rows_now(this, session, table)
        record.after = None if now is None else tuple(sorted(now))
    return table


def remove_old_backups(this: Run, session: Session) -> None:
    """Remove the backups that MIGRATOR_BACKUP_KEEP does not keep."""
    finding = tidy_up(session, this.settings)
    this.record.findings += (finding,) if finding else ()
