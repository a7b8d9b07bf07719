"""An env.py that goes through one version table for each tenant: all of them count, also one that came later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.env_text import env
from tests.support.gates import Gate
from tests.support.ledgers import agrees
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, write_project
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Run = Callable[..., Result]

LIST = """
with engine.connect() as first:
    tenants = [row[0] for row in first.execute(text("SELECT name FROM public.tenants ORDER BY 1"))]
"""
SET_PATH = "connection.execute(text('SET search_path TO ' + tenant)); connection.commit()"
LOOP = f"""{LIST}
for tenant in tenants:
    with engine.connect() as connection:
        {{set_path}}
        {{run}}
"""
CONFIGURED = """context.configure(connection=connection, version_table_schema=tenant)
        with context.begin_transaction():
            context.run_migrations()"""
OWN_MODULE = """
from alembic import context
from sqlalchemy import create_engine, text
import os

def for_each_tenant(url, run):
    with create_engine(url).connect() as first:
        tenants = [row[0] for row in first.execute(text("SELECT name FROM public.tenants ORDER BY 1"))]
    for tenant in tenants:
        engine = create_engine(url, connect_args={"options": "-csearch_path=" + tenant})
        with engine.connect() as connection:
            run(connection)
"""
SHAPES = {
    "version_table_schema": env(run="pass", after=LOOP.format(set_path=SET_PATH, run=CONFIGURED)),
    "search_path": env(run="pass", after=LOOP.format(set_path=SET_PATH, run="run(connection)")),
    "a helper that loops": {
        **env(
            top="from application import for_each_tenant",
            run="pass",
            after="for_each_tenant(os.environ['DATABASE_URL'], run)",
        ),
        "application.py": OWN_MODULE,
    },
    "a schema that env.py makes": env(
        run="pass",
        after=LOOP.format(
            set_path=f"connection.execute(text('CREATE SCHEMA IF NOT EXISTS ' + tenant))\n        {SET_PATH}",
            run=CONFIGURED,
        ),
    ),
    "a log of its own": env(
        run="pass",
        after="with engine.begin() as first: first.execute(text('INSERT INTO public.log DEFAULT VALUES'))\n"
        + LOOP.format(set_path=SET_PATH, run=CONFIGURED),
    ),
    "a transaction of env.py's for each": env(
        run="pass",
        after=f"{LIST}\ndef one(tenant):\n    with engine.begin() as connection:\n"
        "        connection.execute(text('SET LOCAL search_path TO ' + tenant)); run(connection)\n"
        "[one(tenant) for tenant in tenants]",
    ),
}
ONLY_NAMED = ("version_table_schema", "a schema that env.py makes")
A1 = Revision("a1", None, "CREATE TABLE t (id int)")
B1 = Revision("b1", "a1", "ALTER TABLE t ADD note text")
NAMED = {"MIGRATOR_VERSION_TABLE": "one.alembic_version"}


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    """Run migrator on the test's database, without backups."""
    return lambda *arguments, cwd, **variables: run_migrator(
        *arguments, cwd=cwd, database=database, env={"MIGRATOR_BACKUP": "off", **variables}
    )


def tenant(database: Database, name: str) -> None:
    database.execute(
        "CREATE TABLE IF NOT EXISTS tenants (name text); CREATE TABLE IF NOT EXISTS log (id serial)"
    )
    database.execute(f"CREATE SCHEMA {name}; INSERT INTO tenants VALUES ('{name}')")


def rows(database: Database, name: str) -> list[str]:
    return [row for (row,) in database.psql(f"SELECT version_num FROM {name}.alembic_version")]


def behind(run: Run, folder: Path, **variables: str) -> None:
    """Check that everything that looks sees that one of them is behind."""
    for command, code in (("verify", ExitCode.VERIFY_FAILED), ("wait-for-current", ExitCode.NOT_CURRENT)):
        result = run(command, cwd=folder, MIGRATOR_WAIT_TIMEOUT="1s", **variables)
        assert result.code == code, result
    status = done(run("status", "--format", "json", cwd=folder, **variables)).answer
    assert status["pending"], status


def failed_in_the_second(
    database: Database, project: Project, run: Run, shape: str, variables: dict[str, str]
) -> Path:
    """Leave the first tenant at b1, and the second at a1, for a column of b1's is there already."""
    for name in ("one", "two"):
        tenant(database, name)
    folder = project(SHAPES[shape], revisions=[A1])
    done(run("--baseline", "base", cwd=folder, **variables))
    write_project(folder, SHAPES[shape], revisions=[A1, B1])
    done(run("freeze", cwd=folder, **variables))
    database.execute("ALTER TABLE two.t ADD note text")
    result = run(cwd=folder, **variables)
    assert result.code == ExitCode.PARTIAL, result
    assert (
        "b1 was applied and committed; the database is at b1 in one.alembic_version; a1 in two"
        in result.stderr
    )
    return folder


@pytest.mark.parametrize(
    ("shape", "variables"),
    [(shape, NAMED if shape in ONLY_NAMED else {}) for shape in SHAPES if "log" not in shape],
)
def test_nothing_to_do_means_all_of_them(
    shape: str, variables: dict[str, str], database: Database, project: Project, run: Run
) -> None:
    folder = failed_in_the_second(database, project, run, shape, variables)
    again = run(cwd=folder, **variables)
    assert again.code == ExitCode.ROLLED_BACK, again
    assert (rows(database, "one"), rows(database, "two")) == (["b1"], ["a1"])
    assert run("check", cwd=folder, **variables).code == ExitCode.PENDING
    database.execute("ALTER TABLE two.t DROP note")
    done(run(cwd=folder, **variables))
    assert (rows(database, "one"), rows(database, "two")) == (["b1"], ["b1"])
    tenant(database, "three")
    assert run("check", cwd=folder, **variables).code == ExitCode.PENDING
    done(run(cwd=folder, **variables))
    agrees(database, ["a1", "b1"], table="three.migrator_ledger")
    assert "Nothing to do" in done(run(cwd=folder, **variables)).stderr


GOES_ON = f"""{LIST}
for tenant in tenants:
    try:
        with engine.connect() as connection:
            {SET_PATH}
            run(connection)
    except Exception:
        print("not", tenant)
"""


@pytest.mark.parametrize("broken", ["one", "two"])
def test_the_failure_of_one_is_told_where_env_py_goes_on(
    broken: str, database: Database, project: Project, run: Run
) -> None:
    for name in ("one", "two"):
        tenant(database, name)
    files = env(run="pass", after=GOES_ON)
    folder = project(files, revisions=[A1])
    done(run("--baseline", "base", cwd=folder))
    write_project(folder, files, revisions=[A1, B1])
    database.execute(f"ALTER TABLE {broken}.t ADD note text")
    result = run(cwd=folder)
    other = "two" if broken == "one" else "one"
    words = ("Revision b1 failed", f"a1 in {broken}.alembic_version", f"b1 in {other}.alembic_version")
    refusal(result, ExitCode.PARTIAL, *words)
    again = run(cwd=folder)
    refusal(again, ExitCode.ROLLED_BACK, "Revision b1 failed", "Everything was rolled back")


def test_all_that_looks_sees_all_of_them(database: Database, project: Project, run: Run) -> None:
    folder = failed_in_the_second(database, project, run, "version_table_schema", NAMED)
    behind(run, folder, **NAMED)
    database.execute("ALTER TABLE two.t DROP note")
    done(run(cwd=folder, **NAMED))
    for command in ("check", "verify", "wait-for-current"):
        done(run(command, cwd=folder, **NAMED))
    tenant(database, "three")
    behind(run, folder, **NAMED)


def test_what_runs_saw_counts_where_env_py_cannot_be_asked(
    database: Database, project: Project, run: Run
) -> None:
    """It writes each time, which those that only look do not let it do."""
    folder = failed_in_the_second(database, project, run, "a log of its own", NAMED)
    behind(run, folder, **NAMED)
    database.execute("ALTER TABLE two.t DROP note")
    done(run(cwd=folder, **NAMED))
    result = done(run("check", cwd=folder, **NAMED))
    assert "only one.alembic_version, two.alembic_version was checked" in result.stderr


def test_without_any_tenant_no_version_table_is_named(database: Database, project: Project, run: Run) -> None:
    database.execute("CREATE TABLE tenants (name text)")
    folder = project(SHAPES["version_table_schema"], revisions=[A1])
    result = run("check", cwd=folder)
    assert result.code == ExitCode.PENDING, result
    assert "no version table was checked" in result.stderr


def test_a_run_that_waits_for_another_asks_env_py_itself(
    database: Database, project: Project, run: Run, start_migrator: Callable[..., Running]
) -> None:
    """Where env.py writes, it is asked under the lock alone: until then nobody says that there is no version table."""
    for name in ("one", "two"):
        tenant(database, name)
    off = {"MIGRATOR_BACKUP": "off"}
    revisions = [A1, Revision("b1", "a1", f"op.execute({Gate.statement!r})", "SELECT 1")]
    folder = project(SHAPES["a log of its own"], revisions=revisions)
    done(run("upgrade", "a1", "--baseline", "base", cwd=folder))
    with Gate(database) as gate:
        first = start_migrator(cwd=folder, database=database, env=off)
        first.wait_for(gate.reached)
        second = start_migrator(cwd=folder, database=database, env=off)
        second.wait_for("waiting for the run lock")
    done(first.finish())
    assert "Nothing to do" in done(second.finish()).stderr
    done(run("downgrade", "-1", "--yes", cwd=folder))
    assert database.psql("SELECT * FROM one.alembic_version, two.alembic_version") == [("a1", "a1")]
