"""Who else can write the ledger: text from an untrusted role decides nothing.

The queries serve every connection, ours and the one of ``env.py``. So they have no parameters and mean the
same under any search path. Trusted are superusers, our login, the database's owner and MIGRATOR_ROLE.
The ledger's owner is trusted if it is one of them, or owns the version table too, or is a role that our
login is a member of. A member of the owner counts as the owner. For that, the version table's owner has
no code on it (postgres/attached_code.py). docs/why/adr/0042 has the reasons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.errors import AccessDenied
from migrator.postgres.attached_code import code, plain
from migrator.postgres.quoting import quote_literal
from migrator.postgres.version_table import VersionTable


@dataclass(frozen=True)
class Hole:
    """One way in which another role can write the ledger, or have code run by its writers.

    ``kind`` is owner, grant, member (of pg_write_all_data), code (of ``role``), parent (a table that it
    inherits from), relation (not a plain table) or columns (those of another table). ``role``,
    ``grantor`` and ``privileges`` are quoted for SQL; for code in a trigger, ``privileges`` holds the
    trigger's name.
    """

    kind: str
    role: str
    grantor: str
    grantable: bool
    privileges: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return {
            "owner": f"{self.role} owns it",
            "grant": f"{self.role} may {', '.join(self.privileges)}",
            "member": f"{self.role} is a member of pg_write_all_data",
            "code": f"the {self.name} {self.role}",
            "parent": f"it is a child of {self.name}",
            "relation": "it is not a plain table",
            "columns": "it does not have the ledger's columns",
        }[self.kind]


OWNER = (
    "SELECT CAST(pg_catalog.pg_get_userbyid(relowner) AS pg_catalog.text) FROM pg_catalog.pg_class"
    " WHERE oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass(%s) AS pg_catalog.oid)"
    " AND pg_catalog.pg_has_role(relowner, 'MEMBER')"
)
"""The owner of a table (the parameter), where the login can become it."""

NOT_OURS = Hole("columns", "", "", False, (), "")
"""A table of this name that is not a ledger; reading it shows that."""

_HOLES = """
WITH ledger AS (
  SELECT c.oid, c.relkind, c.relowner, c.relacl FROM pg_catalog.pg_class c
   WHERE c.oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({ledger}) AS pg_catalog.oid)
),
login AS (
  SELECT r.oid, r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) session_user
),
granted AS (
  SELECT a.grantee, a.grantor, a.privilege_type, a.is_grantable
    FROM ledger, LATERAL pg_catalog.aclexplode(ledger.relacl) a
  UNION ALL
  SELECT a.grantee, a.grantor, a.privilege_type, a.is_grantable
    FROM ledger JOIN pg_catalog.pg_attribute t ON t.attrelid OPERATOR(pg_catalog.=) ledger.oid,
         LATERAL pg_catalog.aclexplode(t.attacl) a
),
found (kind, role, grantor, grantable, privileges, name) AS (
  SELECT 'owner', relowner, CAST(NULL AS pg_catalog.oid), false, CAST(NULL AS pg_catalog.text[]),
         CAST('' AS pg_catalog.text) FROM ledger
  UNION ALL
  SELECT 'grant', g.grantee, g.grantor, pg_catalog.bool_or(g.is_grantable),
         pg_catalog.array_agg(DISTINCT g.privilege_type), ''
    FROM granted g, ledger
   WHERE g.privilege_type OPERATOR(pg_catalog.<>) 'SELECT' AND g.grantee OPERATOR(pg_catalog.<>) ledger.relowner
   GROUP BY g.grantee, g.grantor
  UNION ALL
  SELECT 'member', m.member, NULL, false, NULL, ''
    FROM ledger, pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) m.roleid
   WHERE r.rolname OPERATOR(pg_catalog.=) 'pg_write_all_data' AND m.member OPERATOR(pg_catalog.<>) ledger.relowner
  UNION ALL
  SELECT 'code', k.owner, NULL, false, CASE WHEN k.trigger IS NOT NULL THEN ARRAY[k.trigger] END, k.described
    FROM ledger CROSS JOIN {code} AS k
  UNION ALL
  SELECT 'parent', CAST(0 AS pg_catalog.oid), NULL, false, NULL,
         CAST(CAST(i.inhparent AS pg_catalog.regclass) AS pg_catalog.text)
    FROM ledger JOIN pg_catalog.pg_inherits i ON i.inhrelid OPERATOR(pg_catalog.=) ledger.oid
  UNION ALL
  SELECT 'relation', CAST(0 AS pg_catalog.oid), NULL, false, NULL, '' FROM ledger
   WHERE relkind OPERATOR(pg_catalog.<>) 'r'
)
SELECT CAST(pg_catalog.json_agg(pg_catalog.json_build_array(
         f.kind, coalesce(pg_catalog.quote_ident(r.rolname), 'PUBLIC'),
         coalesce(pg_catalog.quote_ident(CASE WHEN f.grantor OPERATOR(pg_catalog.<>) ledger.relowner
                                              THEN g.rolname END), ''),
         f.grantable, coalesce(f.privileges, ARRAY[]::pg_catalog.text[]), f.name)) AS pg_catalog.text)
  FROM ledger CROSS JOIN found f
  LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) f.role
  LEFT JOIN pg_catalog.pg_roles g ON g.oid OPERATOR(pg_catalog.=) f.grantor
 WHERE r.oid IS NULL OR NOT (
       r.rolsuper
    OR CAST(r.rolname AS pg_catalog.text) OPERATOR(pg_catalog.=) ANY (ARRAY[
         CAST(session_user AS pg_catalog.text), CAST(current_user AS pg_catalog.text), {role}])
    OR EXISTS (SELECT FROM pg_catalog.pg_database b WHERE b.datdba OPERATOR(pg_catalog.=) r.oid
                  AND b.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())
    OR f.kind OPERATOR(pg_catalog.<>) 'grant' AND f.kind OPERATOR(pg_catalog.<>) 'member' AND (
         EXISTS (SELECT FROM login WHERE NOT login.rolsuper
                    AND pg_catalog.pg_has_role(login.oid, r.oid, 'MEMBER')))
    OR f.kind OPERATOR(pg_catalog.=) 'owner' AND r.oid OPERATOR(pg_catalog.=) {version_owner})
"""

# True for a ledger as migrator creates it, which has no holes: _HOLES takes ten times as long to plan.
_AS_CREATED = f"""
SELECT {plain("l")}
   AND NOT l.relrowsecurity AND (l.relowner OPERATOR(pg_catalog.=) {{version_owner}}
     OR l.relowner OPERATOR(pg_catalog.=)
        (SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolname OPERATOR(pg_catalog.=) session_user))
   AND NOT EXISTS (SELECT FROM pg_catalog.aclexplode(l.relacl) a WHERE a.grantee OPERATOR(pg_catalog.<>) l.relowner
                      AND a.privilege_type OPERATOR(pg_catalog.<>) 'SELECT')
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute t
                    WHERE t.attrelid OPERATOR(pg_catalog.=) l.oid AND t.attacl IS NOT NULL)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhrelid OPERATOR(pg_catalog.=) l.oid)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles r
                       ON r.oid OPERATOR(pg_catalog.=) m.roleid
                    WHERE r.rolname OPERATOR(pg_catalog.=) 'pg_write_all_data')
  FROM pg_catalog.pg_class l
 WHERE l.oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({{ledger}}) AS pg_catalog.oid)
"""  # noqa: S608 - constants only

_CODE = code("(SELECT oid FROM ledger)")
_VERSION_OWNER = (
    "(SELECT v.relowner FROM pg_catalog.pg_class v"
    " WHERE v.oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({table}) AS pg_catalog.oid))"
)


def _text(text: str) -> str:
    return f"CAST({quote_literal(text)} AS pg_catalog.text)"


def holes(
    ask: Callable[[str], Any], ledger: VersionTable, table: VersionTable | None, *, role: str = ""
) -> tuple[Hole, ...]:
    """Return the holes of a ledger; ``ask`` returns the first value of a query.

    ``table`` is the version table, whose owner may own the ledger too. It is None if code from the
    ledger is to run: two tables that somebody made beforehand do not vouch for each other. ``role`` is
    MIGRATOR_ROLE.
    """
    owner = "CAST(0 AS pg_catalog.oid)"
    if table:
        owner = _VERSION_OWNER.format(table=_text(VersionTable(table.name, ledger.schema).quoted))
    if ask(_AS_CREATED.format(ledger=_text(ledger.quoted), version_owner=owner)):
        return ()
    sql = _HOLES.format(code=_CODE, ledger=_text(ledger.quoted), role=_text(role), version_owner=owner)
    found = json.loads(ask(sql) or "[]")
    return tuple(
        Hole(kind, name_of, grantor, grantable, tuple(sorted(privileges)), name)
        for kind, name_of, grantor, grantable, privileges, name in found
    )


def revocations(ledger: VersionTable, found: Sequence[Hole]) -> list[str]:
    """Return the statements that revoke the grants, for the ledger's owner to run."""
    grants = [hole for hole in found if hole.kind == "grant"]
    theirs = {hole.role for hole in grants}
    statements = []
    for hole in grants:
        if hole.grantor in theirs:
            continue  # its grantor loses it too, and CASCADE revokes this one
        revoke = f"REVOKE {', '.join(hole.privileges)} ON TABLE {ledger.typed} FROM {hole.role}"
        revoke += " CASCADE" if hole.grantable else ""
        statements.append(f"SET ROLE {hole.grantor}; {revoke}; RESET ROLE" if hole.grantor else revoke)
    return statements


def refusal(ledger: VersionTable, found: Sequence[Hole]) -> AccessDenied:
    """Return the error that names who can write the ledger, and which commands fix that."""
    grants = [hole for hole in found if hole.kind in ("grant", "member")]
    others = [hole for hole in found if hole not in grants]
    if any(hole.kind != "code" or not hole.privileges for hole in others):
        # Another role made it: a new ledger holds nothing of theirs.
        steps = [f"ALTER TABLE {ledger.typed} RENAME TO {ledger.name}_refused"]
        then = "; migrator creates a new one"
    else:
        steps = [f"DROP TRIGGER {hole.privileges[0]} ON {ledger.typed}" for hole in others]
        steps += revocations(ledger, found)
        steps += [f"REVOKE pg_write_all_data FROM {hole.role}" for hole in grants if hole.kind == "member"]
        then = ""
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return AccessDenied(
        f"Others can write the ledger {ledger}, so migrator does not trust it: "
        f"{'; '.join(str(hole) for hole in (*others, *grants)[:5])}{more}.",
        next_step="look for rows that none of your runs wrote (docs/howto/protect-the-ledger.md), then, as "
        f"its owner or a superuser: {'; '.join(steps)}{then}",
    )
