"""Read the ledger as an auditor does, and see that it agrees with the version table."""

from __future__ import annotations

from collections.abc import Iterable

from migrator.ledger.table import APPLIED, FOUND, GONE, REVERTED, STAMPED, UNSTAMPED
from tests.support.servers import Database

_CAME = {APPLIED, FOUND, STAMPED}
_WENT = {REVERTED, GONE, UNSTAMPED}


def events(
    database: Database, table: str = "migrator_ledger", version_table: str = "alembic_version"
) -> list[tuple[str, str]]:
    """Return (event, revision) of every row about a revision, in the order in which they were written."""
    rows = database.psql(
        f"SELECT event, revision FROM {table} WHERE version_table = %s AND revision IS NOT NULL"
        " ORDER BY at, number",
        (version_table,),
    )
    return [(event, revision) for event, revision in rows]


def runs(database: Database, table: str = "migrator_ledger") -> list[tuple[str, str]]:
    """Return (command, outcome) of every run, in order."""
    rows = database.psql(f"SELECT command, outcome FROM {table} WHERE event = 'run' ORDER BY at")
    return [(command, outcome) for command, outcome in rows]


def has_ledger(database: Database, table: str = "migrator_ledger") -> bool:
    """Whether there is a ledger."""
    return bool(database.psql("SELECT to_regclass(%s) IS NOT NULL", (table,))[0][0])


def standing(events: Iterable[tuple[str, str]]) -> set[str]:
    """Return the revisions that stand after these events; each must make sense after those before it."""
    stands: set[str] = set()
    for event, revision in events:
        if event in _CAME:
            assert revision not in stands, f"{revision} came twice"
            stands.add(revision)
        elif event in _WENT:
            assert revision in stands, f"{revision} went and was not there"
            stands.remove(revision)
    return stands


def agrees(database: Database, wanted: Iterable[str], **tables: str) -> None:
    """Assert that exactly these revisions stand in the ledger."""
    assert standing(events(database, **tables)) == set(wanted)
