"""Verify what a run left, or found: what is checked at which revision, and what its findings mean for the run."""

from __future__ import annotations

import dataclasses
import logging

from migrator.drift import compare, refuse
from migrator.errors import Internal, VerifyFailed
from migrator.history import History
from migrator.outcome import Finding, Severity
from migrator.postgres import QueryFailed, Session
from migrator.run import ATTEMPTS, Run, alive
from migrator.schema import catalog
from migrator.schema.expectations import Expectations
from migrator.stages.verify import verify
from migrator.versions import VersionTable, read_rows

log = logging.getLogger("migrator")


def verify_patiently(
    this: Run,
    session: Session,
    table: VersionTable | None,
    expectations: Expectations | None,
    history: History,
    not_valid: frozenset[str],
) -> None:
    """Verify what was applied; again, where Postgres went away meanwhile."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with alive(this, session) as living:
                verify_run(this, living, table, expectations, history, not_valid)
            return
        except QueryFailed as error:
            if attempt == ATTEMPTS or not error.lost:
                raise
            log.warning("the connection was lost while verifying: %s", error.text)


def verify_run(
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
        if this.request.kind == "verify":
            drift = compare(session, this.settings, alone=False)
            record.drift = details["drift"] = str(drift)
            refuse(drift, at=record.after)
            record.findings += drift.findings(Severity.WARNING)


def _verify_failed(errors: list[Finding], this: Run, *, changed: bool) -> VerifyFailed:
    record = this.record
    count = "a check" if len(errors) == 1 else f"{len(errors)} checks"
    more = f"; and {len(errors) - 5} more in the report" if len(errors) > 5 else ""
    before = ", ".join(record.before or ()) or "base"
    ways = []
    if changed and this.request.kind == "upgrade" and len(record.before or ()) <= 1 and not _adopted(this):
        ways.append(f"`migrator downgrade {before}{' --yes' if before == 'base' else ''}`")
    if record.backup_id:
        ways.append(f"`migrator restore {record.backup_id} --yes`")
    back = "; to go back: " + " or ".join(ways) if ways else ""
    return VerifyFailed(
        f"Verify failed {count}: " + "; ".join(str(error) for error in errors[:5]) + more + ".",
        state=f"The database is at {', '.join(record.after or ()) or 'base'}"
        + ("." if changed else "; this run changed nothing."),
        next_step="mend what the findings say, then run `migrator verify`" + back,
    )


def _adopted(this: Run) -> bool:
    """Whether the run adopted a schema that was there: a downgrade would delete it."""
    return this.record.plan is not None and bool(this.record.plan.baseline)
