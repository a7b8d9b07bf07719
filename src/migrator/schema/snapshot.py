"""A snapshot of the live schema, in a form in which two of them can be compared, and their differences.

One statement reads it, on a session of ours with a search_path that prints every name with its schema.
The server writes one sorted JSON text. Two texts are compared first, and split only if they differ.
Expressions and bodies (defaults, checks, index and view definitions, functions, policies) are kept as a
hash: a snapshot is stored in the ledger, and such a text may hold a secret. To print them, Postgres
locks their tables as a SELECT does.

Excluded are: objects of extensions; properties that are not schema (owners, grants, comments, storage
parameters, statistics targets, whether a materialised view is populated); invalid indexes (they have
their own finding); the ledger itself; and partitions, which their users create and drop on a schedule,
with their parent's columns.
"""

from __future__ import annotations

import base64
import functools
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from migrator.postgres.errors import Refused
from migrator.postgres.queries import IN_USER_SCHEMA, LEDGER
from migrator.postgres.session import Session
from migrator.postgres.version_table import read_all
from migrator.schema.names import split_formatted


class Item(NamedTuple):
    """One item of the schema.

    ``relation`` is its own table (or view, or sequence), or the one it belongs to; empty if there is
    none. ``attributes`` are for people, ``definition`` is the hash of the rest.
    """

    kind: str
    relation: str
    name: str
    attributes: str
    definition: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the key that identifies an item in two snapshots."""
        return self.kind, self.relation, self.name

    @property
    def is_relation(self) -> bool:
        """Tell whether other items are parts of it."""
        return self.relation == self.name

    def __str__(self) -> str:
        if self.kind == "column":
            return f"column {self.relation}.{self.name}"
        named_in_full = (
            self.kind in {"index", "sequence", "statistics"} or not self.relation or self.is_relation
        )
        return f"{self.kind} {self.name}" + ("" if named_in_full else f" of {self.relation}")


@dataclass(frozen=True)
class Snapshot:
    """A schema at one moment, with its place and its revisions.

    ``text`` is a JSON array with one array for each item. ``versions`` are the rows of every version
    table. ``place`` distinguishes a database from a restored copy of it, in which Postgres may print
    the same definitions differently. ``hidden`` are the schemas with a version table that the role may
    not read: they belong to another application.
    """

    text: str
    versions: Mapping[str, tuple[str, ...]]
    major: int
    place: tuple[int | None, ...]
    hidden: frozenset[str] = frozenset()

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """Return the items in the text; raises :class:`Unreadable`."""
        try:
            return tuple(Item(*map(str, item)) for item in json.loads(self.text))
        except (TypeError, ValueError) as error:
            raise Unreadable(f"it is damaged: {error}") from error

    def pack(self) -> dict[str, Any]:
        """Return it as JSON-ready data, a tenth of its size."""
        return {
            "format": _FORMAT,
            "major": self.major,
            "place": list(self.place),
            "versions": dict(self.versions),
            "hidden": sorted(self.hidden),
            "items": base64.b64encode(
                zlib.compress(self.text.encode("utf-8", "surrogateescape"), 1)
            ).decode(),
        }


class Unreadable(ValueError):
    """A packed snapshot cannot be unpacked: it is damaged, or from a later migrator."""


def unpack(data: Mapping[str, Any]) -> Snapshot:
    """Unpack a snapshot; raises :class:`Unreadable`."""
    try:
        if data["format"] != _FORMAT:
            raise Unreadable(f"it has the format {data['format']}, which this migrator does not know")
        unzipped = zlib.decompressobj()
        text = unzipped.decompress(base64.b64decode(data["items"]), _LARGEST)
        if not unzipped.eof:
            raise Unreadable("it is too large for a schema, or cut off")
        return Snapshot(
            text.decode("utf-8", "surrogateescape"),
            {str(name): tuple(map(str, rows)) for name, rows in data["versions"].items()},
            int(data["major"]),
            tuple(data["place"]),
            frozenset(map(str, data["hidden"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"it is damaged: {error}") from error


_FORMAT = 1
_LARGEST = 256_000_000  # bytes: some 500,000 tables
_ATTEMPTS = 3
_PASSING = frozenset({"55P03", "XX000", "42P01", "42704", "40001"})
"""SQLSTATEs of a catalog that others change meanwhile: a lock, "cache lookup failed", a dropped object."""


def take(session: Session, beside: str) -> Snapshot:
    """Read the live schema; ``beside`` is the quoted name of the ledger.  Raises QueryFailed."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return _take(session, beside)
        except Refused as error:
            if error.sqlstate not in _PASSING:
                raise
            time.sleep(0.2)
    return _take(session, beside)


def _take(session: Session, beside: str) -> Snapshot:
    session.query(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
        " SET LOCAL lock_timeout = '2s'; SET LOCAL quote_all_identifiers = off; SET LOCAL jit = off"
    )
    try:
        versions, hidden = read_all(session)
        place = session.query(_PLACE, (beside,))[0]
        return Snapshot(session.value(_TEXT), versions, session.facts.major, tuple(place), hidden)
    finally:
        if not session.closed:
            session.query("ROLLBACK")


_PLACE = """
SELECT oid::bigint, to_regclass(%s)::oid::bigint FROM pg_database WHERE datname = current_database()
"""


def _hash(text: str) -> str:
    return f'hashtextextended({text} COLLATE "C", 0)::text'  # md5() is missing on FIPS systems


# Aggregates have no definition as a text.
_FUNCTION = "CASE prokind WHEN 'a' THEN pg_get_function_arguments(p.oid) ELSE pg_get_functiondef(p.oid) END"
_POLICY = (
    "concat_ws(' ', (SELECT string_agg(pg_get_userbyid(role), ', ' ORDER BY 1) FROM unnest(polroles) AS role),"
    " pg_get_expr(polqual, polrelid), 'check', pg_get_expr(polwithcheck, polrelid))"
)
_QUERY = f"""
WITH owned AS (
  SELECT classid, objid FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'
),
mine AS (
  SELECT oid, nspname FROM pg_namespace n
   WHERE {IN_USER_SCHEMA}
     AND (oid, 'pg_namespace'::regclass) NOT IN (SELECT objid, classid FROM owned)
),
relations AS (
  SELECT format('%I.%I', nspname, relname) AS name, c.* FROM pg_class c JOIN mine ON mine.oid = relnamespace
   WHERE (c.oid, 'pg_class'::regclass) NOT IN (SELECT objid, classid FROM owned)
     AND relpersistence <> 't' AND NOT relispartition AND relname <> '{LEDGER}'
)
SELECT relkind::text, name, name,
       concat_ws(', ', CASE WHEN relkind = 'p' THEN 'partitioned by ' || pg_get_partkeydef(oid) END,
                 CASE WHEN relpersistence = 'u' THEN 'unlogged' END,
                 CASE WHEN relrowsecurity THEN 'row level security' END,
                 CASE WHEN relforcerowsecurity THEN 'forced row level security' END),
       CASE WHEN relkind IN ('v', 'm') THEN
         {_hash("pg_get_viewdef(r.oid)")} END
  FROM relations r WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c')
UNION ALL
SELECT 'column', name, quote_ident(attname),
       concat_ws(' ', format_type(atttypid, atttypmod),
                 CASE WHEN attcollation <> typcollation THEN
                   'collate ' || (SELECT quote_ident(collname) FROM pg_collation WHERE oid = attcollation) END,
                 CASE WHEN attnotnull THEN 'not null' END,
                 CASE attidentity WHEN 'a' THEN 'identity' WHEN 'd' THEN 'identity by default' END,
                 CASE WHEN attgenerated <> '' THEN 'generated' WHEN atthasdef THEN 'default' END),
       (SELECT {_hash("pg_get_expr(adbin, adrelid)")} FROM pg_attrdef d WHERE adrelid = attrelid AND adnum = attnum)
  FROM relations r JOIN pg_attribute a ON attrelid = r.oid JOIN pg_type t ON t.oid = atttypid
 WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'c') AND attnum > 0 AND NOT attisdropped
UNION ALL
SELECT CASE WHEN conrelid = 0 THEN 'domain constraint' ELSE 'constraint' END,
       coalesce(name, format_type(contypid, NULL)), quote_ident(conname),
       concat_ws(' ', CASE contype WHEN 'c' THEN 'check' WHEN 'f' THEN 'foreign key' WHEN 'p' THEN 'primary key'
                                   WHEN 'u' THEN 'unique' WHEN 'x' THEN 'exclude' ELSE contype::text END,
                 CASE WHEN NOT convalidated THEN 'not valid' END),
       {_hash("pg_get_constraintdef(k.oid)")}
  FROM pg_constraint k JOIN mine ON mine.oid = connamespace LEFT JOIN relations r ON r.oid = conrelid
 WHERE conparentid = 0 AND contype NOT IN ('n', 't') AND (conrelid = 0 OR name IS NOT NULL)
   AND (contypid, 'pg_type'::regclass) NOT IN (SELECT objid, classid FROM owned)
UNION ALL
SELECT 'index', r.name, i.name, concat_ws(' ', CASE WHEN indisunique THEN 'unique' END, 'on', r.name),
       {_hash("pg_get_indexdef(indexrelid)")}
  FROM pg_index x JOIN relations r ON r.oid = indrelid JOIN relations i ON i.oid = indexrelid
 WHERE (indisvalid OR i.relkind = 'I')
   AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.indexrelid AND k.conrelid = x.indrelid
                   AND k.contype IN ('p', 'u', 'x'))
UNION ALL
SELECT 'trigger', name, quote_ident(tgname),
       CASE tgenabled WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'on replicas' WHEN 'A' THEN 'always' ELSE 'enabled' END,
       {_hash("pg_get_triggerdef(g.oid)")}
  FROM pg_trigger g JOIN relations r ON r.oid = tgrelid
 WHERE NOT tgisinternal AND coalesce(to_jsonb(g) ->> 'tgparentid', '0') = '0'
UNION ALL
SELECT 'rule', name, quote_ident(rulename), '', {_hash("pg_get_ruledef(w.oid)")}
  FROM pg_rewrite w JOIN relations r ON r.oid = ev_class WHERE rulename <> '_RETURN'
UNION ALL
SELECT 'policy', name, quote_ident(polname),
       concat_ws(' ', CASE WHEN polpermissive THEN 'permissive' ELSE 'restrictive' END, 'for',
                 CASE polcmd WHEN 'r' THEN 'select' WHEN 'a' THEN 'insert' WHEN 'w' THEN 'update'
                             WHEN 'd' THEN 'delete' ELSE 'all' END),
       {_hash(_POLICY)}
  FROM pg_policy p JOIN relations r ON r.oid = polrelid
UNION ALL
SELECT 'statistics', name, format('%I.%I', mine.nspname, stxname), '',
       {_hash("pg_get_statisticsobjdef(s.oid)")}
  FROM pg_statistic_ext s JOIN mine ON mine.oid = stxnamespace JOIN relations r ON r.oid = stxrelid
UNION ALL
SELECT CASE prokind WHEN 'p' THEN 'procedure' WHEN 'a' THEN 'aggregate' ELSE 'function' END, '',
       format('%I.%I(%s)', nspname, proname, pg_get_function_identity_arguments(p.oid)),
       concat_ws(' ', 'returns ' || format_type(prorettype, NULL), CASE WHEN prosecdef THEN 'security definer' END),
       {_hash(_FUNCTION)}
  FROM pg_proc p JOIN mine ON mine.oid = pronamespace
 WHERE (p.oid, 'pg_proc'::regclass) NOT IN (SELECT objid, classid FROM owned)
UNION ALL
SELECT CASE typtype WHEN 'd' THEN 'domain' ELSE 'type' END, '', format('%I.%I', nspname, typname),
       concat_ws(' ', CASE WHEN typtype = 'd' THEN format_type(typbasetype, typtypmod) END,
                 CASE WHEN typnotnull THEN 'not null' END,
                 (SELECT string_agg(quote_literal(enumlabel), ', ' ORDER BY enumsortorder)
                    FROM pg_enum WHERE enumtypid = t.oid)),
       {_hash("concat(typdefault, typcollation::text)")}
  FROM pg_type t JOIN mine ON mine.oid = typnamespace
 WHERE typtype IN ('d', 'e', 'r') AND (t.oid, 'pg_type'::regclass) NOT IN (SELECT objid, classid FROM owned)
UNION ALL
SELECT relkind::text,
       coalesce((SELECT o.name FROM pg_depend d JOIN relations o ON o.oid = d.refobjid
                  WHERE d.classid = 'pg_class'::regclass AND d.objid = r.oid AND d.deptype IN ('a', 'i')
                    AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 LIMIT 1), name), name,
       concat_ws(' ', format_type(seqtypid, NULL), 'start', seqstart, 'increment', seqincrement, 'from', seqmin,
                 'to', seqmax, CASE WHEN seqcycle THEN 'cycle' END), ''
  FROM pg_sequence JOIN relations r ON r.oid = seqrelid
UNION ALL
SELECT 'schema', '', quote_ident(nspname), '', '' FROM mine
UNION ALL
SELECT 'extension', '', quote_ident(extname), '', '' FROM pg_extension
"""  # noqa: S608 - constants only
_TEXT = f"""
SELECT '[' || coalesce(string_agg(line, ',' ORDER BY line COLLATE "C"), '') || ']'
  FROM (SELECT json_build_array(
                 CASE kind WHEN 'r' THEN 'table' WHEN 'p' THEN 'table' WHEN 'v' THEN 'view'
                           WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'c' THEN 'type'
                           WHEN 'S' THEN 'sequence' ELSE kind END,
                 coalesce(relation, ''), coalesce(name, ''), coalesce(attributes, ''), coalesce(definition, ''))::text
          FROM ({_QUERY}) AS found (kind, relation, name, attributes, definition)) AS lines (line)
"""  # noqa: S608 - constants only


class Difference(NamedTuple):
    """One difference: it is gone (``after`` is None), is new (``before`` is None), or has changed."""

    before: Item | None
    after: Item | None

    @property
    def item(self) -> Item:
        """Return the item of the difference."""
        if self.after is not None:
            return self.after
        if self.before is None:
            raise ValueError("a difference between nothing and nothing")
        return self.before

    @property
    def sentence(self) -> str:
        attributes = self.item.attributes
        if self.after is None:
            return "it is gone" + (f"; it was {attributes}" if attributes else "")
        if self.before is None:
            return "it was not there" + (f"; it is {attributes}" if attributes else "")
        if self.before.attributes != attributes:
            return f"it is {attributes or 'plain'} and was {self.before.attributes or 'plain'}"
        return "its definition changed"


def differences(before: Snapshot, after: Snapshot) -> tuple[Difference, ...]:
    """Compare two snapshots; parts of a table that is gone, or new, are not listed.

    Definitions are compared only if both are from the same database and major version: otherwise
    Postgres may print the same definition differently. Schemas of another application are ignored.
    """
    if before.text == after.text:
        return ()
    exact = before.place == after.place and None not in before.place and before.major == after.major
    hidden = before.hidden | after.hidden
    old, new = (
        {item.key: item for item in snapshot.items if not hidden or schema_of(item) not in hidden}
        for snapshot in (before, after)
    )
    gone = [item for key, item in old.items() if key not in new]
    came = [item for key, item in new.items() if key not in old]
    changed = [
        Difference(item, new[key])
        for key, item in old.items()
        if key in new and _differ(item, new[key], exact)
    ]
    found = [
        *(Difference(item, None) for item in _whole(gone)),
        *changed,
        *(Difference(None, item) for item in _whole(came)),
    ]
    return tuple(found)


def schema_of(item: Item) -> str:
    """Return the schema of an item, or its own name for a schema; empty for an extension."""
    return "" if item.kind == "extension" else split_formatted(item.relation or item.name)[0]


def _differ(one: Item, other: Item, exact: bool) -> bool:
    return one.attributes != other.attributes or (exact and one.definition != other.definition)


def _whole(items: Sequence[Item]) -> list[Item]:
    relations = {item.relation for item in items if item.is_relation}
    return [item for item in items if item.is_relation or item.relation not in relations]
