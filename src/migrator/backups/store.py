"""What a place for backups can do, whichever it is, and how one is found by its address.

A backup is its manifest: what has none is no backup, and no store lists it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.parse import unquote, urlparse

from migrator.backups.manifest import Backup
from migrator.errors import BackupFailed

LATEST = "latest"
_CHUNK = 4 * 1024 * 1024


class Part(Protocol):
    """A dump on its way into a store: hashed as it is written, and gone on leaving unless it was added."""

    id: str
    size: int

    def __enter__(self) -> Part:
        """Return it."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was written, unless it was added."""
        ...

    @property
    def sha256(self) -> str:
        """Return the checksum of what was written."""
        ...

    def write(self, chunk: bytes) -> None:
        """Append to it; raises OSError."""
        ...

    def sync(self) -> None:
        """Have all of it where it will be read back from; raises OSError."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """Yield what was written, read back from where it is stored; raises OSError."""
        ...

    def local(self) -> AbstractContextManager[Path]:
        """Yield a path on this machine with what was written; raises OSError."""
        ...


class Store(Protocol):
    """A place where backups live; several databases may share it.  ``str()`` is its name for people."""

    def prepare(self) -> None:
        """Make it ready and try that it can be written to; raises BackupFailed."""
        ...

    def free_bytes(self) -> int | None:
        """Return how many bytes may still be written; None where there is no limit."""
        ...

    def cannot_write(self, error: OSError, needed: str = "") -> BackupFailed:
        """Say why a backup cannot be written here, and what to do about it."""
        ...

    def backups(self, database: str = "") -> list[Backup]:
        """Return the backups (of one database), the newest first; raises RestoreFailed."""
        ...

    def get(self, wanted: str, database: str) -> Backup:
        """Return a backup by id, by name, or ``latest`` of a database; raises RestoreFailed."""
        ...

    def chunks(self, backup: Backup) -> Iterator[bytes]:
        """Yield a backup's bytes as they are stored; raises OSError."""
        ...

    def local(self, backup: Backup) -> AbstractContextManager[Path]:
        """Yield a path on this machine with what is stored of a backup; raises OSError."""
        ...

    def remove_stale(self, database: str) -> None:
        """Remove what dead runs left of backups that never were."""
        ...

    def remove(self, backup: Backup) -> None:
        """Remove a backup, its manifest first; raises OSError."""
        ...

    def new_dump(self, backup_id: str) -> Part:
        """Begin a dump; raises OSError."""
        ...

    def add(self, part: Part, backup: Backup) -> Backup:
        """Make a proven dump a backup: its manifest is written last; raises OSError, and leaves nothing then."""
        ...


def open_store(url: str) -> Store:
    """Return the store that ``file:///folder`` names."""
    from migrator.backups.folder import FolderStore

    return FolderStore(Path(unquote(urlparse(url, allow_fragments=False).path)))


def new_id(database: str, moment: datetime | None = None) -> str:
    """Return a new backup's id: the database's name as far as a file name can hold it, the time, and chance."""
    moment = moment or datetime.now(UTC)
    return f"{slug(database)}-{moment:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def slug(database: str) -> str:
    """Return a database's name as far as a file name can hold it."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", database).lstrip(".")[:40] or "_"


def checksum(chunks: Iterable[bytes], on_chunk: Callable[[int], object] | None = None) -> tuple[str, int]:
    """Return the sha256 and the size of what a store yields; raises OSError."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        if on_chunk is not None:
            on_chunk(size)
    return digest.hexdigest(), size


def file_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, read from the disk; raises OSError."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
