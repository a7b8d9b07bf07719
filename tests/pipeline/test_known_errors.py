"""What a failure says of the database when the run has committed something before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrator.errors import AccessDenied, MigratorError
from migrator.outcome import ExitCode
from migrator.pipeline.context import Run, ending
from migrator.postgres.errors import QueryFailed


def told(before: tuple[str, ...] | None, after: tuple[str, ...] | None, error: Exception) -> MigratorError:
    record = SimpleNamespace(before=before, after=after)
    this: Any = SimpleNamespace(record=record, interruption=SimpleNamespace(received=""))
    return ending(cast("Run", this), error)


FAILURES = [
    QueryFailed("permission denied for table t", "42501"),
    QueryFailed("column x does not exist", "42703"),
    QueryFailed("disk full", "53100"),
    AccessDenied("Others can write the ledger public.migrator_ledger.", next_step="REVOKE"),
]


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_after_a_commit_no_failure_says_that_the_database_was_not_changed(error: Exception) -> None:
    found = told(("r001",), ("r002",), error)
    assert found.code is ExitCode.PARTIAL
    assert "was not changed" not in str(found)
    assert "The database is at r002." in str(found)
    assert found.next_step


@pytest.mark.parametrize("error", FAILURES, ids=str)
def test_before_a_commit_it_says_so(error: Exception) -> None:
    found = told(("r001",), ("r001",), error)
    assert found.code < ExitCode.PARTIAL or found.code is ExitCode.INTERNAL
    assert "The database was not changed." in str(found)


def test_what_was_not_read_is_not_called_a_commit() -> None:
    assert told(None, ("r001",), FAILURES[0]).code is ExitCode.ACCESS_DENIED
    assert told(("r001",), None, FAILURES[0]).code is ExitCode.ACCESS_DENIED
