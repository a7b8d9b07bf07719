"""The ledger's rows are in the order in which they were written, whatever the server's clock says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.config.database_url import parse
from migrator.ledger import table as ledger
from migrator.ledger.queries import read_rows, read_standing
from migrator.ledger.table import Author, append, insertion, written
from migrator.postgres.session import Session, connect
from migrator.postgres.version_table import VersionTable
from tests.support.outcomes import done
from tests.support.projects import linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database

Project = Callable[..., Path]
Run = Callable[..., Result]
TABLE, LEDGER = VersionTable("alembic_version", "public"), VersionTable("migrator_ledger", "public")
AUTHOR = Author("run", "", "", "", "")

# What migrator 0.1 wrote with, before rows had a number.
OLDER_INSERT = (
    'INSERT INTO "public"."migrator_ledger" SELECT r.* FROM jsonb_array_elements(CAST({rows} AS jsonb)) AS d,'
    ' jsonb_populate_record(NULL::"public"."migrator_ledger", d || jsonb_build_object('
    "'at', clock_timestamp() - coalesce(CAST(d->>'age' AS float8), 0) * interval '1 second',"
    " 'role', current_user)) AS r RETURNING txid_current()::text"
)


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    return lambda *arguments, cwd: run_migrator(
        *arguments, cwd=cwd, database=database, env={"MIGRATOR_BACKUP": "off"}
    )


@pytest.fixture
def older(database: Database) -> Database:
    """A ledger of migrator 0.1, with two runs in it."""
    database.execute("CREATE TABLE alembic_version (version_num varchar(32))")
    database.execute(ledger._CREATE.format(table=LEDGER.quoted).replace("    id bigint,\n", ""))
    write_as_older(database, "one", "applied", "r001")
    write_as_older(database, "two", "reverted", "r001")
    return database


def row(run_id: str, event: str, revision: str) -> dict[str, Any]:
    return {**AUTHOR.row(event, 1, TABLE, revision=revision), "run_id": run_id}


def write_as_older(database: Database, run_id: str, event: str, revision: str) -> None:
    rows = ledger.literal(json.dumps([row(run_id, event, revision)]))
    database.execute(OLDER_INSERT.format(rows=rows))


def session(database: Database) -> Session:
    return connect(parse(database.url), "test", 30)


def order(database: Database) -> list[str]:
    """Return the runs' ids as migrator reads them, the oldest first."""
    with session(database) as asked:
        return [found["run_id"] for found in reversed(read_rows(asked, TABLE, 100, ""))]


def step_back(database: Database) -> None:
    """Do what a clock does that steps back: everything that is written from now on has an earlier time."""
    database.execute("UPDATE migrator_ledger SET at = at + interval '1 hour'")


def test_a_clock_that_steps_back(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    step_back(database)
    done(run("downgrade", "r001", cwd=folder))
    assert "last run: downgrade, OK (0)" in run("status", cwd=folder).stdout
    step_back(database)
    # An edit of what does not stand is none, and what was reverted is not found to be gone.
    file = folder / "migrations/versions/r002.py"
    file.write_text(file.read_text().replace("t2 (id int", "t2 (id bigint"))
    done(run(cwd=folder))
    events = database.psql(
        "SELECT event, revision FROM migrator_ledger WHERE revision IS NOT NULL ORDER BY id"
    )
    assert events == [("applied", "r001"), ("applied", "r002"), ("reverted", "r002"), ("applied", "r002")]
    assert database.psql("SELECT count(*), count(DISTINCT id) FROM migrator_ledger")[0] == (
        *database.psql("SELECT max(id), max(id) FROM migrator_ledger")[0],
    )


def test_an_older_ledger_is_read_as_it_was(older: Database) -> None:
    assert order(older) == ["one", "two"]
    with session(older) as asked:
        assert dict(read_standing(asked, TABLE, "").entries) == {}


def test_an_older_ledger_is_numbered_by_the_first_row(older: Database) -> None:
    with session(older) as asked:
        append(asked, TABLE, [row("three", "applied", "r002"), row("four", "applied", "r003")])
    assert older.psql("SELECT run_id, id FROM migrator_ledger ORDER BY id") == [
        ("one", 1),
        ("two", 2),
        ("three", 3),
        ("four", 4),
    ]
    step_back(older)
    # An older image goes on writing, and what it has written comes after what was there.
    write_as_older(older, "five", "reverted", "r003")
    assert order(older) == ["one", "two", "three", "four", "five"]
    columns = written(LEDGER, lambda sql: older.psql(sql)[0][0])
    older.execute(
        insertion(LEDGER, [row("six", "applied", "r004")], columns, unicode=True)
    )  # env.py's connection
    assert order(older)[-1] == "six"
    step_back(older)
    with session(older) as asked:
        append(asked, TABLE, [row("seven", "applied", "r005")])
    assert order(older) == ["one", "two", "three", "four", "five", "six", "seven"]
    assert older.psql("SELECT max(id), count(*) FILTER (WHERE id IS NULL) FROM migrator_ledger") == [(7, 0)]


def test_two_at_once_number_it_once(older: Database) -> None:
    def write(name: str) -> None:
        with session(older) as asked:
            append(asked, TABLE, [row(name, "applied", name)])

    threads = [threading.Thread(target=write, args=(f"new{number}",)) for number in range(2)]
    with older.connect() as blocker, blocker.cursor() as cursor:
        cursor.execute("SELECT * FROM migrator_ledger")  # both wait for it, or give up: the rows are written
        for thread in threads:
            thread.start()
        blocker.rollback()
    for thread in threads:
        thread.join(60)
    with session(older) as asked:
        append(asked, TABLE, [row("last", "applied", "last")])
    found = older.psql("SELECT run_id, id FROM migrator_ledger ORDER BY id, at")
    assert [name for name, _ in found[:2]] == ["one", "two"]
    assert {name for name, _ in found[2:4]} == {"new0", "new1"}
    assert found[4][0] == "last"
    assert all(number for _, number in found)


def test_a_login_that_may_not_alter_it_writes_all_the_same(older: Database) -> None:
    role = older.server.create_role(f"login_{older.name}")
    older.execute(
        f"GRANT SELECT, INSERT ON migrator_ledger TO {role}; GRANT SELECT ON alembic_version TO {role}"
    )
    try:
        with connect(parse(older.server.url(older.name, role)), "test", 30) as asked:
            append(asked, TABLE, [row("three", "applied", "r001")])
            assert "r001" in read_standing(asked, TABLE, "").entries
        older.execute(f"REVOKE INSERT ON migrator_ledger FROM {role}")
        assert order(older)[-1] == "three"
    finally:
        older.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
