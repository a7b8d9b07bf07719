"""The stage ``backup``: no apply without a verified backup, unless it is switched off by name."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from migrator.backups import dump, reuse
from migrator.backups.dump import back_up
from migrator.backups.manifest import Backup
from migrator.errors import MigratorError
from migrator.interruption import Interrupt
from migrator.outcome import Finding, Severity
from migrator.postgres import QueryFailed, Session
from migrator.settings import Settings

__all__ = ["back_up", "check_client", "decide", "preflight", "reusable", "tidy_up", "why_reused"]

LOGGER = logging.getLogger("migrator.backup")


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


def check_client(session: Session, settings: Settings) -> None:
    """Refuse a pg_dump that is too old before anything starts, also before the lock; raises :class:`BackupFailed`.

    Where a recent backup may be reused, another machine makes those, and no pg_dump is needed here.
    """
    if settings.backup_max_age is None:
        dump.check_client(session, settings)


def tidy_up(session: Session, settings: Settings) -> Finding | None:
    """Remove what MIGRATOR_BACKUP_KEEP does not keep, now that all went well; that it cannot be done is a finding."""
    from migrator.backups.retention import prune

    if not settings.backup_keep:
        return None
    try:
        prune(session, settings)
        return None
    except Interrupt as signal:  # the run's own work is done: a signal must not make it look undone
        why = f"interrupted by {signal.name}"
    except (MigratorError, QueryFailed) as error:
        why = str(error)
    LOGGER.warning("old backups were not removed: %s", why)
    sentence = f"old backups were not removed: {why}"
    return Finding("backups-not-pruned", Severity.WARNING, settings.backup_url, sentence, "migrator prune")


def preflight(session: Session, settings: Settings) -> None:
    """Find out, before anything starts, whether a backup could be made; raises :class:`BackupFailed`."""
    dump.preflight(session, settings)


def reusable(session: Session, settings: Settings, revisions: tuple[str, ...]) -> Backup | None:
    """Return a backup that is as good as a new one, where MIGRATOR_BACKUP_MAX_AGE allows for it."""
    return reuse.find(session, settings, revisions)


def why_reused(backup: Backup) -> str:
    """Say in a few words which backup stands for a new one."""
    minutes = reuse.age(backup, datetime.now(UTC)) / 60
    return f"reuses {backup.id}, made {minutes:.0f} min ago"
