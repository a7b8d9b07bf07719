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

from migrator.aftermath import translate
from migrator.backups.manifest import summary
from migrator.errors import Internal, Interrupted, MigratorError, Partial, VerifyFailed
from migrator.history import History, ProjectOptions
from migrator.interruption import Interrupt, Interruption
from migrator.logs import Logs
from migrator.outcome import Finding, Outcome, Severity
from migrator.postgres import ConnectFailed, QueryFailed, Session, connect
from migrator.record import Record
from migrator.schema import catalog
from migrator.schema.expectations import Expectations, read
from migrator.settings import Settings
from migrator.stages.apply import Application, apply
from migrator.stages.backup import back_up, decide
from migrator.stages.guard import guard
from migrator.stages.inspect import Inspection, inspect
from migrator.stages.lock import APPLY_LOCK, LOCK_CLASS, lock, regain
from migrator.stages.verify import verify
from migrator.stages.wait import wait
from migrator.versions import VersionTable, read_rows

log = logging.getLogger("migrator")


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
    record = this.record
    try:
        _stages(this)
    except MigratorError as error:
        return record.failed(error)
    except Interrupt as error:
        this.interruption.shield()
        if record.after is not None and record.after != record.before:
            return record.failed(
                Partial(
                    f"Interrupted by {error.name} after the revisions were committed, before they were verified.",
                    state=f"The database is at {', '.join(record.after) or 'base'}.",
                    next_step="`migrator verify` checks it",
                )
            )
        return record.failed(Interrupted(f"Interrupted by {error.name}.", next_step="run it again"))
    except Exception as error:
        log.exception("unexpected")
        return record.failed(translate(error))
    return record.succeeded()


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
                details["waited"] = round(stack.enter_context(lock(session, settings)), 3)
            # Another run may have done the work while this one waited.
            found = _inspect(this, session, history, settled=True)
        if this.request.kind == "verify" or _nothing_to_do(this, found):
            _verify(this, session, found.version_table, expectations, history)
            return
        with record.stage("guard"):
            record.findings += guard(found.plan, yes=this.request.yes, tables=found.tables)
        _backup(this, session, found)
        not_valid = catalog.not_valid_constraints(session)
        table = _apply(this, session, history, found)
        _verify(this, stack.enter_context(_alive(this, session)), table, expectations, history, not_valid)


def _wait(this: Run) -> Session:
    with this.record.stage("wait") as details:
        session, attempts = wait(this.settings.required_target, this.settings, this.application_name)
        details.update(attempts=attempts, server_version=session.facts.version)
    return session


def _inspect(this: Run, session: Session, history: History, *, settled: bool) -> Inspection:
    with this.record.stage("inspect") as details:
        kind = "upgrade" if this.request.kind == "verify" else this.request.kind
        found = inspect(
            session,
            history,
            this.settings,
            kind,
            this.request.destination,
            read_only=this.request.kind == "verify",
            settled=settled,
        )
        details.update(
            current=found.current,
            pending=[revision.revision for revision in found.plan.revisions],
            tables=found.tables,
            size_bytes=found.size,
        )
    this.record.plan, this.record.before, this.record.after = found.plan, found.current, found.current
    return found


def _nothing_to_do(this: Run, found: Inspection) -> bool:
    return found.plan.empty and this.settings.backup != "always"


def _backup(this: Run, session: Session, found: Inspection) -> None:
    pending = not found.plan.empty and this.request.kind != "stamp"
    reason = decide(this.settings.backup, pending, found.empty)
    if reason:
        this.record.skip("backup", reason)
        return
    with this.record.stage("backup") as details:
        backup = back_up(
            session,
            this.settings,
            run_id=this.record.run_id,
            revisions=found.current,
            application_name=this.application_name,
        )
        this.record.backup = summary(backup)
        details.update(id=backup.id, size_bytes=backup.size_bytes)


def _apply(this: Run, session: Session, history: History, found: Inspection) -> VersionTable | None:
    """Run the plan; returns the version table that ``env.py`` really uses."""
    record = this.record
    if found.plan.empty:
        record.skip("apply", "nothing is pending")
        return found.version_table
    application = Application(
        session,
        history,
        this.settings,
        found.plan,
        logs=this.logs,
        interruption=this.interruption,
        apply_lock=(LOCK_CLASS, APPLY_LOCK),
        regain=lambda: regain(session),
    )

    def rows() -> frozenset[str] | None:
        return _rows_now(this, session, application.version_table)

    try:
        with record.stage("apply"):
            apply(application, backup_id=record.backup_id, read_rows=rows)
    finally:
        if application.version_table is not None:
            now = rows()
            record.revisions = application.committed(now)
            record.after = None if now is None else tuple(sorted(now))
    return application.version_table


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
    """Yield the session, or another one for the block where it was lost while the migration ran."""
    try:
        session.query("SELECT 1")
    except QueryFailed:
        log.warning("the control connection was lost while the migration ran; connecting again")
        with connect(
            session.target, this.application_name, max(10.0, this.settings.connect_timeout)
        ) as other:
            yield other
    else:
        yield session


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
        record.findings += findings
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
