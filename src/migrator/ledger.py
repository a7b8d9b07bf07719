"""The ledger: the table ``migrator_ledger`` beside the version table, which says who changed the schema, when and how.

A row for each revision that was applied or reverted, written in that revision's own transaction on the migration's
own connection, and one for each run that had something to do.  Rows are only ever added.  Each is handed over as one
JSON document, which the server unpacks: drivers differ in how they write parameters, and an older migrator's table
may have fewer columns than a newer one fills.
https://www.postgresql.org/docs/current/functions-json.html#FUNCTIONS-JSON-PROCESSING (jsonb_populate_record)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.contents import LEDGER
from migrator.logs import redact
from migrator.postgres import Session, quote_identifier
from migrator.versions import VersionTable

NAME = LEDGER

APPLIED, REVERTED, STAMPED, UNSTAMPED = "applied", "reverted", "stamped", "unstamped"
FOUND, GONE = "found", "gone"
"""Applied, or reverted, by something else than migrator: noticed by the next run."""
ACCEPTED = "accepted"
"""An edited file was accepted by `migrator repair --accept`."""
BEGUN = "begun"
"""A run begins to apply; one without a row of `RUN` died."""
RUN = "run"
SCHEMA = "schema"
"""What the schema is after a run that changed it, or as `migrator repair --accept-schema` found it; see drift.py."""
SCHEMA_ROW = -2
"""Its row's number; that of :data:`BEGUN` is -1, that of :data:`RUN` 0."""

UNDONE = (REVERTED, UNSTAMPED, GONE)

_CREATE = """
CREATE TABLE {table} (
    run_id text NOT NULL,
    number integer NOT NULL,
    at timestamptz NOT NULL,
    event text NOT NULL,
    version_table text NOT NULL,
    revision text,
    message text,
    file text,
    checksum text,
    syntax text,
    parents text[],
    depends_on text[],
    min_compatible text,
    rows_before text[],
    rows_after text[],
    seconds double precision,
    backup_id text,
    command text,
    code integer,
    outcome text,
    digest text,
    actor text,
    role text,
    host text,
    migrator_version text,
    image_version text,
    search_path text,
    way_back text[],
    no_way_back text,
    details jsonb,
    PRIMARY KEY (run_id, version_table, number)
)
"""

_INSERT = (
    "INSERT INTO {table} SELECT r.* FROM jsonb_array_elements(CAST({rows} AS jsonb)) AS d,"
    " jsonb_populate_record(NULL::{table}, d || jsonb_build_object("
    "'at', clock_timestamp() - coalesce(CAST(d->>'age' AS float8), 0) * interval '1 second',"
    " 'role', current_user)) AS r RETURNING txid_current()::text"
)


@dataclass(frozen=True)
class Author:
    """Who a row is by: the same in every row of a run."""

    run_id: str
    actor: str
    host: str
    migrator_version: str
    image_version: str

    def row(self, event: str, number: int, version_table: VersionTable, **values: Any) -> dict[str, Any]:
        """Return a row, ready for :func:`insertion`."""
        return {
            "run_id": self.run_id,
            "actor": self.actor,
            "host": self.host,
            "migrator_version": self.migrator_version,
            "image_version": self.image_version,
            "event": event,
            "number": number,
            "version_table": version_table.name,
            **values,
        }


def beside(version_table: VersionTable, ask: Callable[[str], Any]) -> VersionTable:
    """Return the ledger's name, with the schema that the version table is in; ``ask`` returns one value."""
    literal = version_table.quoted.replace("'", "''")
    schema = version_table.schema or ask(
        "SELECT n.nspname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"  # noqa: S608 - quoted
        f" WHERE c.oid = to_regclass('{literal}')"
    )
    return VersionTable(NAME, schema or "")


def exists(ledger: VersionTable, ask: Callable[[str], Any]) -> bool:
    """Whether the ledger is there."""
    literal = ledger.quoted.replace("'", "''")
    return bool(ask(f"SELECT to_regclass('{literal}') IS NOT NULL"))


def creation(ledger: VersionTable) -> str:
    """Return the statement that makes the ledger."""
    return _CREATE.format(table=ledger.quoted)


def insertion(ledger: VersionTable, rows: Iterable[Mapping[str, Any]], *, unicode: bool) -> str:
    """Return the statement that adds rows, without secrets; ``unicode`` is the answer to :data:`TAKES_UNICODE`."""
    rows = list(rows)
    document = json.dumps(rows, ensure_ascii=False, default=str)
    if _needs_cleaning(document, unicode):
        document = json.dumps([_clean(row, unicode) for row in rows], ensure_ascii=False, default=str)
    return _INSERT.format(table=ledger.quoted, rows=literal(document))


def _needs_cleaning(document: str, unicode: bool) -> bool:
    """Whether anything in it may not be written as it is: looked at as a whole, which is ten times as fast."""
    if "\\u0000" in document or not (unicode or document.isascii()):
        return True
    try:
        document.encode()
    except UnicodeEncodeError:  # half a character
        return True
    text = _unescaped(document)
    return redact(text) != text


def _unescaped(document: str) -> str:
    """Return JSON with the characters that it escapes as they are, so that a secret with one of them is found."""
    if "\\" not in document:
        return document
    return _ESCAPED.sub(lambda found: _SHORT.get(found[0]) or str(json.loads(f'"{found[0]}"')), document)


TAKES_UNICODE = (
    "SELECT current_setting('server_encoding') = 'UTF8'"
    " AND current_setting('client_encoding') IN ('UTF8', 'UNICODE')"
)
"""Whether the database takes any character; in one that does not, those beyond ASCII are written as ``\\xe9``."""


def _clean(value: Any, unicode: bool, key: str = "") -> Any:
    """Return a value as jsonb takes it, and without a secret in what people wrote; ``key`` is its column."""
    if isinstance(value, Mapping):
        return {name: _clean(item, unicode, key or name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, unicode, key) for item in value]
    if not isinstance(value, str):
        return value
    encoding, errors = ("utf-8", "replace") if unicode else ("ascii", "backslashreplace")
    text = value.encode(encoding, errors).decode(encoding).replace("\0", "")
    return redact(text) if key in _WRITTEN_BY_PEOPLE else text


_ESCAPED = re.compile(r"\\u[0-9a-fA-F]{4}|\\.")
_SHORT = {r"\"": '"', r"\\": "\\", r"\n": "\n"}
_WRITTEN_BY_PEOPLE = frozenset({"actor", "command", "details", "host", "message", "no_way_back"})
"""Columns that may repeat a secret; one in ``way_back`` keeps the SQL out, for half of it would do harm."""


def literal(text: str) -> str:
    """Write a text for SQL, whatever it holds, and whatever ``standard_conforming_strings`` says.

    https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-DOLLAR-QUOTING
    """
    tag = "$migrator$"
    while tag[:-1] in text:
        tag = f"{tag[:-1]}_$"
    return f"{tag}{text}{tag}"


def append(session: Session, version_table: VersionTable, rows: Sequence[Mapping[str, Any]]) -> int:
    """Add rows on migrator's own session, and make the ledger first where it is missing; raises QueryFailed.

    A ledger that is made here belongs to the version table's owner, for the migration's connection must be able to
    write it too, and may have changed its role.  Returns the id of the transaction.
    """
    ledger = beside(version_table, session.value)
    if not exists(ledger, session.value):
        session.query(creation(ledger))
        _give_toowner_of(session, version_table, ledger)
    with session.as_role(owner_of(session, ledger, unless_may="INSERT")):
        return int(session.value(insertion(ledger, rows, unicode=bool(session.value(TAKES_UNICODE)))))


def _give_toowner_of(session: Session, version_table: VersionTable, ledger: VersionTable) -> None:
    owner = session.value(
        "SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = to_regclass(%s)"
        " AND relowner <> current_user::regrole AND pg_has_role(relowner, 'USAGE')",
        (version_table.quoted,),
    )
    if owner:
        session.query(f"ALTER TABLE {ledger.quoted} OWNER TO {quote_identifier(owner)}")


def owner_of(session: Session, ledger: VersionTable, *, unless_may: str) -> str:
    """Return the owner, whom the login can become, where it may not itself do this; else an empty string."""
    owner = session.value(
        "SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = to_regclass(%s)"
        " AND NOT has_table_privilege(oid, %s) AND pg_has_role(relowner, 'MEMBER')",
        (ledger.quoted, unless_may),
    )
    return owner or ""
