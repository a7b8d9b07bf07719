"""What the ledger tells of the past: what stands applied, how the last run ended, and which ways lead back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from migrator.errors import AccessDenied
from migrator.ledger import BEGUN, NAME, UNDONE, beside, owner_of
from migrator.postgres import QueryFailed, Session, as_typed
from migrator.versions import VersionTable

# A ledger of a version table that was renamed, or of another one in the schema, is not ours.
_STANDING = """
SELECT DISTINCT ON (revision) revision, event, checksum, syntax, file, at, run_id, image_version, migrator_version,
       min_compatible, role, host
FROM {table} WHERE version_table = %s AND revision IS NOT NULL ORDER BY revision, at DESC, number DESC
"""

STANDING_NAMES = """
SELECT json_agg(revision)::text FROM (
    SELECT DISTINCT ON (revision) revision, event FROM {table}
    WHERE version_table = '{version_table}' AND revision IS NOT NULL ORDER BY revision, at DESC, number DESC
) newest WHERE event NOT IN ('reverted', 'unstamped', 'gone')
"""
"""The revisions that stand, as JSON text: one value, and no parameters, whatever the driver."""

_LAST_RUN = """
SELECT run_id, at, command, code, outcome, digest, actor, role, host, image_version
FROM {table} WHERE version_table = %s AND event = 'run' ORDER BY at DESC LIMIT 1
"""

# The first run since the last good one that has no row of its own: it was killed.
_DIED = """
WITH good AS (SELECT max(at) AS at FROM {table} WHERE version_table = %(name)s AND event = 'run' AND code = 0)
SELECT l.run_id, l.event, l.rows_before, l.details->'indexes' FROM {table} l, good
WHERE l.version_table = %(name)s AND l.event IN ('begun', 'applied') AND (good.at IS NULL OR l.at > good.at)
  AND NOT EXISTS (SELECT 1 FROM {table} r
                  WHERE r.run_id = l.run_id AND r.version_table = %(name)s AND r.event = 'run')
ORDER BY l.at, l.number LIMIT 1
"""

_FAILED = """
SELECT details->'failed', run_id, at, code
FROM {table} WHERE version_table = %s AND event = 'run' AND (code = 0 OR details->'failed' IS NOT NULL)
ORDER BY at DESC LIMIT 1
"""

# Of each version table: the backups of the newest run that changed the schema, and of those after it that did not end
# well (or have not ended yet).
_NEEDED_BACKUPS = """
WITH changed AS (
    SELECT DISTINCT ON (version_table) version_table, run_id, at FROM {table}
    WHERE event IN ('applied', 'reverted') ORDER BY version_table, at DESC, number DESC
)
SELECT DISTINCT l.backup_id FROM {table} l LEFT JOIN changed c ON c.version_table = l.version_table
WHERE l.backup_id IS NOT NULL AND (
    l.run_id = c.run_id
    OR (c.at IS NULL OR l.at > c.at) AND NOT EXISTS (
        SELECT 1 FROM {table} r WHERE r.run_id = l.run_id AND r.version_table = l.version_table
                                  AND r.event = 'run' AND r.code = 0
    )
)
"""

_LAST_SNAPSHOT = """
SELECT run_id, at, details->'schema' FROM {table} WHERE event = 'schema' ORDER BY at DESC LIMIT 1
"""

_WAYS_BACK = """
SELECT DISTINCT ON (revision) revision, event, message, parents, depends_on, rows_before, rows_after, way_back,
       no_way_back, at, number, image_version, search_path, role
FROM {table} WHERE version_table = %s AND revision IS NOT NULL AND event <> 'accepted'
ORDER BY revision, at DESC, number DESC
"""


_NEWEST = """
SELECT (to_jsonb(l) - 'way_back') #- '{{details,schema,items}}'
FROM {table} l WHERE version_table = %s AND (event <> 'schema' OR message IS NOT NULL)
ORDER BY at DESC, number DESC LIMIT %s
"""
"""Snapshots of the schema are for migrator; that someone has accepted one is for everybody."""


@dataclass(frozen=True)
class Entry:
    """The newest row about one revision; ``checksum`` and ``syntax`` are the digests of its file back then."""

    revision: str
    event: str
    checksum: str
    syntax: str
    file: str
    at: datetime
    run_id: str
    image_version: str
    migrator_version: str
    min_compatible: str
    role: str
    host: str

    @property
    def by(self) -> str:
        """Say when, and by which run of which image, this came about."""
        image = f" of image {self.image_version}" if self.image_version else ""
        return f"{self.at:%Y-%m-%d %H:%M:%S %Z} by run {self.run_id}{image}"


@dataclass(frozen=True)
class DeadRun:
    """A run that was killed: its id, and those of the indexes it was to build that were there when it began."""

    run_id: str
    indexes: frozenset[str]


@dataclass(frozen=True)
class Failed:
    """A failure that was taken back: the revision (empty where only verify failed), its file's checksum, the image."""

    revision: str
    checksum: str
    digest: str
    image: str
    run_id: str
    at: datetime
    code: int


@dataclass(frozen=True)
class LastSnapshot:
    """What a run left: the packed snapshot of the schema, and the ledger that it is in."""

    run_id: str
    at: datetime
    snapshot: Mapping[str, Any]
    ledger: VersionTable


@dataclass(frozen=True)
class WayBack:
    """How to revert one revision without its file: SQL statements, or the reason why there are none.

    ``search_path`` and ``role`` are those that it was applied with: the same names then mean the same tables.
    """

    revision: str
    message: str
    parents: tuple[str, ...]
    depends_on: tuple[str, ...]
    rows_before: tuple[str, ...]
    rows_after: tuple[str, ...]
    statements: tuple[str, ...] | None
    reason: str
    at: datetime
    number: int
    image_version: str
    search_path: str
    role: str


@dataclass(frozen=True)
class LastRun:
    """The newest row of a run."""

    run_id: str
    at: datetime
    command: str
    code: int
    outcome: str
    digest: str
    actor: str
    role: str
    host: str
    image_version: str

    def __str__(self) -> str:
        who = "@".join(part for part in (self.actor or self.role, self.host) if part)
        image = f", image {self.image_version}" if self.image_version else ""
        return f"{self.command}, {self.outcome} ({self.code}), {self.at:%Y-%m-%d %H:%M:%S %Z} by {who}{image}"


@dataclass(frozen=True)
class Standing:
    """What the ledger says stands: a row for each revision that is applied, and how the last run ended."""

    exists: bool = False
    entries: Mapping[str, Entry] = field(default_factory=dict)
    last: LastRun | None = None

    def clean(self, digest: str) -> bool:
        """Whether the last run ended well for the very history that has this digest."""
        return self.last is not None and self.last.code == 0 and self.last.digest == digest


def _read(
    session: Session, ledger: VersionTable, sql: str, parameters: tuple[Any, ...] | dict[str, Any]
) -> list[tuple[Any, ...]]:
    """Query the ledger, as its owner where the login itself may not; raises QueryFailed."""
    sql = sql.format(table=ledger.quoted.replace("%", "%%"))
    try:
        return session.query(sql, parameters)
    except QueryFailed as error:
        owner = "" if error.sqlstate != "42501" else owner_of(session, ledger, unless_may="SELECT")
        if not owner:
            raise
    with session.as_role(owner):
        return session.query(sql, parameters)


def read_standing(session: Session, version_table: VersionTable | None) -> Standing:
    """Read what stands; a ledger that is not there, or may not be read, says nothing."""
    if version_table is None:
        return Standing()
    ledger = beside(version_table, session.value)
    parameters = (version_table.name,)
    try:
        rows = _read(session, ledger, _STANDING, parameters)
        last = _read(session, ledger, _LAST_RUN, parameters)
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return Standing()
    entries = {row[0]: _entry(row) for row in rows if row[1] not in UNDONE}
    return Standing(True, entries, _last_run(last[0]) if last else None)


def read_dead_run(session: Session, version_table: VersionTable | None) -> DeadRun | None:
    """Return the run that was killed since the last one that ended well; None where none was, or nobody knows."""
    if version_table is None:
        return None
    ledger = beside(version_table, session.value)
    try:
        rows = _read(session, ledger, _DIED, {"name": version_table.name})
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return None
    # A run on an empty database begins no ledger, for its first revision is not to see it: there were no indexes.
    known = rows and (rows[0][1] == BEGUN or not rows[0][2])
    return DeadRun(rows[0][0], frozenset(rows[0][3] or ())) if known else None


def read_needed_backups(session: Session) -> frozenset[str]:
    """Return the ids of the backups that lead back from where the database is, by all of its ledgers.

    Raises QueryFailed where one cannot be read: nobody knows then.
    """
    return frozenset(
        row[0] for table in _ledgers(session) for row in _read(session, table, _NEEDED_BACKUPS, ())
    )


def read_last_snapshot(session: Session) -> LastSnapshot | None:
    """Return the newest snapshot of the schema, in whichever ledger of the database; None where there is none.

    Raises QueryFailed where none can be read: nobody knows then.
    """
    found, denied = [], None
    for table in _ledgers(session):
        try:
            rows = _read(session, table, _LAST_SNAPSHOT, ())
        except QueryFailed as error:
            if error.sqlstate != "42501":
                raise
            denied = error  # another application's, unless there is no other one
            continue
        found += [LastSnapshot(run_id, at, snapshot or {}, table) for run_id, at, snapshot in rows]
    if denied and not found:
        raise denied
    return max(found, key=lambda left: left.at, default=None)


def _ledgers(session: Session) -> list[VersionTable]:
    rows = session.query(
        "SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relname = %s AND c.relkind = 'r' AND n.nspname !~ '^pg_'",
        (NAME,),
    )
    return [VersionTable(NAME, schema) for (schema,) in rows]


def read_failed(session: Session, version_table: VersionTable | None) -> Failed | None:
    """Return what the newest run whose failure was taken back left to remember; None where one ended well since."""
    if version_table is None:
        return None
    ledger = beside(version_table, session.value)
    try:
        rows = _read(session, ledger, _FAILED, (version_table.name,))
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return None
    if not rows or rows[0][0] is None:
        return None
    known, run_id, at, code = rows[0]
    revision, checksum, digest, image = (
        str(known.get(name) or "") for name in ("revision", "checksum", "digest", "image")
    )
    return Failed(revision, checksum, digest, image, run_id, at, code)


def _last_run(row: tuple[Any, ...]) -> LastRun:
    return LastRun(*("" if item is None else item for item in row))  # type: ignore[arg-type]


def _entry(row: tuple[Any, ...]) -> Entry:
    return Entry(*(item or "" for item in row))  # type: ignore[arg-type]


def read_ways_back(session: Session, version_table: VersionTable) -> list[WayBack]:
    """Return how to revert each applied revision, the newest one first."""
    ledger = beside(version_table, session.value)
    try:
        rows = _read(session, ledger, _WAYS_BACK, (version_table.name,))
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return []
    ways = [
        WayBack(
            revision=row[0],
            message=row[2] or "",
            parents=tuple(row[3] or ()),
            depends_on=tuple(row[4] or ()),
            rows_before=tuple(row[5] or ()),
            rows_after=tuple(row[6] or ()),
            statements=None if row[7] is None else tuple(row[7]),
            reason=row[8] or "",
            at=row[9],
            number=row[10],
            image_version=row[11] or "",
            search_path=row[12] or "",
            role=row[13] or "",
        )
        for row in rows
        if row[1] not in UNDONE
    ]
    return sorted(ways, key=lambda way: (way.at, way.number), reverse=True)


def read_rows(session: Session, version_table: VersionTable, limit: int) -> list[dict[str, Any]]:
    """Return the newest rows as they are, the newest first; the SQL of the way back is left out."""
    ledger = beside(version_table, session.value)
    try:
        return [row[0] for row in _read(session, ledger, _NEWEST, (version_table.name, limit))]
    except QueryFailed as error:
        if error.sqlstate == "42501":
            user = session.facts.user
            raise AccessDenied(
                f"{user} may not read the ledger {ledger}.",
                next_step=f"GRANT SELECT ON {ledger.typed} TO {as_typed(user)}",
            ) from None
        if error.lost or error.sqlstate != "42P01":
            raise
        return []


_UNREADABLE = ("42P01", "42501")  # not there, not allowed
