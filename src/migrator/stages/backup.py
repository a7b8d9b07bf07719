"""The stage ``backup``: no apply without a verified backup, unless it is switched off by name."""

from __future__ import annotations

from migrator.backups import dump
from migrator.backups.dump import back_up
from migrator.postgres import Session
from migrator.settings import Settings

__all__ = ["back_up", "decide", "preflight"]


def decide(mode: str, pending: bool, empty: bool) -> str:
    """Return why there shall be no backup, or ``""`` where there shall be one.

    ``mode`` is MIGRATOR_BACKUP; ``pending`` whether revisions will be applied or reverted; ``empty`` whether the
    database holds nothing that could be lost.
    """
    if mode == "off":
        return "switched off by MIGRATOR_BACKUP=off"
    if mode == "always":
        return ""
    if not pending:
        return "nothing is pending"
    return "the database is empty" if empty else ""


def preflight(session: Session, settings: Settings) -> None:
    """Find out, before anything starts, whether a backup could be made; raises :class:`BackupFailed`."""
    dump.preflight(session, settings)
