"""Extensions: a restore in place leaves them unchanged, because their owner is rarely the database's owner.

Their schemas and grants stay too. Users' rows in an extension's configuration tables are dumped like
any other rows
(https://www.postgresql.org/docs/current/extend-extensions.html#EXTEND-EXTENSIONS-CONFIG-TABLES), so
these rows are deleted before the backup's are restored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from migrator.postgres.quoting import as_typed
from migrator.postgres.session import Session

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
# In one statement: foreign keys between them are checked at its end.
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
    r"\d+; \d+ \d+ (TABLE DATA|TABLE|SEQUENCE SET|SEQUENCE|SCHEMA -|ACL|DEFAULT ACL|COMMENT|SECURITY LABEL) (.*)"
)
_ROWS = {"TABLE DATA": "TABLE", "SEQUENCE SET": "SEQUENCE"}


@dataclass(frozen=True)
class Staying:
    """The objects that stay, and the test for an archive's entries: ``wanted`` says which of them can be
    restored.

    ``empty`` is the SQL that deletes users' rows in extensions. ``kept`` are the tables and sequences
    for which the role may not do that.
    """

    wanted: Callable[[str], bool]
    empty: str
    kept: tuple[str, ...]


def look(session: Session, entries: Iterable[str]) -> Staying:
    """Find out, from an archive's table of contents, which entries cannot or need not be restored beside the
    staying objects.
    """
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
        """Return the relation of these rows; those of a user's table stand beside the table itself."""
        return None if kind not in _ROWS or (_ROWS[kind], rest) in users else theirs.get(rest)

    def wanted(line: str) -> bool:
        match = _ENTRY.match(line)
        if match is None:
            return True
        kind, rest = match.groups()
        if kind == "SCHEMA -":
            return rest not in schemas
        if kind in ("ACL", "DEFAULT ACL", "COMMENT", "SECURITY LABEL"):
            # For objects of others that the restore did not create; an extension's comment belongs to its
            # owner.
            return " EXTENSION " not in f" {rest}" and rest.endswith(acting_for)
        relation = of_an_extension(kind, rest)
        return relation is None or relation[2]

    ours = {item for kind, rest in found if (item := of_an_extension(kind, rest))}
    oids = ",".join(str(oid) for oid, _, may in sorted(ours) if may)
    kept = tuple(name for _, name, may in sorted(ours) if not may)
    return Staying(wanted, _DELETE.format(oids=oids) if oids else "", kept)
