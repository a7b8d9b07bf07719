"""Verify a stored backup again: its checksum, all of its content, or a restore into a scratch database.

The manifest has all facts for the comparison, so the original is not needed. Each verification is
recorded there, also failed ones. A backup with changed bytes or content is renamed, and is no backup
any more. One that only cannot be restored here (a role or an extension is missing, the server's disk is
full) stays one.
"""

from __future__ import annotations

import logging
import time

from migrator.backups import clients, pg_restore
from migrator.backups.manifest import Backup, Proof
from migrator.backups.storage.interface import Store
from migrator.backups.verification import scratch_database, verify_new
from migrator.backups.verification.verdict import Failed, Unproven, demand_parsed, judging
from migrator.backups.verification.verify_new import READ, RESTORE
from migrator.config.settings import Settings
from migrator.errors import BackupFailed

LOGGER = logging.getLogger("migrator.backup")
CHECKSUM = "checksum"
"""The only check of an encrypted backup without its private key: the stored bytes are unchanged."""


def verify(
    store: Store, backup: Backup, settings: Settings, how: str, *, run_id: str, application_name: str
) -> Backup:
    """Verify a backup by ``read`` or ``restore``; return it with the verification recorded in its manifest.

    Raises :class:`BackupFailed` if it fails.
    """
    started, before = time.monotonic(), backup.verified
    LOGGER.info("verifying %s (%s) ...", backup.id, how)
    try:
        with judging():
            place = (
                verify_new.place_of(settings, settings.target, application_name) if how == RESTORE else None
            )
            if place is not None:  # before all of it is read
                scratch_database.check(place)
            backup = backup.proven(_read(store, backup, settings, run_id))
            if place is not None:
                with pg_restore.opened(store, backup, settings) as path:
                    backup = backup.proven(verify_new.restored(place, settings, backup, path, run_id, None))
    except Unproven as failure:
        done = verify_new.failed_proof(how, run_id, started, str(failure))
        try:
            store.note(backup.unproven(done, before))
        except OSError as error:
            LOGGER.warning("the manifest does not record that the verification did not finish: %s", error)
        raise BackupFailed(
            failure.of(backup),
            next_step=f"{failure.next_step}, and run verify-backup again; the backup was kept",
        ) from failure
    except Failed as failure:
        raise _condemned(store, backup, failure) from failure
    try:
        store.note(backup)
    except OSError as error:
        raise BackupFailed(
            f"{backup.id} is verified, but that cannot be recorded: {error}.",
            next_step="make its place writable, and run verify-backup again",
        ) from error
    if backup.verified:
        LOGGER.info("%s is verified: %s", backup.id, backup.proofs[-1].how)
    else:
        LOGGER.warning(
            "the checksum of %s matches, but a checksum verifies no backup: it is still not used as a backup",
            backup.id,
        )
    return backup


def _read(store: Store, backup: Backup, settings: Settings, run_id: str) -> Proof:
    """Read all of a backup once; raises Failed, DamagedBackup, OSError."""
    started = time.monotonic()
    client = clients.for_restore(settings, backup.client_major, backup.client_major)
    if backup.encrypted_to and not settings.backup_identity_file:
        pg_restore.check_stored_checksum(store, backup)
        LOGGER.warning(
            "%s is encrypted and there is no private key: only its checksum is compared "
            "(MIGRATOR_BACKUP_IDENTITY_FILE)",
            backup.id,
        )
        return verify_new.proof(CHECKSUM, run_id, started)
    if backup.dump_format == "directory":
        with pg_restore.opened(store, backup, settings) as path:
            finished = pg_restore.read_whole(client, path)
    else:
        chunks = pg_restore.plain_chunks(store, backup, settings)
        finished = pg_restore.read_whole(client, chunks)
        for _ in chunks:  # to the end, where the checksum is compared
            pass
    demand_parsed(finished)
    return verify_new.proof(READ, run_id, started)


def _condemned(store: Store, backup: Backup, failure: Failed) -> BackupFailed:
    """Rename a bad backup, so that nothing uses it as one; return the error about that."""
    try:
        kept = (
            "is not a backup any more: it was renamed to "
            f"{store.mark_bad(backup, str(failure), backup.database)}."
        )
    except OSError as error:
        kept = f"is not a backup any more, but it could not be renamed: {error}."
    return BackupFailed(
        f"{failure} {backup.id} {kept}",
        next_step="make another backup now: migrator backup; `migrator backups` lists older ones",
    )
