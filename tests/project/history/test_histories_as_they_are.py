"""Histories as they are: several in one database, ids and rows of every kind, and env.py files that do as they like.

What other files test is not repeated: shapes of graphs and layouts (test_alembic_projects), kinds of connections and
version tables (test_env_files), failures (test_env_failures).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.comparison import Comparison
from tests.support.env_text import env
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]
THREE = linear_history(3)


def revision(id: str, down: str | None, table: str, **more: object) -> str:
    """Return a revision's text; two histories may well use the same ids."""
    text = f"from alembic import op\nrevision = {id!r}\ndown_revision = {down!r}\n"
    text += "".join(f"{name} = {value!r}\n" for name, value in more.items())
    return (
        text
        + f"def upgrade():\n    op.execute('CREATE TABLE {table} (id int)')\n"
        + f"def downgrade():\n    op.execute('DROP TABLE {table}')\n"
    )


# The way of skypilot: a section for each history, one env.py for all, and both functions ask for the table.
SECTIONED = """
from alembic import context
from sqlalchemy import engine_from_config, pool
config = context.config

def offline():
    version_table = config.get_section_option(config.config_ini_section, 'version_table', 'alembic_version')
    context.configure(url='postgresql://', version_table=version_table)
    context.run_migrations()

def online():
    engine = engine_from_config(config.get_section(config.config_ini_section, {}), poolclass=pool.NullPool)
    version_table = config.get_section_option(config.config_ini_section, 'version_table', 'alembic_version')
    with engine.connect() as connection:
        context.configure(connection=connection, version_table=version_table)
        with context.begin_transaction():
            context.run_migrations()

offline() if context.is_offline_mode() else online()
"""
SECTIONS = """
[DEFAULT]
script_location = %(here)s/migrations
[users]
version_locations = %(here)s/users
version_table = versions_of_users
[jobs]
version_locations = %(here)s/jobs
version_table = versions_of_jobs
"""


def test_several_histories_in_one_database(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    folder = project(
        {
            "alembic.ini": SECTIONS,
            "migrations/env.py": SECTIONED,
            "users/001.py": revision("001", None, "users_1"),
            "users/002.py": revision("002", "001", "users_2"),
            "jobs/001.py": revision("001", None, "jobs_1"),
        }
    )
    for section, head in (("users", "002"), ("jobs", "001")):
        result = run_migrator("-n", section, cwd=folder, database=database)
        assert result.code == 0, result
        assert database.psql(f"SELECT version_num FROM versions_of_{section}") == [(head,)]
    (folder / "migrations" / "env.py").write_text("raise SystemExit(9)\n" + SECTIONED)
    for section in ("users", "jobs"):
        again = run_migrator("-n", section, cwd=folder, database=database)
        assert again.code == 0, again
        assert again.logs[-1]["message"].startswith("Nothing to do"), again
    (folder / "migrations" / "env.py").write_text(SECTIONED)
    back = run_migrator("-n", "users", "downgrade", "-1", cwd=folder, database=database)
    assert back.code == 0, back
    assert database.psql("SELECT version_num FROM versions_of_users") == [("001",)]
    assert database.psql("SELECT version_num FROM versions_of_jobs") == [("001",)]


def test_tables_that_no_other_section_explains_are_still_refused(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    database.execute("CREATE TABLE users_1 (id int)")
    files = {"alembic.ini": SECTIONS, "migrations/env.py": SECTIONED}
    folder = project({**files, "users/001.py": revision("001", None, "users_1"), "jobs/.keep": ""})
    result = run_migrator("-n", "users", cwd=folder, database=database)
    assert result.code == 33, result


DECOYS = """
CREATE SCHEMA other; CREATE SCHEMA "Aaa";
CREATE TABLE other.alembic_version (version_num varchar(32) PRIMARY KEY);
CREATE TABLE "Aaa".alembic_version (version_num varchar(32) PRIMARY KEY);
CREATE TABLE alembic_version_of_another (version_num varchar(32) PRIMARY KEY);
CREATE TABLE alembic_version_old (LIKE alembic_version INCLUDING ALL);
INSERT INTO other.alembic_version VALUES ('r002');
INSERT INTO "Aaa".alembic_version VALUES ('unknown');
INSERT INTO alembic_version_of_another VALUES ('r001');
INSERT INTO alembic_version_old VALUES ('r001');
"""


def test_other_version_tables_do_not_mislead(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    folder = project(revisions=THREE[:2])
    assert run_migrator(cwd=folder, database=database).code == 0
    database.execute(DECOYS)
    folder = project(revisions=THREE)
    pending = run_migrator("check", "--format", "json", cwd=folder, database=database)
    assert pending.code == 3, pending
    result = run_migrator(cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
    assert database.psql("SELECT version_num FROM alembic_version_old") == [("r001",)]
    assert database.psql("SELECT version_num FROM other.alembic_version") == [("r002",)]


def test_fewer_rows_than_heads_is_current(project: Project, run_migrator: Runner, database: Database) -> None:
    """`alembic current --check-heads` fails here: b1 depends on a1, so a1 has no row of its own."""
    folder = project(
        {
            **env(),
            "migrations/versions/a1.py": revision("a1", None, "a1"),
            "migrations/versions/b1.py": revision("b1", None, "b1", depends_on="a1"),
        }
    )
    result = run_migrator("upgrade", "heads", cwd=folder, database=database)
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("b1",)]
    for words in ("check", "verify", "upgrade heads", "wait-for-current"):
        again = run_migrator(*words.split(), cwd=folder, database=database)
        assert again.code == 0, again


def test_a_revision_that_replaces_others(project: Project, run_migrator: Runner, database: Database) -> None:
    """Squashed: the new file says what it stands for; a database at the last of those is at it."""
    folder = project(revisions=THREE)
    assert run_migrator(cwd=folder, database=database).code == 0
    for old in (folder / "migrations" / "versions").glob("*.py"):
        old.unlink()
    squashed = Revision("r003", None, "op.create_table('t1', sa.Column('id', sa.Integer))").render()
    squashed += "\nreplaces = ('r001', 'r002')\n"
    (folder / "migrations" / "versions" / "squashed.py").write_text(squashed)
    result = run_migrator("status", "--format", "json", cwd=folder, database=database)
    assert result.code == 0, result
    assert result.answer["pending"] == [], result


SETTINGS = """
import os
address = os.environ["DATABASE_URL"]
"""


def test_a_revision_that_imports_the_applications_settings(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    """The settings are read once, when the graph is: by then they must find the address."""
    own = "from shop_settings import address"
    revisions = [Revision("r001", None, f"{own}\nop.execute('CREATE TABLE t1 (id int)')")]
    files = env(before=own, engine="create_engine(address)")
    folder = project({**files, "shop_settings.py": SETTINGS}, revisions=revisions)
    file = folder / "migrations" / "versions" / "r001.py"
    file.write_text(f"{own}\n{file.read_text()}")
    result = run_migrator(cwd=folder, database=database, env={"DATABASE_URL": None})
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


def test_an_async_engine_that_wraps_another(project: Project, compare: Comparison) -> None:
    """The way of Phoenix: AsyncEngine(engine_from_config(...)) with Alembic's own address."""
    text = """
import asyncio
from alembic import context
from sqlalchemy import engine_from_config, pool
from sqlalchemy.ext.asyncio import AsyncEngine

def run(connection):
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    section = context.config.get_section(context.config.config_ini_section)
    async with AsyncEngine(engine_from_config(section, poolclass=pool.NullPool)).connect() as connection:
        await connection.run_sync(run)

asyncio.run(main())
"""
    compare(project({"migrations/env.py": text}, revisions=THREE), driver="asyncpg")


EXITS = {
    "before it connects": ("raise SystemExit('no licence')", ""),
    "with a good code, before it connects": ("raise SystemExit(0)", ""),
    "after its work": ("", "raise SystemExit(0)"),
}


@pytest.mark.parametrize("kind", EXITS)
def test_an_env_that_exits(kind: str, project: Project, run_migrator: Runner, database: Database) -> None:
    before, after = EXITS[kind]
    folder = project(env(before=before, after=after), revisions=THREE)
    result = run_migrator("--format", "json", cwd=folder, database=database)
    landed = database.psql("SELECT to_regclass('t3') IS NOT NULL") == [(True,)]
    assert landed == (kind == "after its work"), result
    code = json.loads(result.stdout)["code"]
    assert code == result.code == (0 if landed else 31), result  # as under plain Alembic
    at = database.psql("SELECT count(*) FROM pg_class WHERE relname = 'alembic_version'")
    assert at == [(int(landed),)], result


REPLACEABLE = """
from alembic.operations import MigrateOperation, Operations


class View:
    def __init__(self, name, sql):
        self.name, self.sql = name, sql


class Reversible(MigrateOperation):
    def __init__(self, target):
        self.target = target

    @classmethod
    def replace(cls, operations, target, replaces=None, replace_with=None):
        revision, name = (replaces or replace_with).split(".")
        script = operations.get_context().script
        old = getattr(script.get_revision(revision).module, name)
        drop, create = (old, target) if replaces else (target, old)
        operations.invoke(DropView(drop))
        operations.invoke(CreateView(create))


@Operations.register_operation("create_view", "invoke_for_target")
@Operations.register_operation("replace_view", "replace")
class CreateView(Reversible):
    @classmethod
    def invoke_for_target(cls, operations, target):
        return operations.invoke(cls(target))


@Operations.register_operation("drop_view", "invoke_for_target")
class DropView(CreateView):
    pass


@Operations.implementation_for(CreateView)
def create_view(operations, operation):
    operations.execute(f"CREATE VIEW {operation.target.name} AS {operation.target.sql}")


@Operations.implementation_for(DropView)
def drop_view(operations, operation):
    operations.execute(f"DROP VIEW {operation.target.name}")
"""


def test_objects_that_replace_those_of_an_earlier_revision(project: Project, compare: Comparison) -> None:
    """Alembic's recipe for views (`op.replace_view(view, replaces="a1.view")`) reads the earlier revision's module."""
    first = Revision("a1", None, "op.create_view(view)", "op.drop_view(view)").render()
    second = Revision(
        "a2",
        "a1",
        'op.replace_view(view, replaces="a1.view")',
        'op.replace_view(view, replace_with="a1.view")',
    ).render()
    folder = project(
        {
            "shop_views.py": REPLACEABLE,
            "migrations/versions/a1.py": f"{first}\nfrom shop_views import View\nview = View('v', 'SELECT 1 AS a')\n",
            "migrations/versions/a2.py": f"{second}\nfrom shop_views import View\nview = View('v', 'SELECT 2 AS b')\n",
        }
    )
    compare(folder)
    result = compare.run("downgrade", "-1", cwd=folder, database=compare.database)
    assert result.code == 0, result
    assert compare.database.psql("SELECT a FROM v") == [(1,)]


NEEDS_GROUND = """
import contextlib

ready = False

@contextlib.contextmanager
def prepare(config):
    global ready
    ready = True
    try:
        yield
    finally:
        ready = False
"""


def test_revisions_that_import_what_must_be_prepared(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    """The way of Superset: they import the application, which does not load outside of its context."""
    folder = project({**env(), "shop_ground.py": NEEDS_GROUND}, revisions=THREE)
    file = folder / "migrations" / "versions" / "r002.py"
    file.write_text(f"import shop_ground\nassert shop_ground.ready, 'not yet'\n{file.read_text()}")
    result = run_migrator(cwd=folder, database=database)
    assert result.code == 31, result
    assert "not yet" in result.logs[-1]["message"], result
    told = {"MIGRATOR_BOOTSTRAP": "shop_ground:prepare", "MIGRATOR_BACKUP": "off"}
    for words in ("upgrade", "check", "history", "downgrade -1", "upgrade"):
        result = run_migrator(*words.split(), cwd=folder, database=database, env=told)
        assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]


MIGRATES_ITSELF = """
import contextlib
from alembic import command
from alembic.config import Config

@contextlib.contextmanager
def prepare(config):
    command.upgrade(Config("alembic.ini"), "{to}")
    yield
"""


@pytest.mark.parametrize("to", ["r002", "head"])
def test_an_application_that_migrates_itself_when_it_is_loaded(
    to: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    """The way of ihatemoney, whose `create_app()` upgrades the database: what is left is done, all is told."""
    own_engine = env(engine="create_engine(os.environ['DATABASE_URL'])")
    folder = project({**own_engine, "shop_ground.py": MIGRATES_ITSELF.format(to=to)}, revisions=THREE)
    told = {"MIGRATOR_BOOTSTRAP": "shop_ground:prepare", "MIGRATOR_BACKUP": "off"}
    result = run_migrator("--format", "json", cwd=folder, database=database, env=told)
    assert result.code == 0, result
    assert [item["revision"] for item in result.answer["revisions"]] == (["r003"] if to == "r002" else [])
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
    warnings = [line["message"] for line in result.logs if line["level"] == "warning"]
    assert any("migrated the database to " in line and "by itself" in line for line in warnings), result
    rows = database.psql("SELECT revision, event FROM migrator_ledger WHERE revision <> '' ORDER BY revision")
    last = "applied" if to == "r002" else "found"
    assert rows == [("r001", "found"), ("r002", "found"), ("r003", last)]


def test_an_ini_that_names_a_wrong_place_beside_its_env(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    """Flask-Migrate takes the ini's own folder, whatever the ini says: many of those are never looked at."""
    folder = project({**env(), "migrations/alembic.ini": "[alembic]\nscript_location = .\n"}, revisions=THREE)
    (folder / "alembic.ini").unlink()
    result = run_migrator("-c", "migrations/alembic.ini", cwd=folder, database=database)
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
