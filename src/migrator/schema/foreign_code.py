"""Other roles' code that a superuser would run with a query that others may have prepared.

A view's functions run as its reader. During planning, functions also run in a table's indexes, extended
statistics, partition keys and virtual columns. The words in a query tell which relations it reads,
before the server sees it. Names that are put together while it runs are not found. A query does not
name the function of a cast, of a range's statistics, or an operator behind LIKE, IN and others: if
other roles own such functions, they always count.
"""

from __future__ import annotations

import re

from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session

_FOUND = """
WITH RECURSIVE others AS (
  SELECT oid, rolname FROM pg_roles
   WHERE NOT rolsuper AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
),
unnamed AS (
  SELECT castfunc AS oid FROM pg_cast UNION ALL SELECT rngsubdiff FROM pg_range
  UNION ALL SELECT rngcanonical FROM pg_range
),
code AS (
  SELECT 'pg_proc'::regclass AS class, oid FROM pg_proc WHERE proowner IN (SELECT oid FROM others)
  UNION ALL SELECT 'pg_operator'::regclass, oid FROM pg_operator WHERE oprowner IN (SELECT oid FROM others)
  UNION ALL SELECT 'pg_type'::regclass, oid FROM pg_type
             WHERE typtype = 'd' AND typowner IN (SELECT oid FROM others)
),
tree AS (
  SELECT oid FROM pg_class WHERE relname = ANY(%(words)s::text[]) AND relkind IN ('r', 'p', 'v', 'm', 'f')
  UNION SELECT below FROM tree JOIN (
    SELECT inhparent AS above, inhrelid AS below FROM pg_inherits
    UNION ALL SELECT ev_class, refobjid FROM pg_rewrite r JOIN pg_depend d ON d.objid = r.oid
               WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
  ) AS reads ON oid = above
),
planned AS (
  SELECT oid AS relation, 'pg_class'::regclass AS class, oid FROM tree
  UNION ALL SELECT indrelid, 'pg_class'::regclass, indexrelid FROM pg_index JOIN tree ON oid = indrelid
  UNION ALL SELECT stxrelid, 'pg_statistic_ext'::regclass, s.oid FROM pg_statistic_ext s JOIN tree t ON t.oid = stxrelid
  UNION ALL SELECT adrelid, 'pg_attrdef'::regclass, d.oid FROM pg_attrdef d JOIN tree t ON t.oid = adrelid
              JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum AND attgenerated = 'v'
)
SELECT CASE relkind WHEN 'v' THEN 'view' WHEN 'f' THEN 'foreign table' ELSE 'table' END, nspname::text, relname::text,
       rolname::text,
       relkind IN ('v', 'f') OR EXISTS (
         SELECT FROM planned p JOIN pg_depend d ON d.classid = p.class AND d.objid = p.oid AND d.objsubid = 0
           JOIN code ON code.class = d.refclassid AND code.oid = d.refobjid WHERE p.relation = c.oid)
  FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = relnamespace JOIN others o ON o.oid = relowner
UNION ALL
SELECT 'function', nspname::text, proname::text, rolname::text, true
  FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace JOIN others o ON o.oid = proowner
 WHERE proname = ANY(%(words)s::text[]) OR p.oid IN (SELECT oid FROM unnamed)
UNION ALL
SELECT 'domain', nspname::text, typname::text, rolname::text, true
  FROM pg_type JOIN pg_namespace n ON n.oid = typnamespace JOIN others o ON o.oid = typowner
 WHERE typtype = 'd' AND typname = ANY(%(words)s::text[])
UNION ALL
SELECT 'operator', nspname::text, oprname::text, rolname::text, true
  FROM pg_operator JOIN pg_namespace n ON n.oid = oprnamespace JOIN others o ON o.oid = oprowner
 WHERE strpos(%(sql)s, oprname) > 0 OR oprname IN ('=', '<>', '<', '<=', '>', '>=', '~', '~~', '!~~', '~~*', '!~~*')
"""
_VIEWS = (
    "SELECT count(*) FROM pg_class WHERE relkind IN ('v', 'f') AND oid >= 16384 AND relname = ANY(%s::text[])"
)


def words(sql: str) -> list[str]:
    """Return every word of a query that may be a name."""
    plain = re.findall(r"[^\W\d][\w$]*", sql)
    quoted = [name.replace('""', '"') for name in re.findall(r'"((?:[^"]|"")+)"', sql)]
    return sorted({*plain, *(word.lower() for word in plain), *quoted})


def code_in(session: Session, sql: str) -> list[str]:
    """Return other roles' code that a superuser's query would run; nothing if the session's role is not a
    superuser.

    The tables are locked first (ACCESS SHARE, in the session's transaction), so that they do not
    change.
    """
    asked = {"words": words(sql), "sql": sql}
    found = session.query(_FOUND, asked)
    tables = sorted({(schema, name) for _, schema, name, _, runs in found if not runs})
    if tables:
        listed = ", ".join(
            f"ONLY {quote_identifier(schema)}.{quote_identifier(name)}" for schema, name in tables
        )
        session.query(f"LOCK TABLE {listed} IN ACCESS SHARE MODE")
        found = session.query(_FOUND, asked)
    return sorted({f"{kind} {schema}.{name} of {role}" for kind, schema, name, role, runs in found if runs})


def names_views(session: Session, sql: str) -> bool:
    """Tell whether a query may read a view or a foreign table that is not the system's."""
    return bool(session.value(_VIEWS, [words(sql)]))
