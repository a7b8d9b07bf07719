"""Verify the state after a run: which checks apply at which revision, and what their findings mean for the
run.
"""

from __future__ import annotations

import dataclasses
import logging

from migrator.errors import Internal, VerifyFailed
from migrator.ledger import queries
from migrator.outcome import Finding, Severity
from migrator.pipeline.context import ATTEMPTS, Run, alive
from migrator.pipeline.drift import compare, refuse, snapshot_after
from migrator.pipeline.stages.verify import not_at_target, verify
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, read_rows
from migrator.project import History
from migrator.schema import catalog
from migrator.schema.expectations import Expectations

log = logging.getLogger("migrator")


def verify_patiently(
    this: Run,
    session: Session,
    table: VersionTable | None,
    expectations: Expectations | None,
    history: History,
    not_valid: frozenset[str],
) -> None:
    """Verify the applied revisions; verify again if Postgres went away meanwhile."""
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
    """Check the state of the database; ``not_valid`` are the constraints that were NOT VALID before the run."""
    record, plan = this.record, this.record.plan
    if plan is None:
        raise Internal("verify ran before inspect")
    actual = frozenset(read_rows(session, table) if table else ())
    record.after = tuple(sorted(actual)) if record.after is None else record.after
    at_head = (
        not history.unknown(actual) and not history.plan("upgrade", this.settings.goal, actual).revisions
    )
    if expectations and not at_head:
        # verify.toml describes the schema at head; its exceptions apply anywhere.
        expectations = dataclasses.replace(expectations, tables=(), assertions=())
    with record.stage("verify") as details:
        findings = verify(
            session,
            expected=actual if record.visits else plan.after,
            actual=actual,
            not_valid_before=catalog.not_valid_constraints(session) if not_valid is None else not_valid,
            expectations=expectations,
            trusting=this.settings.verify_as_superuser,
        )
        findings = (*findings, *_of_others(this, session), *_half_reverted(this, session, table))
        said = {(finding.rule, finding.place) for finding in findings}
        before = (finding for finding in record.findings if (finding.rule, finding.place) not in said)
        record.findings = (*before, *findings)
        details.update(findings=len(findings), expectations=bool(expectations and at_head))
        errors = [finding for finding in findings if finding.severity is Severity.ERROR]
        if errors:
            hint = history.branch_hint(this.settings.destination) if this.request.kind == "verify" else ""
            raise _verify_failed(errors, this, hint, changed=record.before != record.after)
        if this.request.kind == "verify":
            drift = compare(session, this.settings, alone=False)
            record.drift = details["drift"] = str(drift)
            refuse(drift, at=record.after)
            record.findings += drift.findings(Severity.WARNING)
        elif not_valid is not None:
            record.schema = snapshot_after(session, this.settings, record.version_table)


def _of_others(this: Run, session: Session) -> list[Finding]:
    """Return the version tables that are not at their target, for an ``env.py`` with several."""
    found: list[Finding] = []
    for place, wanted in this.record.visits.items():
        found += not_at_target(wanted, frozenset(read_rows(session, place)), str(place))
    return found


def _half_reverted(this: Run, session: Session, table: VersionTable | None) -> list[Finding]:
    """Return the revisions with a partly committed downgrade and an unchanged version row."""
    if not this.settings.ledger or this.settings.retry:
        return []
    return [
        Finding(
            rule="half-reverted",
            severity=Severity.ERROR,
            place=part.revision,
            sentence=f"run {part.run_id} may have committed a part of {part.name}, and"
            f" {part.revision} still counts as applied; the part began with: {part.statement}",
            remedy="finish the downgrade with --retry, or undo that part by hand and run `migrator upgrade --retry`",
        )
        for part in queries.read_partial(session, table, this.settings.role)
        if not part.upgrade
    ]


def _verify_failed(errors: list[Finding], this: Run, hint: str, *, changed: bool) -> VerifyFailed:
    record = this.record
    count = "a check" if len(errors) == 1 else f"{len(errors)} checks"
    more = f"; and {len(errors) - 5} more in the report" if len(errors) > 5 else ""
    before = ", ".join(record.before or ()) or "base"
    ways = []
    if changed and this.request.kind == "upgrade" and len(record.before or ()) <= 1 and _reversible(this):
        ways.append(f"`migrator downgrade {before}{' --yes' if before == 'base' else ''}`")
    if record.backup_id:
        ways.append(f"`migrator restore {record.backup_id} --yes`")
    back = "; to go back: " + " or ".join(ways) if ways else ""
    return VerifyFailed(
        f"Verify failed {count}: " + "; ".join(str(error) for error in errors[:5]) + more + ".",
        state=f"The database is at {', '.join(record.after or ()) or 'base'}"
        + ("." if changed else "; this run changed nothing."),
        next_step="fix what the findings say, then run `migrator verify`"
        + back
        + (f"; {hint}" if hint else ""),
    )


def _reversible(this: Run) -> bool:
    """Tell whether a downgrade can revert the run: not over a schema that the run adopted, which it would
    delete.
    """
    plan = this.record.plan
    return plan is not None and not plan.baseline and not plan.one_way
