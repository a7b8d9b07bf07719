"""The interface of a place for backups.

A backup is its manifest: a dump without one is not a backup, and no store lists it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

from migrator.backups.manifest import PROVEN, Backup, BadManifest, from_json
from migrator.backups.storage import files
from migrator.errors import BackupFailed, NoSuchBackup

LATEST = "latest"
DUMP, MANIFEST, BAD, BAD_MANIFEST, SEALED = ".dump", ".json", ".bad", ".bad.json", ".age"
_CHUNK = 4 * 1024 * 1024


class Part(Protocol):
    """A dump on its way into a store: hashed while it is written, and removed on leaving unless it was added.

    ``size`` and ``sha256`` are of the plain content. If it is encrypted on the way (``encrypted_to``
    names the keys), the stored content differs: :meth:`stored`, :meth:`chunks` and :meth:`local` are
    about that.
    """

    id: str
    encrypted_to: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return how many bytes were written so far."""

    def __enter__(self) -> Self:
        """Return it."""

    def __exit__(self, *_: object) -> None:
        """Remove the content, unless it was added."""

    @property
    def sha256(self) -> str:
        """Return the checksum of the plain content."""

    @property
    def stored(self) -> tuple[str, int]:
        """Return the checksum and the size of the stored content; known after :meth:`sync`."""

    @property
    def tag(self) -> str:
        """Return the store's own name (ETag) for the content that :meth:`chunks` has read; empty if it has
        none.
        """

    def sync(self) -> None:
        """Store all of it, ready to be read back; raises OSError."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the stored content, read back; raises OSError."""

    def local(self) -> AbstractContextManager[Path]:
        """Yield a path on this machine with the stored content; raises OSError."""


class WritablePart(Part, Protocol):
    """A part with a write method; pg_dump writes into a folder itself."""

    def write(self, chunk: bytes) -> None:
        """Append to it; raises OSError."""


@dataclasses.dataclass(frozen=True)
class BadDump:
    """A dump that failed verification: kept for inspection, never used as a backup; ``at`` is the time of the
    failure.
    """

    id: str
    database: str
    at: str
    why: str
    place: str


class Store(Protocol):
    """A place for backups; several databases may share it. ``str()`` is its name for people."""

    def prepare(self) -> None:
        """Prepare it and test a write; raises BackupFailed."""

    def free_bytes(self) -> int | None:
        """Return how many bytes may still be written; None if there is no limit."""

    def cannot_write(self, error: OSError, needed: str = "") -> BackupFailed:
        """Return why a backup cannot be written here, and the fix."""

    def backups(self, database: str = "") -> list[Backup]:
        """Return the backups (of one database), the newest first; raises BackupFailed."""

    def get(self, wanted: str, database: str) -> Backup:
        """Return a backup by id, by name, or ``latest`` of a database; raises NoSuchBackup, BackupFailed."""

    def chunks(self, backup: Backup) -> Iterator[bytes]:
        """Yield a backup's bytes as they are stored; raises OSError."""

    def tag(self, backup: Backup) -> str:
        """Return the store's current name (ETag) for a backup's content, or an empty text; raises OSError."""

    def remove_stale(self, database: str) -> None:
        """Remove the leftovers of dead runs without a manifest."""

    def remove(self, found: Backup | BadDump) -> None:
        """Remove a backup and all files beside it, its manifest first; raises OSError.

        A file that another run has removed meanwhile is not a failure.
        """

    def new_dump(self, backup_id: str, expected: int = 0) -> WritablePart:
        """Begin a dump of about ``expected`` bytes (0: unknown); raises OSError."""

    def add(self, part: Part, backup: Backup, beside: Mapping[str, bytes] | None = None) -> Backup:
        """Turn a verified dump into a backup: its manifest is written last; raises OSError, and leaves
        nothing then.

        ``beside`` are small files that belong to it, by ending (``.globals.sql``).
        """

    def note(self, backup: Backup) -> None:
        """Replace a backup's manifest in one step, with newer facts; raises OSError.

        If another run has removed it meanwhile, it stays removed.
        """

    def mark_bad(self, found: Part | Backup, why: str, database: str = "") -> str:
        """Rename a dump that failed verification, and return its place; raises OSError.

        From the first moment it is not a backup, and a part outlives its block.
        """

    def bad(self, database: str = "") -> list[BadDump]:
        """Return the dumps that failed verification (of one database); raises BackupFailed."""


def pick(store: Store, wanted: str, database: str) -> Backup:
    """Return a backup by name, or ``latest`` of a database; raises NoSuchBackup, BackupFailed.

    An unverified one is never the latest. Among several with one name, it comes after the verified
    ones.
    """
    found = store.backups(database)
    for backup in sorted(found, key=lambda item: not item.verified):
        if wanted and (wanted == backup.name or (wanted == LATEST and backup.verified)):
            return backup
    what = f"of database {database}" if wanted == LATEST else f"{wanted!r} of database {database}"
    raise NoSuchBackup(f"There is no backup {what} in {store}.", next_step="see `migrator backups`")


def read_manifest(text: str, stem: str) -> Backup:
    """Read the manifest ``STEM.json``; raises :class:`BadManifest`, also if it belongs to another backup."""
    backup = from_json(text)
    if backup.id != stem:
        raise BadManifest(f"it belongs to {backup.id}: it was renamed")
    return backup


def newest_first(found: Iterable[Backup]) -> list[Backup]:
    return sorted(found, key=lambda backup: (backup.created_at, backup.id), reverse=True)


def dump_name(backup_id: str, encrypted_to: Sequence[str]) -> str:
    """Return the name of a dump in custom format."""
    return f"{backup_id}{DUMP}{SEALED if encrypted_to else ''}"


def manifest_content(backup: Backup) -> bytes:
    """Return the content of a manifest file; raises :class:`BackupFailed` if it is too large to be read back."""
    content = backup.to_json().encode()
    if len(content) > files.SMALL:
        raise BackupFailed(
            f"The manifest of {backup.id} would have {len(content)} bytes, more than the limit of {files.SMALL}.",
            next_step="back up with pg_dump itself, and set MIGRATOR_BACKUP=off",
        )
    return content


def bad_manifest(found: Part | Backup, why: str, database: str) -> str:
    """Return the text of ``ID.bad.json``: the known facts, and the failure."""
    document: dict[str, Any] = {"format": PROVEN, "id": found.id, "database": database}
    if isinstance(found, Backup):
        document = json.loads(found.to_json())
    else:
        document |= {"sha256": found.sha256, "size_bytes": found.size, "encrypted_to": found.encrypted_to}
    document["bad"] = {"why": why, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read_bad(text: str, stem: str, place: str) -> BadDump | None:
    """Read ``STEM.bad.json``; None if :func:`bad_manifest` did not write it (or not completely)."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        document = json.loads(text)
        bad = document.get("bad") or {}
        if document["id"] == stem:
            at = str(bad.get("at", document.get("created_at", "")))
            return BadDump(stem, str(document["database"]), at, str(bad.get("why", "")), place)
    return None


def of_database(bad: BadDump, database: str) -> bool:
    """Tell whether a bad dump belongs to a database (any: ``""``); by its id if nothing else tells."""
    if not database or not bad.database:
        return not database or bad.id.startswith(f"{slug(database)}-")
    return bad.database == database


def new_id(database: str, moment: datetime | None = None) -> str:
    """Return a new backup's id: the database's name as far as a file name can hold it, the time, and a random
    part.
    """
    moment = moment or datetime.now(UTC)
    return f"{slug(database)}-{moment:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def slug(database: str) -> str:
    """Return a database's name as far as a file name can hold it."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", database).lstrip(".")[:40] or "_"


def checksum(chunks: Iterable[bytes]) -> tuple[str, int]:
    """Return the sha256 and the size of a store's chunks; raises OSError."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def file_chunks(path: Path) -> Iterator[bytes]:
    """Yield a regular file's bytes, read from the disk; raises OSError."""
    with files.opened(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk
