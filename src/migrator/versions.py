"""The version table: which one it is, and the revisions it holds, read without Alembic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from migrator.errors import AccessDenied, SettingsError
from migrator.postgres import QueryFailed, Session, quote_identifier

_SYSTEM = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"

_VERSION_TABLES = f"""
SELECT n.nspname::text, c.relname::text
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'version_num' AND NOT a.attisdropped
WHERE c.relkind = 'r' AND {_SYSTEM} AND format_type(a.atttypid, NULL) IN ('character varying', 'text')
ORDER BY n.nspname <> current_schema(), n.nspname, c.relname
"""  # noqa: S608 - constants only


@dataclass(frozen=True)
class VersionTable:
    """The name of the version table, and its schema where ``env.py`` names one."""

    name: str = "alembic_version"
    schema: str = ""

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name

    @property
    def quoted(self) -> str:
        """Return the name for SQL text."""
        name = quote_identifier(self.name)
        return f"{quote_identifier(self.schema)}.{name}" if self.schema else name


class KnowsRevisions(Protocol):
    """What is needed of the history to recognise its version table."""

    def version_table(self) -> VersionTable | None:
        """Return the table that ``env.py`` names in so many words, or None."""

    def known(self) -> frozenset[str]:
        """Return the ids of all revisions."""


def read_version(
    session: Session, history: KnowsRevisions, setting: str = ""
) -> tuple[VersionTable | None, tuple[str, ...]]:
    """Return the version table that is there, or None, and its revisions.

    Its name comes from the setting, else from what ``env.py`` says in so many words, else from the tables
    that hold a revision of this history.  Raises :class:`SettingsError` where several do.
    """
    if setting:
        schema, _, name = setting.rpartition(".")
        named: VersionTable | None = VersionTable(name, schema)
    else:
        named = history.version_table()
    if named is not None:
        return _read_named(session, named)
    known = history.known()
    found = []
    for schema, name in session.query(_VERSION_TABLES):
        table = VersionTable(name, schema)
        rows = read_rows(session, table)
        if known & set(rows):
            found.append((table, rows))
    if len(found) > 1:
        names = ", ".join(str(table) for table, _ in found)
        raise SettingsError(
            [f"env.py computes its version table, and several hold this history's revisions: {names}"],
            next_step="name the right one with MIGRATOR_VERSION_TABLE",
        )
    return found[0] if found else (None, ())


def _read_named(session: Session, table: VersionTable) -> tuple[VersionTable | None, tuple[str, ...]]:
    if session.value("SELECT to_regclass(%s) IS NULL", (table.quoted,)):
        return None, ()
    return table, read_rows(session, table)


def read_rows(session: Session, table: VersionTable) -> tuple[str, ...]:
    """Return the revisions in a version table; raises :class:`AccessDenied` where it may not be read."""
    try:
        rows = session.query(f"SELECT version_num::text FROM {table.quoted} ORDER BY 1")  # noqa: S608 - quoted
    except QueryFailed as error:
        if error.sqlstate == "42501":
            raise AccessDenied(
                f"{session.facts.user} may not read the version table {table}.",
                next_step=f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {session.facts.user}",
            ) from None
        if error.sqlstate == "42P01":  # dropped since it was listed
            return ()
        raise
    return tuple(row[0] for row in rows)
