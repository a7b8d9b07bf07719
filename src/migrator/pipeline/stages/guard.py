"""Refuse what would destroy: the last check before the backup."""

from __future__ import annotations

from migrator.errors import Unsafe
from migrator.history import Plan
from migrator.outcome import Finding, Severity


def guard(plan: Plan, *, yes: bool, tables: int) -> tuple[Finding, ...]:
    """Judge the plan; ``yes`` is the person's consent, ``tables`` the number of tables in the database.

    A downgrade that ends at base, however it was spelled, deletes the schema and needs consent.
    Raises :class:`Unsafe`.
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
                remedy="add --yes if that is meant",
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
