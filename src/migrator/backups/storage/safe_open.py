"""Read the files of a backup folder: only regular files, and small ones in bounded memory.

A writer of the folder can put anything in it under any name: a FIFO, which would block an open for
ever, a device, a folder, a manifest of gigabytes. A symbolic link counts as its target.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

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
