"""Find a backup that is as good as a new one, only with MIGRATOR_BACKUP_MAX_AGE.

It must be of this database (cluster, timeline and oid, and not only the name), at these revisions, and
verified like a new one. It may exclude no rows that a new one would have. It must still be there: in a
folder byte for byte; in a bucket as the same object that was read back for its verification, by its
ETag, or else byte for byte too. It must not hold the leftovers of a failed run: it would be named as
the way back to before them. It lacks all later writes: the setting accepts that.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path

from migrator.backups import exported_snapshot, pg_restore
from migrator.backups.manifest import Backup
from migrator.backups.storage import files
from migrator.backups.storage.interface import Store, checksum
from migrator.backups.storage.open import open_store
from migrator.config.settings import Settings
from migrator.errors import MigratorError
from migrator.ledger.unfinished_runs import made_over
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.schema.names import parse_patterns

LOGGER = logging.getLogger("migrator.backup")


def find(
    session: Session, settings: Settings, revisions: tuple[str, ...], version_table: VersionTable | None
) -> Backup | None:
    """Return the newest backup that can be reused; None if there is none.

    Raises QueryFailed.
    """
    if settings.backup_max_age is None:
        return None
    try:
        store = open_store(settings.backup_url, settings)
        candidates = store.backups(session.facts.database)
    except MigratorError as error:
        LOGGER.warning("no backup can be reused: %s", error.message)
        return None
    now = datetime.now(UTC)
    recent = [backup for backup in candidates if 0 <= age(backup, now) <= settings.backup_max_age]
    if not recent:
        return None
    identity = (*exported_snapshot.identity(session), session.facts.database_oid)
    patterns = parse_patterns(settings.backup_exclude_table_data)
    found = exported_snapshot.relations(session) if patterns else []
    left_out = {table.shown for table in exported_snapshot.find(session, patterns, found)}
    for backup in recent:
        why = _unfit(backup, revisions, identity, left_out, settings.backup_verify)
        if (
            not why
            and settings.ledger
            and made_over(session, version_table, backup.next_xid, backup.unseen_xid)
        ):
            why = "it was made after a failed run had left a part"
        why = why or _gone(store, backup)
        if not why:
            return backup
        LOGGER.info("%s is not reused: %s", backup.id, why)
    return None


def age(backup: Backup, now: datetime) -> float:
    """Return how old a backup is in seconds; less than 0 if its clock was ahead, or is unknown."""
    try:
        return (now - datetime.fromisoformat(backup.created_at)).total_seconds()
    except (TypeError, ValueError):
        return -1.0


def _unfit(
    backup: Backup,
    revisions: tuple[str, ...],
    identity: tuple[str, int | None, int],
    left_out: set[str],
    proof: str,
) -> str:
    """Return why a backup cannot replace a new one, or ``""``."""
    if set(backup.revisions) != set(revisions):
        return "it is of another revision"
    if not identity[0] or (backup.system_identifier, backup.timeline, backup.database_oid) != identity:
        return "it may be of another database with this name"
    if not backup.verified or (proof == "restore" and backup.verified != "restore"):
        return f"it was not verified by {proof}"
    if set(backup.excluded_table_data) - left_out:
        return "it excludes rows"
    return ""


def _gone(store: Store, backup: Backup) -> str:
    """Return the fault of the stored content, or ``""``.

    Only a write gives an object another ETag, and buckets keep their own checksums against decay. So an
    object with the ETag of its verification is not read again, which would take as long as a dump.
    """
    place = Path(backup.place)
    try:
        if not place.is_absolute():
            if backup.stored_tag and store.tag(backup) == backup.stored_tag:
                return ""
            LOGGER.info(
                "reading %s again: the object may have been replaced since it was verified", backup.id
            )
            found = checksum(store.chunks(backup))
        else:
            size = files.size_of(place) if place.is_dir() else place.stat().st_size
            if size != backup.stored[1]:
                return f"it has {size} bytes, not {backup.stored[1]}"
            found = pg_restore.checksum_of(place)
    except OSError as error:
        return str(error.strerror)
    return "" if found == backup.stored else "its content was changed"
