"""Which roles' code runs when a table is read or written.

Such code is in triggers, rules, checks, indexes, defaults, policies, statistics and the types of
columns. It is also in related tables: a child, a table with a foreign key to it, and tables that a rule
or a policy names. A foreign key's check runs as its table's owner. Up to PostgreSQL 17, code that this
owner defers to the COMMIT runs as the committing role. An operator is a function, and a domain may have
a check; pg_depend has only their own name.

The server's own functions belong to nobody, and some run any SQL text (``query_to_xml``). So the
possible author of an expression with such a call counts as the owner of the code: the table's owner,
and for a trigger's WHEN each role that may create triggers.
"""

from __future__ import annotations

from migrator.errors import AccessDenied
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable

# The classes, such as 1259 for pg_class, are fixed oids: as regclass they would need a cast that others
# can make too. With OFFSET 0 each is looked up by its index. The planner would otherwise read all of
# pg_depend for a tree of unknown size.
_CODE = """
WITH RECURSIVE tree (oid) AS (
  SELECT CAST({table} AS pg_catalog.oid)
  UNION
  SELECT a.below FROM tree t CROSS JOIN LATERAL (
    SELECT i.inhrelid AS below FROM pg_catalog.pg_inherits i WHERE i.inhparent OPERATOR(pg_catalog.=) t.oid
    UNION ALL
    SELECT k.conrelid FROM pg_catalog.pg_trigger g
      JOIN pg_catalog.pg_constraint k ON k.oid OPERATOR(pg_catalog.=) g.tgconstraint
     WHERE g.tgrelid OPERATOR(pg_catalog.=) t.oid
    UNION ALL
    SELECT d.refobjid FROM pg_catalog.pg_rewrite w
      JOIN pg_catalog.pg_depend d ON d.objid OPERATOR(pg_catalog.=) w.oid
     WHERE w.ev_class OPERATOR(pg_catalog.=) t.oid AND d.classid OPERATOR(pg_catalog.=) CAST(2618 AS pg_catalog.oid)
       AND d.refclassid OPERATOR(pg_catalog.=) CAST(1259 AS pg_catalog.oid)
    UNION ALL
    SELECT d.refobjid FROM pg_catalog.pg_policy p
      JOIN pg_catalog.pg_depend d ON d.objid OPERATOR(pg_catalog.=) p.oid
     WHERE p.polrelid OPERATOR(pg_catalog.=) t.oid AND d.classid OPERATOR(pg_catalog.=) CAST(3256 AS pg_catalog.oid)
       AND d.refclassid OPERATOR(pg_catalog.=) CAST(1259 AS pg_catalog.oid)
  ) AS a
),
attached (classid, objid) AS (
  SELECT CAST(1259 AS pg_catalog.oid), t.oid FROM tree t
  UNION
  SELECT CAST(1259 AS pg_catalog.oid), x.indexrelid FROM tree t CROSS JOIN LATERAL (
    SELECT indexrelid FROM pg_catalog.pg_index WHERE indrelid OPERATOR(pg_catalog.=) t.oid OFFSET 0) AS x
  UNION
  SELECT d.classid, d.objid FROM tree t CROSS JOIN LATERAL (
    SELECT classid, objid FROM pg_catalog.pg_depend WHERE refclassid OPERATOR(pg_catalog.=) CAST(1259 AS pg_catalog.oid)
       AND refobjid OPERATOR(pg_catalog.=) t.oid AND deptype OPERATOR(pg_catalog.<>) 'n' OFFSET 0) AS d
),
authors (relation, role, classid) AS (
  SELECT t.oid, c.relowner, CAST(NULL AS pg_catalog.oid) FROM tree t CROSS JOIN LATERAL (
    SELECT relowner FROM pg_catalog.pg_class WHERE oid OPERATOR(pg_catalog.=) t.oid OFFSET 0) AS c
  UNION
  SELECT t.oid, c.grantee, CAST(2620 AS pg_catalog.oid) FROM tree t CROSS JOIN LATERAL (
    SELECT a.grantee FROM pg_catalog.pg_class r, LATERAL pg_catalog.aclexplode(r.relacl) a
     WHERE r.oid OPERATOR(pg_catalog.=) t.oid AND a.privilege_type OPERATOR(pg_catalog.=) 'TRIGGER' OFFSET 0) AS c
),
code (described, owner, trigger) AS (
  SELECT DISTINCT pg_catalog.concat_ws(' ', pg_catalog.pg_describe_object(h.classid, h.objid, 0), o.how), o.owner,
         (SELECT pg_catalog.quote_ident(g.tgname) FROM pg_catalog.pg_trigger g
           WHERE g.oid OPERATOR(pg_catalog.=) h.objid AND h.classid OPERATOR(pg_catalog.=) CAST(2620 AS pg_catalog.oid)
             AND g.tgrelid OPERATOR(pg_catalog.=) CAST({table} AS pg_catalog.oid))
    FROM attached h
    CROSS JOIN LATERAL (
      SELECT refclassid AS class, refobjid AS oid FROM pg_catalog.pg_depend
       WHERE classid OPERATOR(pg_catalog.=) h.classid AND objid OPERATOR(pg_catalog.=) h.objid OFFSET 0) AS d
    CROSS JOIN LATERAL (
      SELECT proowner AS owner, 'calls a function of' AS how FROM pg_catalog.pg_proc
       WHERE oid OPERATOR(pg_catalog.=) d.oid AND d.class OPERATOR(pg_catalog.=) CAST(1255 AS pg_catalog.oid)
      UNION ALL
      SELECT oprowner, 'calls an operator of' FROM pg_catalog.pg_operator
       WHERE oid OPERATOR(pg_catalog.=) d.oid AND d.class OPERATOR(pg_catalog.=) CAST(2617 AS pg_catalog.oid)
      UNION ALL
      SELECT typowner, 'has a type of' FROM pg_catalog.pg_type
       WHERE oid OPERATOR(pg_catalog.=) d.oid AND d.class OPERATOR(pg_catalog.=) CAST(1247 AS pg_catalog.oid)
    ) AS o
  UNION ALL
  SELECT pg_catalog.concat_ws(' ', pg_catalog.pg_describe_object(CAST(1259 AS pg_catalog.oid), t.oid, 0),
           'comes along and belongs to'),
         c.relowner, CAST(NULL AS pg_catalog.text)
    FROM tree t CROSS JOIN LATERAL (
      SELECT relowner FROM pg_catalog.pg_class WHERE oid OPERATOR(pg_catalog.=) t.oid OFFSET 0) AS c
   WHERE t.oid OPERATOR(pg_catalog.<>) CAST({table} AS pg_catalog.oid)
  UNION
  -- The server's functions of fixed results are harmless, and so is now().
  SELECT pg_catalog.concat(pg_catalog.pg_describe_object(w.classid, w.objid, 0), ' calls ', p.proname,
           ', and may have been made by'),
         a.role, CAST(NULL AS pg_catalog.text)
    FROM authors a
   CROSS JOIN LATERAL (
      SELECT CAST(2620 AS pg_catalog.oid) AS classid, oid AS objid, CAST(tgqual AS pg_catalog.text) AS expression
        FROM pg_catalog.pg_trigger WHERE tgrelid OPERATOR(pg_catalog.=) a.relation
      UNION ALL
      SELECT CAST(2606 AS pg_catalog.oid), oid, CAST(conbin AS pg_catalog.text)
        FROM pg_catalog.pg_constraint WHERE conrelid OPERATOR(pg_catalog.=) a.relation
      UNION ALL
      SELECT CAST(2604 AS pg_catalog.oid), oid, CAST(adbin AS pg_catalog.text)
        FROM pg_catalog.pg_attrdef WHERE adrelid OPERATOR(pg_catalog.=) a.relation
      UNION ALL
      SELECT CAST(3256 AS pg_catalog.oid), oid, pg_catalog.concat(polqual, polwithcheck)
        FROM pg_catalog.pg_policy WHERE polrelid OPERATOR(pg_catalog.=) a.relation
      UNION ALL
      SELECT CAST(2618 AS pg_catalog.oid), oid, pg_catalog.concat(ev_qual, ev_action)
        FROM pg_catalog.pg_rewrite WHERE ev_class OPERATOR(pg_catalog.=) a.relation
      OFFSET 0) AS w
   CROSS JOIN LATERAL pg_catalog.regexp_matches(w.expression, '{{FUNCEXPR :funcid ([0-9]+)', 'g') AS called (oid)
    JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) CAST(called.oid[1] AS pg_catalog.oid)
   WHERE w.classid OPERATOR(pg_catalog.=) coalesce(a.classid, w.classid)
     AND CAST(p.provolatile AS pg_catalog.text) OPERATOR(pg_catalog.<>) 'i'
     AND p.proname OPERATOR(pg_catalog.<>) 'now'
)
SELECT described, owner, trigger FROM code
"""


def code(table: str) -> str:
    """Return a subquery with a row for each piece of code that is attached to a table.

    ``described`` selects from its ``owner``, and the quoted name of the ``trigger`` if it is one.
    ``table`` is an SQL expression for the oid. The subquery means the same under any search path.
    """
    return f"({_CODE.format(table=table)})"


_TABLE = """(SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
   WHERE c.relname = %(name)s AND n.nspname = %(schema)s)"""
_OF_OTHERS = f"""
SELECT DISTINCT c.described, coalesce(quote_ident(r.rolname), 'PUBLIC')
FROM {code(_TABLE)} AS c LEFT JOIN pg_roles r ON r.oid = c.owner
WHERE r.oid IS NULL OR NOT (r.rolsuper OR r.rolname IN (session_user, current_user, %(role)s)
           OR r.oid = (SELECT datdba FROM pg_database WHERE datname = current_database())
           OR r.oid = (SELECT relowner FROM pg_class WHERE oid = {_TABLE})
              AND pg_has_role(session_user, r.oid, 'MEMBER')
              AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = session_user))
ORDER BY 1, 2
"""  # noqa: S608 - constants only

_PLAIN = """
CAST({c}.relkind AS pg_catalog.text) OPERATOR(pg_catalog.=) 'r' AND {c}.relchecks OPERATOR(pg_catalog.=) 0
   AND NOT ({c}.relhastriggers OR {c}.relhasrules OR {c}.relhassubclass)
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                    WHERE a.attrelid OPERATOR(pg_catalog.=) {c}.oid AND a.attnum OPERATOR(pg_catalog.>) 0
                      AND (a.atthasdef OR a.atttypid OPERATOR(pg_catalog.>=) CAST(16384 AS pg_catalog.oid)))
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i
                     JOIN pg_catalog.pg_depend d ON d.classid OPERATOR(pg_catalog.=) CAST(1259 AS pg_catalog.oid)
                      AND d.objid OPERATOR(pg_catalog.=) i.indexrelid
                    WHERE i.indrelid OPERATOR(pg_catalog.=) {c}.oid
                      AND d.refclassid OPERATOR(pg_catalog.=) ANY
                          (CAST(ARRAY[1247, 1255, 2616, 2617] AS pg_catalog.oid[])))
   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                    WHERE d.refclassid OPERATOR(pg_catalog.=) CAST(1259 AS pg_catalog.oid)
                      AND d.refobjid OPERATOR(pg_catalog.=) {c}.oid AND d.deptype OPERATOR(pg_catalog.<>) 'n'
                      AND d.classid OPERATOR(pg_catalog.<>) ALL (CAST(ARRAY[1247, 1259, 2606] AS pg_catalog.oid[])))
"""


def plain(alias: str) -> str:
    """Return the condition that nothing on a table, with ``alias`` as its row of pg_class, can call code.

    Then :func:`code` has no row, and takes ten times as long to plan. The condition names the allowed kinds
    of dependent objects, so an unknown kind makes it false. An index may call the server's own functions:
    those in an index are immutable. It means the same under any search path. 16384: the objects of initdb
    have smaller ids, and no row of pg_depend.
    https://www.postgresql.org/docs/current/system-catalog-initial-data.html
    """
    return _PLAIN.format(c=alias).strip()


_IS_PLAIN = f"""
SELECT {plain("c")} FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relname = %(name)s AND n.nspname = %(schema)s
"""  # noqa: S608 - constants only


def refuse_code(session: Session, table: VersionTable, role: str) -> None:
    """Raise :class:`AccessDenied` if a write to the version table would run the code of an untrusted role.

    Trusted are superusers, our login, the database's owner, ``role``, and the table's owner if our
    login is a member of it. A login that can become a role does not therefore trust that role with its
    own other privileges.
    """
    found = session.find(table.name) if not table.schema else (table.schema, "")
    if found is None:
        return
    place = {"name": table.name, "schema": found[0]}
    if session.query(_IS_PLAIN, place) == [(True,)]:
        return
    rows = session.query(_OF_OTHERS, {**place, "role": role})
    if not rows:
        return
    what = "; ".join(f"{described} {owner}" for described, owner in rows[:5])
    raise AccessDenied(
        f"A write to the version table {table} would run the code of other roles: {what}.",
        next_step=f"inspect it (`\\d {table.typed}` in psql), drop it as the table's owner or a superuser, "
        f"and REVOKE ALL ON TABLE {table.typed} FROM "
        f"{', '.join(sorted({owner for _, owner in rows}))}",
    )
