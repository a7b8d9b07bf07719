"""The version table: which one it is, and the revisions it holds, read without Alembic."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from migrator.errors import AccessDenied, HistoryError, SettingsError, Unversioned
from migrator.postgres.errors import QueryFailed
from migrator.postgres.queries import IN_USER_SCHEMA
from migrator.postgres.quoting import as_typed, quote_identifier
from migrator.postgres.session import Session

_VERSION_TABLES = f"""
SELECT n.nspname::text, c.relname::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'version_num' AND NOT a.attisdropped
WHERE c.relkind = 'r' AND NOT row_security_active(c.oid) AND {IN_USER_SCHEMA}
  AND format_type(a.atttypid, NULL) IN ('character varying', 'text')
ORDER BY n.nspname <> %s, n.nspname, c.relname
"""  # noqa: S608 - constants only


class VersionTable(NamedTuple):
    """The name of the version table, and its schema if ``env.py`` names one."""

    name: str = "alembic_version"
    schema: str = ""

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name

    @property
    def typed(self) -> str:
        """Return the name as a user types it into SQL."""
        return f"{as_typed(self.schema)}.{as_typed(self.name)}" if self.schema else as_typed(self.name)

    @property
    def quoted(self) -> str:
        name = quote_identifier(self.name)
        return f"{quote_identifier(self.schema)}.{name}" if self.schema else name


class KnowsRevisions(Protocol):
    """The part of a history that identifies its version table."""

    def version_table(self) -> VersionTable | None:
        """Return the table that ``env.py`` names, or None if only running it can tell."""

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""

    def hints(self) -> frozenset[str]:
        """Return the values of ``-x``."""

    @property
    def env_can_run_twice(self) -> bool:
        """Tell whether ``env.py`` can run twice: an import runs a module's code only once."""

    @property
    def runs_once(self) -> bool:
        """Tell whether ``env.py`` has one version table in a database, as far as its text shows."""


ONLY_THAT_NAMES_IT = "only that names its version table"
"""A doubt that the last successful run has settled: ``env.py`` led it to the table."""


class FoundVersionTable(NamedTuple):
    """The existing version table, or None, its revisions, and why only running ``env.py`` could be sure.

    ``others`` are further tables with revisions of this history, any of which may be the right one.
    With ``several``, ``env.py`` may use more than one.
    """

    table: VersionTable | None
    rows: tuple[str, ...]
    doubt: str = ""
    others: tuple[VersionTable, ...] = ()
    several: bool = False


def refusal(tables: Sequence[VersionTable]) -> SettingsError:
    """Return the error for version tables that only ``env.py`` can choose from."""
    names = ", ".join(map(str, tables))
    return SettingsError(
        [f"only env.py knows its version table, and these tables have revisions: {names}"],
        next_step="set MIGRATOR_VERSION_TABLE to the right one",
    )


def read_version(
    session: Session, history: KnowsRevisions, setting: str = ""
) -> tuple[VersionTable | None, tuple[str, ...]]:
    """Return the existing version table, or None, and its revisions.

    Raises :class:`SettingsError` if it could be one of several.
    """
    found = find_version_table(session, history, setting)
    if found.table is None and found.others:
        raise refusal(found.others)
    return found.table, found.rows


def find_version_table(session: Session, history: KnowsRevisions, setting: str = "") -> FoundVersionTable:
    """Find the version table.

    Its name comes from the setting, else from ``env.py``. If only running that could tell, it is the
    table with a revision of this history, in the schema that ``-x`` names, if any. A name without a
    schema is resolved by ``env.py``'s own connection, which may have another search_path or another
    role.
    """
    schema, _, name = setting.rpartition(".")
    named = VersionTable(name, schema) if setting else history.version_table()
    hints, several = history.hints(), not history.runs_once
    doubt = "it may use several version tables" if several else ""
    told = hints & {row[0] for row in session.query("SELECT nspname::text FROM pg_namespace")}
    if named is not None and (named.schema or not told):
        table, rows = (named, read_rows(session, named)) if _exists(session, named) else (None, ())
        others = _elsewhere(session, history.known(), named, there=table is not None)
        doubt = "its connection may see another version table" if others else doubt
        return FoundVersionTable(table, rows, doubt, others, several)
    found = _search(session, history.known(), named.name if named else "", told)
    if len(found) > 1 or (found and hints and not told):
        names = tuple(table for table, _ in found)
        return FoundVersionTable(None, (), doubt or "only env.py knows its version table", names, several)
    if not found:
        return FoundVersionTable(None, (), doubt, (), several)
    asked = ONLY_THAT_NAMES_IT if history.env_can_run_twice else ""
    return FoundVersionTable(*found[0], doubt or asked, (), several)


def _elsewhere(
    session: Session, known: frozenset[str], named: VersionTable, *, there: bool
) -> tuple[VersionTable, ...]:
    """Return the tables that ``env.py`` may use instead of the one, existing or not, behind its name."""
    if there and named.schema:
        return ()
    here = place_of(session, named)
    try:
        found = _search(session, known, named.name if there else "", frozenset())
    except AccessDenied:  # another application's
        return ()
    place = VersionTable(named.name, here[0]) if here else None
    return tuple(table for table, rows in found if known & set(rows) and table != place)


def _search(
    session: Session, known: frozenset[str], name: str, schemas: frozenset[str]
) -> list[tuple[VersionTable, tuple[str, ...]]]:
    """Return the tables with known revisions, else those with any (this image may be the older one).

    ``name`` and ``schemas`` narrow the search if they are not empty.
    """
    found = []
    denied: AccessDenied | None = None
    nearest = next(iter(session.user_schemas()), "")
    for row in session.query(_VERSION_TABLES, (nearest,)):
        table = VersionTable(row[1], row[0])
        if (name and table.name != name) or (schemas and table.schema not in schemas):
            continue
        try:
            rows = _read(session, table, table)
        except AccessDenied as error:  # another application's, unless there is no better one
            denied = error
            continue
        if rows:
            found.append((table, rows))
    if denied and not found:
        raise denied
    return [(table, rows) for table, rows in found if known & set(rows)] or found


class VersionTables(NamedTuple):
    """Every version table of a database with its rows, of any history; and the schemas that are out of reach."""

    rows: dict[str, tuple[str, ...]]
    hidden: frozenset[str]


# Only a version table has this single column; another table's version_num may be in a million rows. A
# policy calls functions of the table's owner.
_ALL = f"""
SELECT n.nspname::text, c.relname::text,
       has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AND NOT row_security_active(c.oid)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'version_num' AND NOT a.attisdropped
 WHERE c.relkind = 'r' AND {IN_USER_SCHEMA} AND (c.relnatts = 1 OR c.relname = 'alembic_version')
"""  # noqa: S608 - constants only


def read_all(session: Session) -> VersionTables:
    """Read every version table that the role may read."""
    found = session.query(_ALL)
    readable = [VersionTable(name, schema) for schema, name, may in found if may]
    rows = {}
    for table in readable:
        with contextlib.suppress(NotThere):
            rows[str(table)] = copied(session, table)
    return VersionTables(rows, frozenset(schema for schema, _, may in found if not may))


class NotThere(Exception):
    """A version table was dropped, or is no longer a plain table, since it was listed."""


class _Rows:
    """The output of COPY: a row at a time, each as one value in double quotes, or empty for NULL."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self.nulls = 0

    def write(self, data: bytes) -> int:
        if data == b"\n":
            self.nulls += 1
        else:
            self.values.append(data.decode()[1:-2].replace('""', '"'))
        return len(data)


def copied(session: Session, table: VersionTable) -> tuple[str, ...]:
    """Return the revisions in a plain table; raises :class:`NotThere`, and QueryFailed.

    It uses COPY and not a query. The table's creator may have given it an index that calls a function,
    which the planner would evaluate as us (docs/why/adr/0035-rows-are-read-by-copy.md).
    """
    return tuple(sorted(_copied(session, table).values))


def _copied(session: Session, table: VersionTable) -> _Rows:
    sink = _Rows()
    try:
        session.query(
            f"COPY {table.quoted} (version_num) TO STDOUT (FORMAT csv, FORCE_QUOTE (version_num))", sink=sink
        )
    except QueryFailed as error:
        if error.sqlstate in ("42P01", "3F000", "42809"):
            raise NotThere from error
        raise
    return sink


# A schema that the role may not use is not in its effective search path, and its tables seem not to
# exist.
_OUT_OF_SIGHT = """
SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = %(name)s AND c.relkind IN ('r', 'p') AND NOT has_schema_privilege(n.oid, 'USAGE')
  AND (n.nspname = %(schema)s OR (%(schema)s = '' AND n.nspname = ANY(
       string_to_array(translate(%(path)s, '" ', ''), ','))))
"""


def _exists(session: Session, table: VersionTable) -> bool:
    if locate(session, table) is not None:
        return True
    hidden = []
    if table.schema or not session.user_schemas():
        asked = {"name": table.name, "schema": table.schema, "path": session.user_path}
        hidden = session.query(_OUT_OF_SIGHT, asked)
    if hidden:
        schema, user = hidden[0][0], session.facts.user
        raise AccessDenied(
            f"{user} may not use the schema {schema}, in which the version table {table.name} is.",
            next_step=f"GRANT USAGE ON SCHEMA {as_typed(schema)} TO {as_typed(user)}",
        )
    return False


_KIND = """
SELECT n.nspname::text, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %s AND c.relname = %s
"""


def place_of(session: Session, table: VersionTable) -> tuple[str, str] | None:
    """Return the table's schema (without one, the user's search_path decides) and its kind; None if it does
    not exist.
    """
    if not table.schema:
        return session.find(table.name)
    return next(((row[0], row[1]) for row in session.query(_KIND, (table.schema, table.name))), None)


def locate(session: Session, table: VersionTable) -> VersionTable | None:
    """Return the table with its schema; None if it does not exist.

    Raises :class:`AccessDenied` for a view, for example: a read of it calls functions of unknown
    owners.
    """
    found = place_of(session, table)
    if found is None:
        return None
    if found[1] != "r":
        raise AccessDenied(
            f"{table} is not a table, so it cannot be the version table; migrator does not touch it.",
            next_step=f"inspect {as_typed(found[0])}.{as_typed(table.name)} and find out who created it; then "
            "drop it",
        )
    return VersionTable(table.name, found[0])


def read_rows(session: Session, table: VersionTable) -> tuple[str, ...]:
    """Return the revisions in a version table; raises :class:`AccessDenied` if it may not be read."""
    there = locate(session, table)
    return () if there is None else _read(session, there, table)


def _read(session: Session, there: VersionTable, table: VersionTable) -> tuple[str, ...]:
    """Read the existing table ``there``; the user's name for it is ``table``."""
    try:
        rows = _copied(session, there)
    except NotThere:
        return ()
    except QueryFailed as error:
        if error.sqlstate == "42501":
            raise AccessDenied(
                f"{session.facts.user} may not read the version table {table}.",
                next_step=f"GRANT SELECT ON {table.typed} TO {as_typed(session.facts.user)}, and for what changes the"
                " schema INSERT, UPDATE, DELETE as well; USAGE ON SCHEMA too, where it has not even that",
            ) from None
        if error.sqlstate == "42703":
            raise Unversioned(
                f"{table} has no column version_num, so it is not a version table of Alembic's.",
                next_step="name this application's version table in MIGRATOR_VERSION_TABLE, or rename that table",
            ) from None
        raise
    if rows.nulls:  # Alembic ends with a TypeError, as if env.py were at fault
        raise HistoryError(
            f"{table} has a row without a revision (NULL).",
            next_step=f"in psql: DELETE FROM {there.quoted} WHERE version_num IS NULL; then run migrator again",  # noqa: S608 - text
        )
    return tuple(sorted(rows.values))
