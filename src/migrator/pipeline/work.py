"""The stages in order, and nothing else: the table of contents of the product.

::

    wait -> inspect --nothing to do--> verify
               |
             lock -> inspect -> guard -> backup -> apply -> verify

The run looks whether there is anything to do before it takes the lock, and again when it holds it.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

from migrator.accounts import begin, on_the_books, settle_up
from migrator.backups.manifest import summary
from migrator.bookkeeping import Bookkeeper
from migrator.drift import before_apply, snapshot_after
from migrator.edited import judge
from migrator.errors import BackupFailed, Internal
from migrator.failure import refuse_again, taking_back
from migrator.history import History, Plan
from migrator.interruption import Interrupt
from migrator.outcome import Finding, Outcome
from migrator.past import read_dead_run
from migrator.postgres import ConnectFailed, QueryFailed, Session
from migrator.run import ATTEMPTS, Run, harmless, known, rows_now
from migrator.schema import catalog
from migrator.schema.expectations import Expectations, read
from migrator.settings import Settings
from migrator.stages.apply import Application, apply
from migrator.stages.backup import back_up, check_client, decide, reusable, tidy_up, why_reused
from migrator.stages.guard import guard
from migrator.stages.inspect import Inspection, inspect
from migrator.stages.leftovers import clear, clear_after_death
from migrator.stages.lock import APPLY_LOCK, LOCK_CLASS, lock, regain
from migrator.stages.revert import Reversal
from migrator.stages.wait import log_in_again, wait
from migrator.verification import verify_patiently, verify_run
from migrator.versions import VersionTable
from migrator.window import reopen_after_death, window

log = logging.getLogger("migrator")


def run(this: Run) -> Outcome:
    """Carry out a request from first to last stage; never raises, whatever happens."""
    try:
        _patiently(this)
    except (Exception, Interrupt) as error:  # noqa: BLE001 - the one place that catches everything
        return this.record.failed(known(this, error))
    return this.record.succeeded()


def _patiently(this: Run) -> None:
    """Run the stages, from the first again where Postgres went away before anything was applied."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _stages(this)
            return
        except (QueryFailed, ConnectFailed) as error:
            if attempt == ATTEMPTS or not harmless(this, error):
                raise
            log.warning(
                "the connection was lost (%s); nothing was applied yet: beginning again (%d of %d)",
                error.text.rstrip("."),
                attempt,
                ATTEMPTS - 1,
            )


def _stages(this: Run) -> None:
    settings, record = this.settings, this.record
    history = History(this.project, settings.required_target)
    this.logs.install()  # what a revision file imports may have set up logging of its own
    expectations = read(history.location / "verify.toml")
    record.heads = history.heads
    with contextlib.ExitStack() as stack:
        session = _wait(this)
        this, settings = _aim(this, session, history)
        stack.callback(session.close)
        stack.enter_context(this.interruption.calling(session.cancel))
        if this.request.kind != "verify":
            reopen_after_death(this, session)
        found = _inspect(this, session, history, settled=this.request.kind == "verify")
        if this.request.kind != "verify" and not _nothing_to_do(this, found):
            if not _why_no_backup(this, found):
                check_client(session, settings)
            with record.stage("lock") as details:
                # Another run may have done the work while this one waited.
                held = stack.enter_context(
                    lock(
                        session,
                        settings,
                        look=lambda: _work_done(this, session, history),
                        session_ends=lambda: record.restored,
                    )
                )
                details.update(waited=round(held.waited, 3))
            if held.seen is None:
                reopen_after_death(this, session)
            found = _inspect(this, session, history, settled=True, seen=held.seen)
        if this.request.kind == "verify" or _nothing_to_do(this, found):
            verify_run(this, session, found.version_table, expectations, history)
            settle_up(this, session, history, found)
            return
        refuse_again(this, session, history, found)
        stack.enter_context(on_the_books(this, session, history))
        with record.stage("guard"):
            record.findings += guard(found.plan, yes=this.request.yes, tables=found.tables)
            record.findings += before_apply(session, settings, kind=this.request.kind, at=found.current)
        stack.enter_context(window(this, session))
        _backup(this, session, found)
        _clear_leftovers(this, session, found, expectations)
        begin(this, session, found)
        not_valid = catalog.not_valid_constraints(session)
        with taking_back(this, history, lambda plan: _apply(this, session, history, found, plan)):
            table = _apply(this, session, history, found, found.plan)
            verify_patiently(this, session, table, expectations, history, not_valid)
        record.schema = snapshot_after(session, settings, record.version_table)
        finding = tidy_up(session, settings)
        record.findings += (finding,) if finding else ()


def _wait(this: Run) -> Session:
    with this.record.stage("wait") as details:
        session, attempts = wait(this.settings.required_target, this.settings, this.application_name)
        details.update(attempts=attempts, server_version=session.facts.version)
    return session


def _aim(this: Run, session: Session, history: History) -> tuple[Run, Settings]:
    """Go on with what was connected to: another address, where its file was replaced while Postgres was waited for."""
    settings = this.settings._replace(target=session.target)
    if session.target != this.settings.target:
        history.aim_at(session.target)
        this.record.target = session.target
    return replace(this, settings=settings), settings


def _inspect(
    this: Run, session: Session, history: History, *, settled: bool, seen: Inspection | None = None
) -> Inspection:
    """Find out what there is to do, unless that was ``seen`` just now, under the lock that is still held."""
    findings: tuple[Finding, ...] = ()
    with this.record.stage("inspect") as details:
        found = seen or _look(this, session, history, settled=settled)
        details.update(
            current=found.current,
            pending=[revision.revision for revision in found.plan.revisions],
        )
        if not _nothing_to_do(this, found):  # else there is nothing to lose, and a glance need not ask
            details.update(tables=found.tables, size_bytes=found.size)
        if this.request.kind != "stamp":
            details["edited"] = [edit.entry.revision for edit in found.edits]
            findings = judge(found.edits, this.settings.edited)
    record = this.record
    record.plan, record.before, record.after = found.plan, found.current, found.current
    record.version_table, record.ahead = found.version_table, found.ahead
    record.findings += tuple(finding for finding in findings if finding not in record.findings)
    return found


def _look(this: Run, session: Session, history: History, *, settled: bool) -> Inspection:
    return inspect(
        session,
        history,
        this.settings,
        "upgrade" if this.request.kind == "verify" else this.request.kind,
        this.request.destination,
        read_only=this.request.kind == "verify",
        settled=settled,
    )


def _work_done(this: Run, session: Session, history: History) -> Inspection | None:
    """Return what shows that another run has done the work; None while something is left to do."""
    found = _look(this, session, history, settled=True)
    return found if _nothing_to_do(this, found) else None


def _nothing_to_do(this: Run, found: Inspection) -> bool:
    return found.plan.empty and this.settings.backup != "always"


def _why_no_backup(this: Run, found: Inspection) -> str:
    pending = not found.plan.empty and this.request.kind != "stamp"
    return decide(this.settings.backup, pending, found.empty)


def _backup(this: Run, session: Session, found: Inspection) -> None:
    reason = _why_no_backup(this, found)
    recent = None if reason else reusable(session, this.settings, found.current)
    if recent is not None:
        this.record.backup, reason = summary(recent), why_reused(recent)
    if reason:
        this.record.skip("backup", reason)
        return
    with this.record.stage("backup") as details:
        log_in_again(session, this.settings, this.application_name)
        try:
            backup = back_up(
                session,
                this.settings,
                run_id=this.record.run_id,
                revisions=found.current,
                application_name=this.application_name,
            )
        except BackupFailed as error:
            if session.answers():
                raise
            raise QueryFailed(
                error.message, lost=True
            ) from error  # the server went away, and pg_dump with it
        this.record.backup = summary(backup)
        details.update(id=backup.id, size_bytes=backup.size_bytes)


def _clear_leftovers(
    this: Run, session: Session, found: Inspection, expectations: Expectations | None
) -> None:
    """Look ahead of apply for indexes that a run before left; those that a pending revision builds are dropped."""
    if found.plan.empty or found.plan.kept or this.request.kind == "stamp":
        return
    rebuild = this.settings.invalid_indexes == "rebuild"
    this.record.findings += clear(
        session,
        found.plan,
        rebuild=rebuild,
        allowed=expectations.allowed_invalid_indexes if expectations else (),
    )
    if rebuild:
        clear_after_death(session, found.plan, read_dead_run(session, found.version_table))


def _apply(
    this: Run, session: Session, history: History, found: Inspection, plan: Plan
) -> VersionTable | None:
    """Run a plan: what was found, or the way back from it; returns the version table that ``env.py`` really uses."""
    record, before = this.record, this.record.revisions
    if plan.empty:
        record.skip("apply", "nothing is pending")
        return found.version_table
    if plan.kept:
        return _revert(this, session, found)
    back = plan is not found.plan
    application = Application(
        session,
        history,
        this.settings,
        plan,
        logs=this.logs,
        interruption=this.interruption,
        apply_lock=(LOCK_CLASS, APPLY_LOCK),
        regain=lambda: regain(session),
        books=Bookkeeper(
            record.author(this.settings.actor),
            history,
            command=f"{plan.kind if back else this.request.kind} {plan.destination}",
            backup_id=record.backup_id,
            enabled=this.settings.ledger,
            after=record.rows_booked,
        ),
    )

    def rows() -> frozenset[str] | None:
        return rows_now(this, session, application.version_table)

    try:
        with record.stage("downgrade" if back else "apply"):
            log_in_again(session, this.settings, this.application_name)
            apply(application, backup_id=record.backup_id, read_rows=rows)
    finally:
        if application.version_table is not None:
            record.version_table = application.version_table
            now = rows()
            record.revisions = (*before, *application.committed(now))
            record.after = None if now is None else tuple(sorted(now))
        record.transactions |= application.steps.transactions
        record.rows_booked = application.books.number
        if not back:
            record.failed_in = application.steps.running
            record.committed_parts = tuple(application.steps.committed_parts)
    return application.version_table


def _revert(this: Run, session: Session, found: Inspection) -> VersionTable | None:
    """Go back by the SQL that the ledger kept, for revisions that this image does not have."""
    record, table = this.record, found.version_table
    if table is None:
        raise Internal("a plan from a ledger without a version table")
    author = record.author(this.settings.actor)
    reversal = Reversal(session, this.settings, table, author, f"downgrade {found.plan.destination}")
    try:
        with record.stage("apply") as details:
            details["from"] = "ledger"
            reversal.run(found.plan, this.application_name, this.interruption)
    finally:
        record.revisions = tuple(reversal.results)
        now = rows_now(this, session, table)
        record.after = None if now is None else tuple(sorted(now))
    return table
