"""The version table: which one it is, and the revisions it holds, read without Alembic."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from migrator.errors import AccessDenied, SettingsError
from migrator.postgres import QueryFailed, Session, as_typed, quote_identifier

_SYSTEM = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"

_VERSION_TABLES = f"""
SELECT n.nspname::text, c.relname::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'version_num' AND NOT a.attisdropped
WHERE c.relkind = 'r' AND {_SYSTEM} AND format_type(a.atttypid, NULL) IN ('character varying', 'text')
ORDER BY n.nspname <> current_schema(), n.nspname, c.relname
"""  # noqa: S608 - constants only


class VersionTable(NamedTuple):
    """The name of the version table, and its schema where ``env.py`` names one."""

    name: str = "alembic_version"
    schema: str = ""

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name

    @property
    def typed(self) -> str:
        """Return the name as a person would type it into SQL."""
        return f"{as_typed(self.schema)}.{as_typed(self.name)}" if self.schema else as_typed(self.name)

    @property
    def quoted(self) -> str:
        """Return the name for SQL text."""
        name = quote_identifier(self.name)
        return f"{quote_identifier(self.schema)}.{name}" if self.schema else name


class KnowsRevisions(Protocol):
    """What is needed of the history to recognise its version table."""

    def version_table(self) -> VersionTable | None:
        """Return the table that ``env.py`` names, or None where only running it would tell."""

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""

    def hints(self) -> frozenset[str]:
        """Return the values of ``-x``."""


def read_version(
    session: Session, history: KnowsRevisions, setting: str = ""
) -> tuple[VersionTable | None, tuple[str, ...]]:
    """Return the version table that is there, or None, and its revisions.

    Its name comes from the setting, else from what ``env.py`` says.  Where only running that would tell, it is
    the one that holds a revision of this history, in the schema that ``-x`` names if it names one.
    Raises :class:`SettingsError` where that could be several.
    """
    schema, _, name = setting.rpartition(".")
    named = VersionTable(name, schema) if setting else history.version_table()
    hints = history.hints()
    told = hints & {row[0] for row in session.query("SELECT nspname::text FROM pg_namespace")}
    if named is not None and (named.schema or not told):
        return (named, read_rows(session, named)) if _exists(session, named) else (None, ())
    found = _search(session, history.known(), named.name if named else "", told)
    if len(found) > 1 or (found and hints and not told):
        names = ", ".join(str(table) for table, _ in found)
        raise SettingsError(
            [f"only env.py knows which version table is meant, and revisions are in: {names}"],
            next_step="name the right one with MIGRATOR_VERSION_TABLE",
        )
    return found[0] if found else (None, ())


def _search(
    session: Session, known: frozenset[str], name: str, schemas: frozenset[str]
) -> list[tuple[VersionTable, tuple[str, ...]]]:
    """Return the tables that hold known revisions, else those that hold any (this image may be the older one).

    ``name`` and ``schemas`` narrow the search where they are not empty.
    """
    found = []
    denied: AccessDenied | None = None
    for row in session.query(_VERSION_TABLES):
        table = VersionTable(row[1], row[0])
        if (name and table.name != name) or (schemas and table.schema not in schemas):
            continue
        try:
            rows = read_rows(session, table)
        except AccessDenied as error:  # another application's, unless there is no better one
            denied = error
            continue
        if rows:
            found.append((table, rows))
    if denied and not found:
        raise denied
    return [(table, rows) for table, rows in found if known & set(rows)] or found


class VersionTables(NamedTuple):
    """Every version table of a database with its rows, of whatever history; and the schemas of those out of reach."""

    rows: dict[str, tuple[str, ...]]
    hidden: frozenset[str]


# Nothing but a version table has this one column; another one's version_num may be in a million rows.
_ALL = """
SELECT n.nspname::text, c.relname::text,
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'version_num' AND NOT a.attisdropped
 WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND (c.relnatts = 1 OR c.relname = 'alembic_version')
"""


def read_all(session: Session) -> VersionTables:
    """Read every version table that the role may read, in one statement."""
    found = session.query(_ALL)
    readable = [VersionTable(name, schema) for schema, name, may in found if may]
    each = (
        f"SELECT {number}, array_agg(version_num::text ORDER BY version_num::text) FROM {table.quoted}"  # noqa: S608 - quoted
        for number, table in enumerate(readable)
    )
    rows = session.query(" UNION ALL ".join(each)) if readable else []
    return VersionTables(
        {str(readable[number]): tuple(values or ()) for number, values in rows},
        frozenset(schema for schema, _, may in found if not may),
    )


# A schema that the role may not use is left out of its search path, and what is in it seems not to be there.
_OUT_OF_SIGHT = """
SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = %(name)s AND c.relkind IN ('r', 'p') AND NOT has_schema_privilege(n.oid, 'USAGE')
  AND (n.nspname = %(schema)s OR (%(schema)s = '' AND current_schema() IS NULL AND n.nspname = ANY(
       string_to_array(translate(current_setting('search_path'), '" ', ''), ','))))
"""


def _exists(session: Session, table: VersionTable) -> bool:
    hidden = session.query(_OUT_OF_SIGHT, {"name": table.name, "schema": table.schema})
    if hidden:
        schema, user = hidden[0][0], session.facts.user
        raise AccessDenied(
            f"{user} may not use the schema {schema}, in which the version table {table.name} is.",
            next_step=f"GRANT USAGE ON SCHEMA {as_typed(schema)} TO {as_typed(user)}",
        )
    return bool(session.value("SELECT to_regclass(%s) IS NOT NULL", (table.quoted,)))


def read_rows(session: Session, table: VersionTable) -> tuple[str, ...]:
    """Return the revisions in a version table; raises :class:`AccessDenied` where it may not be read."""
    try:
        rows = session.query(f"SELECT version_num::text FROM {table.quoted} ORDER BY 1")  # noqa: S608 - quoted
    except QueryFailed as error:
        if error.sqlstate == "42501":
            raise AccessDenied(
                f"{session.facts.user} may not read the version table {table}.",
                next_step=f"GRANT SELECT ON {table.typed} TO {as_typed(session.facts.user)}, and for what changes the"
                " schema INSERT, UPDATE, DELETE as well; USAGE ON SCHEMA too, where it has not even that",
            ) from None
        if error.sqlstate == "42P01":  # dropped since it was listed
            return ()
        raise
    return tuple(row[0] for row in rows)
