"""One exported snapshot, and what the database holds in it: the dump and its row counts see the same instant.

``pg_export_snapshot`` hands the instant over to ``pg_dump --snapshot``.  A row count taken at any other time
would prove nothing about the dump.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from migrator.backups.manifest import Properties, Table
from migrator.postgres import QueryFailed, Session, connect, quote_identifier
from migrator.target import Target

LOCK_WAIT = 60.0
"""Seconds to wait for a table that another session has locked; pg_dump is told the same."""
COUNTED_BYTES = 100 * 1000 * 1000
"""Tables whose rows take up more are not counted: the scan would cost what the dump's own costs.

Decided by size and not by ``reltuples``, which is a guess and missing where nothing was analysed yet.
"""
_LOCK_SLICE = 1000  # milliseconds: a signal is answered between two waits, not in the middle of one
_EMPTY_DATABASE = 8 * 1000 * 1000  # bytes: the catalogs of a database that holds nothing
_LOCK_NOT_AVAILABLE = "55P03"

# No pg_relation_size here and below: it waits for whoever has the table locked.
# Ordinary tables that pg_dump would dump: none of the system's, of other sessions, or of an extension.
_TABLES = """
SELECT c.oid::bigint, n.nspname::text, c.relname::text, c.relkind::text, c.reltuples::bigint,
       row_security_active(c.oid),
       has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't'
   AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                             AND d.deptype = 'e')
 ORDER BY 2, 3
"""


class LockedOut(Exception):
    """A table stayed locked for LOCK_WAIT seconds."""

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table


@dataclass(frozen=True)
class Relation:
    """A table, partitioned table or sequence as the catalogs have it."""

    oid: int
    schema: str
    name: str
    kind: str
    estimated_rows: int | None
    hides_rows: bool
    readable: bool

    @property
    def qualified(self) -> str:
        """Return the quoted name, with its schema."""
        return f"{quote_identifier(self.schema)}.{quote_identifier(self.name)}"

    @property
    def shown(self) -> str:
        """Return the name for people and for the manifest: quoted only where SQL would need it."""
        return ".".join(
            part if part.isascii() and part.isidentifier() and part.islower() else quote_identifier(part)
            for part in (self.schema, self.name)
        )


@dataclass(frozen=True)
class Sizes:
    """Bytes: of the whole database, and of what a dump may hold of it (all but indexes and what is always there)."""

    database: int
    data: int


def relations(session: Session) -> list[Relation]:
    """Return the tables and sequences that a dump of this database would hold."""
    return [
        Relation(
            oid=row[0],
            schema=row[1],
            name=row[2],
            kind=row[3],
            estimated_rows=row[4] if row[4] >= 0 and row[3] == "r" else None,
            hides_rows=row[5],
            readable=row[6],
        )
        for row in session.query(_TABLES)
    ]


def sizes(session: Session) -> Sizes:
    """Measure the database."""
    whole, indexes = session.query(
        "SELECT pg_database_size(current_database())::bigint,"
        " (SELECT coalesce(sum(relpages), 0)::bigint * current_setting('block_size')::int"
        "    FROM pg_class WHERE relkind = 'i')"
    )[0]
    return Sizes(whole, max(0, whole - indexes - _EMPTY_DATABASE))


def table_bytes(session: Session) -> dict[int, int]:
    """Return what tables take up with their TOAST, in bytes by oid, as of the last VACUUM or ANALYZE of each."""
    rows = session.query(
        "SELECT c.oid::bigint, (c.relpages + coalesce(t.relpages, 0))::bigint * current_setting('block_size')::int"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_class t ON t.oid = c.reltoastrelid"
        " WHERE c.relkind = 'r' AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'"
    )
    return {row[0]: row[1] for row in rows}


def oddities(session: Session) -> tuple[str, ...]:
    """Return the options of columns that only some servers know, such as Debian 15.20's ``pg_attver``.

    A pg_dump of another build writes them into the dump, where no other server accepts them.
    """
    rows = session.query(
        "SELECT DISTINCT split_part(o, '=', 1)::text FROM pg_attribute, unnest(attoptions) o"
        " WHERE attnum > 0 AND NOT attisdropped ORDER BY 1"
    )
    return tuple(row[0] for row in rows if row[0] not in ("n_distinct", "n_distinct_inherited"))


def identity(session: Session) -> tuple[str, int | None]:
    """Return the cluster's system identifier and timeline; ``("", None)`` where the role may not read them.

    Not for a session in a transaction, which a refusal would end.
    """
    try:
        row = session.query(
            "SELECT system_identifier::text, timeline_id FROM pg_control_system(), pg_control_checkpoint()"
        )[0]
    except QueryFailed as error:
        if error.lost:
            raise
        return "", None
    return row[0], row[1]


def next_xid(session: Session) -> int:
    """Return the least transaction id (of the cluster, with its epoch) that the session's snapshot may not have seen.

    Its xmin, not its xmax: a transaction that was under way and is committed later is not in the dump either.
    """
    found: int = session.value("SELECT txid_snapshot_xmin(txid_current_snapshot())::bigint")
    return found


def properties(session: Session) -> Properties:
    """Read how this database was created; through JSON, for the columns differ from major to major."""
    row = session.query(
        "SELECT pg_get_userbyid(d.datdba)::text, pg_encoding_to_char(d.encoding)::text, d.datcollate::text,"
        " d.datctype::text, coalesce(j ->> 'datlocprovider', 'c'),"
        " coalesce(j ->> 'datlocale', j ->> 'daticulocale', ''), coalesce(j ->> 'daticurules', ''),"
        " (SELECT CASE spcname WHEN 'pg_default' THEN '' ELSE spcname::text END"
        "    FROM pg_tablespace WHERE oid = d.dattablespace)"
        " FROM pg_database d, to_jsonb(d) j WHERE d.datname = current_database()"
    )[0]
    return Properties(*row)


@contextlib.contextmanager
def exported(target: Target, application_name: str, timeout: float) -> Iterator[tuple[Session, str]]:
    """Open a session whose transaction holds a snapshot, and yield both; closed on leaving.

    The database's own timeouts are switched off in it: it has nothing to do while pg_dump works.
    """
    with connect(target, application_name, timeout) as session:
        names = ["statement_timeout", "idle_in_transaction_session_timeout"]
        names += ["transaction_timeout"] if session.facts.major >= 17 else []
        for name in names:
            session.query(f"SET {name} = 0")
        session.query(f"SET lock_timeout = {_LOCK_SLICE}")
        session.query("SET row_security = off")  # a count that leaves rows out must fail
        session.query("SET search_path = ''")
        session.query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield session, session.value("SELECT pg_export_snapshot()")


def count(session: Session, found: Sequence[Relation], excluded: Collection[str] = ()) -> dict[str, Table]:
    """Count the rows of the tables in the session's transaction; raises :class:`LockedOut`.

    Those of ``excluded`` (by the name that is shown) are not counted, for the dump has none of them.

    In a transaction the counted tables stay locked (ACCESS SHARE, as pg_dump locks them itself) until its
    end, so nobody can drop or truncate them between the count and the dump.
    """
    deadline = time.monotonic() + LOCK_WAIT
    tables = {}
    for relation in found:
        if relation.kind == "S":
            continue
        if relation.kind == "r":
            tables[relation.shown] = _count_one(session, relation, deadline, relation.shown in excluded)
        else:
            tables[relation.shown] = Table(None)
    return tables


def _count_one(session: Session, relation: Relation, deadline: float, excluded: bool) -> Table:
    while True:
        session.query("SAVEPOINT one_table")
        try:
            rows = None
            own, size = session.query(
                "SELECT pg_relation_size(%s::oid), pg_table_size(%s::oid)", [relation.oid, relation.oid]
            )[0]
            if own <= COUNTED_BYTES and not excluded:
                rows = count_exactly(session, relation)
        except QueryFailed as error:
            if error.sqlstate != _LOCK_NOT_AVAILABLE:
                raise
            session.query("ROLLBACK TO SAVEPOINT one_table")
            if time.monotonic() > deadline:
                raise LockedOut(relation.shown) from error
            continue
        session.query("RELEASE SAVEPOINT one_table")
        return Table(rows, relation.estimated_rows, size_bytes=size)


def count_exactly(session: Session, relation: Relation) -> int:
    """Count a table's own rows, whatever that costs."""
    rows: int = session.value(f"SELECT count(*) FROM ONLY {relation.qualified}")  # noqa: S608 - quoted
    return rows
