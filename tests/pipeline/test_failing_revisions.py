"""A revision that fails: what was rolled back, what was committed, and that the message tells the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal, unchanged
from tests.support.pace import Stopwatch
from tests.support.projects import ENV_FILES, Revision, bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

RAISES = 'op.execute("CREATE TABLE half (id int)")\nraise RuntimeError("half way")'
FAILURES = {
    "python": (RAISES, ("RuntimeError: half way",)),
    "sql": ("CREATE TABLE half (id int); SELECT 1 / 0", ("division by zero", "22012", "SELECT 1 / 0")),
    "constraint": (
        "INSERT INTO t1 VALUES (1, 'kept'), (1, 'kept')",
        ("duplicate key", "23505", "DETAIL: Key (id)=(1) already exists"),
    ),
    "sys.exit": ('import sys\nop.execute("CREATE TABLE half (id int)")\nsys.exit(5)', ("sys.exit(5)",)),
    "keyboard": ('op.execute("CREATE TABLE half (id int)")\nraise BaseException("odd")', ("odd",)),
}
PER_MIGRATION = "transaction_per_migration=True"


def env_with(option: str, name: str = "plain_url") -> dict[str, str]:
    """Return env.py with one more option of `context.configure` in its online part."""
    text = (ENV_FILES / f"{name}.py").read_text()
    assert "connection=connection, " in text
    return {
        "migrations/env.py": text.replace("connection=connection, ", f"connection=connection, {option}, ")
    }


def history_failing_at_third(body: str) -> list[Revision]:
    """Return four revisions, the third of which runs `body`."""
    revisions = linear_history(4)
    revisions[2] = Revision("r003", "r002", body, "DROP TABLE IF EXISTS half")
    return revisions


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_in_the_middle_rolls_everything_back(
    database: Database, project: Project, run_migrator: Runner, failure: str
) -> None:
    body, words = FAILURES[failure]
    folder = project(revisions=history_failing_at_third(body))
    bring_to(database, 1)
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision r003 failed", "Everything was rolled back.", *words)


@pytest.mark.parametrize("env", ["own_variable", "async_engine", "imports_app", "file_config"])
def test_a_failure_under_any_env_rolls_everything_back(
    database: Database, project: Project, run_migrator: Runner, env: str
) -> None:
    app = {"app.py": "import sqlalchemy\nmetadata = sqlalchemy.MetaData()\n"}
    folder = project(app, revisions=history_failing_at_third(RAISES), env=env)
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision r003 failed", "half way")


def test_a_run_goes_on_once_the_revision_is_mended(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=history_failing_at_third(RAISES))
    refusal(run_migrator(cwd=folder, database=database), ExitCode.ROLLED_BACK, "fix revision r003")
    project(revisions=linear_history(4))
    done(run_migrator(cwd=folder, database=database))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r004",)]


def test_what_landed_before_the_failure_is_said(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(env_with(PER_MIGRATION), revisions=history_failing_at_third(RAISES))
    result = run_migrator("--format", "json", cwd=folder, database=database)
    refusal(
        result,
        ExitCode.PARTIAL,
        "Revision r003 failed",
        "2 of 4 revisions were applied and committed",
        "the database is at r002",
        "continue with `migrator upgrade head`",
        "to go back: `migrator downgrade base --yes`",
    )
    assert [item["revision"] for item in result.answer["revisions"]] == ["r001", "r002"]
    assert (result.answer["before"], result.answer["after"]) == ([], ["r002"])
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert database.psql("SELECT to_regclass('t2')::text, to_regclass('half')::text") == [("t2", None)]


def test_the_first_revision_failing_alone_is_all_rolled_back(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(env_with(PER_MIGRATION), revisions=history_failing_at_third(RAISES))
    bring_to(database, 2)
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision r003 failed")


def test_a_downgrade_that_stops_half_way_says_where(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    revisions = linear_history(4)
    revisions[1] = Revision("r002", "r001", "CREATE TABLE t2 (id int)", RAISES)
    folder = project(env_with(PER_MIGRATION), revisions=revisions)
    done(run_migrator(cwd=folder, database=database))
    result = run_migrator("downgrade", "r001", cwd=folder, database=database)
    sentence = refusal(
        result,
        ExitCode.PARTIAL,
        "Revision r002 failed",
        "2 of 3 revisions were reverted and committed; the database is at r002",
        "migrator restore ",
    )
    assert sentence.count("migrator restore ") == 1
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


COMMITTING = {
    "an autocommit block": (
        'op.execute("CREATE TABLE landed (id int)")\n'
        "with op.get_context().autocommit_block():\n"
        '    op.execute("CREATE INDEX CONCURRENTLY i1 ON t1 (note)")\n'
        '    op.execute("CREATE INDEX CONCURRENTLY i1 ON t1 (note)")'
    ),
    "after an autocommit block": (
        'op.execute("CREATE TABLE landed (id int)")\n'
        "with op.get_context().autocommit_block():\n"
        '    op.execute("CREATE INDEX CONCURRENTLY i1 ON t1 (note)")\n'
        'raise RuntimeError("after it")'
    ),
    # how it was done before there were autocommit blocks
    "COMMIT as a statement": (
        'op.execute("CREATE TABLE landed (id int)")\n'
        'op.execute("COMMIT")\n'
        'op.execute("CREATE INDEX CONCURRENTLY i1 ON t1 (note)")\n'
        'raise RuntimeError("after it")'
    ),
    "commit() of the connection": (
        'op.execute("CREATE TABLE landed (id int)")\nop.get_bind().commit()\nraise RuntimeError("after it")'
    ),
    "COMMIT within a script": (
        'op.execute("""CREATE TABLE landed (id int);\n-- and done\ncommit; SELECT 1""")\n'
        'raise RuntimeError("after it")'
    ),
    "COMMIT that SQLAlchemy knows nothing of": (
        'op.execute("CREATE TABLE landed (id int)")\n'
        'op.get_bind().connection.cursor().execute("COMMIT")\n'
        'raise RuntimeError("after it")'
    ),
    "COMMIT within a script that fails": (
        'op.execute("CREATE TABLE landed (id int); COMMIT; SELECT 1 / 0")\n'
    ),
}


@pytest.mark.parametrize("way", COMMITTING)
def test_a_failure_after_a_part_was_committed_is_no_rollback(
    database: Database, project: Project, run_migrator: Runner, way: str
) -> None:
    revisions = [*linear_history(1), Revision("r002", "r001", COMMITTING[way])]
    folder = project(revisions=revisions)
    bring_to(database, 1)
    result = run_migrator("--format", "json", cwd=folder, database=database)
    assert database.psql("SELECT to_regclass('landed')::text") == [("landed",)]
    refusal(
        result,
        ExitCode.PARTIAL,
        "Revision r002 failed",
        "A part of r002 was committed",
        "by hand, then run",
        f"migrator restore {result.answer['backup']['id']}",
    )
    assert result.answer["after"] == ["r001"]


def test_a_commit_that_only_a_text_speaks_of_is_none(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    body = "INSERT INTO t1 VALUES (1, 'commit; it'); COMMENT ON TABLE t1 IS 'no; commit'; SELECT 1 / 0"
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", body)])
    bring_to(database, 1)
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision r002 failed")


def test_a_busy_table_is_not_waited_for_longer_than_lock_timeout(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    alter = Revision("r002", "r001", "ALTER TABLE t1 ADD COLUMN b int", "ALTER TABLE t1 DROP COLUMN b")
    folder = project(revisions=[*linear_history(1), alter])
    bring_to(database, 1)
    with unchanged(database):
        reader = database.connect()
        reader.cursor().execute("SELECT * FROM t1")  # and never ends its transaction
        with Stopwatch() as watch:
            result = run_migrator(
                "--lock-timeout", "500ms", "--lock-retries", "1", cwd=folder, database=database
            )
        reader.close()
    refusal(
        result,
        ExitCode.BLOCKED,
        "Revision r002 failed",
        "lock timeout",
        "55P03",
        "Everything was rolled back.",
        "MIGRATOR_LOCK_TIMEOUT",
    )
    assert watch.within(20)


def test_a_statement_that_takes_too_long_is_rolled_back(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", "SELECT pg_sleep(60)")])
    bring_to(database, 1)
    with unchanged(database):
        result = run_migrator("--statement-timeout", "1s", cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision r002 failed", "statement timeout", "57014")


def test_a_connection_that_is_lost_is_not_called_a_rollback_without_looking(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    ends = "SELECT pg_terminate_backend(pg_backend_pid())"
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", ends)])
    bring_to(database, 1)
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision r002 failed", "Everything was rolled back.")
