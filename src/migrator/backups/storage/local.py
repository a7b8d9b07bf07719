"""The folder of backups: ``ID.dump`` and, written last, its manifest ``ID.json``.

A dump is written to ``ID.dump.part`` under a lock (flock), hashed on the way, fsynced, read back from
the disk, and renamed; then the manifest goes the same way. So a file that ends in ``.dump`` is
complete, and a listed backup is complete and verified. A killed run leaves a ``.part`` file with a free
lock; the next backup removes it. Encrypted dumps are ``ID.dump.age``. A dump that failed verification
is ``ID.dump.bad`` with ``ID.bad.json`` beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from migrator.backups.manifest import Backup, BadManifest
from migrator.backups.storage import encryption, files, interface
from migrator.backups.storage.files import DIRECTORY
from migrator.backups.storage.parts import PART, DirectoryPart, FilePart, sync_folder
from migrator.errors import BackupFailed
from migrator.runtime.resource_errors import lack
from migrator.runtime.subprocesses import uninterrupted

LOGGER = logging.getLogger("migrator.backup")
STALE_AFTER = 3600.0
"""Seconds after which a ``.part`` file of *another* database counts as dead, if flock says it is free."""

_PROBE = ".migrator-"
_UNPUBLISHED = re.compile(r"(?P<id>[A-Za-z0-9_.]+-\d{8}T\d{6}Z-[0-9a-f]{6})(?:\.bad)?\.json\.part")
_NOT_OF_THE_FOLDER = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FolderStore:
    """The backups of one folder; several databases may share it. Dumps are encrypted if there are recipients."""

    def __init__(self, folder: Path, recipients: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.recipients = recipients

    def __str__(self) -> str:
        return str(self.folder)

    def dump_path(self, backup_id: str) -> Path:
        return self.folder / interface.dump_name(backup_id, self.recipients)

    def chunks(self, backup: Backup) -> Iterator[bytes]:
        return interface.file_chunks(Path(backup.place))

    def tag(self, backup: Backup) -> str:
        """Return an empty name: a folder has no name for a file's content except its checksum."""
        return ""

    def prepare(self) -> None:
        """Create the folder if needed, and test that files can be created in it; raises
        :class:`BackupFailed`.
        """
        probe = self.folder / f"{_PROBE}{secrets.token_hex(6)}{PART}"
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
                "%s is in the container itself: its backups are lost with the container; mount a "
                "volume there",
                self.folder,
            )

    def cannot_write(self, error: OSError, needed: str = "") -> BackupFailed:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            space = f"; {needed}" if needed else ""
            return BackupFailed(
                f"The backup does not fit in {self.folder}: {reason}, {self._free_text()}{space}. The "
                "unfinished file was removed.",
                next_step="free space there, mount a bigger volume, or set MIGRATOR_BACKUP_URL to another "
                "folder",
            )
        if error.errno in _NOT_OF_THE_FOLDER:
            return BackupFailed(
                f"The backup cannot be written to {self.folder}: {lack(error)}.",
                next_step="raise that limit or add that resource, then run it again",
            )
        return BackupFailed(
            f"The backup cannot be written to {self.folder}: {reason}.",
            next_step=f"mount a volume that user {os.geteuid()} can write to (group {os.getegid()}), set "
            "MIGRATOR_BACKUP_URL to another folder, or set MIGRATOR_BACKUP=off to run without a "
            "backup",
        )

    def free_bytes(self) -> int:
        facts = os.statvfs(self.folder)
        return facts.f_bavail * facts.f_frsize

    def _free_text(self) -> str:
        try:
            return f"{self.free_bytes()} bytes free"
        except OSError:
            return "free space unknown"

    def backups(self, database: str = "") -> list[Backup]:
        """Return the backups (of one database), the newest first; a manifest that cannot be read is logged."""
        found = []
        for path in self._manifests(interface.MANIFEST):
            if path.name.endswith(interface.BAD_MANIFEST):
                continue
            try:
                backup = self._read(path)
            except FileNotFoundError:
                continue  # another run has removed it since
            except BadManifest as error:
                LOGGER.warning("%s is not a usable backup: %s", path, error)
                continue
            if not database or backup.database == database:
                found.append(backup)
        return interface.newest_first(found)

    def _manifests(self, ending: str) -> list[Path]:
        try:
            return self._names(ending)
        except OSError as error:
            raise BackupFailed(
                f"The backups in {self.folder} cannot be listed: {error.strerror}.",
                next_step="check the permissions of that folder, or set MIGRATOR_BACKUP_URL to another folder",
            ) from error

    def get(self, wanted: str, database: str) -> Backup:
        path = self.folder / f"{wanted}{interface.MANIFEST}"
        if wanted != interface.LATEST and path.parent == self.folder and path.is_file():
            try:
                return self._read(path)
            except (BadManifest, FileNotFoundError) as error:
                raise BackupFailed(
                    f"The manifest {path} cannot be used: {error}.",
                    next_step="use another backup: `migrator backups` lists them",
                ) from error
        return interface.pick(self, wanted, database)

    def _names(self, ending: str) -> list[Path]:
        """Return the files with an ending, none if the folder is missing; raises OSError.

        Path.glob would hide that a folder may not be read.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return [self.folder / name for name in sorted(names) if name.endswith(ending)]

    def _read(self, path: Path) -> Backup:
        """Read a manifest; raises BadManifest, or FileNotFoundError if it no longer exists."""
        try:
            text = files.small(path).decode()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BadManifest(error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            raise BadManifest(str(error)) from error
        backup = interface.read_manifest(text, path.name.removesuffix(interface.MANIFEST))
        in_folder = backup.dump_format == "directory"
        dump = self.folder / (
            f"{backup.id}{DIRECTORY}" if in_folder else interface.dump_name(backup.id, backup.encrypted_to)
        )
        if not (dump.is_dir() if in_folder else dump.is_file()):
            if not path.exists():
                raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(path))
            raise BadManifest(f"its dump {dump.name} is missing")
        return dataclasses.replace(backup, place=str(dump))

    def remove_stale(self, database: str) -> None:
        """Remove the leftovers of dead runs: ``.part`` files whose lock is free.

        Those of this database at once, because this run holds its run lock. Those of others only when
        they are old, because not every network file system carries locks from host to host.
        """
        ours = re.compile(re.escape(interface.slug(database)) + r"-\d{8}T\d{6}Z-[0-9a-f]{6}\.[a-z.]+\.part")
        for path in self._names(PART):
            try:
                if path.name.startswith(_PROBE):  # only its creation mattered, by any run
                    path.unlink(missing_ok=True)
                    continue
                old = time.time() - path.stat().st_mtime > STALE_AFTER
                if (old or ours.fullmatch(path.name)) and _nobody_holds(path):
                    self._remove_without_manifest(path)
                    _delete(path)
                    LOGGER.info("removed %s, which an interrupted run left", path)
            except OSError as error:
                LOGGER.warning("cannot remove %s: %s", path, error.strerror)

    def _remove_without_manifest(self, path: Path) -> None:
        """Remove the files that a run published before it was killed, if ``path`` is its unpublished
        manifest.

        The manifest is written before anything is published, and published last.
        """
        found = _UNPUBLISHED.fullmatch(path.name)
        if found is None or any(
            (self.folder / f"{found['id']}{end}").exists()
            for end in (interface.MANIFEST, interface.BAD_MANIFEST)
        ):
            return
        for published in self._names(""):
            if published.name.startswith(f"{found['id']}.") and not published.name.endswith(PART):
                _delete(published)
                LOGGER.info("removed %s, which an interrupted run left without a manifest", published)

    def remove(self, found: Backup | interface.BadDump) -> None:
        """Remove a backup, its manifest first, so that it is no backup from the first moment; raises OSError."""
        for ending in (interface.MANIFEST, interface.BAD_MANIFEST):
            (self.folder / f"{found.id}{ending}").unlink(missing_ok=True)
        for path in self._names(""):
            if path.name.startswith(f"{found.id}."):
                _delete(path)
        sync_folder(self.folder)

    def mark_bad(self, found: interface.Part | Backup, why: str, database: str = "") -> str:
        """Rename a dump that failed verification to ``ID.dump.bad``; return its place. Raises OSError.

        The manifest is removed first and in one step: at no moment does a manifest name a bad dump.
        """
        manifest = self.folder / f"{found.id}{interface.BAD_MANIFEST}"
        with uninterrupted():
            if isinstance(found, Backup):
                database = database or found.database
                (self.folder / f"{found.id}{interface.MANIFEST}").rename(manifest)
            with FilePart(manifest, found.id) as text:
                text.write(interface.bad_manifest(found, why, database).encode())
                text.sync()
                if isinstance(found, Backup):
                    place = Path(found.place)
                    bad = place.with_name(place.name + interface.BAD)
                    place.rename(bad)
                else:
                    part = _inner(found)
                    bad = part.path.with_name(part.path.name + interface.BAD)
                    part.publish(bad)
                text.publish()
        return str(bad)

    def bad(self, database: str = "") -> list[interface.BadDump]:
        found = []
        for path in self._manifests(interface.BAD_MANIFEST):
            stem = path.name.removesuffix(interface.BAD_MANIFEST)
            dumps = [item for item in self._names(interface.BAD) if item.name.startswith(f"{stem}.")]
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = files.small(path).decode()
                bad = interface.read_bad(text, stem, str(dumps[0] if dumps else path))
                if bad is not None and interface.of_database(bad, database):
                    found.append(bad)
        return found

    def new_dump(self, backup_id: str, expected: int = 0) -> interface.WritablePart:
        part = FilePart(self.dump_path(backup_id), backup_id)
        return encryption.sealed(part, self.recipients) if self.recipients else part

    def new_directory(self, backup_id: str) -> DirectoryPart:
        """Make the folder that a dump in directory format is written to; raises OSError."""
        return DirectoryPart(self.folder / f"{backup_id}{DIRECTORY}", backup_id)

    def add(self, part: interface.Part, backup: Backup, beside: Mapping[str, bytes] | None = None) -> Backup:
        """Give a verified dump its name, then write its manifest: from here on it is a backup.

        Raises OSError, and leaves nothing then.
        """
        inner = _inner(part)
        with contextlib.ExitStack() as stack:
            files: list[FilePart | DirectoryPart] = [
                stack.enter_context(self._small(f"{backup.id}{ending}", backup.id, content))
                for ending, content in encryption.seal_all(beside or {}, self.recipients).items()
            ]
            files.append(inner)
            content = interface.manifest_content(backup)
            files.append(
                stack.enter_context(self._small(f"{backup.id}{interface.MANIFEST}", backup.id, content))
            )
            with uninterrupted():
                try:
                    for file in files:
                        file.publish()
                except BaseException:
                    for file in reversed(files):
                        _delete(file.path)
                    raise
        return dataclasses.replace(backup, place=str(inner.path))

    def _small(self, name: str, backup_id: str, content: bytes) -> FilePart:
        part = FilePart(self.folder / name, backup_id)
        try:
            part.write(content)
            part.sync()
        except BaseException:
            part.__exit__(None, None, None)
            raise
        return part

    def note(self, backup: Backup) -> None:
        name = f"{backup.id}{interface.MANIFEST}"
        with self._small(name, backup.id, interface.manifest_content(backup)) as manifest, uninterrupted():
            if (self.folder / name).exists():
                manifest.publish()


def _inner(part: interface.Part) -> FilePart | DirectoryPart:
    if isinstance(part, encryption.SealedPart):
        part = part.inner
    assert isinstance(part, FilePart | DirectoryPart)  # noqa: S101 - one that new_dump made
    return part


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lost_with_container(folder: Path) -> bool:
    """Tell whether the folder is on a container's own file system, which is lost with the container."""
    if not any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")):
        return False
    return folder.stat().st_dev == Path("/").stat().st_dev


def _nobody_holds(path: Path) -> bool:
    if not path.is_dir() and not path.is_file():
        return True  # no run writes to this: it is removed, and never opened
    descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
