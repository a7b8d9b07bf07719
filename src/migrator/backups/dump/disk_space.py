"""Check the free space for a backup before it starts.

A backup is refused only if the space is clearly too little, because nobody can know how well data
compresses. The limit is 0.8 times the prediction from the last backup's ratio (dump to database size).
Without one, it is 1/200 of the database's size without its indexes, which are not in a dump (pgbench's
filler was seen to shrink 140 to 1). Below a half there is a warning. A disk that still fills up ends
the backup cleanly.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from migrator.backups.exported_snapshot import Sizes
from migrator.backups.manifest import human_size
from migrator.backups.storage.interface import Store
from migrator.errors import BackupFailed
from migrator.postgres.errors import Refused
from migrator.postgres.session import Session

LOGGER = logging.getLogger("migrator.backup")


def check(store: Store, database: str, sizes: Sizes, compression: str = "") -> None:
    """Refuse a folder that is clearly too small; raises :class:`BackupFailed`."""
    free = store.free_bytes()
    if free is None:
        return
    needed, how = expected(store, database, sizes, compression)
    if free < needed:
        raise BackupFailed(
            f"The backup of {database} needs about {human_size(needed)} in {store} ({needed} bytes: "
            f"{how}), but only {human_size(free)} ({free} bytes) are free.",
            next_step="free space there, mount a bigger volume, or set MIGRATOR_BACKUP_URL to another folder",
        )
    if free < sizes.data // 2:
        text = "%s has %s free, and %s holds %s of data: the backup fits only if that compresses well"
        LOGGER.warning(text, store, human_size(free), database, human_size(sizes.data))


def expected(store: Store, database: str, sizes: Sizes, compression: str = "") -> tuple[int, str]:
    """Return the smallest expected size of a backup in bytes, and why.

    A backup with another compression is not comparable.
    """
    for previous in store.backups(database):
        alike = not compression or previous.compression in ("", compression)
        if alike and previous.database_size_bytes > 0:
            ratio = previous.size_bytes / previous.database_size_bytes
            return int(0.8 * ratio * sizes.database), f"0.8 times the share that {previous.id} needed"
    return sizes.data // 200, "1/200 of the database's size without indexes"


def check_scratch(session: Session, sizes: Sizes) -> None:
    """Check whether the server has room for a second copy of the database, as far as that can be known.

    SQL shows nothing of a server's disks. If the server runs on this machine, its data folder can be
    checked; otherwise there is a warning. Raises :class:`BackupFailed`.
    """
    place = _data_folder(session)
    if place is not None:
        facts = os.statvfs(place)
        free = facts.f_bavail * facts.f_frsize
        if free < sizes.database:
            raise BackupFailed(
                f"Verification by restore needs about {human_size(sizes.database)} on the server "
                f"({sizes.database} bytes, the size of the database), but only {human_size(free)} are "
                f"free in {place}.",
                next_step="free space on the server, or set MIGRATOR_BACKUP_VERIFY=read",
            )
        return
    LOGGER.warning(
        "verification by restore needs about %s on the server; migrator cannot see how much is free there",
        human_size(sizes.database),
    )


def _data_folder(session: Session) -> Path | None:
    """Return the server's data folder if it is on this machine; None if that is not known."""
    try:
        local, place = session.query(
            "SELECT coalesce(inet_server_addr() << '127.0.0.0/8' OR inet_server_addr() = '::1', true),"
            " current_setting('data_directory')"
        )[0]
    except Refused:
        return None  # only pg_read_all_settings may know the folder
    folder = Path(place)
    try:
        return folder if local and folder.is_dir() else None
    except OSError:
        return None
