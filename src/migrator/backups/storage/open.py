"""Find the store that an address names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

from migrator.backups.storage.interface import Store
from migrator.config.settings import Settings


def open_store(url: str, settings: Settings | None = None) -> Store:
    """Return the store behind ``file:///folder`` or ``s3://bucket/prefix``.

    ``settings`` have the access to a bucket, and the public keys for encryption.
    """
    parsed = urlparse(url, allow_fragments=False)
    recipients = tuple(settings.backup_recipients.split("\n")) if settings else ()
    recipients = tuple(filter(None, recipients))
    if parsed.scheme == "s3":
        from migrator.backups.storage.s3 import S3Store

        return S3Store.from_settings(url, settings, recipients)
    from migrator.backups.storage.local import FolderStore

    return FolderStore(Path(unquote(parsed.path)), recipients)
