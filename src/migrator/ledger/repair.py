"""The commands ``ledger`` (read it) and ``repair``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrator.config.settings import Settings
from migrator.errors import HistoryError
from migrator.ledger import queries
from migrator.ledger import table as ledger
from migrator.ledger.edited_files import Edit, find_edits
from migrator.ledger.sql import VERSION_TABLES
from migrator.ledger.table import Author
from migrator.ledger.writer import about
from migrator.outcome import ExitCode
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, read_version
from migrator.project import History

log = logging.getLogger("migrator.ledger")


@dataclass(frozen=True)
class Repair:
    """The result of `repair --accept`: the accepted edits, and the revisions with an unchanged file."""

    accepted: tuple[Edit, ...]
    unchanged: tuple[str, ...]


def read_ledger(session: Session, history: History, settings: Settings, limit: int) -> list[dict[str, Any]]:
    """Return the newest ``limit`` rows, newest first; none if there is no ledger."""
    table, _ = read_version(session, history, settings.version_table)
    return queries.read_rows(session, table, limit, settings.role) if table else []


def accept_edits(
    session: Session, history: History, settings: Settings, names: Sequence[str], author: Author
) -> Repair:
    """Record the current files of applied revisions as the applied ones, and who accepted them.

    Raises :class:`HistoryError` for a revision that is not in the ledger, before anything is recorded.
    """
    table, _ = read_version(session, history, settings.version_table)
    standing = queries.read_standing(session, table, settings.role)
    wanted = list(dict.fromkeys(item.revision for name in names for item in history.find(name)))
    strangers = [name for name in wanted if name not in standing.entries]
    if table is None or strangers:
        raise HistoryError(
            f"The ledger does not have {', '.join(strangers) or 'anything'}.",
            next_step="`migrator ledger` lists the applied revisions; only those can be accepted",
        )
    edits = {edit.entry.revision: edit for edit in find_edits(history, standing)}
    accepted = tuple(edits[name] for name in wanted if name in edits)
    rows = [
        author.row(
            ledger.ACCEPTED,
            number,
            table,
            command="repair --accept",
            details={"checksum_before": edit.entry.checksum, "edit": edit.kind},
            **about(history, edit.entry.revision, sums=True),
        )
        for number, edit in enumerate(accepted, start=1)
    ]
    if rows:
        ledger.append(session, table, rows)
    return Repair(accepted, tuple(name for name in wanted if name not in edits))


_LEDGERS = """
SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'version_table' AND NOT a.attisdropped
WHERE c.relname = %s AND c.relkind = 'r'
"""


def note_restore(
    session: Session, author: Author, role: str, *, message: str, seconds: float, backup_id: str
) -> None:
    """Add a row about a restore for every version table in a ledger of this database.

    All of them were restored, not only the project's. A ledger that others can write is not changed:
    their code on it would run as migrator. ``role`` is MIGRATOR_ROLE. Raises QueryFailed.
    """
    for (schema,) in session.query(_LEDGERS, (ledger.NAME,)):
        place = VersionTable(ledger.NAME, schema)
        found = queries.examine(session, place, None, role)
        if found.holes:
            log.warning("the ledger %s does not record the restore: others can write it", place)
            continue
        tables = session.query(VERSION_TABLES.of(found.indexed).format(table=place.quoted))
        for (name,) in tables:
            table = VersionTable(name, schema)
            row = author.row(
                ledger.RUN,
                0,
                table,
                command="restore",
                code=int(ExitCode.OK),
                outcome=ExitCode.OK.name,
                message=message,
                seconds=round(seconds, 3),
                backup_id=backup_id,
            )
            ledger.append(session, table, [row])
