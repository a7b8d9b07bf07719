"""What must be true whatever happened: promise 2 of the design, and what the exit code says."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

from migrator.outcome import ExitCode
from tests.chaos.injections import SIGNALS, Injection
from tests.chaos.world import IDS, SIGNS
from tests.support.outcomes import left_behind
from tests.support.servers import Database

UNCHANGED = frozenset(
    {
        ExitCode.UNREACHABLE,
        ExitCode.INTERRUPTED,
        ExitCode.BACKUP_FAILED,
        ExitCode.ROLLED_BACK,
        ExitCode.BLOCKED,
    }
)
"""Codes that say that the database is as it was."""


class Broken(AssertionError):
    """An invariant does not hold."""


def must(holds: object, what: str) -> None:
    """Raise :class:`Broken` unless it holds."""
    if not holds:
        raise Broken(what)


def position(database: Database, *, whole: bool) -> int:
    """Return how many revisions alembic_version stands for, after checking that all else agrees with it.

    whole: that r006 leaves no transaction, so that what it counts is there with its version row alone.
    """
    rows = [row[0] for row in database.psql("SELECT version_num FROM alembic_version")]
    must(len(rows) == 1 and rows[0] in IDS, f"alembic_version holds {rows}")
    reached = IDS.index(rows[0]) + 1
    there = Counter(row[0] for row in database.psql("SELECT revision FROM effects"))
    must(
        there == Counter(IDS[:reached]),
        f"at {rows[0]}, but the effects are those of {sorted(there.elements())}",
    )
    for revision, sign in SIGNS.items():
        expected = IDS.index(revision) < reached
        must(
            database.psql(f"SELECT {sign}") == [(expected,)],
            f"at {rows[0]}, but of {revision}: {not expected}",
        )
    _ledger(database, reached)
    ran, applied = count(database), reached >= IDS.index("r006") + 1
    allowed = {1} if applied else {0} if whole else {0, 1}
    must(ran in allowed, f"at {rows[0]}, r006 has counted {ran} times")
    return reached


def count(database: Database) -> int:
    """Return how often the statement of r006 ran that leaves its transaction, where it does."""
    ((number,),) = database.psql("SELECT n FROM counter")
    return int(number)


def _ledger(database: Database, reached: int) -> None:
    if database.psql("SELECT to_regclass('migrator_ledger') IS NULL") == [(True,)]:
        must(reached == 1, "revisions were applied without a ledger")
        return
    events = database.psql(
        "SELECT event, revision FROM migrator_ledger WHERE revision IS NOT NULL ORDER BY at, number"
    )
    expected = [("found", "r001"), *(("applied", revision) for revision in IDS[1:reached])]
    must(events in ([], expected) if reached == 1 else events == expected, f"the ledger says {events}")


def code_is_promised(injection: Injection, code: int, log: str) -> None:
    """Check that the run that was hit ended in a way that it may end in, and without a traceback."""
    traced = [line for line in log.splitlines() if "Traceback" in line and not _for_debugging(line)]
    must(not traced, f"a traceback: {traced}")
    if injection.fault == "SIGKILL":
        allowed = {-9, 0}
    elif injection.fault in SIGNALS:
        # Below zero: the signal's own default, before the command has begun.
        allowed = {0, ExitCode.INTERRUPTED, ExitCode.PARTIAL, -15, -2}
    else:
        allowed = {0, ExitCode.UNREACHABLE, ExitCode.BACKUP_FAILED, ExitCode.ROLLED_BACK, ExitCode.PARTIAL}
    if injection.moment == "lock wait":  # which may end before anything is done to it
        allowed |= {ExitCode.BLOCKED, ExitCode.PARTIAL}
    must(code in allowed, f"exit code {code}")


def _for_debugging(line: str) -> bool:
    """Whether a line is ours for the debug level, or asyncio's about a task of env.py's that was interrupted."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return bool(record.get("level") == "debug" or record.get("logger") == "asyncio")


def told_the_truth(code: int, log: str, reached: int, database: Database) -> None:
    """Check the exit code of the run that was hit against what is in the database."""
    if code == 0:
        must(reached == len(IDS), f"exit code 0 at {IDS[reached - 1]}")
    if code in UNCHANGED or code in {-15, -2}:
        must(reached == 1, f"exit code {code} at {IDS[reached - 1]}")
        must(count(database) == 0, f"exit code {code}, and r006 has counted")
    part = database.psql("SELECT to_regclass('items_total') IS NOT NULL") == [(True,)]
    if code == ExitCode.PARTIAL and reached == 1:
        must(
            part or "is not known" in log or "its transaction" in log or "left the transaction" in log,
            "exit code 40, and nothing was changed",
        )


def nothing_held(database: Database, patience: float) -> None:
    """Check that no session and no advisory lock of a run remains."""
    must(not (left := left_behind(database, patience)), f"left behind after {patience:g} s: {left}")


def backups_whole(folder: Path) -> None:
    """Check that whatever looks like a backup is one, whole and proven."""
    for manifest in folder.glob("*.json"):
        known = json.loads(manifest.read_text())
        dump = manifest.with_suffix(".dump")
        must(dump.exists(), f"{manifest.name} without its dump")
        must(
            known["sha256"] == hashlib.sha256(dump.read_bytes()).hexdigest(),
            f"{dump.name} is not what was dumped",
        )
    for dump in folder.glob("*.dump"):
        must(dump.read_bytes()[:5] == b"PGDMP", f"{dump.name} is no dump")


def complete(database: Database, *, whole: bool) -> None:
    """Check that the database is at head, with everything valid."""
    must((reached := position(database, whole=whole)) == len(IDS), f"the second run left {IDS[reached - 1]}")
    invalid = database.psql("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
    must(not invalid, f"INVALID: {invalid}")
    must(database.psql("SELECT to_regclass('items_total') IS NOT NULL") == [(True,)], "an index is missing")
