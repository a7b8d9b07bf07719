"""Temporary data on this machine: small lists in memory, copies of archives in a folder with enough space.

An image with a read-only root has no /tmp unless one is mounted, so small data must not need it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from migrator.backups.manifest import human_size


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
