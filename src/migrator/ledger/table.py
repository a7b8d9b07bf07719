"""The ledger: the table ``migrator_ledger`` beside the version table. It records who changed the schema, when
and how.

It has a row for each applied or reverted revision, written in that revision's own transaction on the
migration's own connection, and one for each run that had work to do. Rows are only added.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from migrator.ledger import indexes
from migrator.ledger.permissions import OWNER, holes, refusal, revocations
from migrator.postgres.errors import QueryFailed
from migrator.postgres.queries import LEDGER
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.runtime.logs import redact

log = logging.getLogger("migrator.ledger")

NAME = LEDGER

APPLIED, REVERTED, STAMPED, UNSTAMPED = "applied", "reverted", "stamped", "unstamped"
FOUND, GONE = "found", "gone"
"""Applied, or reverted, without migrator: noticed by the next run."""
ACCEPTED = "accepted"
"""An edited file was accepted by `migrator repair --accept`."""
PARTIAL = "partial"
"""A part of a revision is committed, or about to be, before its version row."""
BEGUN = "begun"
"""A run is about to apply; a run without a row of `RUN` died."""
RUN = "run"
SCHEMA = "schema"
"""The schema after a run that changed it, or as `migrator repair --accept-schema` found it; see drift.py."""
SCHEMA_ROW = -2
"""Its row's number; that of :data:`BEGUN` is -1, that of :data:`RUN` 0."""

UNDONE = (REVERTED, UNSTAMPED, GONE)

_CREATE = """
CREATE TABLE {table} (
    run_id pg_catalog.text NOT NULL,
    number integer NOT NULL,
    at pg_catalog.timestamptz NOT NULL,
    event pg_catalog.text NOT NULL,
    version_table pg_catalog.text NOT NULL,
    revision pg_catalog.text,
    message pg_catalog.text,
    file pg_catalog.text,
    checksum pg_catalog.text,
    syntax pg_catalog.text,
    parents pg_catalog.text[],
    depends_on pg_catalog.text[],
    min_compatible pg_catalog.text,
    rows_before pg_catalog.text[],
    rows_after pg_catalog.text[],
    seconds double precision,
    backup_id pg_catalog.text,
    command pg_catalog.text,
    code integer,
    outcome pg_catalog.text,
    digest pg_catalog.text,
    actor pg_catalog.text,
    role pg_catalog.text,
    host pg_catalog.text,
    migrator_version pg_catalog.text,
    image_version pg_catalog.text,
    search_path pg_catalog.text,
    way_back pg_catalog.text[],
    no_way_back pg_catalog.text,
    details pg_catalog.jsonb,
    id bigint,
    PRIMARY KEY (run_id, version_table, number)
)
"""

OLDER = "(SELECT CAST(NULL AS pg_catalog.int8) AS id) AS older"
"""The source of ``id`` for a table of an older migrator, which has no such column; see docs/why/adr/0041.

In a subquery over the table, ``id`` is the table's column if it has one, else this one.
"""
NEWEST_FIRST = "id DESC NULLS FIRST, at DESC, number DESC"
"""The order of the rows: a row without an ``id`` comes from an older migrator, and is newer than all rows
with one.
"""

COLUMNS = frozenset(re.findall(r"^    ([a-z_]+) ", _CREATE, re.MULTILINE))
"""Those of a ledger that is made today."""

_WRITTEN = """
SELECT pg_catalog.string_agg(CAST(attname AS pg_catalog.text), ' ') FROM pg_catalog.pg_attribute
 WHERE attrelid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({table}) AS pg_catalog.oid)
   AND attnum OPERATOR(pg_catalog.>) 0 AND NOT attisdropped
"""
_INSERT = (
    "INSERT INTO {table} ({names}) VALUES {rows} RETURNING CAST(pg_catalog.txid_current() AS pg_catalog.text)"
)
# The new rows come after all others.
_NEXT = """((SELECT coalesce((SELECT id FROM ONLY {table} WHERE id IS NOT NULL ORDER BY id DESC LIMIT 1), 0))
    OPERATOR(pg_catalog.+) {nth})"""
_BY_THE_SERVER = {"at": "pg_catalog.clock_timestamp()", "role": "session_user"}

_UNNUMBERED = f"SELECT EXISTS (SELECT FROM ONLY {{table}} WHERE id IS NULL) FROM {OLDER}"  # noqa: S608 - quoted

# One message, and so one transaction: rows are numbered in their old order, once, or not at all.
_NUMBER = """
SET LOCAL lock_timeout = '2s';
ALTER TABLE {table} ADD COLUMN IF NOT EXISTS id bigint;
UPDATE ONLY {table} AS t SET id = n.id FROM (
    SELECT l.ctid AS place, pg_catalog.row_number() OVER (ORDER BY l.at, l.number) OPERATOR(pg_catalog.+)
        coalesce((SELECT pg_catalog.max(m.id) FROM ONLY {table} m), 0) AS id
    FROM ONLY {table} l WHERE l.id IS NULL) AS n
WHERE t.ctid OPERATOR(pg_catalog.=) n.place;
CREATE INDEX IF NOT EXISTS migrator_ledger_id_idx ON {table} (id)
"""


@dataclass(frozen=True)
class Author:
    """The author of a row: the same in every row of a run."""

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


class Finds(Protocol):
    """A connection that knows where the user's search_path finds a relation."""

    def find(self, name: str) -> tuple[str, str] | None:
        """Return its schema and its kind."""


def beside(version_table: VersionTable, connection: Finds) -> VersionTable:
    """Return the ledger's name, with the schema that the version table is in."""
    found = None if version_table.schema else connection.find(version_table.name)
    return VersionTable(NAME, found[0] if found else version_table.schema)


def exists(ledger: VersionTable, ask: Callable[[str], Any]) -> bool:
    """Whether the ledger is there; without a schema in its name it is not."""
    if not ledger.schema:
        return False
    return bool(ask(f"SELECT pg_catalog.to_regclass({quote_literal(ledger.quoted)}) IS NOT NULL"))


def create(ledger: VersionTable, ask: Callable[[str], Any]) -> None:
    """Create the ledger so that only its owner can write it, with any default privileges.

    It runs in a transaction: before its end, no other session sees the table.
    """
    ask(_CREATE.format(table=ledger.quoted))
    ask(f"CREATE INDEX ON {ledger.quoted} (id)")
    for _, statement in indexes.statements(ledger):
        ask(statement)
    close_to_others(ledger, ask)


def close_to_others(ledger: VersionTable, ask: Callable[[str], Any]) -> None:
    """Revoke all grants on the ledger except for reading, as its owner; else do nothing."""
    statements = revocations(ledger, holes(ask, ledger, None))
    if statements and ask(_OWNED.format(table=quote_literal(ledger.quoted))):
        for statement in statements:
            if not statement.startswith("SET ROLE"):  # grants by others need manual action
                ask(statement)


def is_open(ledger: VersionTable, ask: Callable[[str], Any]) -> bool | None:
    """Tell whether another role than its owner may do more than read the ledger; None if it does not exist."""
    return ask(_OPEN.format(table=quote_literal(ledger.quoted))) if ledger.schema else None


_OPEN = """
SELECT EXISTS (SELECT FROM pg_catalog.aclexplode(c.relacl) a
                WHERE a.privilege_type OPERATOR(pg_catalog.<>) 'SELECT'
                  AND a.grantee OPERATOR(pg_catalog.<>) c.relowner)
    OR EXISTS (SELECT FROM pg_catalog.pg_attribute t WHERE t.attrelid OPERATOR(pg_catalog.=) c.oid
                  AND t.attacl IS NOT NULL)
  FROM pg_catalog.pg_class c
 WHERE c.oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({table}) AS pg_catalog.oid)
"""

_OWNED = (
    "SELECT pg_catalog.pg_has_role(relowner, 'USAGE') FROM pg_catalog.pg_class"
    " WHERE oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({table}) AS pg_catalog.oid)"
)


def written(ledger: VersionTable, ask: Callable[[str], Any]) -> frozenset[str]:
    """Return the columns that new rows fill: an older migrator's ledger may have fewer.

    While a row has no ``id``, new rows get none either.
    """
    found = COLUMNS & set((ask(_WRITTEN.format(table=quote_literal(ledger.quoted))) or "").split())
    unnumbered = "id" in found and ask(_UNNUMBERED.format(table=ledger.quoted))
    return found - {"id"} if unnumbered else found


def insertion(
    ledger: VersionTable,
    rows: Iterable[Mapping[str, Any]],
    columns: frozenset[str] = COLUMNS,
    *,
    unicode: bool,
) -> str:
    """Return the statement that adds rows, without secrets.

    ``columns`` is the answer of :func:`written`, ``unicode`` that to :data:`TAKES_UNICODE`.  Without parameters, for
    drivers differ in how they write them.
    """
    rows = list(rows)
    if _needs_cleaning(json.dumps(rows, ensure_ascii=False, default=str), unicode):
        rows = [_clean(row, unicode) for row in rows]
    given = {name for row in rows for name, value in row.items() if value is not None}
    names = sorted(columns & (given | {"at", "role", "id"}))
    lines = [
        ", ".join(
            _expression(name, {**row, "id": _NEXT.format(table=ledger.quoted, nth=nth)}) for name in names
        )
        for nth, row in enumerate(rows, start=1)
    ]
    values = ", ".join(f"({line})" for line in lines)
    return _INSERT.format(table=ledger.quoted, names=", ".join(names), rows=values)


def _expression(name: str, row: Mapping[str, Any]) -> str:
    """Return what a column of a new row gets, in SQL."""
    value = row.get(name)
    if name == "id" or name in _BY_THE_SERVER:
        return _BY_THE_SERVER.get(name) or str(value)
    if value is None:
        return "NULL"
    if isinstance(value, list | tuple):
        return literal("{" + ",".join(_element(str(item)) for item in value) + "}")
    if isinstance(value, Mapping):
        return literal(json.dumps(value, ensure_ascii=False, default=str))
    return literal(str(value))


def _element(text: str) -> str:
    """Quote an element of an array: https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO"""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _needs_cleaning(document: str, unicode: bool) -> bool:
    """Tell whether some text in it must be changed first; one check of the whole is ten times as fast."""
    if "\\u0000" in document or not (unicode or document.isascii()):
        return True
    try:
        document.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return True
    text = _unescaped(document)
    return redact(text) != text


def _unescaped(document: str) -> str:
    """Return JSON with its escaped characters unescaped, so that a secret with one of them is found."""
    if "\\" not in document:
        return document
    return _ESCAPED.sub(lambda found: _SHORT.get(found[0]) or str(json.loads(f'"{found[0]}"')), document)


TAKES_UNICODE = (
    "SELECT pg_catalog.current_setting('server_encoding') OPERATOR(pg_catalog.=) 'UTF8'"
    " AND (pg_catalog.current_setting('client_encoding') OPERATOR(pg_catalog.=) 'UTF8'"
    " OR pg_catalog.current_setting('client_encoding') OPERATOR(pg_catalog.=) 'UNICODE')"
)
"""Whether the database takes any character; if not, characters beyond ASCII are written as ``\\xe9``."""


def _clean(value: Any, unicode: bool, key: str = "") -> Any:
    """Return a value for jsonb, and without a secret in text that people wrote; ``key`` is its column."""
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
"""Columns that may repeat a secret. A secret in ``way_back`` keeps the SQL out: half of it would do harm."""


def literal(text: str) -> str:
    """Write any text for SQL, independent of ``standard_conforming_strings``.

    https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-DOLLAR-QUOTING
    """
    tag = "$migrator$"
    while tag[:-1] in text:
        tag = f"{tag[:-1]}_$"
    return f"{tag}{text}{tag}"


def append(
    session: Session, version_table: VersionTable, rows: Sequence[Mapping[str, Any]], *, within: bool = False
) -> int:
    """Add rows on migrator's own session, and create the ledger first if it does not exist.

    A new ledger belongs to the version table's owner, because the migration's connection must also be
    able to write it, and may have changed its role. ``within`` a transaction of the caller, nothing
    ends that transaction. Returns the id of the transaction. Raises QueryFailed, and
    :class:`AccessDenied` if a write would run the code of an untrusted role.
    """
    ledger = beside(version_table, session)
    if not exists(ledger, session.value):
        _create(session, version_table, ledger, within=within)
    found = holes(session.value, ledger, version_table)
    if any(hole.kind not in ("grant", "member") for hole in found):
        raise refusal(ledger, found)
    role = owner_of(session, ledger, unless_may=("INSERT", "SELECT"))
    if not within:
        _number(session, ledger, role)
    with session.as_role(role):
        columns, unicode = written(ledger, session.value), bool(session.value(TAKES_UNICODE))
        return int(session.value(insertion(ledger, rows, columns, unicode=unicode)))


# Rows that record an accepted schema stay, like all others.
_PRUNE = f"""
DELETE FROM ONLY {{table}} WHERE event OPERATOR(pg_catalog.=) '{SCHEMA}' AND message IS NULL
   AND id OPERATOR(pg_catalog.<) (
    SELECT pg_catalog.min(id) FROM (SELECT id FROM ONLY {{table}} WHERE event OPERATOR(pg_catalog.=) '{SCHEMA}'
        AND id IS NOT NULL ORDER BY id DESC LIMIT {{most}}) AS newest)
"""  # noqa: S608 - constants, the table's quoted name, and a number


def prune(session: Session, version_table: VersionTable, keep: int) -> None:
    """Remove all schema snapshots but the newest and ``keep`` before it; without the privilege they stay."""
    ledger = beside(version_table, session)
    try:
        with session.as_role(owner_of(session, ledger, unless_may=("DELETE", "SELECT"))):
            session.query(_PRUNE.format(table=ledger.quoted, most=keep + 1))
    except QueryFailed as error:
        if error.lost:
            raise
        log.info("the ledger keeps its old schema snapshots: %s", error.text)


def _create(session: Session, version_table: VersionTable, ledger: VersionTable, *, within: bool) -> None:
    try:
        session.query("SELECT" if within else "BEGIN")
        create(ledger, session.value)
        _give_to_owner_of(session, version_table, ledger)
        session.query("SELECT" if within else "COMMIT")
    except QueryFailed:
        if not within and not session.closed:
            session.query("ROLLBACK")
        raise


def _number(session: Session, ledger: VersionTable, reader: str) -> None:
    """Number the rows of an older migrator in their old order; without the privilege, that order continues."""
    try:
        with session.as_role(reader):
            if not session.value(_UNNUMBERED.format(table=ledger.quoted)):
                return
        with session.as_role(session.value(OWNER, (ledger.quoted,)) or ""):
            session.query(_NUMBER.format(table=ledger.quoted))
    except QueryFailed as error:
        if error.lost:
            raise
        log.info("the ledger's rows cannot be numbered, so they are ordered by time: %s", error.text)


def _give_to_owner_of(session: Session, version_table: VersionTable, ledger: VersionTable) -> None:
    owner = session.value(
        "SELECT CAST(pg_catalog.pg_get_userbyid(relowner) AS pg_catalog.text) FROM pg_catalog.pg_class"
        " WHERE oid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass(%s) AS pg_catalog.oid)"
        " AND pg_catalog.pg_get_userbyid(relowner) OPERATOR(pg_catalog.<>) current_user"
        " AND pg_catalog.pg_has_role(relowner, 'USAGE')",
        (VersionTable(version_table.name, ledger.schema).quoted,),
    )
    if owner:
        session.query(f"ALTER TABLE {ledger.quoted} OWNER TO {quote_identifier(owner)}")


def owner_to_be(session: Session, table: VersionTable) -> str:
    """Return the table's owner, if it is another role that the login can become; else an empty string."""
    another = f"{OWNER} AND pg_catalog.pg_get_userbyid(relowner) OPERATOR(pg_catalog.<>) session_user"
    return session.value(another, (table.quoted,)) or ""


def owner_of(session: Session, ledger: VersionTable, *, unless_may: Sequence[str]) -> str:
    """Return the owner that the login can become, if the login itself may not do all this; else an empty
    string.
    """
    may = " AND ".join("pg_catalog.has_table_privilege(oid, %s)" for _ in unless_may)
    return session.value(f"{OWNER} AND NOT ({may})", (ledger.quoted, *unless_may)) or ""
