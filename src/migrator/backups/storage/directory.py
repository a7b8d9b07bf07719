"""A dump in directory format: ``ID.dir``, a folder that pg_dump's workers write in parallel.

To compute its checksum by hand: ``cd ID.dir && sha256sum -- * | LC_ALL=C sort -k 2 | sha256sum``.
pg_dump writes the files itself. Each is hashed as pg_dump left it, in the kernel's memory, and again
from the disk after the kernel's copy was dropped. So a faulty disk is noticed as with a file that
migrator writes.
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

    It is the hash of the lines ``SHA256 NAME``, in the order of the names' bytes. ``on_bytes`` gets the
    number of bytes read so far.
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
    """Return the current size of a folder's files in bytes: some may still be written to."""
    size = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                size += entry.stat().st_size
    return size
