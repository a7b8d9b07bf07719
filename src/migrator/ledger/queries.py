"""Read the past from the ledger: the applied revisions, the end of the last run, and the SQL to revert."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from migrator.errors import AccessDenied
from migrator.ledger import indexes
from migrator.ledger import sql as questions
from migrator.ledger.permissions import NOT_OURS, Hole, holes, refusal
from migrator.ledger.table import NAME, UNDONE, beside, owner_of
from migrator.postgres.errors import QueryFailed
from migrator.postgres.quoting import as_typed
from migrator.postgres.search_path import FIRST_OF_OTHERS
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.project.downgrade.stored import StoredDowngrade

log = logging.getLogger("migrator.ledger")


@dataclass(frozen=True)
class Entry:
    """The newest row about one revision; ``checksum`` and ``syntax`` are the digests of its file at that
    time.
    """

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
        """Return when, and by which run of which image, this happened."""
        image = f" of image {self.image_version}" if self.image_version else ""
        return f"{self.at:%Y-%m-%d %H:%M:%S %Z} by run {self.run_id}{image}"


@dataclass(frozen=True)
class Failed:
    """A failure that was reverted or restored: the revision (empty if only verify failed), its checksum, the
    image.
    """

    revision: str
    checksum: str
    digest: str
    image: str
    run_id: str
    at: datetime
    code: int


@dataclass(frozen=True)
class Partial:
    """A revision with a part that was committed before its version row, and the first statement of that part."""

    revision: str
    upgrade: bool
    statement: str
    run_id: str
    at: datetime
    backup_id: str

    @property
    def name(self) -> str:
        """Return which function of the revision the part belongs to."""
        return self.revision if self.upgrade else f"the downgrade of {self.revision}"


@dataclass(frozen=True)
class LastSnapshot:
    """The packed schema snapshot of a run, and the ledger that holds it."""

    run_id: str
    at: datetime
    snapshot: Mapping[str, Any]
    ledger: VersionTable


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
    """The state in the ledger: a row for each applied revision, and the end of the last run."""

    exists: bool = False
    entries: Mapping[str, Entry] = field(default_factory=dict)
    last: LastRun | None = None

    def clean(self, digest: str) -> bool:
        """Tell whether the last run ended well with the history of this digest."""
        return self.last is not None and self.last.code == 0 and self.last.digest == digest


def query_ledger(
    session: Session,
    ledger: VersionTable,
    sql: str,
    parameters: tuple[Any, ...] | dict[str, Any],
    *,
    indexed: bool = False,
) -> list[tuple[Any, ...]]:
    """Query the ledger, as its owner if the login itself may not; raises QueryFailed.

    If row security would hide some of its rows, and run someone's expressions, that is an error.
    ``indexed`` is for a query by index. Without statistics the planner prefers to read and sort all rows.
    It also compiles for seconds what takes a millisecond.
    """
    settings = "SET LOCAL row_security = off; SET LOCAL jit = off;"
    for name in ("seqscan", "bitmapscan", "sort") if indexed else ():
        settings += f" SET LOCAL enable_{name} = off;"
    sql = settings + sql.format(table=ledger.quoted.replace("%", "%%"))
    try:
        return session.query(sql, parameters)
    except QueryFailed as error:
        if error.sqlstate in _OTHER_COLUMNS:
            raise refusal(ledger, [NOT_OURS]) from error
        owner = "" if error.sqlstate != "42501" else owner_of(session, ledger, unless_may=("SELECT",))
        if not owner:
            raise
    with session.as_role(owner):
        return session.query(sql, parameters)


@dataclass(frozen=True)
class Ledger:
    """A ledger: its table, the other roles that can write it, and whether it has all its indexes."""

    session: Session
    table: VersionTable
    holes: tuple[Hole, ...]
    indexed: bool

    def ask(
        self, asked: questions.Shapes | str, version_table: VersionTable, *more: Any
    ) -> list[tuple[Any, ...]]:
        """Query the rows of a version table, by index if the ledger has them; raises QueryFailed."""
        sql = asked if isinstance(asked, str) else asked.of(self.indexed)
        names = (version_table.name,) * (sql.count("%s") - len(more))
        return query_ledger(self.session, self.table, sql, (*names, *more), indexed=self.indexed)


def examine(
    session: Session, table: VersionTable, version_table: VersionTable | None, role: str, *, limits: str = ""
) -> Ledger:
    """Return what the catalogs say of a ledger, see :func:`.permissions.holes`.

    ``limits`` are statements to run before each query, in the same message. Raises QueryFailed.
    """

    def ask(sql: str) -> Any:
        return session.value(f"{limits}{sql}")

    return Ledger(
        session, table, holes(ask, table, version_table, role=role), bool(ask(indexes.question(table)))
    )


def _trusted(session: Session, version_table: VersionTable, role: str) -> Ledger:
    """Return the ledger; raises :class:`AccessDenied` if an untrusted role can write it."""
    ledger = examine(session, beside(version_table, session), version_table, role)
    if ledger.holes:
        raise refusal(ledger.table, ledger.holes)
    return ledger


def read_standing(session: Session, version_table: VersionTable | None, role: str) -> Standing:
    """Read the state; a ledger that does not exist, or cannot be read, gives none.

    This function and those below raise :class:`AccessDenied` for a ledger that others can write;
    ``role`` is MIGRATOR_ROLE.
    """
    if version_table is None:
        return Standing()
    try:
        ledger = _trusted(session, version_table, role)
        rows = ledger.ask(questions.STANDING, version_table)
        last = ledger.ask(questions.LAST_RUN, version_table)
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return Standing()
    entries = {row[0]: _entry(row) for row in rows if row[1] not in UNDONE}
    return Standing(True, entries, _last_run(last[0]) if last else None)


def read_visited(session: Session, version_table: VersionTable | None, role: str) -> tuple[VersionTable, ...]:
    """Return the version tables of the last run of ``env.py``, if there were several.

    A table with other columns than a ledger gives none; functions that read more of it refuse it.
    """
    if version_table is None:
        return ()
    try:
        rows = _trusted(session, version_table, role).ask(questions.VISITED, version_table)
    except AccessDenied as error:
        if not isinstance(error.__cause__, QueryFailed):
            raise
        return ()
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return ()
    return tuple(VersionTable(str(name), str(schema)) for schema, name in (rows[0][0] if rows else ()))


def led_here(session: Session, version_table: VersionTable | None, role: str) -> bool:
    """Tell whether ``env.py`` used this table in the last run, and that run ended well.

    The version table's owner vouches for nothing here: an ordinary role can make both tables in its own
    schema.
    """
    if version_table is None:
        return False
    ledger = beside(version_table, session)
    try:
        if holes(session.value, ledger, None, role=role):
            return False
        rows = query_ledger(session, ledger, questions.LAST_RUN, (version_table.name,))
    except AccessDenied:
        return False
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return False
    return bool(rows) and _last_run(rows[0]).code == 0


def read_last_snapshot(session: Session, role: str) -> LastSnapshot | None:
    """Return the newest schema snapshot in any ledger of the database; None if there is none.

    A ledger that others can write does not count; that of the version table was refused before. Raises
    QueryFailed if none can be read: then the answer is not known.
    """
    found, denied = [], None
    for table in ledgers(session):
        try:
            if holes(session.value, table, None, role=role):
                log.info("the ledger %s cannot tell whether the schema drifted: others can write it", table)
                continue
            rows = query_ledger(session, table, questions.LAST_SNAPSHOT, ())
        except QueryFailed as error:
            if error.sqlstate != "42501":
                raise
            denied = error  # another application's, unless there is no other one
            continue
        found += [LastSnapshot(run_id, at, snapshot or {}, table) for run_id, at, snapshot in rows]
    if denied and not found:
        raise denied
    return max(found, key=lambda left: left.at, default=None)


def ledgers(session: Session) -> list[VersionTable]:
    """Return all ledgers of the database, also those of other roles."""
    rows = session.query(
        "SELECT CAST(n.nspname AS pg_catalog.text) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n"  # noqa: S608 - a number
        " ON n.oid OPERATOR(pg_catalog.=) c.relnamespace WHERE c.relname OPERATOR(pg_catalog.=) %s"
        " AND c.relkind OPERATOR(pg_catalog.=) 'r' AND NOT pg_catalog.starts_with("
        "CAST(n.nspname AS pg_catalog.text), 'pg_')"
        # Another project's table of this name has other columns.
        " AND (SELECT pg_catalog.count(*) FROM pg_catalog.pg_attribute a"
        " WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND NOT a.attisdropped AND (a.attname"
        " OPERATOR(pg_catalog.=) 'version_table' OR a.attname OPERATOR(pg_catalog.=) 'details'"
        " OR a.attname OPERATOR(pg_catalog.=) 'backup_id')) OPERATOR(pg_catalog.=) 3"
        # The type of a column may bring a cast, and a policy a function, of the table's author.
        " AND NOT pg_catalog.row_security_active(c.oid) AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a"
        " WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid AND NOT a.attisdropped"
        f" AND a.atttypid OPERATOR(pg_catalog.>=) CAST('{FIRST_OF_OTHERS}' AS pg_catalog.oid))",
        (NAME,),
    )
    return [VersionTable(NAME, schema) for (schema,) in rows]


def read_failed(session: Session, version_table: VersionTable | None, role: str) -> Failed | None:
    """Return the facts of the newest failure that was reverted or restored; None if a later run ended well."""
    if version_table is None:
        return None
    try:
        rows = _trusted(session, version_table, role).ask(questions.FAILED, version_table)
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return None
    if not rows or not isinstance(rows[0][0], dict):
        return None
    known, run_id, at, code = rows[0]
    revision, checksum, digest, image = (
        str(known.get(name) or "") for name in ("revision", "checksum", "digest", "image")
    )
    return Failed(revision, checksum, digest, image, run_id, at, code)


def read_partial(session: Session, version_table: VersionTable | None, role: str) -> tuple[Partial, ...]:
    """Return the parts that are committed without a version row, oldest first."""
    if version_table is None:
        return ()
    try:
        rows = _trusted(session, version_table, role).ask(questions.PARTIAL, version_table)
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return ()
    return tuple(
        Partial(revision, upgrade != "false", statement or "", run_id, at, backup_id or "")
        for revision, upgrade, statement, run_id, at, backup_id in rows
    )


def _last_run(row: tuple[Any, ...]) -> LastRun:
    return LastRun(*("" if item is None else item for item in row))  # type: ignore[arg-type]


def _entry(row: tuple[Any, ...]) -> Entry:
    return Entry(*(item or "" for item in row))  # type: ignore[arg-type]


def read_stored_downgrades(session: Session, version_table: VersionTable, role: str) -> list[StoredDowngrade]:
    """Return how to revert each applied revision, newest first.

    This is code that will run. The version table's owner vouches for nothing here: the same role may
    have made both tables.
    """
    try:
        ledger = examine(session, beside(version_table, session), None, role)
        if ledger.holes:
            raise refusal(ledger.table, ledger.holes)
        rows = ledger.ask(questions.STORED_DOWNGRADES, version_table)
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return []
    return [
        StoredDowngrade(
            revision=row[0],
            message=row[2] or "",
            parents=tuple(row[3] or ()),
            depends_on=tuple(row[4] or ()),
            rows_before=tuple(row[5] or ()),
            rows_after=tuple(row[6] or ()),
            statements=None if row[7] is None else tuple(row[7]),
            reason=row[8] or "",
            image_version=row[9] or "",
            search_path=row[10] or "",
            role=row[11] or "",
        )
        for row in rows
        if row[1] not in UNDONE
    ]


def read_rows(session: Session, version_table: VersionTable, limit: int, role: str) -> list[dict[str, Any]]:
    """Return the newest rows unchanged, newest first, without the SQL to revert."""
    ledger = _trusted(session, version_table, role)
    try:
        return [row[0] for row in ledger.ask(questions.NEWEST, version_table, limit)]
    except QueryFailed as error:
        if error.sqlstate == "42501":
            user = session.facts.user
            raise AccessDenied(
                f"{user} may not read the ledger {ledger.table}.",
                next_step=f"GRANT SELECT ON {ledger.table.typed} TO {as_typed(user)}",
            ) from None
        if error.lost or error.sqlstate != "42P01":
            raise
        return []


_UNREADABLE = ("42P01", "42501")  # it does not exist, or is not allowed
_OTHER_COLUMNS = (
    "42703",
    "42804",
    "42883",
)  # no such column, or of another type: another role made the table
