"""Leftovers of dead runs in a bucket. A bucket has no locks, so their age tells, by the server's clock."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from migrator.backups.storage.interface import BAD_MANIFEST, MANIFEST, slug

if TYPE_CHECKING:
    from migrator.backups.storage.s3 import S3Store

LOGGER = logging.getLogger("migrator.backup")
IDLE = timedelta(hours=1)
"""After this time without new parts, an upload of this database counts as dead; those of others after `OLD`.
"""
OLD = timedelta(days=1)
"""After this time without a manifest, the run of a dump counts as dead: its verification may take hours."""
_MOST_UPLOADS = 10_000
_OURS = re.compile(r"(?P<id>(?P<slug>.+)-\d{8}T\d{6}Z-[0-9a-f]{6})\.[a-z.]+")


def abort_uploads(store: S3Store, database: str) -> None:
    """Abort the uploads without new parts; raises OSError."""
    for now, upload in _uploads(store):
        ours = _OURS.fullmatch(upload["Key"].removeprefix(store.key("")))
        patience = IDLE if ours and ours["slug"] == slug(database) else OLD
        if ours and now - upload["Initiated"] > patience and now - _last(store, upload) > patience:
            _abort(store, upload)


def _uploads(store: S3Store) -> Iterator[tuple[datetime, Mapping[str, Any]]]:
    """Yield the uploads below the store's prefix, each with the server's time.

    MinIO lists uploads by a whole key or by none, never by a prefix. If there seem to be none, those of
    the whole bucket are searched.
    """
    prefix, found = store.key(""), False
    for asked in dict.fromkeys((prefix, "")):
        with store.asking("s3:ListBucketMultipartUploads"):
            pages = store.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(
                Bucket=store.bucket, Prefix=asked, PaginationConfig={"MaxItems": _MOST_UPLOADS}
            ):
                now = _now(page)
                for upload in page.get("Uploads", ()):
                    found = True
                    if upload["Key"].startswith(prefix):
                        yield now, upload
        if found:
            return


def _last(store: S3Store, upload: Mapping[str, Any]) -> datetime:
    """Return when an upload got its last part."""
    last: datetime = upload["Initiated"]
    with store.asking("s3:ListMultipartUploadParts"):
        pages = store.client.get_paginator("list_parts").paginate(
            Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
        for page in pages:
            last = max([last, *(part["LastModified"] for part in page.get("Parts", ()))])
    return last


def _abort(store: S3Store, upload: Mapping[str, Any]) -> None:
    with store.asking("s3:AbortMultipartUpload"):
        store.client.abort_multipart_upload(
            Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
    LOGGER.info(
        "aborted the upload of s3://%s/%s, which an interrupted run left", store.bucket, upload["Key"]
    )


def remove_orphans(store: S3Store) -> None:
    """Remove old dumps without a manifest; raises OSError."""
    listed = store.listed()
    now = datetime.now(UTC)  # S3 refuses requests with a clock that is a quarter of an hour off
    for name, item in listed.items():
        ours = _OURS.fullmatch(name)
        known = ours and {f"{ours['id']}{ending}" for ending in (MANIFEST, BAD_MANIFEST)} & listed.keys()
        if ours and not known and now - item["LastModified"] > OLD:
            store.delete(name)
            LOGGER.info("removed %s, which an interrupted run left", store.place(name))


def _now(answer: Mapping[str, Any]) -> datetime:
    """Return the server's time: ages are measured with its clock."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    with contextlib.suppress(TypeError, ValueError):
        return parsedate_to_datetime(date).astimezone(UTC)
    return datetime.now(UTC)
