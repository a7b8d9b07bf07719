"""Names and texts as SQL: quoted, and in the encodings of other databases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg2.extensions


def quote_literal(text: str) -> str:
    """Quote text for SQL, independent of ``standard_conforming_strings``."""
    doubled = text.replace("'", "''")
    return " E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in text else f"'{doubled}'"


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_RESERVED = """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation
    column concurrently constraint create cross current_catalog current_date current_role current_schema current_time
    current_timestamp current_user default deferrable desc distinct do else end except false fetch for foreign freeze
    from full grant group having ilike in initially inner intersect into is isnull join lateral leading left like limit
    localtime localtimestamp natural not notnull null offset on only or order outer overlaps placing primary references
    returning right select session_user similar some symmetric system_user table tablesample then to trailing true union
    unique user using variadic verbose when where window with
"""
"""Words of the grammar that need quotes as a name:
https://www.postgresql.org/docs/current/sql-keywords-appendix.html
"""


def as_typed(name: str) -> str:
    """Return a name as a user types it into SQL: quoted if needed, so that no name is a command."""
    plain = re.fullmatch("[a-z_][a-z0-9_]*", name) is not None
    return name if plain and not re.search(rf"\b{name}\b", _RESERVED) else quote_identifier(name)


def codec(encoding: str) -> str:
    """Return Python's name of a PostgreSQL encoding; without one, names pass unchanged."""
    return "utf-8" if encoding == "SQL_ASCII" else psycopg2.extensions.encodings.get(encoding, "utf-8")


def decoded(value: Any) -> Any:
    """Return a text that arrived as bytes: the shared catalogs have names in the encodings of other
    databases.
    """
    if type(value) is bytes:
        return value.decode("utf-8", "surrogateescape")
    return list(map(decoded, value)) if type(value) is list else value


class _Encoded:
    """A text that is not UTF-8, as SQL: its original bytes."""

    def __init__(self, text: str) -> None:
        self._bytes = text.encode("utf-8", "surrogateescape")

    def __conform__(self, _protocol: object) -> _Encoded:
        return self

    def getquoted(self) -> bytes:
        return b" E'" + self._bytes.replace(b"\\", b"\\\\").replace(b"'", b"''") + b"'"


def execute(cursor: Any, sql: str, parameters: Sequence[Any] | Mapping[str, Any] | None) -> None:
    """Execute a statement that may have names of :func:`decoded` in it."""
    try:
        cursor.execute(sql, parameters)
    except UnicodeEncodeError:  # before anything was sent
        if isinstance(parameters, Mapping):
            raise
        raw = [_Encoded(item) if isinstance(item, str) else item for item in parameters or ()]
        cursor.execute(sql.encode("utf-8", "surrogateescape"), raw or None)
