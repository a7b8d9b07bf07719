"""Objects that the role of a backup cannot create again: a restore by that role would stop at them."""

from __future__ import annotations

from migrator.postgres.queries import IN_USER_SCHEMA
from migrator.postgres.session import Session

# An extension's members come with it. Where the role may create no database, extensions stay as they are.
_FOUND = f"""
WITH extensions(classid, objid) AS (SELECT classid, objid FROM pg_depend WHERE deptype = 'e'),
mine AS (SELECT oid FROM pg_namespace n WHERE {IN_USER_SCHEMA}),
owned(classid, oid, owner) AS (
  SELECT 'pg_class'::regclass, oid, relowner FROM pg_class WHERE relnamespace IN (TABLE mine)
  UNION ALL SELECT 'pg_proc'::regclass, oid, proowner FROM pg_proc WHERE pronamespace IN (TABLE mine)
  UNION ALL SELECT 'pg_type'::regclass, oid, typowner FROM pg_type WHERE typnamespace IN (TABLE mine)
  UNION ALL SELECT 'pg_namespace'::regclass, n.oid, nspowner FROM mine JOIN pg_namespace n USING (oid)
   WHERE nspname <> 'public'
), found(name) AS (
  SELECT 'extension ' || quote_ident(extname) FROM pg_extension JOIN pg_roles ON rolname = current_user
    JOIN pg_available_extension_versions v ON (v.name, v.version) = (extname, extversion)
   WHERE rolcreatedb AND v.superuser AND coalesce(to_jsonb(v) ->> 'trusted', 'false') = 'false'
  UNION ALL SELECT 'publication ' || quote_ident(pubname) FROM pg_publication p
   WHERE puballtables OR NOT pg_has_role(pubowner, 'USAGE') OR EXISTS (
     SELECT FROM pg_depend d JOIN pg_class c ON c.oid = d.classid
      WHERE c.relname = 'pg_publication_namespace' AND refclassid = 'pg_publication'::regclass AND refobjid = p.oid)
  UNION ALL SELECT 'server ' || quote_ident(srvname) FROM pg_foreign_server s
   WHERE (NOT has_foreign_data_wrapper_privilege(srvfdw, 'USAGE') OR NOT pg_has_role(srvowner, 'USAGE'))
     AND ('pg_foreign_server'::regclass, s.oid) NOT IN (TABLE extensions)
  UNION ALL SELECT 'function ' || p.oid::regprocedure FROM pg_proc p JOIN pg_language l ON l.oid = prolang
   WHERE pronamespace IN (TABLE mine) AND (NOT lanpltrusted AND lanname <> 'sql' OR proleakproof)
     AND ('pg_proc'::regclass, p.oid) NOT IN (TABLE extensions)
  UNION ALL SELECT 'operator class ' || quote_ident(opcname) FROM pg_opclass o
   WHERE opcnamespace IN (TABLE mine) AND ('pg_opclass'::regclass, o.oid) NOT IN (TABLE extensions)
  UNION ALL SELECT 'event trigger ' || quote_ident(evtname) FROM pg_event_trigger e
   WHERE ('pg_event_trigger'::regclass, e.oid) NOT IN (TABLE extensions)
  UNION ALL SELECT DISTINCT 'default privileges of role ' || quote_ident(pg_get_userbyid(defaclrole)::text)
    FROM pg_default_acl, pg_roles
   WHERE rolname = current_user AND rolcreatedb AND NOT pg_has_role(defaclrole, 'USAGE')
  UNION ALL SELECT DISTINCT 'objects of role ' || quote_ident(pg_get_userbyid(owner)::text) FROM owned
   WHERE NOT pg_has_role(owner, 'USAGE') AND (classid, oid) NOT IN (TABLE extensions)
)
SELECT name FROM found WHERE NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) ORDER BY 1
"""  # noqa: S608 - constants only


def find(session: Session) -> list[str]:
    """Return one sentence that names them, or none; raises QueryFailed."""
    names = [row[0] for row in session.query(_FOUND)]
    if not names:
        return []
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return [
        f"role {session.facts.user} is not a superuser and may not create these again: {', '.join(names[:8])}{more}; "
        "restore it as a superuser"
    ]
