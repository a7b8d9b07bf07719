"""The content of a database, in a form for comparing a restored copy with the original.

Rows: for each table their number and one hash, the sum over all rows of a hash (64 bits) of the row as
COPY writes it. A sum does not depend on the order, and unlike an exclusive-or it notices duplicate
rows. It is computed here and not on the server, where a query would run others' code in the table's
indexes and statistics (see exported_snapshot.py). A million rows of two columns take 0.75 s instead of
0.15. It finds accidents; the sha256 of an archive finds a forgery. The text form of values is pinned
(:data:`PINNED`). Columns go by name, because a restore may reorder them if a parent table got columns
later than its children. Generated columns are excluded, as in pg_dump.

Schema: one line for each column, constraint, index, trigger, function, type and sequence, with the
facts that a restore must keep, and without the text of definitions. Postgres does not print an
expression as before a dump (``a IN ('x')`` on a varchar comes back with moved casts, for example).

All of it is read in one transaction, in the snapshot that pg_dump dumps. Only sequences take no part in
that.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from migrator.backups import exported_snapshot
from migrator.backups.exported_snapshot import Relation
from migrator.backups.manifest import Table
from migrator.postgres.errors import Refused
from migrator.postgres.queries import IN_USER_SCHEMA
from migrator.postgres.session import Session
from migrator.runtime.threads import Result

LOGGER = logging.getLogger("migrator.backup")
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
    "row_security": "off",
    "statement_timeout": "0",
}
"""The settings for the text form of values, and for the visible rows."""

_TOO_BIG = ("54000", "53200")  # program_limit_exceeded: a row of 1 GB as text; out_of_memory

_COLUMNS = """
SELECT quote_ident(attname) FROM pg_attribute
 WHERE attrelid = %s::oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attname
"""
_SEQUENCES = """
SELECT seqrelid::bigint, coalesce(last_value, seqstart), last_value IS NOT NULL
  FROM pg_sequence, pg_sequence_last_value(seqrelid) AS last_value WHERE seqrelid = ANY(%s::bigint[]::oid[])
"""
_LARGE_OBJECTS = """
SELECT count(*)::text || ' ' || coalesce(sum(hashtextextended(
         (oid::text || ' ' || encode(sha256(lo_get(oid)), 'hex')) COLLATE "C", 0)::numeric), 0)::text
  FROM pg_largeobject_metadata
"""

# Objects that pg_dump omits are omitted: those of the system, of an extension, and dependent ones (a
# partition's clone of a foreign key or trigger, an invalid index). Named NOT NULL constraints (PostgreSQL
# 18) belong to the column.
_SCHEMA = f"""
WITH mine AS (
  SELECT oid, nspname FROM pg_namespace n
   WHERE {IN_USER_SCHEMA}
),
owned AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
relations AS (
  SELECT format('%I.%I', nspname, relname) AS name, c.oid, relkind, relpersistence, relrowsecurity, relforcerowsecurity,
         relispopulated
    FROM pg_class c JOIN mine ON mine.oid = relnamespace
   WHERE (c.oid, 'pg_class'::regclass) NOT IN (SELECT objid, classid FROM owned) AND relpersistence <> 't'
)
SELECT concat_ws(' ', 'relation', name, relkind, relpersistence, relrowsecurity, relforcerowsecurity,
                 CASE WHEN relkind = 'm' THEN relispopulated END,
                 CASE WHEN relkind = 'p' THEN pg_get_partkeydef(oid) END)
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
"""  # noqa: S608 - constants only


@dataclass(frozen=True)
class Contents:
    """The content of a database: rows by table, values by sequence, large objects, and its schema as lines.

    ``large_objects`` is their number and one hash, ``""`` if they could not be read completely.
    """

    tables: Mapping[str, Table]
    sequences: Mapping[str, Value]
    large_objects: str
    schema: tuple[str, ...] = ()

    @property
    def schema_sha256(self) -> str:
        """Return the checksum of the schema's lines, ``""`` if they are not known."""
        if not self.schema:
            return ""
        return hashlib.sha256("\n".join(self.schema).encode()).hexdigest()


def pin(session: Session) -> None:
    """Make the session write values like every other session that compares contents."""
    names = dict(PINNED)
    if session.facts.major >= 17:
        names["transaction_timeout"] = "0"
    for name, value in names.items():
        session.query("SELECT set_config(%s, %s, false)", (name, value))


def take(
    session: Session,
    found: Sequence[Relation],
    excluded: Collection[str] = (),
    *,
    rows: bool,
    only: Collection[str] | None = None,
    lenient: bool = False,
) -> Contents:
    """Read the content of a database, without its schema, in the session's transaction.

    Raises QueryFailed and ``exported_snapshot.LockedOut``. ``found`` are its tables and sequences. With
    ``rows``, the rows of all tables but ``excluded`` (or of ``only`` some, by their shown names) are
    hashed, and large objects too. A locked table is waited for as in the dump itself; an unreadable one
    is a warning if ``lenient``.
    """
    pin(session)
    tables = {
        relation.shown: Table(None, relation.estimated_rows)
        for relation in found
        if rows and relation.kind != "S"
    }
    wanted = [
        relation
        for relation in found
        if rows and relation.kind == "r" and relation.shown not in excluded
        if only is None or relation.shown in only
    ]
    for relation in wanted:
        try:
            measured = exported_snapshot.when_free(
                session, relation.shown, functools.partial(measure, session, relation)
            )
        except Refused as error:
            if not lenient:
                raise
            LOGGER.warning("the rows of %s were not hashed: %s", relation.shown, error.text)
        else:
            tables[relation.shown] = measured
    for relation in exported_snapshot.replaced(
        session, [item for item in wanted if tables[item.shown].rows is not None]
    ):
        tables[relation.shown] = Table(None, relation.estimated_rows)

    def known(what: str, read: Callable[[Session], Result], otherwise: Result) -> Result:
        if not lenient:
            return read(session)
        return exported_snapshot.leniently(session, what, lambda: read(session), otherwise)

    return Contents(
        tables,
        known("the position of the sequences", lambda inside: sequences(inside, found), {}),
        known("the content of large objects", large_objects, "") if rows else "",
    )


class _Hashing:
    """The destination of hashed rows: psycopg2 writes one at a time."""

    total = 0

    def write(self, data: bytes) -> int:
        digest = hashlib.blake2b(data, digest_size=8, usedforsecurity=False).digest()
        self.total = (self.total + int.from_bytes(digest, "big")) % 2**64
        return len(data)


def measure(session: Session, relation: Relation) -> Table:
    """Count and hash a table's own rows in the session's transaction; raises QueryFailed."""
    sink = _Hashing()
    columns = ", ".join(row[0] for row in session.query(_COLUMNS, [relation.oid]))
    rows = exported_snapshot.copied(session, relation, columns, sink)
    return Table(rows, relation.estimated_rows, f"{sink.total:016x}")


def sequences(session: Session, found: Iterable[Relation]) -> dict[str, Value]:
    """Read the current values of the sequences, in the session's transaction, whose snapshot does not cover
    them.

    By oid, because a name may belong to a view by now. An unused one is identified by its start. Raises
    QueryFailed and LockedOut.
    """
    names = {item.oid: item for item in found if item.kind == "S"}
    if not names:
        return {}
    rows = exported_snapshot.by_oid(session, _SEQUENCES, names)
    return {names[oid].shown: (value, called) for oid, value, called in rows}


def sequences_now(session: Session, found: Iterable[Relation]) -> dict[str, Value]:
    """Read the current values of sequences, in a separate transaction; raises QueryFailed and LockedOut."""
    session.query("BEGIN READ ONLY")
    try:
        session.query("SET LOCAL lock_timeout = '1s'")
        return sequences(session, found)
    finally:
        if not session.closed:
            session.query("ROLLBACK")


def large_objects(session: Session) -> str:
    """Return the number of large objects and one hash over them, ``""`` if one is too big; raises
    QueryFailed.
    """
    try:
        with exported_snapshot.savepoint(session):
            return str(exported_snapshot.interruptibly(session, lambda: session.value(_LARGE_OBJECTS)))
    except Refused as error:
        if error.sqlstate not in _TOO_BIG:
            raise
        return ""


def schema(session: Session) -> tuple[str, ...]:
    """Return the schema as sorted lines."""
    return tuple(sorted(row[0] for row in session.query(_SCHEMA)))
