"""Prove a backup again, whenever: its checksum, all of it read, or restored into a scratch database and compared.

What it is compared with is in its manifest, so it does not matter what became of the original.  Each proof is noted
there, the failed ones too.  A backup whose bytes or contents are not what they were is renamed, and is none any more;
one that only cannot be restored here (a role or an extension is missing, the server's disk is full) stays one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator

from migrator.backups import archive, clients, proof
from migrator.backups.manifest import Backup, Proof
from migrator.backups.proof import READ, RESTORE, CannotRestore, Failed, NotFinished
from migrator.backups.store import Store
from migrator.errors import BackupFailed, DamagedBackup, MigratorError, RestoreFailed
from migrator.postgres import ConnectFailed, QueryFailed
from migrator.settings import Settings

LOGGER = logging.getLogger("migrator.backup")
CHECKSUM = "checksum"
"""All that can be proven of an encrypted backup where its private key is not: it is as it was written."""


def verify(
    store: Store, backup: Backup, settings: Settings, how: str, *, run_id: str, application_name: str
) -> Backup:
    """Prove a backup by ``read`` or ``restore``; return it with the proof noted in its manifest.

    Raises :class:`BackupFailed` where it fails.
    """
    started = time.monotonic()
    LOGGER.info("proving %s (%s) ...", backup.id, how)
    with _failing(backup):
        try:
            found = _read(store, backup, settings, run_id)
            backup = backup.proven(found)
            if how == RESTORE:
                with archive.opened(store, backup, settings) as path:
                    place = proof.place_of(settings, settings.target, application_name)
                    backup = backup.proven(proof.restored(place, settings, backup, path, run_id, None))
        except CannotRestore as failure:
            done = dataclasses.replace(proof.proof(how, run_id, started), ok=False, why=str(failure))
            store.note(backup.proven(done))
            if isinstance(failure, NotFinished):
                raise BackupFailed(
                    f"The proof of {backup.id} was not finished: {failure}",
                    next_step="see what the program said, and run verify-backup again; the backup was kept",
                ) from failure
            raise BackupFailed(
                f"{backup.id} could not be restored here: {failure}",
                next_step="put right what pg_restore names, and run verify-backup again; the backup was kept",
            ) from failure
        except (Failed, DamagedBackup) as failure:
            why = failure.message if isinstance(failure, MigratorError) else str(failure)
            kept = store.mark_bad(backup, why, backup.database)
            raise BackupFailed(
                f"{why} {backup.id} is no backup any more: it was renamed to {kept}.",
                next_step="take another backup now: migrator backup; see `migrator backups` for older ones",
            ) from failure
        store.note(backup)
    LOGGER.info("%s is proven: %s", backup.id, backup.proofs[-1].how)
    return backup


def _read(store: Store, backup: Backup, settings: Settings, run_id: str) -> Proof:
    """Read all of a backup once; raises Failed, DamagedBackup, OSError."""
    started = time.monotonic()
    client = clients.for_restore(settings, backup.client_major, backup.client_major)
    if backup.encrypted_to and not settings.backup_identity_file:
        archive.demand_stored(store, backup)
        LOGGER.warning(
            "%s is encrypted and no private key is at hand: only its checksum is compared "
            "(MIGRATOR_BACKUP_IDENTITY_FILE)",
            backup.id,
        )
        return proof.proof(CHECKSUM, run_id, started)
    if backup.dump_format == "directory":
        with archive.opened(store, backup, settings) as path:
            finished = archive.read_whole(client, path)
    else:
        chunks = archive.plain_chunks(store, backup, settings)
        finished = archive.read_whole(client, chunks)
        for _ in chunks:  # to the end, where the checksum is compared
            pass
    if finished.status < 0:
        raise NotFinished(f"pg_restore was ended by a signal: {clients.last_words(finished)}.")
    if finished.status != 0:
        raise Failed(f"{backup.id} cannot be read: {clients.last_words(finished)}.")
    return proof.proof(READ, run_id, started)


@contextlib.contextmanager
def _failing(backup: Backup) -> Iterator[None]:
    """Turn what the disk, the server and opening it can raise into :class:`BackupFailed`."""
    try:
        yield
    except RestoreFailed as error:
        raise BackupFailed(
            f"The proof of {backup.id} was not finished: {error.message}", next_step=error.next_step
        ) from error
    except (ConnectFailed, QueryFailed) as error:
        raise BackupFailed(
            f"The proof of {backup.id} was not finished: {error.text}.", next_step="run verify-backup again"
        ) from error
    except OSError as error:
        raise BackupFailed(
            f"The proof of {backup.id} was not finished: {error}.", next_step="run verify-backup again"
        ) from error
