"""The stage ``backup``: no apply without a verified backup, unless it is switched off by name.

The code for backups is imported late: it is a good part of a small run's start.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from migrator.config.settings import Settings
from migrator.errors import MigratorError
from migrator.outcome import Finding, Severity
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.runtime.signals import Interrupt

if TYPE_CHECKING:
    from migrator.backups.manifest import Backup
    from migrator.postgres.version_table import VersionTable

LOGGER = logging.getLogger("migrator.backup")


def decide(mode: str, pending: bool, empty: bool) -> str:
    """Return why no backup is made, or ``""`` if one is made.

    ``mode`` is MIGRATOR_BACKUP. ``pending`` says whether revisions will be applied or reverted,
    ``empty`` whether the database holds nothing that can be lost.
    """
    if mode == "off":
        return "switched off by MIGRATOR_BACKUP=off"
    if mode == "always":
        return ""
    if not pending:
        return "nothing is pending"
    return "the database is empty" if empty else ""


def back_up(
    session: Session,
    settings: Settings,
    *,
    run_id: str,
    revisions: tuple[str, ...],
    application_name: str,
    name: str = "",
) -> Backup:
    """Back up the session's database and return the verified backup; raises :class:`BackupFailed`."""
    from migrator.backups.dump import backup as dump

    return dump.back_up(
        session, settings, run_id=run_id, revisions=revisions, application_name=application_name, name=name
    )


def check_client(session: Session, settings: Settings) -> None:
    """Refuse a pg_dump that is too old before anything starts, also before the lock; raises
    :class:`BackupFailed`.

    If a recent backup may be reused, another machine makes the backups, and no pg_dump is needed here.
    """
    if settings.backup_max_age is None:
        from migrator.backups import clients

        clients.for_dump(settings, session.facts.version, session.facts.major)


def tidy_up(session: Session, settings: Settings) -> Finding | None:
    """Remove the backups that MIGRATOR_BACKUP_KEEP does not keep, after a good end; a failure is only a
    finding.
    """
    if not settings.backup_keep:
        return None
    from migrator.backups.retention import prune

    try:
        prune(session, settings)
        return None
    except Interrupt as signal:  # the run's own work is done: a signal must not make it look unfinished
        why = f"interrupted by {signal.name}"
    except (MigratorError, QueryFailed) as error:
        why = str(error)
    LOGGER.warning("old backups were not removed: %s", why)
    sentence = f"old backups were not removed: {why}"
    return Finding("backups-not-pruned", Severity.WARNING, settings.backup_url, sentence, "migrator prune")


def reusable(
    session: Session, settings: Settings, revisions: tuple[str, ...], version_table: VersionTable | None
) -> Backup | None:
    """Return a backup that is as good as a new one, if MIGRATOR_BACKUP_MAX_AGE allows it."""
    if settings.backup_max_age is None:
        return None
    from migrator.backups import reuse

    return reuse.find(session, settings, revisions, version_table)


def why_reused(backup: Backup) -> str:
    """Return in a few words which backup is reused."""
    from migrator.backups import reuse

    minutes = reuse.age(backup, datetime.now(UTC)) / 60
    return f"reuses {backup.id}, made {minutes:.0f} min ago"
