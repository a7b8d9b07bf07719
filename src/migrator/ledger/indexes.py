"""The ledger's indexes: one for each question, so that a command does not get slower every year.

They are created with the ledger, and added to an older one by its owner. Without them each question
reads the whole ledger. If another relation has such a name, there is no index, and no run fails
(docs/why/adr/0048).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from migrator.ledger.permissions import OWNER
from migrator.postgres.errors import QueryFailed
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable

log = logging.getLogger("migrator.ledger")

FAILED = (
    "(code OPERATOR(pg_catalog.=) 0 OR pg_catalog.jsonb_extract_path(details, 'failed') IS NOT NULL)"
    " AND event OPERATOR(pg_catalog.=) 'run'"
)
VISITED = (
    "pg_catalog.jsonb_extract_path(details, 'version_tables') IS NOT NULL"
    " AND event OPERATOR(pg_catalog.=) 'run'"
)
BACKUP = (
    "backup_id IS NOT NULL AND (event OPERATOR(pg_catalog.<>) 'run' OR code IS NULL OR"
    " code OPERATOR(pg_catalog.<>) 0)"
)
LEFT_BY = "pg_catalog.jsonb_extract_path_text(details, 'revision')"
"""The revision of a row `partial`."""

PLACE = "coalesce(id, CAST('9223372036854775807' AS pg_catalog.int8))"
"""The order of the rows: a row that an older migrator left without a number is newer than all others."""

_PLACES = f"{PLACE}, at, number"
_NEWEST = "id, at, number"
DEFINITIONS = {
    "migrator_ledger_newest_idx": f"(version_table, {_PLACES})",
    "migrator_ledger_event_idx": f"(version_table, event, {_NEWEST})",
    "migrator_ledger_revision_idx": f"(version_table, revision, {_NEWEST}) WHERE revision IS NOT NULL",
    "migrator_ledger_partial_idx": f"(version_table, {LEFT_BY}, {_PLACES})"
    " WHERE event OPERATOR(pg_catalog.=) 'partial'",
    "migrator_ledger_failed_idx": f"(version_table, {_NEWEST}) WHERE {FAILED}",
    "migrator_ledger_visited_idx": f"(version_table, {_NEWEST}) WHERE {VISITED}",
    "migrator_ledger_backup_idx": f"(version_table, {_PLACES}) WHERE {BACKUP}",
    "migrator_ledger_schema_idx": f"({_NEWEST}) WHERE event OPERATOR(pg_catalog.=) 'schema'",
}
"""By name, what follows ``ON table``."""

_THERE = """
SELECT {what} FROM pg_catalog.pg_index i
  JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) i.indexrelid
 WHERE i.indrelid OPERATOR(pg_catalog.=) CAST(pg_catalog.to_regclass({ledger}) AS pg_catalog.oid)
   AND i.indisvalid AND CAST(c.relname AS pg_catalog.text) OPERATOR(pg_catalog.=) ANY (ARRAY[{names}])
"""


def question(ledger: VersionTable) -> str:
    """Return the query whether a ledger has all of them; it reads only catalogs.

    The ledger's owner can give another index such a name: then the answers are right, and may be slow.
    """
    return _there(ledger, f"pg_catalog.count(*) OPERATOR(pg_catalog.=) {len(DEFINITIONS)}")


def _there(ledger: VersionTable, what: str) -> str:
    names = ", ".join(map(quote_literal, DEFINITIONS))
    return _THERE.format(what=what, ledger=quote_literal(ledger.quoted), names=names)


def statements(ledger: VersionTable) -> Iterator[tuple[str, str]]:
    """Yield the name of each index, and the statement that creates it if nothing has this name."""
    for name, definition in DEFINITIONS.items():
        # The name takes no schema: an index is created in the schema of its table.
        yield name, f"CREATE INDEX IF NOT EXISTS {quote_identifier(name)} ON {ledger.quoted} {definition}"


def complete(session: Session, ledger: VersionTable) -> None:
    """Create the indexes that an older ledger lacks, as its owner, if the login can become it.

    Others can read the ledger meanwhile; a run that writes it waits. If the lock takes two seconds, or one
    index a minute, the run goes on without it, and the next run tries again. Raises QueryFailed if the
    connection is lost.
    """
    try:
        there = _names(session, ledger)
        missing = [statement for name, statement in statements(ledger) if name not in there]
        owner = session.value(OWNER, (ledger.quoted,)) if missing else None
        if not owner:
            return
        with session.as_role(owner):
            for statement in missing:
                session.query(
                    f"SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '1min'; {statement}"
                )
        came = _names(session, ledger) - there
        if came:
            log.info("the ledger %s has new indexes: %s", ledger, ", ".join(sorted(came)))
    except QueryFailed as error:
        if error.lost:
            raise
        log.info("the ledger %s lacks indexes, which could not be created: %s", ledger, error.text)


def _names(session: Session, ledger: VersionTable) -> set[str]:
    return {name for (name,) in session.query(_there(ledger, "CAST(c.relname AS pg_catalog.text)"))}
