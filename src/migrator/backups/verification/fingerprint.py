"""What a database holds, in a form in which a restored copy can be compared with the original.

Rows: per table their number and one hash, computed on the server in one scan: the sum over all rows of
``hashtextextended`` of the row's text.  A sum depends on no order, and unlike an exclusive-or it sees rows that are
there twice.  ``hashtextextended`` (64 bits, under the C collation) is what hash partitions rest on, so majors agree
on it; md5() is missing on FIPS systems, and sha256() took 1.7 times as long (a million rows of four columns: 1.1 s
instead of 0.66 on one core).  It finds accidents; that nobody forged an archive is for its sha256 to say.  How
values are written as text is pinned (:data:`PINNED`), and columns go by name, for a restore may order them anew
where a parent table got columns later than its children.

Schema: one line for each column, constraint, index, trigger, function, type and sequence, with what a restore must
keep, and without the definitions' text: Postgres does not print an expression as it was before a dump
(``a IN ('x')`` on a varchar, for one, comes back with its casts moved).

All of it is read in one transaction, the snapshot that pg_dump dumps.  Only sequences take no part in that.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from migrator.backups import snapshot
from migrator.backups.manifest import Table
from migrator.backups.snapshot import Relation
from migrator.postgres import QueryFailed, Session

Result = TypeVar("Result")
Value = tuple[int, bool]
"""A sequence's ``last_value`` and ``is_called``."""

PINNED = {
    "extra_float_digits": "1",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "quote_all_identifiers": "off",
    "standard_conforming_strings": "on",
    "search_path": "",
    "row_security": "off",
    "statement_timeout": "0",
}
"""The settings that say how values are written as text, and what is seen of the rows."""

SPELLING = (
    "TimeZone",
    "standard_conforming_strings",
    "quote_all_identifiers",
    "bytea_output",
    "lc_monetary",
    "xmloption",
)
"""The settings that say how pg_dump writes definitions, beside those that it sets itself."""

_LOCK_NOT_AVAILABLE = "55P03"
_TOO_BIG = ("54000", "53200")  # program_limit_exceeded: a row of 1 GB as text; out_of_memory

# Virtual generated columns (PostgreSQL 18) hold nothing, and computing one may fail.
_COLUMNS = """
SELECT quote_ident(attname) FROM pg_attribute a
 WHERE attrelid = %s::oid AND attnum > 0 AND NOT attisdropped AND attgenerated <> 'v' ORDER BY attname
"""
_LARGE_OBJECTS = """
SELECT count(*)::text || ' ' || coalesce(sum(hashtextextended(
         (oid::text || ' ' || encode(sha256(lo_get(oid)), 'hex')) COLLATE "C", 0)::numeric), 0)::text
  FROM pg_largeobject_metadata
"""

# What pg_dump leaves out is left out: the system's, an extension's, what follows from another (a partition's clone of
# a foreign key or trigger, an index that is not valid).  Named NOT NULL constraints (PostgreSQL 18) are the column's.
_SCHEMA = """
WITH mine AS (
  SELECT oid, nspname FROM pg_namespace n
   WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
),
owned AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
relations AS (
  SELECT format('%I.%I', nspname, relname) AS name, c.* FROM pg_class c JOIN mine ON mine.oid = relnamespace
   WHERE (c.oid, 'pg_class'::regclass) NOT IN (SELECT objid, classid FROM owned) AND relpersistence <> 't'
)
SELECT concat_ws(' ', 'relation', name, relkind, relpersistence, relrowsecurity, relforcerowsecurity,
                 CASE WHEN relkind = 'm' THEN relispopulated END, pg_get_partkeydef(oid))
  FROM relations r WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
UNION ALL
SELECT concat_ws(' ', 'column', name, quote_ident(attname), format_type(atttypid, atttypmod),
                 CASE WHEN attnotnull THEN 'not null' END, attidentity::text, attgenerated::text,
                 CASE WHEN atthasdef THEN 'default' END,
                 CASE WHEN attcollation <> typcollation THEN
                   (SELECT quote_ident(collname) FROM pg_collation WHERE oid = attcollation) END)
  FROM relations r JOIN pg_attribute ON attrelid = r.oid JOIN pg_type t ON t.oid = atttypid
 WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND attnum > 0 AND NOT attisdropped
UNION ALL
SELECT concat_ws(' ', 'constraint', coalesce(name, format_type(contypid, NULL)), quote_ident(conname), contype,
                 convalidated, condeferrable, condeferred,
                 confupdtype::text || confdeltype::text || confmatchtype::text)
  FROM pg_constraint k JOIN mine ON mine.oid = connamespace LEFT JOIN relations r ON r.oid = conrelid
 WHERE conparentid = 0 AND contype NOT IN ('n', 't') AND (conrelid = 0 OR name IS NOT NULL)
UNION ALL
SELECT concat_ws(' ', 'index', r.name, i.name, indisunique, indisprimary, indisclustered, indisreplident, indnkeyatts)
  FROM pg_index x JOIN relations r ON r.oid = indrelid JOIN relations i ON i.oid = indexrelid
 WHERE indisvalid OR i.relkind = 'I'
UNION ALL
SELECT concat_ws(' ', 'trigger', name, quote_ident(tgname), tgenabled, tgtype, tgdeferrable)
  FROM pg_trigger g JOIN relations r ON r.oid = tgrelid
 WHERE NOT tgisinternal AND coalesce(to_jsonb(g) ->> 'tgparentid', '0') = '0'
UNION ALL
SELECT concat_ws(' ', 'function', format('%I.%I', nspname, proname), pg_get_function_identity_arguments(p.oid),
                 prokind, provolatile, prosecdef, format_type(prorettype, NULL))
  FROM pg_proc p JOIN mine ON mine.oid = pronamespace
 WHERE (p.oid, 'pg_proc'::regclass) NOT IN (SELECT objid, classid FROM owned)
UNION ALL
SELECT concat_ws(' ', 'type', format('%I.%I', nspname, typname), typtype, typnotnull,
                 CASE WHEN typtype = 'd' THEN format_type(typbasetype, typtypmod) END,
                 (SELECT string_agg(quote_literal(enumlabel), ',' ORDER BY enumsortorder)
                    FROM pg_enum WHERE enumtypid = t.oid))
  FROM pg_type t JOIN mine ON mine.oid = typnamespace
 WHERE typtype IN ('d', 'e', 'r') AND (t.oid, 'pg_type'::regclass) NOT IN (SELECT objid, classid FROM owned)
UNION ALL
SELECT concat_ws(' ', 'sequence', name, format_type(seqtypid, NULL), seqstart, seqincrement, seqmin, seqmax, seqcycle)
  FROM pg_sequence JOIN relations r ON r.oid = seqrelid
UNION ALL
SELECT concat_ws(' ', 'schema', quote_ident(nspname)) FROM mine WHERE nspname <> 'public'
UNION ALL
SELECT concat_ws(' ', 'extension', quote_ident(extname)) FROM pg_extension
"""


@dataclass(frozen=True)
class Contents:
    """What a database holds: rows by table, values by sequence, large objects, and its schema as lines.

    ``large_objects`` is their number and one hash, ``""`` where they could not be read as a whole.
    """

    tables: Mapping[str, Table]
    sequences: Mapping[str, Value]
    large_objects: str
    schema: tuple[str, ...]

    @property
    def schema_sha256(self) -> str:
        """Return the checksum of the schema's lines."""
        return hashlib.sha256("\n".join(self.schema).encode()).hexdigest()


def pin(session: Session) -> None:
    """Have the session write values as every other one that compares contents does."""
    names = dict(PINNED)
    if session.facts.major >= 17:
        names["transaction_timeout"] = "0"
    for name, value in names.items():
        session.query("SELECT set_config(%s, %s, false)", (name, value))


def spelling(session: Session) -> dict[str, str]:
    """Read how the session's role writes definitions in its database; before the session is pinned."""
    columns = ", ".join(f"current_setting('{name}')" for name in SPELLING)
    return dict(zip(SPELLING, session.query(f"SELECT {columns}")[0], strict=True))


def take(
    session: Session, excluded: Collection[str] = (), *, rows: bool, only: Collection[str] | None = None
) -> Contents:
    """Read what a database holds, in the session's transaction; raises QueryFailed, and LockedOut of snapshot.py.

    With ``rows``, those of all tables but ``excluded`` (or of ``only`` some, by the names that are shown) are hashed,
    and so are large objects.  A table that is locked is waited for as the dump itself waits.
    """
    pin(session)
    found = snapshot.relations(session)
    tables = {}
    for relation in found:
        if relation.kind != "S":
            tables[relation.shown] = Table(None)
        wanted = relation.shown not in excluded and (only is None or relation.shown in only)
        if relation.kind == "r" and rows and wanted:
            tables[relation.shown] = _when_free(
                session, relation, functools.partial(measure, session, relation)
            )
    return Contents(
        tables if rows else {},
        sequences(session, found),
        large_objects(session) if rows else "",
        schema(session),
    )


def _when_free(session: Session, relation: Relation, work: Callable[[], Result]) -> Result:
    """Do what needs a lock, again and again while another session has it; a signal is answered in between."""
    deadline = time.monotonic() + snapshot.LOCK_WAIT
    while True:
        session.query("SAVEPOINT one_table")
        try:
            found = work()
        except QueryFailed as error:
            if error.sqlstate != _LOCK_NOT_AVAILABLE:
                raise
            session.query("ROLLBACK TO SAVEPOINT one_table")
            if time.monotonic() > deadline:
                raise snapshot.LockedOut(relation.shown) from error
            continue
        session.query("RELEASE SAVEPOINT one_table")
        return found


def measure(session: Session, relation: Relation) -> Table:
    """Count and hash a table's own rows in the session's transaction; raises QueryFailed.

    A table with a row that does not fit into memory as text is counted, and not hashed.
    """
    session.query("SAVEPOINT one_hash")
    try:
        rows, content_hash = interruptibly(session, lambda: _hash(session, relation))
    except QueryFailed as error:
        if error.sqlstate not in _TOO_BIG:
            raise
        session.query("ROLLBACK TO SAVEPOINT one_hash")
        rows, content_hash = snapshot.count_exactly(session, relation), ""
    session.query("RELEASE SAVEPOINT one_hash")
    return Table(rows, relation.estimated_rows, content_hash)


def _hash(session: Session, relation: Relation) -> tuple[int, str]:
    columns = ", ".join(row[0] for row in session.query(_COLUMNS, [relation.oid]))
    rows, total = session.query(
        "SELECT count(*)::bigint, coalesce(sum(hashtextextended("  # noqa: S608 - quoted by the server
        f'ROW({columns})::text COLLATE "C", 0)::numeric), 0)::text FROM ONLY {relation.qualified}'
    )[0]
    return rows, total


def sequences(session: Session, found: Iterable[Relation]) -> dict[str, Value]:
    """Read what the sequences are at now, in the session's transaction, though that has no view of its own of them.

    Raises QueryFailed and LockedOut.
    """

    def read(relation: Relation) -> Value:
        row = session.query(f"SELECT last_value, is_called FROM {relation.qualified}")[0]  # noqa: S608 - quoted
        return row[0], row[1]

    return {
        relation.shown: _when_free(session, relation, functools.partial(read, relation))
        for relation in found
        if relation.kind == "S"
    }


def sequences_now(session: Session) -> dict[str, Value]:
    """Read what the sequences are at now, in a transaction of its own; raises QueryFailed and LockedOut."""
    session.query("BEGIN READ ONLY")
    try:
        session.query("SET LOCAL lock_timeout = '1s'")
        return sequences(session, snapshot.relations(session))
    finally:
        if not session.closed:
            session.query("ROLLBACK")


def large_objects(session: Session) -> str:
    """Return the number of large objects and one hash over them, ``""`` where one is too big; raises QueryFailed."""
    session.query("SAVEPOINT large_objects")
    try:
        found: str = interruptibly(session, lambda: session.value(_LARGE_OBJECTS))
    except QueryFailed as error:
        if error.sqlstate not in _TOO_BIG:
            raise
        found = ""
        session.query("ROLLBACK TO SAVEPOINT large_objects")
    session.query("RELEASE SAVEPOINT large_objects")
    return found


def schema(session: Session) -> tuple[str, ...]:
    """Return the schema as sorted lines."""
    return tuple(sorted(row[0] for row in session.query(_SCHEMA)))


def interruptibly(session: Session, work: Callable[[], Result]) -> Result:
    """Do what may keep the server busy for long, and cancel it where a signal's handler raises.

    psycopg2 waits inside libpq, where no handler runs; so it waits in another thread.
    """
    results: list[Result] = []
    failures: list[QueryFailed] = []

    def run() -> None:
        try:
            results.append(work())
        except QueryFailed as error:
            failures.append(error)

    worker = threading.Thread(target=run, name="contents", daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.2)
    except BaseException:
        while worker.is_alive():
            session.cancel()
            worker.join(0.2)
        raise
    if failures:
        raise failures[0]
    return results[0]
