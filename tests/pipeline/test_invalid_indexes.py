"""An INVALID index that a run before left is dropped where a pending revision builds it, and else reported."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from migrator.pipeline.stages.invalid_indexes import builds
from tests.support.projects import Revision, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]

BUILD = """\
with op.get_context().autocommit_block():
    op.create_index('t1_note_key', 't1', ['note'], unique=True, postgresql_concurrently=True{more})
"""
DROP = "op.drop_index('t1_note_key', table_name='t1')"
COMPUTED = BUILD.replace("'t1_note_key'", "op.f('%s_note_key' % 't1')", 1)
SQL = "CREATE UNIQUE INDEX CONCURRENTLY {more}t1_note_key ON public.t1 (note)"
AS_SQL = "with op.get_context().autocommit_block():\n    op.execute('" + SQL + "')"
WAYS = {
    "operation": BUILD.format(more=""),
    "operation, if not exists": BUILD.format(more=", if_not_exists=True"),
    "SQL": AS_SQL.format(more=""),
    "SQL, if not exists": AS_SQL.format(more="IF NOT EXISTS "),
}
VALID = (
    "SELECT c.relname, indisvalid::text FROM pg_index JOIN pg_class c ON c.oid = indexrelid"
    " WHERE c.relname ~ 'note_key'"
)
OFF = {"MIGRATOR_BACKUP": "off"}


def history(build: str) -> list[Revision]:
    return [*linear_history(1), Revision("r002", "r001", build, DROP)]


def findings(result: Result) -> list[dict[str, Any]]:
    return [item for item in result.answer["findings"] if item["rule"] == "invalid-index"]


def two_rows(database: Database) -> None:
    database.execute("INSERT INTO t1 VALUES (1, 'same'), (2, 'same')")


@pytest.mark.parametrize("build", WAYS.values(), ids=WAYS.keys())
def test_after_a_failed_build_the_next_run_builds_it_anew(
    database: Database, project: Project, run_migrator: Runner, build: str
) -> None:
    folder = project(revisions=history(build))
    assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF).code == 0
    two_rows(database)
    failed = run_migrator("upgrade", cwd=folder, database=database, env=OFF)
    assert failed.code in (39, 40), failed
    assert database.psql(VALID) == [("t1_note_key", "false")]
    database.execute("DELETE FROM t1 WHERE id = 2")
    result = run_migrator("upgrade", "--format", "json", cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert database.psql(VALID) == [("t1_note_key", "true")]
    assert "dropping the INVALID index public.t1_note_key" in result.stderr
    assert findings(result) == []


@pytest.mark.parametrize(
    "build", [WAYS["operation"], WAYS["SQL, if not exists"]], ids=["plain", "if not exists"]
)
def test_a_killed_build(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, build: str
) -> None:
    folder = project(revisions=history(build))
    assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF).code == 0
    writer = database.connect()  # the build waits for its transaction
    writer.cursor().execute("INSERT INTO t1 VALUES (1, 'mine')")
    run = start_migrator("upgrade", cwd=folder, database=database, env=OFF)
    run.wait_for(lambda: database.psql(VALID) == [("t1_note_key", "false")])
    run.kill()
    run.finish()
    deadline = time.monotonic() + 60  # the server notices within seconds that its client is gone
    while database.psql("SELECT 1 FROM pg_stat_progress_create_index") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert database.psql(VALID) == [("t1_note_key", "false")]
    writer.commit()
    writer.close()
    result = run_migrator("upgrade", cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert database.psql(VALID) == [("t1_note_key", "true")]


HELD = """\
import os
import time

with op.get_context().autocommit_block():
    op.create_index('t1_note_key', 't1', ['note'], unique=True, postgresql_concurrently=True{more})
time.sleep(120 if os.environ.get("HOLD") else 0)
"""


def killed_when_built(
    database: Database, run_migrator: Runner, start_migrator: Start, folder: Path, **env: str
) -> None:
    """Kill a run when the index of r002 is whole, and r002 does not count as applied."""
    assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF).code == 0
    run = start_migrator("upgrade", cwd=folder, database=database, env={**OFF, "HOLD": "yes", **env})
    run.wait_for(lambda: database.psql(VALID) == [("t1_note_key", "true")])
    run.kill()
    run.finish()
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


@pytest.mark.parametrize("more", ["", ", if_not_exists=True"], ids=["plain", "if not exists"])
def test_a_run_that_is_killed_when_the_index_is_whole(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, more: str
) -> None:
    folder = project(revisions=history(HELD.format(more=more)))
    killed_when_built(database, run_migrator, start_migrator, folder)
    oid = database.psql("SELECT 't1_note_key'::regclass::oid")
    result = run_migrator("upgrade", cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert database.psql(VALID) == [("t1_note_key", "true")]
    kept = database.psql("SELECT 't1_note_key'::regclass::oid") == oid
    assert kept == bool(more), result
    assert ("dropping the index public.t1_note_key" in result.stderr) != kept
    events = database.psql("SELECT event, count(*) FROM migrator_ledger GROUP BY event ORDER BY event")
    assert events == [
        ("applied", 2),
        ("begun", 2),
        ("run", 2),
        ("schema", 2),
    ]  # a run on an empty database notes no beginning


@pytest.mark.parametrize("how", ["there before", "a run after it ended well", "switched off", "no ledger"])
def test_an_index_that_no_killed_run_built_stays(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start, how: str
) -> None:
    """The revision then fails, for its name is taken: what to do is for a person to say."""
    folder = project(revisions=history(HELD.format(more="")))
    env = dict(OFF)
    if how == "there before":
        assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF).code == 0
        database.execute("CREATE UNIQUE INDEX t1_note_key ON t1 (note)")
        assert run_migrator("upgrade", cwd=folder, database=database, env=OFF).code == 40
    elif how == "no ledger":
        env["MIGRATOR_LEDGER"] = "off"
        killed_when_built(database, run_migrator, start_migrator, folder, MIGRATOR_LEDGER="off")
    else:
        killed_when_built(database, run_migrator, start_migrator, folder)
        if how == "switched off":
            env["MIGRATOR_INVALID_INDEXES"] = "report"
        else:
            for revision in ("r002", "r001"):
                assert run_migrator("stamp", revision, cwd=folder, database=database, env=OFF).code == 0
    oid = database.psql("SELECT 't1_note_key'::regclass::oid")
    result = run_migrator("upgrade", cwd=folder, database=database, env=env)
    assert result.code == 40, result
    assert "already exists" in result.stderr
    assert database.psql("SELECT 't1_note_key'::regclass::oid") == oid


def make_invalid(database: Database, name: str) -> None:
    two_rows(database)
    with pytest.raises(psycopg2.errors.UniqueViolation):
        database.psql(f"CREATE UNIQUE INDEX CONCURRENTLY {name} ON t1 (note)")
    database.execute("DELETE FROM t1")


@pytest.mark.parametrize(
    ("name", "build", "setting", "remedy"),
    [
        ("other_note_key", WAYS["operation"], "rebuild", "REINDEX INDEX CONCURRENTLY"),
        ("t1_note_key_ccnew", WAYS["operation"], "rebuild", "left over from a REINDEX CONCURRENTLY"),
        ("x_note_key", "op.execute('CREATE TABLE t2 ()')", "rebuild", "or, if it is not needed, DROP INDEX"),
        ("t1_note_key", COMPUTED.format(more=", if_not_exists=True"), "rebuild", "REINDEX INDEX CONCURRENTLY"),
        ("t1_note_key", WAYS["SQL, if not exists"], "report", "REINDEX INDEX CONCURRENTLY"),
    ],
    ids=["another", "left by REINDEX", "nothing built", "a computed name", "switched off"],
)  # fmt: skip
def test_what_no_revision_builds_is_reported_once(
    database: Database,
    project: Project,
    run_migrator: Runner,
    name: str,
    build: str,
    setting: str,
    remedy: str,
) -> None:
    """It stays as it is, so verify fails, as it does wherever an index is invalid; apply went through."""
    folder = project(revisions=history(build))
    assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF).code == 0
    make_invalid(database, name)
    result = run_migrator(
        "upgrade",
        "--format",
        "json",
        cwd=folder,
        database=database,
        env={**OFF, "MIGRATOR_INVALID_INDEXES": setting},
    )
    assert result.code == 41, result
    assert (name, "false") in database.psql(VALID)
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    (finding,) = findings(result)
    assert finding["place"] == f"public.{name}"
    assert remedy in finding["remedy"]
    assert f"public.{name}: the index on public.t1 was invalid before this run" in result.stderr


def test_one_that_is_allowed_is_let_be(database: Database, project: Project, run_migrator: Runner) -> None:
    allow = {"migrations/verify.toml": '[allow]\ninvalid_indexes = ["public.x_note_key"]\n'}
    folder = project(allow, revisions=history("CREATE TABLE t2 ()"))
    assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=OFF).code == 0
    make_invalid(database, "x_note_key")
    result = run_migrator("upgrade", "--format", "json", cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert findings(result) == []
    assert database.psql(VALID) == [("x_note_key", "false")]


def test_a_downgrade_does_not_take_it_away_beforehand(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """The way back drops it itself, and would fail if it were gone."""
    folder = project(revisions=history(WAYS["operation"]))
    assert run_migrator("upgrade", cwd=folder, database=database, env=OFF).code == 0
    database.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 't1_note_key'::regclass")
    result = run_migrator("downgrade", "-1", "--yes", cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert database.psql(VALID) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("op.create_index('i', 't', ['c'])", True),
        ("op.create_index(op.f('i'), 't', ['c'])", True),
        ("CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS s.i ON t (c)", True),
        ('CREATE INDEX "i" ON t (c)', True),
        ("NAME = 'i'\nop.create_index(NAME, 't', ['c'])", True),
        ("NAME = 'i'\nop.execute(f'CREATE INDEX CONCURRENTLY {NAME} ON t (c)')", True),
        ("DROP INDEX IF EXISTS i; CREATE INDEX i ON t (c)", True),
        ("op.drop_index('i', if_exists=True)\nop.create_index('i', 't', ['c'])", True),
        ("op.drop_index('i')\nop.create_index('i', 't', ['c'])", False),
        ("op.drop_index(op.f('i'), table_name='t')\nop.create_index('j', 't', ['c'])", False),
        ("DROP INDEX CONCURRENTLY s.i; CREATE INDEX i ON t (c)", False),
        ("REINDEX INDEX CONCURRENTLY i", False),
        ("CREATE INDEX j ON t (c); ALTER INDEX i RENAME TO k", False),
        ("CREATE INDEX j ON t (c); ALTER TABLE t ADD CONSTRAINT x UNIQUE USING INDEX i", False),
        ("CREATE UNIQUE INDEX i ON t (c); ALTER TABLE t ADD CONSTRAINT x UNIQUE USING INDEX i", True),
        ("op.create_index('ix', 't', ['c'])", False),
        ("op.create_index('a_i', 't', ['c'])", False),
        ("op.drop_table('i')", False),
    ],
)
def test_what_builds_an_index(text: str, expected: bool) -> None:
    assert builds(text, "i") is expected
