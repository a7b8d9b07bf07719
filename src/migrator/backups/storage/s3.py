"""Backups in a bucket, with any S3 server: ``PREFIX/ID.dump`` and, written last, ``PREFIX/ID.json``.

A dump is streamed in parts, which are invisible until it is complete. Then it is read back and
verified, and only then gets its manifest. So an object ``ID.dump`` without ``ID.json`` is not a backup:
its verification is running, or its run died. A bucket has no locks, so leftovers of dead runs are
recognised by their age.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from migrator.backups.manifest import Backup, BadManifest
from migrator.backups.storage import encryption, files, s3_stale
from migrator.backups.storage.interface import (
    BAD,
    BAD_MANIFEST,
    LATEST,
    MANIFEST,
    SEALED,
    BadDump,
    Part,
    WritablePart,
    bad_manifest,
    dump_name,
    manifest_content,
    newest_first,
    of_database,
    pick,
    read_bad,
    read_manifest,
)
from migrator.backups.storage.s3_client import ATTEMPTS, Access, S3Failure, client, translated
from migrator.backups.storage.s3_upload import S3Part, downloaded
from migrator.errors import BackupFailed

if TYPE_CHECKING:
    from migrator.config.settings import Settings

LOGGER = logging.getLogger("migrator.backup")
_CHUNK = 1024 * 1024


class TooBig(S3Failure):
    """An object that should be small is not."""


class S3Store:
    """The backups under one prefix of a bucket; several databases may share it."""

    def __init__(self, url: str, access: Access, recipients: tuple[str, ...] = ()) -> None:
        parsed = urlparse(url, allow_fragments=False)
        self.bucket = parsed.netloc
        self.prefix = parsed.path.strip("/")
        self.recipients = recipients
        self.access = access

    @classmethod
    def from_settings(cls, url: str, settings: Settings | None, recipients: tuple[str, ...]) -> S3Store:
        """Return the store of a URL, with the access from the settings."""
        access = Access()
        if settings is not None:
            access = Access(
                endpoint=settings.s3_endpoint,
                region=settings.s3_region,
                path_style=settings.s3_path_style,
                key_id=settings.aws_access_key_id,
                secret_key=settings.aws_secret_access_key,
                token=settings.aws_session_token,
            )
        return cls(url, access, recipients)

    def __str__(self) -> str:
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    # -- requests to the bucket
    # ----------------------------------------------------------------------------

    @functools.cached_property
    def client(self) -> Any:
        """boto3's client."""
        with translated(str(self), self.bucket, self.access, ""):
            return client(self.access)

    @functools.cached_property
    def quick_client(self) -> Any:
        """A client that gives up soon, for cleaning up."""
        with translated(str(self), self.bucket, self.access, ""):
            return client(self.access, quick=True)

    def asking(self, right: str) -> AbstractContextManager[None]:
        """Raise boto3's errors as :class:`S3Failure`; ``right`` is the privilege that the request needs."""
        known = dataclasses.replace(self.access, region=self.client.meta.region_name)
        return translated(str(self), self.bucket, known, right)

    def key(self, name: str) -> str:
        """Return the key of a name."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def place(self, name: str) -> str:
        """Return the place of an object, for people."""
        return f"s3://{self.bucket}/{self.key(name)}"

    def read(self, name: str, on_tag: Callable[[str], object] = lambda _: None) -> Iterator[bytes]:
        """Yield an object's bytes; continue after a broken connection. Raises OSError.

        The tag, which is passed to ``on_tag``, ensures that it is still the same object.
        """
        place, tag, attempts = 0, "", 0
        while True:
            more = {"Range": f"bytes={place}-", "IfMatch": tag} if place else {}
            began = place
            try:
                with self.asking("s3:GetObject"):
                    answer = self.client.get_object(Bucket=self.bucket, Key=self.key(name), **more)
                    tag = answer["ETag"]
                    on_tag(tag)
                    left = answer["ContentLength"]
                    if place and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                        raise S3Failure(str(self), f"{name} cannot be read from an offset", "run again")
                    for chunk in answer["Body"].iter_chunks(_CHUNK):
                        yield chunk
                        place += len(chunk)
                if place - began != left:
                    raise S3Failure(str(self), f"{name} ended after {place} bytes", "run again", "Short")
                return
            except S3Failure as failure:
                attempts = attempts + 1 if place == began else 1
                broken = failure.code.endswith("Error") or failure.code == "Short"
                if not broken or not place or attempts >= ATTEMPTS:
                    raise
                LOGGER.debug("reading %s again from byte %d: %s", name, place, failure.why)

    def size(self, name: str) -> int | None:
        """Return an object's size; None if it does not exist. Raises OSError."""
        try:
            with self.asking("s3:GetObject"):
                return int(self.client.head_object(Bucket=self.bucket, Key=self.key(name))["ContentLength"])
        except S3Failure as failure:
            if failure.missing:
                return None
            raise

    def delete(self, name: str, *, quick: bool = False) -> None:
        """Delete an object, if it exists; raises OSError."""
        with self.asking("s3:DeleteObject"):
            (self.quick_client if quick else self.client).delete_object(
                Bucket=self.bucket, Key=self.key(name)
            )

    def _put(self, name: str, content: bytes) -> None:
        with self.asking("s3:PutObject"):
            self.client.put_object(Bucket=self.bucket, Key=self.key(name), Body=content)

    def _get(self, name: str) -> bytes:
        """Return a small object's content; raises OSError, :class:`TooBig` if it is not small."""
        found = bytearray()
        for chunk in self.read(name):
            found += chunk
            if len(found) > files.SMALL:
                raise TooBig(str(self), f"{name} has more than {files.SMALL} bytes", "remove it")
        return bytes(found)

    def listed(self, start: str = "") -> dict[str, Mapping[str, Any]]:
        """Return the objects directly under the prefix, by name; raises OSError."""
        found = {}
        with self.asking("s3:ListBucket"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.key(start), Delimiter="/"
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    found[item["Key"].rpartition("/")[2]] = item
        return found

    # -- before a backup -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Test that uploads are possible: begin one and abort it; raises :class:`BackupFailed`."""
        key = self.key(".migrator-probe")
        try:
            with self.asking("s3:PutObject and s3:AbortMultipartUpload"):
                made = self.client.create_multipart_upload(Bucket=self.bucket, Key=key)
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=made["UploadId"])
        except S3Failure as failure:
            raise self.cannot_write(failure) from failure

    def free_bytes(self) -> None:
        """Return that there is no limit: a bucket does not report one."""

    def cannot_write(self, error: OSError, needed: str = "") -> BackupFailed:
        """Return why a backup cannot be written here, and the fix."""
        if isinstance(error, S3Failure):
            return BackupFailed(
                f"The backup cannot be written to {self}: {error.why}.", next_step=error.next_step
            )
        return BackupFailed(
            f"The backup cannot be written to {self}: {error}.", next_step="fix the cause and run again"
        )

    def remove_stale(self, database: str) -> None:
        """Remove the leftovers of dead runs: uploads without new parts, and old dumps without a manifest.

        If they cannot be listed or removed, that is a warning: the backup does not fail.
        """
        try:
            s3_stale.abort_uploads(self, database)
            s3_stale.remove_orphans(self)
        except S3Failure as failure:
            LOGGER.warning("the leftovers of interrupted runs in %s cannot be removed: %s", self, failure.why)

    # -- backups ---------------------------------------------------------------------------------------

    def new_dump(self, backup_id: str, expected: int = 0) -> WritablePart:
        """Begin an upload; raises OSError."""
        part = S3Part(self, dump_name(backup_id, self.recipients), backup_id, expected)
        return encryption.sealed(part, self.recipients) if self.recipients else part

    def add(self, part: Part, backup: Backup, beside: Mapping[str, bytes] | None = None) -> Backup:
        """Write a verified dump's manifest: from here on it is a backup.

        Raises OSError, and leaves nothing then.
        """
        inner = _inner(part)
        files = encryption.seal_all(beside or {}, self.recipients)
        try:
            for ending, content in files.items():
                self._put(f"{backup.id}{ending}", content)
            self._put(f"{backup.id}{MANIFEST}", manifest_content(backup))
            inner.kept = True
        except BaseException:
            try:
                self.delete(f"{backup.id}{MANIFEST}", quick=True)
                for ending in files:
                    self.delete(f"{backup.id}{ending}", quick=True)
            except S3Failure as failure:
                # The manifest may exist after all: then the dump must too.
                inner.kept = True
                LOGGER.warning("%s may still be there, complete: %s", self.place(inner.name), failure.why)
            raise
        return dataclasses.replace(backup, place=self.place(inner.name))

    def note(self, backup: Backup) -> None:
        """Replace a backup's manifest, if it still exists; raises OSError."""
        try:
            self._get(f"{backup.id}{MANIFEST}")
        except S3Failure as failure:
            if failure.missing:
                return
            raise
        self._put(f"{backup.id}{MANIFEST}", manifest_content(backup))

    def backups(self, database: str = "") -> list[Backup]:
        """Return the backups (of one database), the newest first; a manifest that cannot be read is logged."""
        try:
            listed = self.listed()
            found = []
            for name in listed:
                if not name.endswith(MANIFEST) or name.endswith(BAD_MANIFEST):
                    continue
                try:
                    backup = self._read(name, listed)
                except BadManifest as error:
                    LOGGER.warning("%s is not a usable backup: %s", self.place(name), error)
                    continue
                if backup is not None and (not database or backup.database == database):
                    found.append(backup)
        except S3Failure as failure:
            raise self._cannot_read(failure) from failure
        return newest_first(found)

    def _cannot_read(self, failure: S3Failure) -> BackupFailed:
        return BackupFailed(
            f"The backups in {self} cannot be read: {failure.why}.", next_step=failure.next_step
        )

    def _read(self, name: str, listed: Mapping[str, Mapping[str, Any]]) -> Backup | None:
        """Read a manifest; None if another run has removed it. Raises BadManifest, OSError."""
        try:
            text = self._get(name).decode()
        except TooBig as failure:
            raise BadManifest(failure.why) from failure
        except S3Failure as failure:
            if failure.missing:
                return None
            raise
        except UnicodeDecodeError as error:
            raise BadManifest(str(error)) from error
        backup = read_manifest(text, name.removesuffix(MANIFEST))
        dump = dump_name(backup.id, backup.encrypted_to)
        if dump not in listed:
            raise BadManifest(f"its dump {dump} is missing")
        size = listed[dump]["Size"]
        if size != backup.stored[1]:
            raise BadManifest(f"its dump {dump} has {size} bytes, not {backup.stored[1]}")
        return dataclasses.replace(backup, place=self.place(dump))

    def get(self, wanted: str, database: str) -> Backup:
        """Return a backup by id, by ``--name``, or ``latest`` of a database; raises :class:`BackupFailed`."""
        name = f"{wanted}{MANIFEST}"
        if wanted and wanted != LATEST and "/" not in wanted:
            try:
                listed = self.listed(f"{wanted}.")
                backup = self._read(name, listed) if name in listed else None
            except S3Failure as failure:
                raise self._cannot_read(failure) from failure
            except BadManifest as error:
                raise BackupFailed(
                    f"The manifest {self.place(name)} cannot be used: {error}.",
                    next_step="use another backup: `migrator backups` lists them",
                ) from error
            if backup is not None:
                return backup
        return pick(self, wanted, database)

    def chunks(self, backup: Backup) -> Iterator[bytes]:
        """Yield a backup's stored bytes; raises OSError."""
        return self.read(backup.place.rpartition("/")[2])

    def tag(self, backup: Backup) -> str:
        """Return the current ETag of a dump; raises OSError."""
        name = backup.place.rpartition("/")[2]
        with self.asking("s3:GetObject"):
            return str(self.client.head_object(Bucket=self.bucket, Key=self.key(name))["ETag"])

    def local(self, backup: Backup) -> AbstractContextManager[Path]:
        """Yield a file on this machine with a backup's stored content, removed afterwards; raises OSError."""
        return downloaded(self, backup.place.rpartition("/")[2], backup.stored[1])

    def beside(self, backup: Backup, ending: str) -> bytes | None:
        """Return a small file that belongs to a backup, as stored; raises OSError."""
        try:
            return self._get(f"{backup.id}{ending}{SEALED if backup.encrypted_to else ''}")
        except S3Failure as failure:
            if failure.missing:
                return None
            raise

    def remove(self, found: Backup | BadDump) -> None:
        """Remove a backup and all files beside it, its manifest first; raises OSError."""
        for ending in (MANIFEST, BAD_MANIFEST):
            self.delete(f"{found.id}{ending}")
        for name in self.listed(f"{found.id}."):
            self.delete(name)

    def mark_bad(self, found: Part | Backup, why: str, database: str = "") -> str:
        """Copy a dump that failed verification to ``ID.dump.bad`` and remove it; return its place. Raises
        OSError.

        Its manifest is removed first.
        """
        if isinstance(found, Backup):
            database = database or found.database
            self.delete(f"{found.id}{MANIFEST}")
            name = found.place.rpartition("/")[2]
        else:
            name = _inner(found).name
        self._put(f"{found.id}{BAD_MANIFEST}", bad_manifest(found, why, database).encode())
        if not isinstance(found, Backup):
            _inner(found).kept = True
        with contextlib.suppress(S3Failure), self.asking("s3:GetObject and s3:PutObject"):
            self._copy(name, name + BAD)
            self.delete(name)
            return self.place(name + BAD)
        return self.place(name)  # it has no manifest and a note that it is bad: that must be enough

    def _copy(self, source: str, target: str) -> None:
        from boto3.s3.transfer import TransferConfig

        self.client.copy(
            {"Bucket": self.bucket, "Key": self.key(source)},
            self.bucket,
            self.key(target),
            Config=TransferConfig(use_threads=False),
        )

    def bad(self, database: str = "") -> list[BadDump]:
        """Return the dumps that failed verification (of one database); raises :class:`BackupFailed`."""
        found = []
        try:
            listed = self.listed()
            for name in (item for item in listed if item.endswith(BAD_MANIFEST)):
                stem = name.removesuffix(BAD_MANIFEST)
                dumps = [item for item in listed if item.startswith(f"{stem}.") and item.endswith(BAD)]
                with contextlib.suppress(UnicodeDecodeError, TooBig):
                    bad = read_bad(self._get(name).decode(), stem, self.place(dumps[0] if dumps else name))
                    if bad is not None and of_database(bad, database):
                        found.append(bad)
        except S3Failure as failure:
            if not failure.missing:
                raise self._cannot_read(failure) from failure
        return found


def _inner(part: Part) -> S3Part:
    if isinstance(part, encryption.SealedPart):
        part = part.inner
    assert isinstance(part, S3Part)  # noqa: S101 - one that new_dump made
    return part
