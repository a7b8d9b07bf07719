"""Look into the ledger, and put it right: the commands ``ledger`` and ``repair``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrator import ledger
from migrator.bookkeeping import about
from migrator.edited import Edit, find_edits
from migrator.errors import HistoryError
from migrator.history import History
from migrator.ledger import Author
from migrator.postgres import Session
from migrator.settings import Settings
from migrator.versions import read_version

log = logging.getLogger("migrator.ledger")


@dataclass(frozen=True)
class Repair:
    """What `repair --accept` found: edits that are accepted now, and revisions whose file is as it was."""

    accepted: tuple[Edit, ...]
    unchanged: tuple[str, ...]


def read_ledger(session: Session, history: History, settings: Settings, limit: int) -> list[dict[str, Any]]:
    """Return the newest ``limit`` rows, the newest first; none where there is no ledger."""
    table, _ = read_version(session, history, settings.version_table)
    return ledger.read_rows(session, table, limit) if table else []


def accept_edits(
    session: Session, history: History, settings: Settings, names: Sequence[str], author: Author
) -> Repair:
    """Record the present files of applied revisions as the ones that were applied, and by whom.

    Raises :class:`HistoryError` for a revision that is not in the ledger, before anything is recorded.
    """
    table, _ = read_version(session, history, settings.version_table)
    standing = ledger.read_standing(session, table)
    wanted = list(dict.fromkeys(item.revision for name in names for item in history.find(name)))
    strangers = [name for name in wanted if name not in standing.entries]
    if table is None or strangers:
        raise HistoryError(
            f"The ledger does not have {', '.join(strangers) or 'anything'}.",
            next_step="`migrator ledger` lists what was applied; only that can have been edited since",
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
