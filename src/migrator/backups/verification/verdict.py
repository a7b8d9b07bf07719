"""The end of a verification: the backup is verified, or it is bad, or nothing was found out.

A bad backup is renamed, and is no backup any more. A verification that did not finish (the server went
away or is full, a program was killed, a role or an extension is missing) shows nothing: the backup is
kept, and can be verified later.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NoReturn

from migrator.backups import clients
from migrator.backups.manifest import Backup
from migrator.backups.storage.interface import Store
from migrator.errors import BackupFailed, DamagedBackup, MigratorError, SettingsError
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.runtime import subprocesses

LOGGER = logging.getLogger("migrator.backup")
_LOOK = "fix the cause"


class Failed(Exception):
    """The verification failed: the dump is not a backup."""

    def __init__(self, why: str, next_step: str = "") -> None:
        super().__init__(why)
        self.next_step = next_step or "run again; if it happens again, check the volume and the memory"


class Unproven(Exception):
    """The verification did not finish, which says nothing about the backup."""

    def __init__(self, why: str, next_step: str = _LOOK) -> None:
        super().__init__(why)
        self.next_step = next_step

    def of(self, backup: Backup) -> str:
        """Return this about a backup, in one sentence."""
        return f"The verification of {backup.id} did not finish: {self}"


class CannotRestore(Unproven):
    """The backup could not be restored here, which may be the server's fault and not the backup's."""

    def __init__(self, why: str) -> None:
        super().__init__(why, "fix what pg_restore reports")

    def of(self, backup: Backup) -> str:
        return f"{backup.id} could not be restored here: {self}"


def refuse(store: Store, backup: Backup, unproven: Unproven) -> NoReturn:
    """Raise :class:`BackupFailed` for a backup that was kept, and could not be verified.

    One such backup is kept per database: a run that retries often would fill the place.
    """
    try:
        for old in store.backups(backup.database):
            if not old.verified and old.id != backup.id and _same_database(old, backup):
                store.remove(old)
                LOGGER.info("removed %s, which was never verified: %s replaces it", old.id, backup.id)
    except (OSError, BackupFailed) as error:
        LOGGER.warning("older unverified backups are not removed: %s", error)
    raise BackupFailed(
        f"{unproven.of(backup)} It was kept as {backup.place}, and is not used as a backup until it is "
        "verified.",
        next_step=f"{unproven.next_step}, then run again; or verify this one: `migrator verify-backup "
        f"{backup.id}`",
    ) from unproven


def _same_database(one: Backup, other: Backup) -> bool:
    cluster = one.system_identifier == other.system_identifier
    return cluster and one.database_oid == other.database_oid and one.target == other.target


@contextlib.contextmanager
def judging() -> Iterator[None]:
    """Separate failures of a backup (:class:`Failed`) from those that only stop its verification
    (:class:`Unproven`).

    Errors in settings are raised unchanged.
    """
    try:
        yield
    except DamagedBackup as error:
        raise Failed(error.message, error.next_step) from error
    except SettingsError:
        raise
    except MigratorError as error:
        raise Unproven(error.message, error.next_step or _LOOK) from error
    except (ConnectFailed, QueryFailed) as error:
        if isinstance(error, ConnectFailed) and error.waited:
            raise
        raise Unproven(f"{error.text}.") from error
    except OSError as error:
        raise Unproven(f"{error}.") from error


def demand_parsed(finished: subprocesses.Finished) -> None:
    """Raise :class:`Failed` if pg_restore could not read an archive, :class:`Unproven` if it was ended."""
    if finished.status < 0:
        raise Unproven(f"pg_restore was ended by a signal: {clients.last_words(finished)}.")
    if finished.status != 0:
        raise Failed(f"The backup cannot be read back: {clients.last_words(finished)}.")
