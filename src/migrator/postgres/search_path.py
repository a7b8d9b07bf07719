"""The search_path of our own sessions, and the lookup of names in the user's own one.

A role that may create objects in a schema of the search_path may put an operator, a function, a cast or
a type there that matches our statements better than the one in pg_catalog. So our sessions leave the
user's search_path with their first message, and that message is written so that no search_path matters.
If the user's path counts, we read its schemas, and compare the name with the catalog.
https://www.postgresql.org/docs/current/typeconv-oper.html
"""

from __future__ import annotations

from collections.abc import Callable

from migrator.postgres.queries import LEDGER

FIRST_OF_OTHERS = 16384
"""The first oid after those of initdb: FirstNormalObjectId in the server's source."""

SAFE = "pg_catalog, pg_temp"
"""Relations and types of pg_temp come first unless it is named: we name it last."""
_SAFE = f"'{SAFE}'"

PATH, SCHEMAS = "migrator.search_path", "migrator.schemas"
"""Settings that last for one message: the user's search_path, and its schemas as JSON, nearest first."""

_RESTRICTION = "restrict_nonsystem_relation_kind"
"""Refuses the views of others, which call functions:
https://www.postgresql.org/docs/current/runtime-config-client.html Servers have it since August 2024.
"""

_LEARN_SCHEMAS = (
    f"pg_catalog.set_config('{SCHEMAS}', CAST(pg_catalog.array_to_json(pg_catalog.current_schemas(false))"
    " AS pg_catalog.text), true)"
)


def _set_columns(path: str, kinds: str, local: str) -> str:
    """Return the columns that set a search_path and the refused kinds of relations; ``local`` is an SQL
    expression.

    ``path`` is an SQL expression as well.
    """
    return (
        f"pg_catalog.set_config('search_path', {path}, {local}),"
        f" CASE WHEN pg_catalog.current_setting('{_RESTRICTION}', true) IS NOT NULL"
        f" THEN pg_catalog.set_config('{_RESTRICTION}', '{kinds}', {local}) END"
    )


def set_our_path(local: str = "false") -> str:
    """Return the statement that sets our path; ``local`` is an SQL expression."""
    return f"SELECT {_set_columns(_SAFE, 'view, foreign-table', local)}"


def set_users_path(literal: str, local: str = "false") -> str:
    """Return the statement that sets a path of the user's, as an SQL literal, and allows every relation
    again.
    """
    return f"SELECT {_set_columns(literal, '', local)}"


def prefix_behind_pooler(restricts: bool) -> str:
    """Return the prefix of a statement behind a pooler, which may give each transaction another connection."""
    restriction = f" SET LOCAL {_RESTRICTION} = 'view, foreign-table';" if restricts else ""
    return f"SET LOCAL search_path = {SAFE};{restriction} "


RESTRICTS = f"pg_catalog.current_setting('{_RESTRICTION}', true) IS NOT NULL"
"""Whether the server can refuse views."""


def leave_users_path(backend_pid: int) -> str:
    """Return the statements that read any path of the user's and leave it.

    A pooler invents process ids. Behind one, the statements apply only to this message, because its
    server connection is shared.
    """
    pooled = f"pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.<>) CAST('{backend_pid}' AS pg_catalog.int8)"
    return (
        f"SELECT pg_catalog.set_config('{PATH}', pg_catalog.current_setting('search_path'), true), {_LEARN_SCHEMAS};"
        f" {set_our_path(pooled)}"
    )


_FIND = f"""
SELECT n.nspname::text, c.relkind::text
FROM json_array_elements_text(current_setting('{SCHEMAS}')::json) WITH ORDINALITY AS s (name, place)
JOIN pg_namespace n ON n.nspname = s.name JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = %s
ORDER BY s.place LIMIT 1
"""  # noqa: S608 - constants only
_LOOK = (
    f"SELECT pg_catalog.set_config('search_path', %s, true); SELECT {_LEARN_SCHEMAS};"
    f" SELECT pg_catalog.set_config('search_path', {_SAFE}, true); "
)
FIND_RELATION = _LOOK + _FIND
"""Returns the schema and the kind of the first relation of a name (second parameter) in a search_path (the
first).
"""
LIST_SCHEMAS = f"{_LOOK}SELECT s.value FROM json_array_elements_text(current_setting('{SCHEMAS}')::json) AS s"  # noqa: S608 - constants only
"""Returns the existing schemas of a search_path (the parameter) that the role may use."""

FIND_HERE = """
SELECT CAST(pg_catalog.json_build_array(n.nspname, c.relkind) AS pg_catalog.text)
FROM pg_catalog.generate_subscripts(pg_catalog.current_schemas(false), 1) AS s (place)
JOIN pg_catalog.pg_namespace n ON n.nspname OPERATOR(pg_catalog.=) (pg_catalog.current_schemas(false))[s.place]
JOIN pg_catalog.pg_class c ON c.relnamespace OPERATOR(pg_catalog.=) n.oid AND c.relname OPERATOR(pg_catalog.=) {name}
ORDER BY s.place LIMIT 1
"""
"""The same on a connection that keeps its search_path, as JSON."""


def only_beside(table: str, schema: str, literal: Callable[[str], str]) -> str:
    """Return the statement that leaves nothing to find, for this message, except beside a plain table.

    That is the first table of this name in the user's path, or the one in ``schema``. A view, a column
    with a type of others, or an index or statistics over an expression could bring a function of
    others: then nothing is found at all.
    """
    schemas = f"json_build_array({literal(schema)})" if schema else f"current_setting('{SCHEMAS}')::json"
    return f"""
SELECT set_config('search_path', coalesce((
  SELECT CASE WHEN NOT EXISTS (
         SELECT FROM pg_class o JOIN pg_attribute a ON a.attrelid = o.oid AND a.attnum > 0 AND NOT a.attisdropped
          WHERE o.relnamespace = n.oid AND o.relname IN ({literal(table)}, '{LEDGER}')
            AND (o.relkind <> 'r' OR a.atttypid >= {FIRST_OF_OTHERS}
              OR EXISTS (SELECT FROM pg_statistic_ext s WHERE s.stxrelid = o.oid)
              OR EXISTS (
                SELECT FROM pg_index i JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
                 WHERE i.indrelid = o.oid AND d.refobjid >= {FIRST_OF_OTHERS}
                   AND d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass))))
         THEN quote_ident(n.nspname) || ', pg_temp' END
    FROM json_array_elements_text({schemas}) WITH ORDINALITY AS s (name, place)
    JOIN pg_namespace n ON n.nspname = s.name
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = {literal(table)}
   ORDER BY s.place LIMIT 1), {_SAFE}), true);"""  # noqa: S608 - quoted


SET_OUR_PATH = f"SELECT pg_catalog.set_config('search_path', {_SAFE}, true);"
"""Leaves that state."""
