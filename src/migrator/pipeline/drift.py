"""Drift: does the live schema still match the snapshot of the last run?

A run that changed the schema and verified it keeps a snapshot in the ledger, in the same statement as
its own row. `verify` compares the schema with the newest snapshot, and so does a run before it changes
anything. Without a valid snapshot (none yet, or the version rows have changed since), nothing is
compared, and the report says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.config.settings import Settings
from migrator.errors import Drifted, HistoryError
from migrator.ledger import table as ledger
from migrator.ledger.queries import LastSnapshot, read_last_snapshot
from migrator.ledger.table import Author
from migrator.outcome import Finding, Severity
from migrator.pipeline.stages.lock import holder
from migrator.postgres.errors import QueryFailed, Refused
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.schema.names import Pattern, parse_patterns, split_formatted
from migrator.schema.snapshot import Difference, Item, Snapshot, Unreadable, differences, take, unpack

log = logging.getLogger("migrator")

_SHOWN = 5
_ACCEPT = "migrator repair --accept-schema"


@dataclass(frozen=True)
class Drift:
    """The result of a comparison: the differences, or in ``unknown`` the reason why there was none."""

    differences: tuple[Difference, ...] = ()
    last: LastSnapshot | None = None
    unknown: str = ""
    switched_off: bool = False

    def __str__(self) -> str:
        if self.unknown:
            return f"its schema was not compared: {self.unknown}"
        run = self.last.run_id if self.last else ""
        if not self.differences:
            return f"its schema matches the snapshot of run {run}"
        count = len(self.differences)
        return (
            f"its schema differs from the snapshot of run {run} ({count} "
            f"difference{'' if count == 1 else 's'})"
        )

    def findings(self, severity: Severity) -> tuple[Finding, ...]:
        """Return a finding for each difference, or a warning that the comparison was not possible."""
        if self.unknown and not self.switched_off:
            return (
                Finding("drift-unknown", Severity.WARNING, "the schema", f"not compared: {self.unknown}"),
            )
        return tuple(
            Finding(_rule(item), severity, str(item.item), item.sentence) for item in self.differences
        )


def _rule(difference: Difference) -> str:
    if difference.after is None:
        return "drift-missing"
    return "drift-added" if difference.before is None else "drift-changed"


def compare(session: Session, settings: Settings, *, alone: bool) -> Drift:
    """Compare the live schema with the last snapshot; ``alone`` means that the run lock is held.

    Raises QueryFailed if the connection is lost.
    """
    if settings.drift == "off":
        return Drift(unknown="MIGRATOR_DRIFT=off", switched_off=True)
    try:
        return _compare(session, settings, alone=alone)
    except Refused as error:
        return Drift(unknown=f"it could not be read: {error.text.rstrip('.')}")


def _compare(session: Session, settings: Settings, *, alone: bool) -> Drift:
    ignored = parse_patterns(settings.drift_ignore)
    last = read_last_snapshot(session, settings.role)
    if last is None:
        return Drift(unknown=f"no run has left a snapshot yet; `{_ACCEPT}` takes one")
    try:
        before = unpack(last.snapshot)
    except Unreadable as error:
        return Drift(unknown=f"the snapshot of run {last.run_id} cannot be read: {error}")
    now = take(session, last.ledger.quoted)
    if before.versions != now.versions:
        return Drift(unknown=_moved(before, now))
    found = tuple(item for item in differences(before, now) if not _is_ignored(item.item, ignored))
    if found and not alone and (running := holder(session)):
        return Drift(unknown=f"{running[1]} is running and may change it")
    newest = read_last_snapshot(session, settings.role) if found else last
    if newest is None or newest.run_id != last.run_id:
        return Drift(unknown="a run changed it during the comparison")
    return Drift(found, last)


def _moved(before: Snapshot, now: Snapshot) -> str:
    names = sorted(
        name
        for name in {*before.versions, *now.versions}
        if before.versions.get(name) != now.versions.get(name)
    )
    rows = "; ".join(
        f"{name} was at {_at(before.versions.get(name))} and is at {_at(now.versions.get(name))}"
        for name in names
    )
    return f"its revision has changed since the last successful run ({rows})"


def _at(rows: tuple[str, ...] | None) -> str:
    return ", ".join(rows) or "base" if rows is not None else "nothing"


def _is_ignored(item: Item, patterns: Sequence[Pattern]) -> bool:
    names = [split_formatted(name) for name in {item.relation, item.name} if name]
    return any(pattern.matches(*name) for pattern in patterns for name in names)


def refuse(drift: Drift, *, at: Sequence[str]) -> None:
    """Raise :class:`Drifted` if there are differences."""
    if not drift.differences or drift.last is None:
        return
    count = len(drift.differences)
    shown = "; ".join(f"{item.item}: {item.sentence}" for item in drift.differences[:_SHOWN])
    more = f"; and {count - _SHOWN} more in the report" if count > _SHOWN else ""
    raise Drifted(
        f"The schema differs from the snapshot of run {drift.last.run_id} "
        f"({drift.last.at:%Y-%m-%d %H:%M:%S %Z}): {shown}{more}.",
        state=f"The database is at {', '.join(at) or 'base'}; this run changed nothing.",
        next_step=f"undo the change, or add it in a revision; to accept the schema as it is: `{_ACCEPT}` "
        "(MIGRATOR_DRIFT_IGNORE excludes tables that others manage)",
        findings=drift.findings(Severity.ERROR),
    )


def before_apply(
    session: Session, settings: Settings, *, kind: str, at: Sequence[str]
) -> tuple[Finding, ...]:
    """Compare before a run changes the schema. Return warnings, or raise Drifted (an upgrade with
    MIGRATOR_DRIFT=refuse).
    """
    if kind not in {"upgrade", "downgrade"}:
        return ()
    drift = compare(session, settings, alone=True)
    if not drift.differences:
        return ()
    if settings.drift == "refuse" and kind == "upgrade":
        refuse(drift, at=at)
    findings = drift.findings(Severity.WARNING)
    for finding in findings[:_SHOWN]:
        log.warning("since the last run: %s", finding, extra={"stage": "guard", "rule": finding.rule})
    if len(findings) > _SHOWN:
        log.warning("since the last run: %d more differences, in the report", len(findings) - _SHOWN)
    return findings


def snapshot_after(
    session: Session, settings: Settings, table: VersionTable | None
) -> Mapping[str, Any] | None:
    """Return the snapshot for the ledger of the schema after a run; None if the ledger keeps none.

    A failure here does not fail the run.
    """
    if table is None or not settings.ledger or settings.drift == "off":
        return None
    try:
        return take(session, ledger.beside(table, session).quoted).pack()
    except QueryFailed as error:
        log.info("the ledger does not keep the current schema: %s", error.text)
        return None


def snapshot_if_moved(session: Session, settings: Settings, table: VersionTable) -> Mapping[str, Any] | None:
    """Return the result of :func:`snapshot_after`, if there is no snapshot of the current version rows."""
    try:
        last = read_last_snapshot(session, settings.role)
        known = unpack(last.snapshot).versions if last else None
    except Unreadable:
        known = None
    snapshot = snapshot_after(session, settings, table)
    return None if snapshot is None or snapshot["versions"] == known else snapshot


def accept(session: Session, settings: Settings, table: VersionTable | None, author: Author) -> Drift:
    """Accept the live schema as the expected one, under the run lock; return the earlier differences.

    Raises :class:`HistoryError` if there is no version table, and QueryFailed.
    """
    if table is None:
        raise HistoryError(
            "There is no version table yet, so there is no ledger to keep the schema.",
            next_step="run `migrator upgrade` first",
        )
    drift = compare(session, settings._replace(drift="warn"), alone=True)
    snapshot = take(session, ledger.beside(table, session).quoted).pack()
    row = author.row(
        ledger.SCHEMA,
        ledger.SCHEMA_ROW,
        table,
        command="repair --accept-schema",
        message=f"accepted: {drift}",
        details={
            "schema": snapshot,
            "differences": [f"{item.item}: {item.sentence}" for item in drift.differences],
        },
    )
    ledger.append(session, table, [row])
    return drift
