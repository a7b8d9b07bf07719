"""Queries on the system catalogs: the content of the database, and the invalid indexes (for the up-to-date
check too).
"""

from __future__ import annotations

LEDGER = "migrator_ledger"

IN_USER_SCHEMA = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
"""Whether a namespace ``n`` is a user's: Postgres keeps names that begin with pg_ for its own."""


def of_no_extension(catalog: str, alias: str) -> str:
    """Return whether an object belongs to no extension: found through the extensions, which are few."""
    return f"""{alias}.oid NOT IN (SELECT d.objid FROM pg_depend d
                   WHERE d.refclassid = 'pg_extension'::regclass AND d.classid = '{catalog}'::regclass
                   AND d.deptype = 'e')"""  # noqa: S608 - constants only


CONTENTS = f"""
SELECT count(*) FILTER (WHERE c.relkind IN ('r', 'p', 'f', 'm')) AS tables,
       count(*)
       + (SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
          WHERE {IN_USER_SCHEMA} AND {of_no_extension("pg_proc", "p")})
       + (SELECT count(*) FROM pg_largeobject_metadata) AS objects
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'f', 'm', 'v', 'S') AND {IN_USER_SCHEMA} AND {of_no_extension("pg_class", "c")}
  AND c.relname <> '{LEDGER}'
  AND NOT (c.relnatts = 1 AND EXISTS (SELECT 1 FROM pg_attribute a JOIN pg_index i ON i.indrelid = a.attrelid
                  WHERE a.attrelid = c.oid AND a.attname = 'version_num' AND i.indisprimary OFFSET 0))
"""  # noqa: S608 - constants only
"""Tables outside of extensions, and all objects that could be lost; version table and ledger do not count."""

INVALID_INDEXES = f"""
SELECT n.nspname, i.relname, t.relname, x.indisunique, x.indexrelid::bigint
  FROM pg_index x
  JOIN pg_class i ON i.oid = x.indexrelid
  JOIN pg_class t ON t.oid = x.indrelid
  JOIN pg_namespace n ON n.oid = i.relnamespace
 WHERE NOT x.indisvalid AND i.relkind = 'i'
   AND {IN_USER_SCHEMA}
   AND NOT EXISTS (
       SELECT FROM pg_locks l
        WHERE l.locktype = 'relation' AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND l.pid <> pg_backend_pid()
          AND (l.relation = x.indexrelid
               OR l.relation = x.indrelid AND l.pid IN (SELECT pid FROM pg_stat_progress_create_index)))
 ORDER BY 1, 2
"""  # noqa: S608 - constants only
