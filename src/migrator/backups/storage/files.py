"""Files of backups on this machine: those of a backup folder, dumps in directory format, and temporary data.

Only regular files are read, and small ones in bounded memory. A writer of the folder can put anything in it under any
name: a FIFO, which would block an open for ever, a device, a folder, a manifest of gigabytes. A symbolic link counts as
its target.

A dump in directory format is ``ID.dir``, a folder that pg_dump's workers write in parallel. To compute its checksum by
hand: ``cd ID.dir && sha256sum -- * | LC_ALL=C sort -k 2 | sha256sum``. pg_dump writes the files itself. Each is hashed
as pg_dump left it, in the kernel's memory, and again from the disk after the kernel's copy was dropped. So a faulty
disk is noticed as with a file that migrator writes.

An image with a read-only root has no /tmp unless one is mounted, so small data does not need it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from migrator.backups.manifest import human_size

SMALL = 64 * 1024 * 1024
"""Bytes that a manifest or another small file has at most; that of 100,000 tables and sequences has about 45 MB."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegular(OSError):
    """The file's name belongs to something else than a regular file."""


def opened(path: Path) -> BinaryIO:
    """Open a regular file to read it, unbuffered; raises :class:`NotRegular` and other OSErrors, and never
    waits.
    """
    _demand(path, os.stat(path).st_mode)  # before it is opened: an open alone affects some devices
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _demand(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def small(path: Path) -> bytes:
    """Return the content of a small file; raises OSError, also if it has more than :data:`SMALL` bytes."""
    with opened(path) as file:
        found = bytearray()
        while chunk := file.read(min(1024 * 1024, SMALL + 1 - len(found))):
            found += chunk
    if len(found) > SMALL:
        raise OSError(errno.EFBIG, f"it has more than {SMALL} bytes", str(path))
    return bytes(found)


def _demand(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise NotRegular(errno.EINVAL, f"it is {kind}, not a file", str(path))


DIRECTORY = ".dir"
CHUNK = 4 * 1024 * 1024


def folder_checksum(folder: Path) -> tuple[str, int]:
    """Return the sha256 over a dump's folder, and the size of its files in bytes; raises OSError.

    It is the hash of the lines ``SHA256 NAME``, in the order of the names' bytes.
    """
    lines, size = hashlib.sha256(), 0
    for path in names(folder):
        digest = hashlib.sha256()
        with opened(path) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        lines.update(f"{digest.hexdigest()}  {path.name}\n".encode())
    return lines.hexdigest(), size


def names(folder: Path) -> list[Path]:
    """Return the files of a dump's folder in the order of their names; raises OSError."""
    return [folder / name for name in sorted(os.listdir(folder), key=os.fsencode)]


def size_of(folder: Path) -> int:
    """Return the current size of a folder's files in bytes: some may still be written to."""
    size = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                size += entry.stat().st_size
    return size


class NoRoom(Exception):
    """No folder on this machine has room for a copy; carries a sentence and a next step."""

    def __init__(self, sentence: str, next_step: str) -> None:
        super().__init__(sentence)
        self.next_step = next_step


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[Path]:
    """Yield the path, valid for our children too, of a file with this content; it is in memory and gone with
    this process.
    """
    number = os.memfd_create("migrator")
    with os.fdopen(number, "wb") as file:
        file.write(content)
        file.flush()
        yield Path(f"/proc/{os.getpid()}/fd/{number}")


def folder(size: int, what: str) -> Path:
    """Return the folder for temporary files (TMPDIR, else /tmp) if it has room for ``size`` bytes; raises NoRoom."""
    try:
        found = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise NoRoom(
            f"{what} has {human_size(size)}, and no folder on this machine can take a copy.",
            f"mount a volume or a tmpfs with {human_size(size)} at /tmp (docker run --tmpfs /tmp; an "
            "emptyDir), or set TMPDIR to a folder",
        ) from None
    free = shutil.disk_usage(found).free
    if free < size:
        raise NoRoom(
            f"{what} has {human_size(size)}, but only {human_size(free)} are free in {found}, where it "
            "is opened.",
            "free space there, or set TMPDIR to another folder",
        )
    return found
