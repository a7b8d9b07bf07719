"""The stages in order, and nothing else: the table of contents of the product.

::

    wait -> inspect --nothing to do--> verify
               |
             lock -> inspect -> guard -> backup -> apply -> verify

The run looks whether there is anything to do before it takes the lock, and again when it holds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from migrator import bookkeeping
from migrator.aftermath import translate
from migrator.backups.manifest import summary
from migrator.bookkeeping import Bookkeeper
from migrator.edited import judge
from migrator.errors import BackupFailed, Internal, Interrupted, MigratorError, Partial, VerifyFailed
from migrator.history import History, ProjectOptions
from migrator.interruption import Interrupt, Interruption
from migrator.ledger import FOUND, GONE, Standing, read_standing
from migrator.lifeline import lost, revive
from migrator.logs import Logs
from migrator.outcome import Finding, Outcome, Severity, Status
from migrator.postgres import ConnectFailed, QueryFailed, Session
from migrator.record import Record
from migrator.schema import catalog
from migrator.schema.expectations import Expectations, read
from migrator.settings import Settings
from migrator.stages.apply import Application, apply
from migrator.stages.backup import back_up, decide
from migrator.stages.guard import guard
from migrator.stages.inspect import Inspection, inspect
from migrator.stages.leftovers import clear
from migrator.stages.lock import APPLY_LOCK, LOCK_CLASS, lock, lock_if_free, regain
from migrator.stages.revert import Reversal
from migrator.stages.verify import verify
from migrator.stages.wait import wait
from migrator.versions import VersionTable, read_rows

log = logging.getLogger("migrator")

_ATTEMPTS = 4
"""So often a run begins, or verifies, where Postgres goes away each time; each wait is bounded by its own setting."""


@dataclass(frozen=True)
class Request:
    """What was asked for: ``upgrade``, ``downgrade``, ``stamp`` or ``verify``, where to, and whether they are sure."""

    kind: str
    destination: str
    yes: bool = False


@dataclass(frozen=True)
class Run:
    """What every stage of one run shares."""

    request: Request
    settings: Settings
    project: ProjectOptions
    record: Record
    logs: Logs
    interruption: Interruption

    @property
    def application_name(self) -> str:
        """Return the name under which the run's sessions are seen in pg_stat_activity."""
        return self.record.application_name


def run(this: Run) -> Outcome:
    """Carry out a request from first to last stage; never raises, whatever happens."""
    try:
        _patiently(this)
    except (Exception, Interrupt) as error:  # noqa: BLE001 - the one place that catches everything
        return this.record.failed(_known(this, error))
    return this.record.succeeded()


def _patiently(this: Run) -> None:
    """Run the stages, from the first again where Postgres went away before anything was applied."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _stages(this)
            return
        except (QueryFailed, ConnectFailed) as error:
            if attempt == _ATTEMPTS or not _harmless(this, error):
                raise
            log.warning(
                "the connection was lost (%s); nothing was applied yet: beginning again (%d of %d)",
                error.text.rstrip("."),
                attempt,
                _ATTEMPTS - 1,
            )


def _harmless(this: Run, error: BaseException) -> bool:
    """Whether an error is a connection that was lost before anything was applied."""
    begun = any(stage.stage == "apply" and stage.status is not Status.SKIPPED for stage in this.record.stages)
    return lost(error) and not begun and not this.interruption.received


def _known(this: Run, error: Exception | Interrupt) -> MigratorError:
    """Return the error that says what happened, whatever was raised."""
    record = this.record
    if isinstance(error, MigratorError):
        return error
    if lost(error) and record.after is not None and record.after != record.before:
        return Partial(
            "Postgres went away after the revisions were committed, before they were verified.",
            state=f"The database is at {', '.join(record.after) or 'base'}.",
            next_step="`migrator verify` checks it",
        )
    if not isinstance(error, Interrupt):
        log.error("unexpected", exc_info=error)
        return translate(error)
    this.interruption.shield()
    if record.after is None or record.after == record.before:
        return Interrupted(f"Interrupted by {error.name}.", next_step="run it again")
    return Partial(
        f"Interrupted by {error.name} after the revisions were committed, before they were verified.",
        state=f"The database is at {', '.join(record.after) or 'base'}.",
        next_step="`migrator verify` checks it",
    )


def _stages(this: Run) -> None:
    settings, record = this.settings, this.record
    history = History(this.project, settings.required_target)
    this.logs.install()  # what a revision file imports may have set up logging of its own
    expectations = read(history.location / "verify.toml")
    record.heads = history.heads
    with contextlib.ExitStack() as stack:
        session = _wait(this)
        stack.callback(session.close)
        stack.enter_context(this.interruption.calling(session.cancel))
        found = _inspect(this, session, history, settled=this.request.kind == "verify")
        if this.request.kind != "verify" and not _nothing_to_do(this, found):
            with record.stage("lock") as details:
                # Another run may have done the work while this one waited.
                held = stack.enter_context(
                    lock(session, settings, look=lambda: _work_done(this, session, history))
                )
                details.update(waited=round(held.waited, 3))
            found = _inspect(this, session, history, settled=True, seen=held.seen)
        if this.request.kind == "verify" or _nothing_to_do(this, found):
            _verify(this, session, found.version_table, expectations, history)
            _settle(this, session, history, found)
            return
        stack.enter_context(_on_the_books(this, session, history))
        with record.stage("guard"):
            record.findings += guard(found.plan, yes=this.request.yes, tables=found.tables)
        _backup(this, session, found)
        _clear_leftovers(this, session, found, expectations)
        not_valid = catalog.not_valid_constraints(session)
        table = _apply(this, session, history, found)
        _verify_patiently(this, session, table, expectations, history, not_valid)


def _wait(this: Run) -> Session:
    with this.record.stage("wait") as details:
        session, attempts = wait(this.settings.required_target, this.settings, this.application_name)
        details.update(attempts=attempts, server_version=session.facts.version)
    return session


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
            tables=found.tables,
            size_bytes=found.size,
        )
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


def _backup(this: Run, session: Session, found: Inspection) -> None:
    pending = not found.plan.empty and this.request.kind != "stamp"
    reason = decide(this.settings.backup, pending, found.empty)
    if reason:
        this.record.skip("backup", reason)
        return
    with this.record.stage("backup") as details:
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
    """Look for INVALID indexes ahead of apply; those that a pending revision builds are dropped."""
    if found.plan.empty or found.plan.kept or this.request.kind == "stamp":
        return
    this.record.findings += clear(
        session,
        found.plan,
        rebuild=this.settings.invalid_indexes == "rebuild",
        allowed=expectations.allowed_invalid_indexes if expectations else (),
    )


def _apply(this: Run, session: Session, history: History, found: Inspection) -> VersionTable | None:
    """Run the plan; returns the version table that ``env.py`` really uses."""
    record = this.record
    if found.plan.empty:
        record.skip("apply", "nothing is pending")
        return found.version_table
    if found.plan.kept:
        return _revert(this, session, found)
    application = Application(
        session,
        history,
        this.settings,
        found.plan,
        logs=this.logs,
        interruption=this.interruption,
        apply_lock=(LOCK_CLASS, APPLY_LOCK),
        regain=lambda: regain(session),
        books=Bookkeeper(
            record.author(this.settings.actor),
            history,
            command=f"{this.request.kind} {this.request.destination}",
            backup_id=record.backup_id,
            enabled=this.settings.ledger,
        ),
    )

    def rows() -> frozenset[str] | None:
        return _rows_now(this, session, application.version_table)

    try:
        with record.stage("apply"):
            apply(application, backup_id=record.backup_id, read_rows=rows)
    finally:
        if application.version_table is not None:
            record.version_table = application.version_table
            now = rows()
            record.revisions = application.committed(now)
            record.after = None if now is None else tuple(sorted(now))
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
        now = _rows_now(this, session, table)
        record.after = None if now is None else tuple(sorted(now))
    return table


@contextlib.contextmanager
def _on_the_books(this: Run, session: Session, history: History) -> Iterator[None]:
    """Add the run to the ledger when the block ends, well or not."""
    try:
        yield
    except (Exception, Interrupt) as error:
        if _harmless(this, error):
            raise  # the run begins again
        known = _known(this, error)
        _close(this, session, history, this.record.failed(known))
        raise known from error
    _close(this, session, history, this.record.succeeded())


def _close(this: Run, session: Session, history: History, outcome: Outcome) -> None:
    table = this.record.version_table
    if table is None or not this.settings.ledger:
        return
    author = this.record.author(this.settings.actor)
    try:
        with _alive(this, session) as alive:
            bookkeeping.close(alive, table, author, outcome, history.digest)
    except (ConnectFailed, QueryFailed) as error:
        log.warning("the ledger does not say how this run ended: %s", error.text)


def _settle(this: Run, session: Session, history: History, found: Inspection) -> None:
    """Bring the ledger up to date in a run with nothing to do, where another image or plain Alembic was at work."""
    table, digest = found.version_table, history.digest
    only_looks = this.request.kind == "verify" or not this.settings.ledger
    if table is None or only_looks or found.ahead or _settled(history, found, found.standing):
        return
    try:
        with lock_if_free(session) as held:
            standing = read_standing(session, table)
            if held and not _settled(history, found, standing):
                author = this.record.author(this.settings.actor)
                bookkeeping.settle(session, history, table, standing.entries, found.current, author)
                bookkeeping.close(session, table, author, this.record.succeeded(), digest)
    except QueryFailed as error:
        log.info("the ledger was left as it is: %s", error.text)


def _settled(history: History, found: Inspection, standing: Standing) -> bool:
    return standing.clean(history.digest) and not bookkeeping.differences(
        history, standing.entries, found.current, FOUND, GONE
    )


def _rows_now(this: Run, session: Session, table: VersionTable | None) -> frozenset[str] | None:
    """Read the version rows; None where nobody answers."""
    if table is None:
        return frozenset()
    try:
        with _alive(this, session) as alive:
            return frozenset(read_rows(alive, table))
    except (ConnectFailed, QueryFailed, MigratorError):
        return None


@contextlib.contextmanager
def _alive(this: Run, session: Session) -> Iterator[Session]:
    """Yield the session, connected again where it was lost; raises ConnectFailed where Postgres stays away."""
    revive(session, 0 if this.interruption.received else this.settings.wait_timeout)
    yield session


def _verify_patiently(
    this: Run,
    session: Session,
    table: VersionTable | None,
    expectations: Expectations | None,
    history: History,
    not_valid: frozenset[str],
) -> None:
    """Verify what was applied; again, where Postgres went away meanwhile."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _alive(this, session) as alive:
                _verify(this, alive, table, expectations, history, not_valid)
            return
        except QueryFailed as error:
            if attempt == _ATTEMPTS or not error.lost:
                raise
            log.warning("the connection was lost while verifying: %s", error.text)


def _verify(
    this: Run,
    session: Session,
    table: VersionTable | None,
    expectations: Expectations | None,
    history: History,
    not_valid: frozenset[str] | None = None,
) -> None:
    """Check what the run left, or found; ``not_valid`` are the constraints that were NOT VALID before it."""
    record, plan = this.record, this.record.plan
    if plan is None:
        raise Internal("verify ran before inspect")
    actual = frozenset(read_rows(session, table) if table else ())
    record.after = tuple(sorted(actual)) if record.after is None else record.after
    at_head = not history.unknown(actual) and not history.plan("upgrade", "heads", actual).revisions
    if expectations and not at_head:
        # verify.toml describes the schema at head; what it allows holds anywhere.
        expectations = dataclasses.replace(expectations, tables=(), assertions=())
    with record.stage("verify") as details:
        findings = verify(
            session,
            expected=plan.after,
            actual=actual,
            not_valid_before=catalog.not_valid_constraints(session) if not_valid is None else not_valid,
            expectations=expectations,
        )
        said = {(finding.rule, finding.place) for finding in findings}
        before = (finding for finding in record.findings if (finding.rule, finding.place) not in said)
        record.findings = (*before, *findings)
        details.update(findings=len(findings), expectations=bool(expectations and at_head))
        errors = [finding for finding in findings if finding.severity is Severity.ERROR]
        if errors:
            raise _verify_failed(errors, this, changed=record.before != record.after)


def _verify_failed(errors: list[Finding], this: Run, *, changed: bool) -> VerifyFailed:
    record = this.record
    count = "a check" if len(errors) == 1 else f"{len(errors)} checks"
    more = f"; and {len(errors) - 5} more in the report" if len(errors) > 5 else ""
    back = f"; to go back: `migrator restore {record.backup_id} --yes`" if record.backup_id else ""
    return VerifyFailed(
        f"Verify failed {count}: " + "; ".join(str(error) for error in errors[:5]) + more + ".",
        state=f"The database is at {', '.join(record.after or ()) or 'base'}"
        + ("." if changed else "; this run changed nothing."),
        next_step="mend what the findings say, then run `migrator verify`" + back,
    )
