"""Dumps on their way into a folder: under a temporary name, locked, and removed unless they were published."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from migrator.backups.storage import files
from migrator.backups.storage.interface import file_chunks
from migrator.runtime.subprocesses import uninterrupted

PART = ".part"
_NOT_EVERYWHERE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


class LocalPart:
    """The common parts of a file and a folder: the name, the lock, removal and publication."""

    encrypted_to: tuple[str, ...] = ()
    tag = ""

    def __init__(self, path: Path, backup_id: str) -> None:
        self.id = backup_id
        self.path = path
        self.temporary = path.with_name(path.name + PART)
        self._published = False
        self._made = False
        self._descriptor = -1
        try:
            with uninterrupted():
                self._make()
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (
            BaseException
        ):  # also a signal that was held back until here: a block that was not entered is not left
            self._discard()
            raise

    def _make(self) -> None:
        """Create and open the target: sets ``_made`` and ``_descriptor``; raises OSError."""
        self._descriptor = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._made = True

    def _remove(self) -> None:
        self.temporary.unlink(missing_ok=True)

    def _discard(self) -> None:
        if self._made and not self._published:
            self._remove()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            self._discard()

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        yield self.temporary

    def publish(self, path: Path | None = None) -> None:
        """Give it its name (or another), and sync that to the disk too."""
        os.rename(self.temporary, path or self.path)
        self._published = True
        sync_folder(self.path.parent)


class FilePart(LocalPart):
    """A file that is hashed while it is written."""

    def __init__(self, path: Path, backup_id: str) -> None:
        self.size = 0
        self._hash = hashlib.sha256()
        super().__init__(path, backup_id)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def stored(self) -> tuple[str, int]:
        return self.sha256, self.size

    def write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._hash.update(chunk)
        self.size += len(chunk)

    def sync(self) -> None:
        """Sync the bytes to the disk, and drop the kernel's copies, so that reading back reads the disk."""
        _sync_file(self._descriptor)

    def chunks(self) -> Iterator[bytes]:
        return file_chunks(self.temporary)


class DirectoryPart(LocalPart):
    """A folder that pg_dump writes into itself, with several workers."""

    _found: tuple[str, int] | None = None

    def _make(self) -> None:
        self.temporary.mkdir(mode=0o700)
        self._made = True
        self._descriptor = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _remove(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def size(self) -> int:
        return self._found[1] if self._found else files.size_of(self.temporary)

    @property
    def sha256(self) -> str:
        return self.stored[0]

    @property
    def stored(self) -> tuple[str, int]:
        assert self._found is not None  # noqa: S101 - sync comes first
        return self._found

    def sync(self) -> None:
        """Hash pg_dump's output, and sync it to the disk, readable only for its owner; raises OSError."""
        self._found = files.folder_checksum(self.temporary)
        for path in files.names(self.temporary):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, 0o600)
                _sync_file(descriptor)
            finally:
                os.close(descriptor)
        os.fsync(self._descriptor)

    def chunks(self) -> Iterator[bytes]:
        for path in files.names(self.temporary):
            yield from file_chunks(path)


def _sync_file(descriptor: int) -> None:
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, if its file system can; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_EVERYWHERE:
            raise
    finally:
        os.close(descriptor)
