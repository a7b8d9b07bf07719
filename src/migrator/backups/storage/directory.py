"""A dump in directory format: ``ID.dir``, a folder that pg_dump's workers write at the same time.

Its checksum can be had by hand: ``cd ID.dir && sha256sum -- * | LC_ALL=C sort -k 2 | sha256sum``.  pg_dump writes the
files itself, so each is hashed as pg_dump left it, in the kernel's memory, and once more when it is on the disk and
the kernel's copy has been dropped: a disk that lies is found out as it is with a file that we write.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from migrator.backups.storage import safe_open

DIRECTORY = ".dir"
CHUNK = 4 * 1024 * 1024


def checksum(folder: Path, on_bytes: Callable[[int], object] | None = None) -> tuple[str, int]:
    """Return the sha256 over a dump's folder, and the size of its files in bytes; raises OSError.

    It is that of the lines ``SHA256  NAME``, in the order of the names' bytes.  ``on_bytes`` is told how many were
    read so far.
    """
    lines, size = hashlib.sha256(), 0
    for path in files(folder):
        digest = hashlib.sha256()
        with safe_open.opened(path) as file:
            while chunk := file.read(CHUNK):
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
