"""Look at how a run ended as the person on call does: the last line, the database, what was left behind."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

from migrator.outcome import ExitCode
from tests.support.runner import Result
from tests.support.servers import LEDGER, Database

STATES = (
    "The database was not changed.",
    "Everything was rolled back.",
    "Everything was rolled back.",
    "the database is at ",
    "The database is at ",
    "was committed",
    "is not known",
)
"""How a message says what state the database is in."""


def done(result: Result) -> Result:
    """Return the result of a run that succeeded; show all it said where it did not."""
    assert result.code == 0, str(result)
    return result


def refusal(result: Result, code: ExitCode, *words: str) -> str:
    """Return the sentence that a failed run ended with, after checking what every such sentence must have.

    It is the last line of the log and stands there once; it names its code, the state of the database and
    the next step; and each of `words` is in it.
    """
    assert result.code == code, result
    assert "Traceback" not in result.stderr, result
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    last = json.loads(lines[-1])
    assert (last["level"], last["code"], last["outcome"]) == ("error", int(code), code.name), result
    sentence: str = last["message"]
    assert result.stderr.count(f"{code.name} ({int(code)}): ") == 1, result
    assert sentence.startswith(f"{code.name} ({int(code)}): "), sentence
    assert any(state in sentence for state in STATES), sentence
    assert sentence.partition(" Next: ")[2], sentence
    missing = [word for word in words if word not in sentence]
    assert not missing, f"{missing} not in: {sentence}"
    return sentence


@contextlib.contextmanager
def unchanged(database: Database) -> Iterator[None]:
    """Assert that the block leaves the database as it was: schema, rows, and nobody's lock or session.

    The ledger grows: it also says which runs failed.
    """
    before = database.dump(LEDGER)
    yield
    assert database.dump(LEDGER) == before
    assert left_behind(database) == []


def left_behind(database: Database, patience: float = 30) -> list[tuple[object, ...]]:
    """Return migrator's sessions and advisory locks that are still there after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        rows = database.psql(_LEFT)
        if not rows or time.monotonic() > deadline:
            return rows
        time.sleep(0.05)


_LEFT = """
SELECT a.pid, a.application_name, a.query, l.locktype FROM pg_stat_activity a
LEFT JOIN pg_locks l ON l.pid = a.pid AND l.locktype = 'advisory'
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
  AND (a.application_name LIKE 'migrator/%' OR l.pid IS NOT NULL)
"""
