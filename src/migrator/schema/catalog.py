"""The live schema: thin queries over the system catalogs.

There are few statements for any number of tables, because they also run in an up-to-date database.
Names have the form ``schema.name``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from migrator.postgres.queries import IN_USER_SCHEMA, INVALID_INDEXES, of_no_extension
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session
from migrator.schema.names import ForeignKey, canonical_type


@dataclass(frozen=True)
class Index:
    """An index that is not valid, and the table that it is on."""

    schema: str
    name: str
    table: str
    unique: bool
    oid: int

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def remedy(self) -> str:
        """Return the SQL that makes it valid, or drops it."""
        name = f"{quote_identifier(self.schema)}.{quote_identifier(self.name)}"
        drop = f"DROP INDEX CONCURRENTLY {name};"
        if re.search(r"_cc(new|old)\d*$", self.name):
            return f"it is left over from a REINDEX CONCURRENTLY that failed: {drop}"
        rebuild = f"REINDEX INDEX CONCURRENTLY {name};"
        if self.unique:
            rebuild = f"remove the duplicate rows, then {rebuild}"
        return f"{rebuild} or, if it is not needed, {drop}"


@dataclass(frozen=True)
class Constraint:
    """A constraint that is NOT VALID, on a table or (``kind`` is ``DOMAIN``) a domain."""

    schema: str
    owner: str
    name: str
    kind: str = "TABLE"

    def __str__(self) -> str:
        return f"{self.schema}.{self.owner}.{self.name}"


@dataclass(frozen=True)
class Column:
    """A column: its type as ``format_type()`` prints it, and in every accepted spelling."""

    type: str
    not_null: bool
    spellings: frozenset[str]


@dataclass
class Table:
    """A table, view or foreign table: its columns, indexes (name to validity), foreign keys and primary key."""

    columns: dict[str, Column] = field(default_factory=dict)
    indexes: dict[str, bool] = field(default_factory=dict)
    foreign_keys: list[ForeignKey] = field(default_factory=list)
    primary_key: tuple[str, ...] | None = None


_NAMED_INDEXES = f"""
SELECT n.nspname::text, c.relname::text, t.relname::text, i.indisunique, c.oid::bigint
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE i.indisvalid AND c.relkind = 'i' AND c.relname = ANY(%s)
  AND {IN_USER_SCHEMA}
  AND NOT EXISTS (SELECT 1 FROM pg_constraint k WHERE k.conindid = c.oid)
ORDER BY 1, 2
"""  # noqa: S608 - constants only


def invalid_indexes(session: Session) -> tuple[Index, ...]:
    """Return the indexes that Postgres maintains but does not use: a failed concurrent build leaves them.

    Indexes that another session is building (or dropping) are excluded. A build holds
    ShareUpdateExclusiveLock on the table and has a row in pg_stat_progress_create_index, whose pid
    everyone may read. So a VACUUM or ANALYZE with the same lock hides nothing. A drop, and REINDEX
    CONCURRENTLY, holds that lock on the index too. Partitioned indexes are excluded: they are invalid
    until every partition has its index.
    """
    rows = session.query(INVALID_INDEXES)
    return tuple(Index(*row) for row in rows)


def indexes_named(session: Session, names: Iterable[str]) -> tuple[Index, ...]:
    """Return the valid indexes with these names in any schema, except those of a constraint."""
    rows = session.query(_NAMED_INDEXES, (sorted(names),))
    return tuple(Index(*row) for row in rows)


def constraints_not_valid(session: Session) -> tuple[Constraint, ...]:
    """Return the constraints with unchecked existing rows.

    Constraints that follow from another one (a partition's, a child table's) are excluded. So are those
    that are NOT ENFORCED (PostgreSQL 18), which are never valid.
    """
    rows = session.query(_NOT_VALID)
    return tuple(Constraint(*row) for row in rows)


def not_valid_constraints(session: Session) -> frozenset[str]:
    """Return them as ``schema.table.constraint``."""
    return frozenset(str(constraint) for constraint in constraints_not_valid(session))


def describe(session: Session, wanted: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], Table]:
    """Return the existing ones of the ``wanted`` tables (schema and name), in three statements."""
    pairs = sorted(set(wanted))
    if not pairs:
        return {}
    parameters = ([schema for schema, _ in pairs], [name for _, name in pairs])
    tables: dict[tuple[str, str], Table] = {}
    near = session.user_schemas()
    for schema, name, column, type_name, type_schema, not_null in session.query(_COLUMNS, parameters):
        table = tables.setdefault((schema, name), Table())
        if column is not None:
            bare = type_name.removeprefix(f"{type_schema}.")
            seen = type_schema.strip('"') in near  # the schema of such a type may be omitted
            spellings = _spellings(
                bare, type_schema, bare=seen or type_schema.strip('"') in ("public", schema)
            )
            table.columns[column] = Column(bare if seen else type_name, not_null, spellings)
    for schema, name, index, valid in session.query(_INDEXES, parameters):
        tables.setdefault((schema, name), Table()).indexes[index] = valid
    for schema, name, kind, columns, other_schema, other, references in session.query(_KEYS, parameters):
        table = tables.setdefault((schema, name), Table())
        if kind == "p":
            table.primary_key = tuple(columns)
        else:
            key = ForeignKey(tuple(columns), other_schema, other, tuple(references))
            table.foreign_keys.append(key)
    return tables


def _spellings(type_name: str, type_schema: str, *, bare: bool) -> frozenset[str]:
    """Return the canonical spellings of a type.

    With its schema it is always accepted. Without it (``bare``) it is accepted if the schema is on the
    user's search_path, which a role's settings may change, or is ``public``, or the table's own.
    """
    found = {type_name} if bare or type_schema == "pg_catalog" else set()
    if type_schema != "pg_catalog":
        found.add(f"{type_schema}.{type_name}")
    return frozenset(canonical_type(name) for name in found)


def user_tables(session: Session) -> tuple[str, ...]:
    """Return the tables outside the system's schemas that no extension owns, as ``schema.table``."""
    rows = session.query(_USER_TABLES)
    return tuple(str(row[0]) for row in rows)


_NOT_VALID = f"""
SELECT n.nspname, coalesce(r.relname, t.typname), c.conname,
       CASE WHEN c.conrelid = 0 THEN 'DOMAIN' ELSE 'TABLE' END
  FROM pg_constraint c
  JOIN pg_namespace n ON n.oid = c.connamespace
  LEFT JOIN pg_class r ON r.oid = c.conrelid
  LEFT JOIN pg_type t ON t.oid = c.contypid
 WHERE NOT c.convalidated
   AND {IN_USER_SCHEMA}
   AND coalesce((to_jsonb(c) ->> 'conenforced')::boolean, true)
   AND NOT EXISTS (SELECT FROM pg_constraint p WHERE p.oid = c.conparentid AND NOT p.convalidated)
   AND NOT EXISTS (
       SELECT FROM pg_inherits h
         JOIN pg_constraint p ON p.conrelid = h.inhparent AND p.conname = c.conname AND p.contype = c.contype
        WHERE h.inhrelid = c.conrelid AND NOT c.conislocal AND NOT p.convalidated)
 ORDER BY 1, 2, 3
"""  # noqa: S608 - constants only
_USER_TABLES = f"""
SELECT n.nspname || '.' || c.relname
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'f')
   AND {IN_USER_SCHEMA} AND {of_no_extension("pg_class", "c")}
 ORDER BY 1
"""  # noqa: S608 - constants only
_WANTED = """  FROM unnest(%s::text[], %s::text[]) AS w (nspname, relname)
  JOIN pg_namespace n ON n.nspname = w.nspname
  JOIN pg_class r ON r.relnamespace = n.oid AND r.relname = w.relname"""
# Tables, partitioned tables, foreign tables, views and materialised views: relations with columns.
_COLUMNS = f"""
SELECT n.nspname, r.relname, a.attname, format_type(a.atttypid, a.atttypmod), quote_ident(tn.nspname),
       a.attnotnull
{_WANTED}
   AND r.relkind IN ('r', 'p', 'f', 'v', 'm')
  LEFT JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_namespace tn ON tn.oid = t.typnamespace
"""
_INDEXES = f"""
SELECT n.nspname, r.relname, i.relname, x.indisvalid
{_WANTED}
  JOIN pg_index x ON x.indrelid = r.oid
  JOIN pg_class i ON i.oid = x.indexrelid
"""
_KEYS = f"""
SELECT n.nspname, r.relname, c.contype::text,
       (SELECT array_agg(a.attname::text ORDER BY k.position)
          FROM unnest(c.conkey) WITH ORDINALITY AS k (attnum, position)
          JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.attnum),
       fn.nspname, f.relname,
       (SELECT array_agg(a.attname::text ORDER BY k.position)
          FROM unnest(c.confkey) WITH ORDINALITY AS k (attnum, position)
          JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.attnum)
{_WANTED}
  JOIN pg_constraint c ON c.conrelid = r.oid AND c.contype IN ('f', 'p')
  LEFT JOIN pg_class f ON f.oid = c.confrelid
  LEFT JOIN pg_namespace fn ON fn.oid = f.relnamespace
"""  # noqa: S608 - constants only
