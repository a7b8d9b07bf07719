"""What a database holds, in one query: how many tables, how much that could be lost, and its size."""

from __future__ import annotations

_SYSTEM = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"

_OURS = """NOT EXISTS (SELECT 1 FROM pg_depend d
                   WHERE d.classid = '{0}'::regclass AND d.objid = {1}.oid AND d.deptype = 'e')"""

CONTENTS = f"""
SELECT count(*) FILTER (WHERE c.relkind IN ('r', 'p', 'f', 'm')),
       count(*)
       + (SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
          WHERE {_SYSTEM} AND {_OURS.format("pg_proc", "p")})
       + (SELECT count(*) FROM pg_largeobject_metadata),
       pg_database_size(current_database())
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'f', 'm', 'v', 'S') AND {_SYSTEM} AND {_OURS.format("pg_class", "c")}
  AND c.relname <> 'migrator_ledger'
  AND NOT EXISTS (SELECT 1 FROM pg_attribute a JOIN pg_index i ON i.indrelid = a.attrelid
                  WHERE a.attrelid = c.oid AND a.attname = 'version_num' AND i.indisprimary AND c.relnatts = 1)
"""  # noqa: S608 - constants only
"""Tables that no extension owns, all that could be lost, and the size; version table and ledger count as neither."""
