"""A dump in directory format: ``ID.dir``, a folder that pg_dump's workers write at the same time.

Its checksum can be had by hand: ``cd ID.dir && sha256sum -- * | LC_ALL=C sort -k 2 | sha256sum``.  pg_dump writes the
files itself, so each is hashed as pg_dump left it, in the kernel's memory, and once more when it is on the disk and
the kernel's copy has been dropped: a disk that lies is found out as it is with a file that we write.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from migrator.process import uninterrupted

DIRECTORY = ".dir"
_PART = ".part"
_CHUNK = 4 * 1024 * 1024


def checksum(folder: Path, on_bytes: Callable[[int], object] | None = None) -> tuple[str, int]:
    """Return the sha256 over a dump's folder, and the size of its files in bytes; raises OSError.

    It is that of the lines ``SHA256  NAME``, in the order of the names' bytes.  ``on_bytes`` is told how many were
    read so far.
    """
    lines, size = hashlib.sha256(), 0
    for path in files(folder):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if on_bytes is not None:
                    on_bytes(size)
        lines.update(f"{digest.hexdigest()}  {path.name}\n".encode())
    return lines.hexdigest(), size


def files(folder: Path) -> list[Path]:
    """Return the files of a dump's folder in the order of their names; raises OSError."""
    return [folder / name for name in sorted(os.listdir(folder), key=os.fsencode)]


def size_of(folder: Path) -> int:
    """Return how many bytes the files of a folder hold just now: some may still be written to."""
    size = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                size += entry.stat().st_size
    return size


class DirectoryPart:
    """A folder on its way: under a temporary name, locked; removed unless it was published."""

    encrypted_to: tuple[str, ...] = ()

    def __init__(self, path: Path, backup_id: str) -> None:
        self.id = backup_id
        self.path = path
        self.temporary = path.with_name(path.name + _PART)
        self._found: tuple[str, int] | None = None
        self._published = False
        self._descriptor = -1
        made = False
        try:
            with uninterrupted():
                self.temporary.mkdir(mode=0o700)
                made = True
                self._descriptor = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (
            BaseException
        ):  # a signal that was held back until here: no one will leave what was not entered
            if made:
                self._discard()
            raise

    def __enter__(self) -> DirectoryPart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            self._discard()

    def _discard(self) -> None:
        if not self._published:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def size(self) -> int:
        """Return how many bytes were written so far."""
        return self._found[1] if self._found else size_of(self.temporary)

    @property
    def sha256(self) -> str:
        """Return the checksum of what pg_dump wrote; known after :meth:`sync`."""
        assert self._found is not None  # noqa: S101 - sync comes first
        return self._found[0]

    @property
    def stored(self) -> tuple[str, int]:
        """Return the checksum and the size of what is stored, which is what was written."""
        return self.sha256, self.size

    def write(self, chunk: bytes) -> None:
        """Refuse: pg_dump writes into the folder itself."""
        raise NotImplementedError

    def sync(self) -> None:
        """Hash what pg_dump wrote, and have it on the disk, for nobody else to read; raises OSError."""
        self._found = checksum(self.temporary)
        for path in files(self.temporary):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, 0o600)
                os.fsync(descriptor)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        os.fsync(self._descriptor)

    def chunks(self) -> Iterator[bytes]:
        """Yield what is stored, file after file; raises OSError."""
        for path in files(self.temporary):
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    yield chunk

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """Yield the path of what was written."""
        yield self.temporary

    def publish(self, path: Path | None = None) -> None:
        """Give the folder its name (or another), and have that on the disk too."""
        os.rename(self.temporary, path or self.path)
        self._published = True
        parent = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(parent)
        finally:
            os.close(parent)
