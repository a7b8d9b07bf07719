"""The folder that backups live in: ``ID.dump`` and, written last, its manifest ``ID.json``.

A dump is written to ``ID.dump.part`` under a lock (flock), hashed on the way, fsynced, read back from the
disk, and renamed; then the manifest goes the same way.  So a file that ends in ``.dump`` is whole, and a
backup that is listed is whole and proven.  What a killed run leaves is a ``.part`` file that nobody holds
the lock of; the next backup removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from migrator.backups.manifest import Backup, BadManifest, from_json
from migrator.backups.store import LATEST, Part, file_chunks, slug
from migrator.errors import BackupFailed, RestoreFailed
from migrator.process import uninterrupted

LOGGER = logging.getLogger("migrator.backup")
STALE_AFTER = 3600.0
"""Seconds after which a ``.part`` file of *another* database is taken for dead, where flock says it is free."""

_PROBE = ".migrator-"
_DUMP, _MANIFEST, _PART = ".dump", ".json", ".part"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FolderStore:
    """The backups of one folder; several databases may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def dump_path(self, backup_id: str) -> Path:
        """Return where the dump of a backup is, or would be."""
        return self.folder / f"{backup_id}{_DUMP}"

    def chunks(self, backup: Backup) -> Iterator[bytes]:
        """Yield a backup's bytes as they are stored, read from the disk; raises OSError."""
        return file_chunks(Path(backup.place))

    @contextlib.contextmanager
    def local(self, backup: Backup) -> Iterator[Path]:
        """Yield a path with what is stored of a backup: here, the file itself."""
        yield Path(backup.place)

    def prepare(self) -> None:
        """Create the folder if need be and try that files can be made in it; raises :class:`BackupFailed`."""
        probe = self.folder / f"{_PROBE}{secrets.token_hex(6)}{_PART}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise self.cannot_write(error) from error
        if _lost_with_container(self.folder):
            LOGGER.warning(
                "%s is in the container itself: backups in it are gone with the container; mount a volume there",
                self.folder,
            )

    def cannot_write(self, error: OSError, needed: str = "") -> BackupFailed:
        """Say why a backup cannot be written here, and what to do about it."""
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            space = f"; {needed}" if needed else ""
            return BackupFailed(
                f"The backup does not fit in {self.folder}: {reason}, {self._free_text()}{space}. "
                "What was written of it has been removed.",
                next_step="make room there, mount a bigger volume, or name another folder in MIGRATOR_BACKUP_URL",
            )
        return BackupFailed(
            f"The backup cannot be written to {self.folder}: {reason}.",
            next_step=f"mount a volume there that user {os.geteuid()} can write to (group {os.getegid()}), name "
            "another folder in MIGRATOR_BACKUP_URL, or set MIGRATOR_BACKUP=off to go without",
        )

    def free_bytes(self) -> int:
        """Return how many bytes we may still write."""
        facts = os.statvfs(self.folder)
        return facts.f_bavail * facts.f_frsize

    def _free_text(self) -> str:
        try:
            return f"{self.free_bytes()} bytes free"
        except OSError:
            return "free space unknown"

    def backups(self, database: str = "") -> list[Backup]:
        """Return the backups (of one database), the newest first; a manifest that cannot be read is logged."""
        try:
            manifests = self._names(_MANIFEST)
        except OSError as error:
            raise RestoreFailed(
                f"The backups in {self.folder} cannot be listed: {error.strerror}."
            ) from error
        found = []
        for path in manifests:
            try:
                backup = self._read(path)
            except BadManifest as error:
                LOGGER.warning("%s is no backup that can be used: %s", path, error)
                continue
            if not database or backup.database == database:
                found.append(backup)
        return sorted(found, key=lambda backup: (backup.created_at, backup.id), reverse=True)

    def get(self, wanted: str, database: str) -> Backup:
        """Return a backup by id, by ``--name``, or ``latest`` of a database; raises :class:`RestoreFailed`."""
        path = self.folder / f"{wanted}{_MANIFEST}"
        if wanted != LATEST and path.parent == self.folder and path.is_file():
            try:
                return self._read(path)
            except BadManifest as error:
                raise RestoreFailed(f"The manifest {path} cannot be used: {error}.") from error
        for backup in self.backups(database):
            if wanted and wanted in (LATEST, backup.name):
                return backup
        what = f"of database {database}" if wanted == LATEST else f"{wanted!r} of database {database}"
        raise RestoreFailed(
            f"There is no backup {what} in {self.folder}.", next_step="see `migrator backups`"
        )

    def _names(self, ending: str) -> list[Path]:
        """Return the files with an ending, none where the folder is missing; raises OSError.

        Path.glob would hide that a folder may not be read.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in sorted(names) if name.endswith(ending)]

    def _read(self, path: Path) -> Backup:
        stem = path.name.removesuffix(_MANIFEST)
        dump = self.dump_path(stem)
        try:
            backup = from_json(path.read_text(encoding="utf-8"), place=str(dump))
        except (OSError, UnicodeDecodeError) as error:
            raise BadManifest(str(error)) from error
        if backup.id != stem:
            raise BadManifest(f"it is that of {backup.id}: it was renamed")
        if not dump.is_file():
            raise BadManifest(f"its dump {dump.name} is missing")
        return backup

    def remove_stale(self, database: str) -> None:
        """Remove what dead runs left: ``.part`` files that no process holds the lock of.

        Those of this database at once, for its run lock is ours; those of others only when they are old, for
        not every network file system carries locks from host to host.
        """
        ours = re.compile(re.escape(slug(database)) + r"-\d{8}T\d{6}Z-[0-9a-f]{6}\.(dump|json)\.part")
        for path in self._names(_PART):
            try:
                if path.name.startswith(_PROBE):  # only making it mattered, to whichever run
                    path.unlink(missing_ok=True)
                    continue
                old = time.time() - path.stat().st_mtime > STALE_AFTER
                if (old or ours.fullmatch(path.name)) and _nobody_holds(path):
                    path.unlink()
                    LOGGER.info("removed %s, which an interrupted run left", path)
            except OSError as error:
                LOGGER.warning("cannot remove %s: %s", path, error.strerror)

    def remove(self, backup: Backup) -> None:
        """Remove a backup, its manifest first, so that it is none from the first moment; raises OSError."""
        (self.folder / f"{backup.id}{_MANIFEST}").unlink(missing_ok=True)
        Path(backup.place).unlink(missing_ok=True)
        _sync_folder(self.folder)

    def new_dump(self, backup_id: str) -> FolderPart:
        """Open the file that a dump is written to; raises OSError."""
        return FolderPart(self.dump_path(backup_id))

    def add(self, part: Part, backup: Backup) -> Backup:
        """Give a proven dump its name, then write its manifest: from here on it is a backup.

        Raises OSError, and leaves nothing then.
        """
        assert isinstance(part, FolderPart)  # noqa: S101 - one that new_dump made
        path = self.folder / f"{backup.id}{_MANIFEST}"
        with FolderPart(path) as manifest:
            manifest.write(backup.to_json().encode())
            manifest.sync()
            with uninterrupted():
                try:
                    part.publish()
                    manifest.publish()
                except BaseException:
                    path.unlink(missing_ok=True)
                    part.path.unlink(missing_ok=True)
                    raise
        return from_json(backup.to_json(), place=str(part.path))


def _lost_with_container(folder: Path) -> bool:
    """Whether the folder is on a container's own file system, of which nothing outlives it."""
    if not any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")):
        return False
    return folder.stat().st_dev == Path("/").stat().st_dev


def _nobody_holds(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


class FolderPart:
    """A file on its way: under a temporary name, locked, hashed; removed unless it was published."""

    def __init__(self, path: Path) -> None:
        self.id = path.stem
        self.path = path
        self.temporary = path.with_name(path.name + _PART)
        self.size = 0
        self._hash = hashlib.sha256()
        self._published = False
        self._descriptor = -1
        try:
            with uninterrupted():
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptor = os.open(self.temporary, flags, 0o600)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (
            BaseException
        ):  # a signal that was held back until here: no one will leave what was not entered
            if self._descriptor >= 0:
                self.temporary.unlink(missing_ok=True)
                os.close(self._descriptor)
            raise

    def __enter__(self) -> FolderPart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            if not self._published:
                self.temporary.unlink(missing_ok=True)
            os.close(self._descriptor)

    @property
    def sha256(self) -> str:
        """Return the checksum of what was written."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Append to the file; raises OSError."""
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._hash.update(chunk)
        self.size += len(chunk)

    def sync(self) -> None:
        """Have the bytes on the disk, and forget the kernel's copies, so that reading back reads the disk."""
        os.fsync(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def chunks(self) -> Iterator[bytes]:
        """Yield what was written, read back from the disk; raises OSError."""
        return file_chunks(self.temporary)

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """Yield the path of what was written."""
        yield self.temporary

    def publish(self) -> None:
        """Give the file its name, and have that on the disk too."""
        os.rename(self.temporary, self.path)
        self._published = True
        _sync_folder(self.path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
