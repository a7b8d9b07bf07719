"""The facts about a backup, kept beside its dump as JSON; without it, a dump is not a backup."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 2
"""Raised when an old reader would misunderstand a new manifest; new keys alone do not raise it.

In format 2 a backup may be unverified (``verified`` is empty), and a reader of format 1 would use it as
a good one. Verified backups are written as format 1, so that older images can restore them.
"""
PROVEN = 1


class BadManifest(ValueError):
    """A manifest that cannot be read; the message says why."""


@dataclass(frozen=True)
class Table:
    """One table of a backup.

    ``rows`` is exact, counted in the dump, or None if the table holds none itself. ``estimated_rows``
    is the planner's guess, or None if it has none. ``rows_hash`` is over all its rows (see
    fingerprint.py), if the backup was verified by restore. ``size_bytes`` is the size of its rows as
    text (on the server, in manifests of older versions).
    """

    rows: int | None
    estimated_rows: int | None = None
    rows_hash: str = ""
    size_bytes: int | None = None


@dataclass(frozen=True)
class Sequence:
    """A sequence around the dump, each as ``last_value`` and ``is_called``.

    A sequence takes no part in transactions, so pg_dump reads a value between the two. They are equal
    if nobody used the sequence meanwhile.
    """

    before: tuple[int, bool]
    after: tuple[int, bool]


@dataclass(frozen=True)
class Proof:
    """One verification of a backup, successful or not: ``how`` is ``read`` or ``restore``.

    ``at`` is UTC in ISO 8601. ``server_version`` is that of the restore's server (empty for ``read``).
    ``why`` is the error, or what could not be compared if it is ``ok``.
    """

    how: str
    at: str
    run_id: str
    ok: bool
    seconds: float = 0.0
    server_version: str = ""
    why: str = ""


@dataclass(frozen=True)
class Properties:
    """How the backed-up database was created, to create another like it; it holds no secrets."""

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
    """A dump and the facts about it.

    ``created_at`` is the moment of the dump's snapshot (UTC, ISO 8601); sizes are in bytes; ``tables``
    are keyed by quoted, schema-qualified name. ``verified`` is the best verification. ``read``: every
    byte was decompressed and parsed, and the checksum is right. ``restore``: restored and compared.
    Empty: the requested verification did not finish, so it is not used as a backup until it is
    verified. ``proofs`` are all verifications. ``place`` is where it was found, and not in the file.

    ``sha256`` and ``size_bytes`` are of pg_dump's output. ``stored_sha256`` and ``stored_bytes`` are of
    the stored content, if that is encrypted (to the keys in ``encrypted_to``). ``stored_tag`` is the
    bucket's ETag of the object that was read back. ``schema_sha256``, ``sequences`` and
    ``large_objects`` (their number, and their hash) are compared with a restored copy.
    ``excluded_table_data`` names the tables with excluded rows, and ``not_dumped`` the objects that
    pg_dump left out, because its role was not a superuser. ``spelling`` has the settings of the dump,
    see session_settings.py, and ``own_settings`` the names of those that differ from the server's
    (``*`` for the application's own). ``next_xid`` is the least transaction id that the dump's snapshot
    may not have seen. ``unseen_xid`` is the least that it has certainly not seen; it has not seen any
    later one either (manifests without it hold that in ``next_xid``). ``running_xids`` are those in
    between that were in progress (manifests without it may mean all of them).
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
    sequences: Mapping[str, Sequence] = field(default_factory=dict)
    large_objects: str = ""
    schema_sha256: str = ""
    proofs: tuple[Proof, ...] = ()
    encrypted_to: tuple[str, ...] = ()
    stored_sha256: str = ""
    stored_bytes: int = 0
    stored_tag: str = ""
    compression: str = ""
    jobs: int = 1
    excluded_table_data: tuple[str, ...] = ()
    not_dumped: tuple[str, ...] = ()
    globals_note: str = ""
    oddities: tuple[str, ...] = ()
    spelling: Mapping[str, str] = field(default_factory=dict)
    own_settings: tuple[str, ...] = ()
    next_xid: int | None = None
    unseen_xid: int | None = None
    running_xids: tuple[int, ...] | None = None
    system_identifier: str = ""
    timeline: int | None = None
    database_oid: int = 0
    place: str = ""

    @property
    def client_major(self) -> int:
        """Return the major version of the pg_dump that wrote it: no older pg_restore can read it."""
        return _leading_number(self.client_version)

    @property
    def server_major(self) -> int:
        return _leading_number(self.server_version)

    @property
    def stored(self) -> tuple[str, int]:
        """Return the checksum and the size of the stored content."""
        return (
            (self.stored_sha256, self.stored_bytes) if self.stored_sha256 else (self.sha256, self.size_bytes)
        )

    def proven(self, proof: Proof) -> Backup:
        """Return it with one more verification, and with ``verified`` raised if that is the better one."""
        better = proof.ok and _STRENGTH.get(proof.how, 0) > _STRENGTH.get(self.verified, 0)
        best = proof.how if better else self.verified
        return dataclasses.replace(self, proofs=(*self.proofs, proof), verified=best)

    def unproven(self, proof: Proof, verified: str = "") -> Backup:
        """Return it with an unfinished verification; ``verified`` is the earlier state."""
        return dataclasses.replace(self.proven(proof), verified=verified)

    def to_json(self) -> str:
        """Return the manifest's text; each table has its own line, because there may be thousands."""
        document = {"format": PROVEN if self.verified else FORMAT, **vars(self), "tables": {}}
        del document["place"]
        text = json.dumps(document, indent=2, ensure_ascii=False, default=vars)
        encode = json.JSONEncoder(ensure_ascii=False).encode
        lines = ",\n".join(
            f"    {encode(name)}: {encode(vars(table))}" for name, table in self.tables.items()
        )
        before, empty, after = text.partition('\n  "tables": {}')
        return f"{before}{empty[:-1]}\n{lines}\n  }}{after}\n" if lines else f"{text}\n"


_STRENGTH = {"read": 1, "restore": 2}
"""A checksum alone keeps the earlier state."""


def _leading_number(version: str) -> int:
    digits = re.match(r"\d+", version)
    return int(digits[0]) if digits else 0


def from_json(text: str) -> Backup:
    """Read a manifest; raises :class:`BadManifest`."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadManifest(f"it is not JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise BadManifest("it is not the manifest of a backup")
    if document["format"] > FORMAT:
        raise BadManifest(
            f"its format is {document['format']}, and this migrator reads up to {FORMAT}: use a newer image"
        )
    try:
        values = _known(Backup, document)
        values["revisions"] = tuple(document["revisions"])
        values["properties"] = Properties(**_known(Properties, document["properties"]))
        values["tables"] = {name: Table(**_known(Table, facts)) for name, facts in document["tables"].items()}
        values.update(_optional(document))
        backup = Backup(**{**values, "place": ""})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadManifest(f"a key is missing in it: {error}") from None
    wrong = [
        item.name for item in dataclasses.fields(Backup) if not _fits(item.type, getattr(backup, item.name))
    ]
    if wrong:
        raise BadManifest(f"its {', '.join(wrong)} cannot be read")
    return backup


def _fits(declared: object, value: object) -> bool:
    """Tell whether a text is one, and a number: a writer of the store can put anything into a manifest."""
    wanted = {"str": str, "int": int}.get(str(declared))
    return wanted is None or (isinstance(value, wanted) and (wanted is str or value >= 0))  # type: ignore[operator]


def _optional(document: Mapping[str, Any]) -> dict[str, Any]:
    """Read the keys that manifests of older versions lack, and that JSON has no type for."""
    names = ("encrypted_to", "excluded_table_data", "not_dumped", "oddities", "own_settings")
    found: dict[str, Any] = {name: tuple(document.get(name, ())) for name in names}
    running = document.get("running_xids")
    found["running_xids"] = None if running is None else tuple(map(int, running))
    found["spelling"] = {str(key): str(value) for key, value in document.get("spelling", {}).items()}
    found["proofs"] = tuple(Proof(**_known(Proof, proof)) for proof in document.get("proofs", ()))
    found["sequences"] = {
        name: Sequence(tuple(facts["before"]), tuple(facts["after"]))
        for name, facts in document.get("sequences", {}).items()
    }
    return found


def _known(kind: type, document: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the keys that this version knows: a later one of the same format may have added some."""
    names = {item.name for item in dataclasses.fields(kind)}
    return {key: value for key, value in document.items() if key in names}


def summary(backup: Backup) -> dict[str, Any]:
    """Return the row for ``migrator backups``; ``size`` is in bytes."""
    return {
        "id": backup.id,
        "name": backup.name,
        "created": backup.created_at,
        "database": backup.database,
        "revision": ", ".join(backup.revisions) or "base",
        "size": backup.size_bytes,
        "verified": backup.verified,
        "verified_at": verified_at(backup),
        "place": backup.place,
    }


def verified_at(backup: Backup) -> str:
    """Return the time of the last verification: the backup's creation by default; an empty text for never."""
    if not backup.verified:
        return ""
    good = [proof.at for proof in backup.proofs if proof.ok]
    return good[-1] if good else backup.created_at


def human_size(size: float) -> str:
    """Render a number of bytes for people: ``1.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
