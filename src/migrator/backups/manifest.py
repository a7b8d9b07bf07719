"""What is known of a backup, kept beside its dump as JSON; without it, a dump is no backup."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
"""Raised when a reader of the old one would misunderstand the new; new keys alone do not raise it."""


class BadManifest(ValueError):
    """A manifest that cannot be read; the message says why."""


@dataclass(frozen=True)
class Table:
    """One table of a backup.

    ``rows`` is exact, counted in the very snapshot that was dumped, or None where counting would have cost
    a scan of a big table; ``estimated_rows`` is the planner's guess, or None where it has none.
    """

    rows: int | None
    estimated_rows: int | None = None


@dataclass(frozen=True)
class Properties:
    """How the backed-up database was created, so that another can be made like it; no secrets in here."""

    owner: str
    encoding: str
    collate: str
    ctype: str
    provider: str = "c"
    locale: str = ""
    icu_rules: str = ""
    tablespace: str = ""


@dataclass(frozen=True)
class Backup:
    """A dump plus what is known about it.

    ``created_at`` is the moment of the dump's snapshot (UTC, ISO 8601); sizes are in bytes; ``tables`` are
    keyed by quoted, schema-qualified name; ``verified`` says how the dump was proven (``read``: every byte
    decompressed and parsed, checksum as written).  ``place`` is where it was found, and not in the file.
    """

    id: str
    created_at: str
    database: str
    target: str
    revisions: tuple[str, ...]
    sha256: str
    size_bytes: int
    database_size_bytes: int
    server_version: str
    client_version: str
    run_id: str
    migrator_version: str
    image_version: str
    seconds: float
    verified: str
    properties: Properties
    name: str = ""
    dump_format: str = "custom"
    tables: Mapping[str, Table] = field(default_factory=dict)
    place: str = ""

    @property
    def client_major(self) -> int:
        """Return the major version of the pg_dump that wrote it: no older pg_restore can read it."""
        digits = ""
        for character in self.client_version:
            if not character.isdecimal():
                break
            digits += character
        return int(digits or 0)

    def to_json(self) -> str:
        """Return the manifest's text."""
        document = dataclasses.asdict(self)
        del document["place"]
        return json.dumps({"format": FORMAT, **document}, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str, *, place: str = "") -> Backup:
    """Read a manifest; raises :class:`BadManifest`."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise BadManifest(f"it is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise BadManifest("it is not a backup's manifest")
    if document["format"] > FORMAT:
        raise BadManifest(
            f"its format is {document['format']} and this migrator reads up to {FORMAT}: use a newer image"
        )
    try:
        values = _known(Backup, document)
        values["revisions"] = tuple(document["revisions"])
        values["properties"] = Properties(**_known(Properties, document["properties"]))
        values["tables"] = {name: Table(**_known(Table, facts)) for name, facts in document["tables"].items()}
        backup = Backup(**{**values, "place": place})
    except (TypeError, KeyError, AttributeError) as error:
        raise BadManifest(f"something is missing in it: {error}") from None
    if not isinstance(backup.size_bytes, int) or not isinstance(backup.sha256, str):
        raise BadManifest("its size or checksum cannot be read")
    return backup


def _known(kind: type, document: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keys that this version knows: a later one of the same format may have added some."""
    names = {item.name for item in dataclasses.fields(kind)}
    return {key: value for key, value in document.items() if key in names}


def summary(backup: Backup) -> dict[str, Any]:
    """Return the row that ``migrator backups`` shows; ``size`` is in bytes."""
    return {
        "id": backup.id,
        "name": backup.name,
        "created": backup.created_at,
        "database": backup.database,
        "revision": ", ".join(backup.revisions) or "base",
        "size": backup.size_bytes,
        "verified": backup.verified,
        "place": backup.place,
    }


def human_size(size: float) -> str:
    """Render a number of bytes for people: ``1.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
