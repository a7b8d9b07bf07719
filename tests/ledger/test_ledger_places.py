"""Where the ledger is, who may write it, and who leaves it alone: schemas, roles, backups, autogenerate, many runs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support import plain_alembic
from tests.support.env_text import env, with_schema
from tests.support.ledgers import agrees, events, has_ledger, runs
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import LEDGER, Database

Project = Callable[..., Path]
Run = Callable[..., Result]
THREE = linear_history(3)
OFF = {"MIGRATOR_BACKUP": "off"}
ALL = ["r001", "r002", "r003"]


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    """Run migrator on the test's database, without backups."""
    return lambda *arguments, cwd, **variables: run_migrator(
        *arguments, cwd=cwd, database=database, env={**OFF, **variables}
    )


# -- where it is -------------------------------------------------------------------------------------------


def test_it_is_beside_the_version_table(database: Database, project: Project, run: Run) -> None:
    made = with_schema("app")
    folder = project(env(connected=made, configure="version_table_schema='app'"), revisions=THREE)
    # A decoy in the search_path, of another project.
    database.execute("CREATE TABLE migrator_ledger (note text)")
    done(run("--baseline", "base", cwd=folder))
    agrees(database, ALL, table="app.migrator_ledger")
    assert database.psql("SELECT count(*) FROM public.migrator_ledger") == [(0,)]
    done(run("downgrade", "-1", cwd=folder))
    agrees(database, ALL[:2], table="app.migrator_ledger")


@pytest.mark.parametrize("name", ['odd "name"', "per%cent", "it's"])
def test_a_schema_of_any_name(name: str, database: Database, project: Project, run: Run) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    database.execute(f"CREATE SCHEMA {quoted}")
    folder = project(env(configure=f"version_table_schema={name!r}"), revisions=THREE)
    done(run(cwd=folder))
    done(run("downgrade", "-1", cwd=folder))
    agrees(database, ALL[:2], table=f"{quoted.replace('%', '%%')}.migrator_ledger")


def test_a_search_path_of_env_py(database: Database, project: Project, run: Run) -> None:
    path = "connection.execute(text('SET search_path TO app, public')); connection.commit()"
    folder = project(env(connected=with_schema("app") + path), revisions=THREE)
    done(run(cwd=folder))
    assert not has_ledger(database, "public.migrator_ledger")
    agrees(database, ALL, table="app.migrator_ledger")


def test_several_version_tables_in_one_schema(database: Database, project: Project, run: Run) -> None:
    one = project(env(configure="version_table='one'"), revisions=THREE, name="one")
    two = [
        Revision("r001", None, "CREATE TABLE u1 (id int)"),
        Revision("u002", "r001", "CREATE TABLE u2 (id int)"),
    ]
    other = project(env(configure="version_table='two'"), revisions=two, name="two")
    done(run(cwd=one))
    done(run("--baseline", "base", cwd=other))
    done(run("downgrade", "r001", cwd=one))
    agrees(database, ["r001"], version_table="one")
    agrees(database, ["r001", "u002"], version_table="two")


def test_an_env_py_that_goes_through_schemas(database: Database, project: Project, run: Run) -> None:
    tenants = """
for tenant in ('a', 'b'):
    with engine.begin() as first:
        first.execute(text(f'CREATE SCHEMA IF NOT EXISTS {tenant}'))
    with engine.connect() as connection:
        connection.execute(text(f'SET search_path TO {tenant}')); connection.commit()
        run(connection)
"""
    folder = project(env(run="pass", after=tenants), revisions=THREE)
    done(run(cwd=folder))
    for tenant in "ab":
        agrees(database, ALL, table=f"{tenant}.migrator_ledger")
    assert not has_ledger(database, "public.migrator_ledger")


# -- who may write it --------------------------------------------------------------------------------------


@pytest.fixture
def login(database: Database) -> Iterator[str]:
    """A role that may log in, and make tables; its address is `address`'s."""
    name = database.server.create_role(f"login_{uuid.uuid4().hex[:8]}")
    yield name
    database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def address(database: Database, login: str) -> dict[str, str]:
    return {**OFF, "MIGRATOR_DATABASE_URL": database.server.url(database.name, user=login)}


def test_who_may_not_write_it_is_refused_before_anything(
    database: Database, project: Project, run_migrator: Runner, run: Run, login: str
) -> None:
    folder = project(revisions=THREE)
    done(run("upgrade", "r001", cwd=folder))
    database.execute(f"GRANT ALL ON alembic_version, t1 TO {login}; GRANT CREATE ON SCHEMA public TO {login}")
    with unchanged(database):
        result = run_migrator(cwd=folder, env=address(database, login))
    refusal(
        result,
        ExitCode.ACCESS_DENIED,
        f"{login} may not write the ledger public.migrator_ledger",
        f"GRANT SELECT, INSERT ON public.migrator_ledger TO {login}",
        "MIGRATOR_LEDGER=off",
    )
    database.execute(f"GRANT SELECT, INSERT ON migrator_ledger TO {login}")
    done(run_migrator(cwd=folder, env=address(database, login)))
    agrees(database, ALL)
    assert database.psql("SELECT DISTINCT role FROM migrator_ledger WHERE revision = 'r003'") == [(login,)]


def test_who_may_not_make_it_is_refused_before_anything(
    database: Database, project: Project, run_migrator: Runner, login: str
) -> None:
    revisions = [*linear_history(1), Revision("r002", "r001", "ALTER TABLE t1 ADD x int")]
    folder = project(revisions=revisions)
    bring_to(database, 1)
    database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    database.execute(f"GRANT ALL ON alembic_version TO {login}; ALTER TABLE t1 OWNER TO {login}")
    with unchanged(database):
        result = run_migrator(cwd=folder, env=address(database, login))
    refusal(
        result,
        ExitCode.ACCESS_DENIED,
        f"{login} may not make the ledger public.migrator_ledger",
        f"GRANT CREATE ON SCHEMA public TO {login}",
    )
    done(run_migrator(cwd=folder, env={**address(database, login), "MIGRATOR_LEDGER": "off"}))
    assert not has_ledger(database)


@pytest.mark.parametrize("by", ["env.py", "MIGRATOR_ROLE"])
def test_a_role_that_the_migration_becomes(
    by: str, database: Database, project: Project, run_migrator: Runner, login: str
) -> None:
    """The login has no rights of its own, not even by membership: all is the owner's."""
    owner = f"owner_{uuid.uuid4().hex[:8]}"
    database.execute(f"CREATE ROLE {owner} NOLOGIN; GRANT CREATE ON SCHEMA public TO {owner}")
    database.execute(f"ALTER ROLE {login} NOINHERIT; GRANT {owner} TO {login}")
    database.execute(f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT SELECT ON TABLES TO {login}")
    try:
        own = (
            f"connection.execute(text('SET ROLE {owner}')); connection.commit()" if by == "env.py" else "pass"
        )
        newer = project(env(connected=own), revisions=THREE)
        variables = {**address(database, login), "MIGRATOR_ROLE": "" if by == "env.py" else owner}
        done(run_migrator(cwd=newer, env=variables))
        database.execute(f"REVOKE ALL ON migrator_ledger FROM {login}")
        for name in ("t1", "migrator_ledger"):
            owned = "SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = %s::regclass"
            assert database.psql(owned, (name,)) == [(owner,)]
        assert runs(database) == [("upgrade", "OK")]
        before = database.dump()
        done(run_migrator(cwd=newer, env=variables))
        assert database.dump() == before
        older = project(env(connected=own), revisions=THREE[:2], name="older")
        back = done(run_migrator("downgrade", "r002", "--yes", cwd=older, env=variables))
        assert "the ledger does not record" not in back.stderr
        assert runs(database) == [("upgrade", "OK"), ("downgrade", "OK")]
    finally:
        database.execute(f"DROP OWNED BY {owner} CASCADE; DROP ROLE {owner}")


# -- who leaves it alone -----------------------------------------------------------------------------------


def test_switched_off(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=THREE)
    done(run(cwd=folder, MIGRATOR_LEDGER="off"))
    done(run("downgrade", "-1", cwd=folder, MIGRATOR_LEDGER="off"))
    assert not has_ledger(database)
    done(run(cwd=folder))
    assert events(database) == [("found", "r001"), ("found", "r002"), ("applied", "r003")]


def test_verify_and_what_looks_write_nothing(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=THREE)
    bring_to(database, 3)
    before = database.dump()
    for command in ("verify", "status", "check", "current", "wait-for-current", "ledger"):
        done(run(command, cwd=folder))
    assert database.dump() == before


def test_it_is_no_table_of_the_project(database: Database, project: Project, run: Run) -> None:
    """A ledger that was left behind is no reason to ask for a baseline, nor anything to back up."""
    folder = project(revisions=THREE)
    done(run(cwd=folder))
    done(run("downgrade", "base", "--yes", cwd=folder))
    database.execute("DROP TABLE alembic_version")
    result = done(run("--format", "json", cwd=folder, MIGRATOR_BACKUP="auto"))
    assert result.answer["backup"] is None
    assert "the database is empty" in result.stderr


def test_a_backup_carries_it(database: Database, project: Project, run: Run, run_migrator: Runner) -> None:
    folder = project(revisions=THREE)
    done(run("upgrade", "r002", cwd=folder))
    done(run(cwd=folder, MIGRATOR_BACKUP="auto"))
    result = done(run_migrator("restore", "latest", "--yes", cwd=folder, database=database))
    agrees(database, ALL[:2])
    assert runs(database) == [("upgrade", "OK"), ("restore", "OK")]
    said = database.psql("SELECT message, backup_id FROM migrator_ledger WHERE command = 'restore'")[0]
    assert said[0] in result.stdout
    assert said[1] in said[0]
    done(run(cwd=folder))
    agrees(database, ALL)
    kept = database.server.psql(
        "SELECT datname FROM pg_database WHERE datname LIKE %s", (f"{database.name}_before%",)
    )
    for (name,) in kept:
        database.server.drop_database(name)


MODELS = """
import sqlalchemy
target = sqlalchemy.MetaData()
for number in (1, 2, 3):
    sqlalchemy.Table(f't{number}', target, sqlalchemy.Column('id', sqlalchemy.Integer, primary_key=True),
        sqlalchemy.Column('note', sqlalchemy.Text))
"""


@pytest.mark.parametrize("own", ["", ", include_name=lambda name, kind, parents: name != 't3'"])
def test_autogenerate_leaves_it_alone(own: str, database: Database, project: Project, run: Run) -> None:
    folder = project(env(top=MODELS, configure=f"target_metadata=target{own}"), revisions=THREE)
    done(run(cwd=folder))
    if own:  # what env.py leaves out is left out: the models' t3 would be made again
        result = run("alembic", "check", cwd=folder)
        assert result.code == ExitCode.BAD_HISTORY, result
        assert "add_table" in result.stderr
        assert "migrator_ledger" not in result.stderr
        return
    done(run("alembic", "check", cwd=folder))
    done(run("alembic", "revision", "--autogenerate", "--rev-id", "x4", "-m", "more", cwd=folder))
    written = next((folder / "migrations/versions").glob("x4*.py")).read_text()
    assert "migrator_ledger" not in written
    assert "drop_table" not in written


RECIPE = """
def include_name(name, type_, parent_names):
    return not (type_ == "table" and name == "migrator_ledger")
"""


def test_the_recipe_for_plain_alembic(database: Database, project: Project, run: Run) -> None:
    configure = "target_metadata=target, include_name=include_name"
    folder = project(env(top=MODELS + RECIPE, configure=configure), revisions=THREE)
    done(run(cwd=folder))
    process = plain_alembic.start("check", cwd=folder, database=database, env={})
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert " ".join(RECIPE.split()) in " ".join(Path("docs/howto/alembic-commands.md").read_text().split())


# -- many runs ---------------------------------------------------------------------------------------------


def test_twenty_pods_add_one_row(
    database: Database, project: Project, start_migrator: Callable[..., Running]
) -> None:
    folder = project(revisions=THREE)
    bring_to(database, 3)
    running = [start_migrator(cwd=folder, database=database, env=OFF) for _ in range(20)]
    for one in running:
        done(one.finish())
    assert events(database) == [("found", name) for name in ALL]
    assert runs(database) == [("upgrade", "OK")]
    before = database.dump()
    done(start_migrator(cwd=folder, database=database, env=OFF).finish())
    assert database.dump() == before


def test_the_command_shows_it(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=THREE)
    assert "the ledger is empty" in done(run("ledger", cwd=folder)).stdout
    done(run(cwd=folder, MIGRATOR_ACTOR="ann", POD_NAME="shop-1"))
    lines = done(run("ledger", cwd=folder)).stdout.splitlines()
    assert re.fullmatch(r"run \S+ by ann@shop-1", lines[0])
    assert [line.split()[1] for line in lines[1:]] == ["run", "applied", "applied", "applied"]
    assert " OK: " in lines[1]
    rows = done(run("ledger", "--limit", "2", "--format", "json", cwd=folder)).answer
    assert [(row["event"], row["revision"]) for row in rows] == [("run", None), ("applied", "r003")]
    assert database.dump(LEDGER).count("CREATE TABLE") == 4
