"""Extensions: where a database is restored from within they stay as they are, for their owner is seldom its owner.

Their schemas and their grants stay with them.  What users keep in an extension's configuration tables is dumped like
any other rows (https://www.postgresql.org/docs/current/extend-extensions.html#EXTEND-EXTENSIONS-CONFIG-TABLES), so
those rows go before the backup's come.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from migrator.postgres.session import Session, as_typed

STAYS = """
EXISTS (SELECT FROM pg_extension e WHERE e.extnamespace = n.oid)
OR EXISTS (SELECT FROM pg_depend m JOIN pg_depend s USING (classid, objid)
            WHERE m.deptype = 'e' AND s.refclassid = 'pg_namespace'::regclass AND s.refobjid = n.oid)
OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_namespace'::regclass AND d.objid = n.oid AND d.deptype = 'e')
"""
"""Whether a schema ``n`` cannot be dropped without an extension: it has its objects, or is one itself."""

_SCHEMAS = f"""
SELECT nspname::text FROM pg_namespace n WHERE nspname <> 'public' AND ({STAYS})
"""  # noqa: S608 - a constant
_ROLES = "SELECT rolname::text, pg_has_role(oid, 'USAGE') FROM pg_roles"
_KEPT_BY_USERS = """
SELECT c.oid::bigint, n.nspname::text, c.relname::text, has_schema_privilege(n.oid, 'USAGE') AND CASE c.relkind
         WHEN 'S' THEN has_sequence_privilege(c.oid, 'UPDATE')
         ELSE has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
              AND has_table_privilege(c.oid, 'DELETE') END
  FROM pg_extension, unnest(extconfig) AS k (oid) JOIN pg_class c USING (oid)
  JOIN pg_namespace n ON n.oid = relnamespace
"""
# In one statement: foreign keys between them are looked at when all of it is done.
_DELETE = """
DO $migrator$
BEGIN
  PERFORM set_config('row_security', 'off', true);
  EXECUTE (
    SELECT 'WITH ' || string_agg(format('d%s AS (DELETE FROM ONLY %s %s)', k.oid, k.oid::regclass, k.filter), ', ')
           || ' SELECT'
      FROM pg_extension, unnest(extconfig, extcondition) AS k (oid, filter) JOIN pg_class c USING (oid)
     WHERE c.relkind <> 'S' AND k.oid = ANY ('{{{oids}}}'));
END $migrator$;
"""
_ENTRY = re.compile(
    r"\d+; \d+ \d+ (TABLE DATA|TABLE|SEQUENCE SET|SEQUENCE|SCHEMA -|ACL|COMMENT|SECURITY LABEL) (.*)"
)
_ROWS = {"TABLE DATA": "TABLE", "SEQUENCE SET": "SEQUENCE"}


@dataclass(frozen=True)
class Staying:
    """What stays, and how an archive's entries are told: ``wanted`` says which of them can come back.

    ``empty`` is the SQL that deletes what users keep in extensions; ``kept`` are the tables and sequences of which the
    role may not do that.
    """

    wanted: Callable[[str], bool]
    empty: str
    kept: tuple[str, ...]


def look(session: Session, entries: Iterable[str]) -> Staying:
    """Find out what of an archive, by its table of contents, cannot or need not come back beside what stays."""
    roles = [(f" {name}", ours) for name, ours in session.query(_ROLES)]
    schemas = {f"{schema}{owner}" for (schema,) in session.query(_SCHEMAS) for owner, _ in roles}
    acting_for = tuple(owner for owner, ours in roles if ours)
    theirs = {
        f"{schema} {name}{owner}": (oid, f"{as_typed(schema)}.{as_typed(name)}", may)
        for oid, schema, name, may in session.query(_KEPT_BY_USERS)
        for owner, _ in roles
    }
    found = [match.groups() for line in entries if (match := _ENTRY.match(line))]
    users = {(kind, rest) for kind, rest in found if kind in _ROWS.values()}

    def of_an_extension(kind: str, rest: str) -> tuple[int, str, bool] | None:
        """Return which relation's rows these are; those of a user's table stand beside the table itself."""
        return None if kind not in _ROWS or (_ROWS[kind], rest) in users else theirs.get(rest)

    def wanted(line: str) -> bool:
        match = _ENTRY.match(line)
        if match is None:
            return True
        kind, rest = match.groups()
        if kind == "SCHEMA -":
            return rest not in schemas
        if kind in ("ACL", "COMMENT", "SECURITY LABEL"):
            # Of what is another's and was not made by the restore; an extension's comment is its owner's.
            return " EXTENSION " not in f" {rest}" and rest.endswith(acting_for)
        relation = of_an_extension(kind, rest)
        return relation is None or relation[2]

    ours = {item for kind, rest in found if (item := of_an_extension(kind, rest))}
    oids = ",".join(str(oid) for oid, _, may in sorted(ours) if may)
    kept = tuple(name for _, name, may in sorted(ours) if not may)
    return Staying(wanted, _DELETE.format(oids=oids) if oids else "", kept)
