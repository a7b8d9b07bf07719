"""One exported snapshot, and the content of the database in it: the dump and the comparison see the same
instant.

``pg_export_snapshot`` passes the instant to ``pg_dump --snapshot``.

migrator reads rows with ``COPY table TO STDOUT``, as pg_dump does, and never with a query. COPY takes
plain tables only: it fails if a view has taken the table's name. And it plans nothing: the planner
evaluates functions in expression indexes and in extended statistics, as the reading role. Tables belong
to others, and so do those functions.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from migrator.backups.clients import Login
from migrator.backups.manifest import Properties
from migrator.postgres.errors import Refused
from migrator.postgres.queries import IN_USER_SCHEMA, of_no_extension
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.server import no_timeouts
from migrator.postgres.session import Session
from migrator.runtime.threads import Result, background
from migrator.schema.names import Pattern

LOGGER = logging.getLogger("migrator.backup")
LOCK_WAIT = 60.0
"""Seconds to wait for a table that another session has locked; pg_dump gets the same limit."""
_LOCK_SLICE = 1000  # milliseconds: a signal is handled between two waits, not within one
_EMPTY_DATABASE = 8 * 1000 * 1000  # bytes: the catalogs of an empty database
_LOCK_NOT_AVAILABLE = "55P03"

# No pg_relation_size here and below: it waits for a session that has the table locked. Ordinary tables
# that pg_dump would dump: none of the system, of other sessions, or of an extension.
_TABLES = f"""
SELECT c.oid::bigint, n.nspname::text, c.relname::text, c.relkind::text,
       CASE WHEN c.relkind = 'r' AND c.reltuples >= 0 THEN c.reltuples::bigint END, row_security_active(c.oid),
       has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'S') AND c.relpersistence <> 't'
   AND {IN_USER_SCHEMA} AND {of_no_extension("pg_class", "c")}
 ORDER BY 2, 3
"""  # noqa: S608 - constants only


class LockedOut(Exception):
    """A table stayed locked for LOCK_WAIT seconds."""

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table


@dataclass(frozen=True)
class Relation:
    """A table, partitioned table or sequence in the catalogs."""

    oid: int
    schema: str
    name: str
    kind: str
    estimated_rows: int | None
    hides_rows: bool
    readable: bool

    @property
    def qualified(self) -> str:
        return f"{quote_identifier(self.schema)}.{quote_identifier(self.name)}"

    @functools.cached_property
    def shown(self) -> str:
        return shown(self.schema, self.name)


def shown(schema: str, name: str) -> str:
    """Return a relation's name for people and for the manifest: quoted only if SQL needs it."""
    return ".".join(
        part if part.isascii() and part.isidentifier() and part.islower() else quote_identifier(part)
        for part in (schema, name)
    )


@dataclass(frozen=True)
class Sizes:
    """Bytes: of the whole database, of the part that a dump may hold (all but indexes and fixed content), and
    of each table by oid, with its TOAST, as of its last VACUUM or ANALYZE.
    """

    database: int
    data: int
    tables: Mapping[int, int]


def relations(session: Session) -> list[Relation]:
    """Return the tables and sequences that a dump of this database would hold."""
    return [Relation(*row) for row in session.query(_TABLES)]


_TABLE_SIZES = f"""
SELECT c.oid::bigint, (c.relpages + coalesce(t.relpages, 0))::bigint * current_setting('block_size')::int
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_class t ON t.oid = c.reltoastrelid
 WHERE c.relkind = 'r' AND {IN_USER_SCHEMA}
"""  # noqa: S608 - constants only


def sizes(session: Session) -> Sizes:
    """Measure the database; no table is locked."""
    whole, indexes = session.query(
        "SELECT pg_database_size(current_database())::bigint,"
        " (SELECT coalesce(sum(relpages), 0)::bigint * current_setting('block_size')::int"
        "    FROM pg_class WHERE relkind = 'i')"
    )[0]
    tables = session.query(_TABLE_SIZES)
    return Sizes(whole, max(0, whole - indexes - _EMPTY_DATABASE), dict(tables))


def oddities(session: Session) -> tuple[str, ...]:
    """Return the options of columns that only some servers know, such as Debian 15.20's ``pg_attver``.

    A pg_dump of another build writes them into the dump, and no other server accepts them.
    """
    rows = session.query(
        "SELECT DISTINCT split_part(o, '=', 1)::text FROM pg_attribute, unnest(attoptions) o"
        " WHERE attoptions IS NOT NULL AND attnum > 0 AND NOT attisdropped ORDER BY 1"
    )
    return tuple(row[0] for row in rows if row[0] not in ("n_distinct", "n_distinct_inherited"))


# As in pg_user_mappings: pg_dump writes only the visible ones.
_HIDDEN = """
SELECT 'options of the user mapping', quote_ident(coalesce(m.usename, 'public')) || ' on ' || quote_ident(m.srvname)
  FROM pg_user_mappings m JOIN pg_foreign_server s ON s.oid = m.srvid, pg_roles me
 WHERE me.rolname = current_user AND NOT me.rolsuper AND NOT CASE m.umuser WHEN 0 THEN pg_has_role(s.srvowner, 'USAGE')
       ELSE m.usename = current_user AND (pg_has_role(s.srvowner, 'USAGE') OR has_server_privilege(s.oid, 'USAGE')) END
UNION ALL
SELECT 'subscription', quote_ident(subname)
  FROM pg_subscription JOIN pg_database d ON d.oid = subdbid AND d.datname = current_database(), pg_roles me
 WHERE me.rolname = current_user AND NOT me.rolsuper
 ORDER BY 1, 2
"""


def not_dumped(session: Session) -> tuple[str, ...]:
    """Name the objects that pg_dump silently leaves out for a role that is not a superuser."""
    return tuple(f"{kind} {name}" for kind, name in session.query(_HIDDEN))


# What pg_read_all_data does not cover.
_UNREADABLE_LARGE_OBJECTS = """
SELECT count(*), min(oid::bigint) FROM pg_largeobject_metadata
 WHERE current_setting('lo_compat_privileges') = 'off' AND NOT pg_has_role(lomowner, 'USAGE')
   AND NOT EXISTS (SELECT FROM aclexplode(lomacl) WHERE privilege_type = 'SELECT'
                                                   AND (grantee = 0 OR pg_has_role(grantee, 'USAGE')))
"""


def unreadable_large_objects(session: Session) -> tuple[int, int | None]:
    """Return how many large objects the role may not read, and the lowest of their oids."""
    number, first = session.query(_UNREADABLE_LARGE_OBJECTS)[0]
    return number, first


def identity(session: Session) -> tuple[str, int | None]:
    """Return the cluster's system identifier and timeline; ``("", None)`` if the role may not read them.

    Not for a session in a transaction, because a refusal would end that.
    """
    try:
        row = session.query(
            "SELECT system_identifier::text, timeline_id FROM pg_control_system(), pg_control_checkpoint()"
        )[0]
    except Refused:
        return "", None
    return row[0], row[1]


# A transaction of another database that is still in progress cannot write into this one.
_BOUNDS = """
SELECT txid_snapshot_xmin(s)::bigint, txid_snapshot_xmax(s)::bigint, ARRAY(
  SELECT x FROM txid_snapshot_xip(s) x
   WHERE NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_xid::text::bigint = x % (2::bigint ^ 32)::bigint
                        AND datname <> current_database())
     AND NOT EXISTS (SELECT FROM pg_prepared_xacts WHERE transaction::text::bigint = x % (2::bigint ^ 32)::bigint
                        AND database <> current_database()))
  FROM txid_current_snapshot() s
"""


@dataclass(frozen=True)
class Bounds:
    """Which transaction ids (of the cluster, with its epoch) a snapshot has not seen.

    It has seen all below ``next``, and none from ``unseen`` on. In between it has not seen ``running``,
    which were in progress and may write here.
    """

    next: int
    unseen: int
    running: tuple[int, ...]


def bounds(session: Session) -> Bounds:
    """Return the transaction ids that the session's snapshot has not seen."""
    next_, unseen, running = session.query(_BOUNDS)[0]
    return Bounds(next_, unseen, tuple(running))


def properties(session: Session) -> Properties:
    """Read how this database was created; through JSON, because the columns differ between majors."""
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
def exported(login: Login) -> Iterator[tuple[Session, str]]:
    """Open a session with a transaction that holds a snapshot, and yield both; closed on leaving.

    The database's own timeouts are switched off in it: it is idle while pg_dump works.
    """
    with login.connect() as session:
        session.query(no_timeouts(session.facts.major))
        session.query(f"SET lock_timeout = {_LOCK_SLICE}")
        session.query("SET row_security = off")  # an error, and no missing rows
        session.query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield session, session.value("SELECT pg_export_snapshot()")


def count_exactly(session: Session, relation: Relation) -> int:
    """Count a table's own rows, at any cost; raises QueryFailed."""
    column = session.query(_NARROWEST, [relation.oid])
    return copied(session, relation, column[0][0] if column else "")


# One of variable length if there is no other: the first is most often the key.
_NARROWEST = """
SELECT quote_ident(attname) FROM pg_attribute
 WHERE attrelid = %s::bigint::oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
 ORDER BY attlen < 0, attlen, attnum LIMIT 1
"""


_IS_OURS = """
SELECT l.oid FROM unnest(%s::bigint[], %s::text[]) AS l (oid, name)
 WHERE to_regclass(l.name)::oid::bigint IS DISTINCT FROM l.oid
    OR l.oid NOT IN (SELECT relation::bigint FROM pg_locks
                      WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation IS NOT NULL)
"""


def replaced(session: Session, read: Sequence[Relation]) -> list[Relation]:
    """Return which tables, read by name, are not the listed ones, and log them.

    Reading has locked the table of that name until the end of the transaction.
    """
    given = [[item.oid for item in read], [item.qualified for item in read]]
    others = {row[0] for row in session.query(_IS_OURS, given)} if read else set()
    found = [item for item in read if item.oid in others]
    for item in found:
        LOGGER.warning("the rows of %s were not counted: another table took its name", item.shown)
    return found


def by_oid(session: Session, sql: str, relations: Mapping[int, Relation]) -> list[tuple[Any, ...]]:
    """Query relations by their oids, all at once; one by one if one of them is locked; raises LockedOut."""
    try:
        with savepoint(session):
            return session.query(sql, [list(relations)])
    except Refused as error:
        if error.sqlstate != _LOCK_NOT_AVAILABLE:
            raise
    rows = []
    for oid, item in relations.items():
        rows += when_free(session, item.shown, functools.partial(session.query, sql, [[oid]]))
    return rows


@contextlib.contextmanager
def savepoint(session: Session) -> Iterator[None]:
    """Let the transaction go on where the server refuses a statement of the block."""
    session.query("SAVEPOINT migrator")
    try:
        yield
    except Refused:
        session.query("ROLLBACK TO SAVEPOINT migrator; RELEASE SAVEPOINT migrator")
        raise
    session.query("RELEASE SAVEPOINT migrator")


def when_free(session: Session, name: str, work: Callable[[], Result]) -> Result:
    """Do work that needs a lock, with retries while another session has it; a signal is handled in between.

    It runs within a savepoint: if it fails, the transaction continues. Raises :class:`LockedOut` and
    QueryFailed.
    """
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            with savepoint(session):
                return work()
        except Refused as error:
            if error.sqlstate != _LOCK_NOT_AVAILABLE:
                raise
            if time.monotonic() > deadline:
                raise LockedOut(name) from error


def leniently(session: Session, what: str, work: Callable[[], Result], otherwise: Result) -> Result:
    """Do optional work of the backup, within a savepoint; a failure is a warning."""
    try:
        with savepoint(session):
            return work()
    except Refused as error:
        LOGGER.warning("%s is not known: %s", what, error.text)
        return otherwise


class Nowhere:
    """The destination of rows that are only counted."""

    def write(self, data: bytes) -> int:
        return len(data)


def copied(session: Session, relation: Relation, columns: str, sink: Any = None) -> int:
    """Write a table's own rows into the sink, each as COPY's text; return their number; raises QueryFailed.

    ``columns`` are quoted names; without any it is all of them.
    """
    listed = f" ({columns})" if columns else ""
    text = f"COPY {relation.qualified}{listed} TO STDOUT"
    rows: int = interruptibly(session, lambda: session.query(text, sink=sink or Nowhere()))[0][0]
    return rows


def interruptibly(session: Session, work: Callable[[], Result]) -> Result:
    """Do long work on the server, and cancel it if a signal's handler raises.

    psycopg2 waits inside libpq, where no handler runs; so it waits in another thread.
    """
    worker = background("contents", work)
    try:
        futures.wait([worker])
    except BaseException:
        while not worker.done():
            session.cancel()
            futures.wait([worker], 0.2)
        raise
    return worker.result()


# A partitioned table holds no rows itself: its partitions hold them.
_BELOW = """
WITH RECURSIVE below AS (
  SELECT inhrelid FROM pg_inherits JOIN pg_class p ON p.oid = inhparent
   WHERE p.relkind = 'p' AND inhparent = ANY(%s::oid[])
  UNION
  SELECT i.inhrelid FROM pg_inherits i JOIN below b ON i.inhparent = b.inhrelid
) SELECT inhrelid::bigint FROM below
"""


def find(session: Session, patterns: Sequence[Pattern], found: Sequence[Relation]) -> list[Relation]:
    """Return the tables with rows to exclude: those that patterns name, and their partitions."""
    tables = {relation.oid: relation for relation in found if relation.kind in "rp"}
    named = {
        oid
        for oid, table in tables.items()
        if any(item.matches(table.schema, table.name) for item in patterns)
    }
    if any(tables[oid].kind == "p" for oid in named):
        named |= {row[0] for row in session.query(_BELOW, [sorted(named)])} & tables.keys()
    return [table for oid, table in tables.items() if oid in named and table.kind == "r"]


def unmatched(patterns: Sequence[Pattern], found: Sequence[Relation]) -> list[str]:
    """Return the patterns that match no table: misspelt, or for a dropped table."""
    tables = [relation for relation in found if relation.kind in "rp"]
    return [
        item.text for item in patterns if not any(item.matches(table.schema, table.name) for table in tables)
    ]
