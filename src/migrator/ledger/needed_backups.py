"""The backups that the ledgers need: all ledgers count, also those that others can write.

A row that others write can only keep a backup. It must not hold up a run either. So such a ledger is
read by one scan, with a limit of rows, and all such ledgers share a limit of seconds. Beyond that it is
not known which backups are needed, and all backups stay (docs/why/adr/0048).
"""

from __future__ import annotations

import time

from migrator.errors import AccessDenied, BackupFailed
from migrator.ledger import sql as questions
from migrator.ledger.queries import Ledger, examine, ledgers, query_ledger
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable

MOST_ROWS = 500_000
"""The most rows that are read of a ledger that others can write."""
SECONDS = 5.0
"""The time for all ledgers that others can write, with the query for who can write them."""
_LONGEST = 255
"""Bytes of a backup's id, which is the name of a file."""
_CANCELED = "57014"


def read_needed_backups(session: Session, role: str) -> frozenset[str]:
    """Return the ids of the backups that lead back from where the database is, by all of its ledgers.

    ``role`` is MIGRATOR_ROLE.  Raises :class:`BackupFailed` where one cannot be read, or not within the bounds.
    """
    needed: set[str] = set()
    left = SECONDS
    for table in ledgers(session):
        began = time.monotonic()
        try:
            ledger = examine(session, table, None, role, limits=_within(table, left))
            if not ledger.holes:
                sql = questions.NEEDED_BACKUPS.of(ledger.indexed)
                needed |= _read(ledger, sql, 2**62, 2**30, indexed=ledger.indexed)
                continue
            left -= time.monotonic() - began
            began = time.monotonic()
            needed |= _read_of_others(ledger, left)
            left -= time.monotonic() - began
        except (QueryFailed, AccessDenied) as error:
            raise _unknown(table, error) from error
    return frozenset(needed)


def _read_of_others(ledger: Ledger, seconds: float) -> set[str]:
    """Read a ledger that others can write by one scan, whatever indexes it has: it may have as many names as rows."""
    sql = _within(ledger.table, seconds) + questions.NEEDED_BACKUPS.scan
    found = _read(ledger, sql, MOST_ROWS + 1, _LONGEST)
    if None in found:
        raise _too_much(ledger.table, f"has more than {MOST_ROWS} rows, and other roles can write it")
    return found


def _read(ledger: Ledger, sql: str, limit: int, longest: int, *, indexed: bool = False) -> set[str]:
    sql = sql.replace("{limit}", str(limit)).replace("{longest}", str(longest))
    return {row[0] for row in query_ledger(ledger.session, ledger.table, sql, (), indexed=indexed)}


def _within(table: VersionTable, seconds: float) -> str:
    """Return the statement that has the server stop after that time, also where it waits for a lock."""
    if seconds <= 0:
        raise _too_much(table, "was not read: ledgers that other roles can write took all the time")
    return f"SET LOCAL statement_timeout = {max(1, round(seconds * 1000))}; "


def _unknown(table: VersionTable, error: QueryFailed | AccessDenied) -> Exception:
    if isinstance(error, QueryFailed):
        if error.lost:
            return error
        if error.sqlstate == _CANCELED:
            return _too_much(table, f"was not read within {SECONDS:.0f} s")
    return BackupFailed(
        f"The ledger cannot be read, so it is not known which backups it needs: {str(error).rstrip('.')}.",
        next_step="grant the role SELECT on migrator_ledger, and prune again",
    )


def _too_much(table: VersionTable, what: str) -> BackupFailed:
    return BackupFailed(
        f"The ledger {table} {what}, so it is not known which backups are needed; no backup was removed.",
        next_step=f"look at who owns and locks {table.typed}; drop it if it is not needed, or name its owner with"
        " MIGRATOR_ROLE; then prune again",
    )
