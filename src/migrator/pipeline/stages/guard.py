"""Refuse to destroy data, or to run unread SQL: the last check before the backup."""

from __future__ import annotations

import logging

from migrator.errors import Unsafe
from migrator.outcome import Finding, Severity
from migrator.project import Plan

log = logging.getLogger("migrator.guard")


def guard(plan: Plan, *, yes: bool, tables: int) -> tuple[Finding, ...]:
    """Judge the plan; ``yes`` is the user's consent, ``tables`` the number of tables in the database.

    A downgrade to base deletes the schema and needs consent, in any spelling. So does a downgrade with
    SQL from the ledger instead of the image: it is shown first. Raises :class:`Unsafe`.
    """
    findings = []
    count = len(plan.revisions)
    revisions = "the only revision" if count == 1 else f"all {count} revisions"
    if plan.kind == "downgrade" and plan.revisions and not plan.after and not yes:
        findings.append(
            Finding(
                rule="downgrade-to-base",
                severity=Severity.ERROR,
                place=f"downgrade {plan.destination}",
                sentence=f"it reverts {revisions} and deletes the schema"
                f" ({tables} table{'' if tables == 1 else 's'} in it now)",
                remedy="add --yes to confirm",
            )
        )
    if plan.stored_downgrades and not yes:
        _show(plan)
        findings.append(
            Finding(
                rule="kept-sql",
                severity=Severity.ERROR,
                place=f"downgrade {plan.destination}",
                sentence=f"this image does not have {_names(plan)}; it would run the SQL from the ledger, "
                "which is shown above",
                remedy="read it, then add --yes to confirm",
            )
        )
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        raise Unsafe(
            "The guard refused: " + "; ".join(str(finding) for finding in errors) + ".",
            next_step=f"migrator {plan.kind} {plan.destination} --yes",
            findings=errors,
        )
    return tuple(findings)


def _names(plan: Plan) -> str:
    names = [way.revision for way, _ in plan.stored_downgrades]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _show(plan: Plan) -> None:
    """Log every statement in full, at a level that is always on."""
    for way, _ in plan.stored_downgrades:
        for statement in way.statements or ():
            log.warning("%s: %s", way.revision, statement, extra={"stage": "guard", "revision": way.revision})
