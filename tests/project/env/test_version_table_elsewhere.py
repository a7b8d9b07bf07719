"""A version table that env.py's connection sees elsewhere than ours does: the second run ends as the first one did."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.env_text import env, with_schema
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, linear_history, write_project
from tests.support.runner import Result, Runner
from tests.support.servers import Database

Project = Callable[..., Path]
Run = Callable[..., Result]
OWN = {"top": "from application import engine", "engine": "engine"}
APPLICATION = """
import os
from sqlalchemy import create_engine, event, text
engine = create_engine(os.environ["DATABASE_URL"]{})
"""
ASYNC = """\
import asyncio
from alembic import context
from application import engine

def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()

asyncio.run(main())
"""
SHAPES = {
    "options": {
        **env(**OWN),
        "application.py": APPLICATION.format(", connect_args={'options': '-csearch_path=app'}"),
    },
    "server_settings": {
        "migrations/env.py": ASYNC,
        "application.py": "import os\nfrom sqlalchemy.ext.asyncio import create_async_engine\n"
        "url = os.environ['DATABASE_URL'].replace('postgresql:', 'postgresql+asyncpg:')\n"
        "engine = create_async_engine(url, connect_args={'server_settings': {'search_path': 'app'}})\n",
    },
    "a listener": {
        **env(**OWN),
        "application.py": APPLICATION.format("")
        + "@event.listens_for(engine, 'connect')\n"
        + "def prepare(raw, _):\n    raw.cursor().execute('SET search_path TO app'); raw.commit()\n",
    },
    "SET ROLE": env(connected="connection.execute(text('SET ROLE {role}')); connection.commit()"),
    "MIGRATOR_ROLE": env(),
    "moved before configure": env(
        connected="connection.execute(text('CREATE SCHEMA IF NOT EXISTS app'))\n"
        "connection.execute(text('ALTER TABLE IF EXISTS public.alembic_version SET SCHEMA app')); connection.commit()",
        configure="version_table_schema='app'",
    ),
}


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    """Run migrator on the test's database, without backups."""
    return lambda *arguments, cwd, **variables: run_migrator(
        *arguments, cwd=cwd, database=database, env={"MIGRATOR_BACKUP": "off", **variables}
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_second_run_finds_it(shape: str, database: Database, project: Project, run: Run) -> None:
    role = f"app_{uuid.uuid4().hex[:8]}"
    files = {name: text.replace("{role}", role) for name, text in SHAPES[shape].items()}
    variables = {"MIGRATOR_ROLE": role} if shape == "MIGRATOR_ROLE" else {}
    place = role if "ROLE" in shape else "app"
    database.execute(
        f"CREATE ROLE {role}; CREATE SCHEMA {place} AUTHORIZATION {role}; CREATE TABLE theirs (id int)"
    )
    try:
        folder = project(files, revisions=linear_history(2))
        if shape == "moved before configure":
            done(
                run(
                    "upgrade",
                    "r001",
                    cwd=project(revisions=linear_history(2), name="before"),
                    MIGRATOR_BASELINE="base",
                )
            )
            database.execute("DROP TABLE migrator_ledger")
        else:
            done(run("upgrade", "r001", "--baseline", "base", cwd=folder, **variables))
        looked = run("check", cwd=folder, **variables)
        if shape == "moved before configure":  # which a look does not let it do
            refusal(looked, ExitCode.BAD_SETTINGS, "these tables have revisions: public.alembic_version")
        else:
            assert looked.code == ExitCode.PENDING, looked
        done(run(cwd=folder, **variables))
        assert database.psql(f"SELECT version_num FROM {place}.alembic_version") == [("r002",)]
        again = done(run(cwd=folder, **variables))
        assert "Nothing to do" in again.stderr
        for command in ("check", "verify", "wait-for-current"):
            done(run(command, cwd=folder, MIGRATOR_WAIT_TIMEOUT="1s", **variables))
        assert done(run("current", cwd=folder, **variables)).stdout == "r002 (head)\n"
        if shape == "moved before configure":
            return
        # One of another service's, which is not behind.
        database.execute(
            "CREATE TABLE public.alembic_version (version_num text); INSERT INTO alembic_version VALUES ('r003')"
        )
        write_project(folder, files, revisions=linear_history(3))
        done(run("freeze", cwd=folder))
        assert run("check", cwd=folder, **variables).code == ExitCode.PENDING
        done(run(cwd=folder, **variables))
        assert database.psql(f"SELECT version_num FROM {place}.alembic_version") == [("r003",)]
    finally:
        database.execute(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_refusal_names_the_tables_of_this_history(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(1))
    database.execute(
        "CREATE SCHEMA app; CREATE TABLE app.alembic_version (version_num text);"
        " INSERT INTO app.alembic_version VALUES ('r001'); CREATE TABLE t (id int)"
    )
    refusal(
        run(cwd=folder),
        ExitCode.UNVERSIONED,
        "no version table where env.py looks for it (public.alembic_version)",
        "revisions of this history are in app.alembic_version",
    )


# -- what stands in it, and what does not ------------------------------------------------------------------


def test_equal_rows_are_refused(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(1))
    done(run("freeze", cwd=folder))
    done(run(cwd=folder))
    database.execute("ALTER TABLE alembic_version DROP CONSTRAINT alembic_version_pkc")
    database.execute("INSERT INTO alembic_version SELECT 'r001' FROM generate_series(1, 2)")
    for command in ("upgrade", "verify"):
        said = refusal(
            run(command, cwd=folder), ExitCode.BAD_HISTORY, "duplicate rows: r001 3 times", "DELETE FROM"
        )
    statement = said.partition("Next: ")[2].partition(";")[0]
    database.execute(statement)
    done(run(cwd=folder))


def test_a_row_and_its_ancestors(database: Database, project: Project, run: Run) -> None:
    """As two tools, or an edited row, leave them; the message has the rows to delete."""
    folder = project(revisions=linear_history(3))
    done(run("upgrade", "r002", cwd=folder))
    database.execute("INSERT INTO alembic_version VALUES ('r001')")
    for command in ("upgrade", "verify"):
        said = refusal(
            run(command, cwd=folder), ExitCode.BAD_HISTORY, "r002 overlaps with", "if r002 was applied"
        )
    database.execute("DELETE FROM alembic_version " + said.partition("row (")[2].partition("), if")[0])
    done(run(cwd=folder))


def test_a_table_of_that_name_that_is_not_alembics(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(1))
    database.execute(
        "CREATE TABLE alembic_version (version text); INSERT INTO alembic_version VALUES ('r001')"
    )
    for command in ("upgrade", "verify", "status"):
        refusal(
            run(command, cwd=folder), ExitCode.UNVERSIONED, "no column version_num", "MIGRATOR_VERSION_TABLE"
        )


def test_a_row_without_a_revision(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(1))
    database.execute(
        "CREATE TABLE alembic_version (version_num varchar(32)); INSERT INTO alembic_version VALUES (NULL)"
    )
    for command in ("upgrade", "verify", "status"):
        said = refusal(
            run(command, cwd=folder), ExitCode.BAD_HISTORY, "a row without a revision", "DELETE FROM"
        )
    database.execute(said.partition("in psql: ")[2].partition(";")[0])
    done(run(cwd=folder))


def test_a_row_that_cannot_be_changed(database: Database, project: Project, run: Run) -> None:
    """The revision is not at fault."""
    folder = project(revisions=linear_history(2))
    done(run("upgrade", "r001", cwd=folder))
    database.execute("CREATE RULE kept AS ON UPDATE TO alembic_version DO INSTEAD NOTHING")
    said = refusal(run(cwd=folder), ExitCode.ROLLED_BACK, "a trigger, a rule or row-level security")
    assert "fix revision" not in said


def test_an_id_that_is_too_long(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=[Revision("r" * 40, None, "CREATE TABLE t (id int)")])
    refusal(run(cwd=folder), ExitCode.ROLLED_BACK, "has 40 characters", "ALTER version_num TYPE varchar(255)")


def test_an_empty_version_table_beside_tables(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(2))
    done(run("upgrade", "r001", cwd=folder))
    database.execute("DELETE FROM alembic_version; DROP TABLE migrator_ledger")
    refusal(
        run(cwd=folder),
        ExitCode.ROLLED_BACK,
        "the version table is empty",
        "`migrator upgrade --baseline REV`",
    )
    done(run("--baseline", "r001", cwd=folder))


def test_stamp_says_where_it_led(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(3))
    done(run(cwd=folder))
    assert '"stamped r001"' in done(run("stamp", "r001", cwd=folder)).stderr


@pytest.mark.parametrize("path", ["nosuch, public", "nosuch, app, public", "nosuch"])
def test_a_search_path_that_begins_nowhere(path: str, database: Database, project: Project, run: Run) -> None:
    database.execute(
        f"CREATE SCHEMA app; CREATE TABLE theirs (id int); ALTER DATABASE {database.name} SET search_path = {path}"
    )
    folder = project(
        env(connected=with_schema("nosuch") if path == "nosuch" else "pass"), revisions=linear_history(1)
    )
    done(run("--baseline", "base", cwd=folder))
    assert "Nothing to do" in done(run(cwd=folder)).stderr
