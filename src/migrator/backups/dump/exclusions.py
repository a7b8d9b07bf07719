"""Tables with rows excluded from a backup: MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA, matched with existing tables.

pg_dump has its own patterns, and does not report their matches. migrator matches its patterns itself,
and gives pg_dump the full name of each table. So the manifest names exactly those tables whose rows are
not in the dump.
"""

from __future__ import annotations

from collections.abc import Sequence

from migrator.backups.exported_snapshot import Relation
from migrator.postgres.session import Session
from migrator.schema.patterns import Pattern

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
