"""Histories of every shape, projects of every layout: found, applied and recognised as Alembic does.

Whether something is pending is found out without env.py, which in real projects takes seconds to load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.comparison import Comparison
from tests.support.env_text import async_env, env
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]
THREE = linear_history(3)
INI = "[alembic]\nscript_location = %(here)s/migrations\n"
TOML = '[tool.alembic]\nscript_location = "%(here)s/migrations"\n'


def revision(
    id: str, down: Any = None, *, folder: str = "migrations/versions", **more: Any
) -> dict[str, str]:
    """Return a revision without a docstring and without a downgrade, which makes a table of its name."""
    text = f"from alembic import op\nrevision = {id!r}\ndown_revision = {down!r}\n"
    text += "".join(f"{name} = {value!r}\n" for name, value in more.items())
    name = id.replace("/", "_")
    return {
        f"{folder}/{name}.py": text + f"def upgrade():\n    op.execute('CREATE TABLE \"{id}\" (id int)')\n"
    }


LONG = "x" * 32
HISTORIES = {
    "two heads": ("heads", {**revision("a1"), **revision("b1"), **revision("b2", "b1")}),
    "one branch of two": (
        "two@head",
        {
            **revision("a1", branch_labels=("one",)),
            **revision("b1", branch_labels=("two",)),
            **revision("b2", "b1"),
        },
    ),
    "a part of a branch": (
        "one@+1",
        {**revision("a1", branch_labels="one"), **revision("a2", "a1"), **revision("b1")},
    ),
    "fewer rows than heads": (
        "heads",
        {**revision("a1"), **revision("a2", "a1"), **revision("b1", depends_on="a2")},
    ),
    "depends on a label": (
        "heads",
        {**revision("a1", branch_labels="one"), **revision("b1", depends_on="one")},
    ),
    "a merge": (
        "head",
        {**revision("a1"), **revision("b1", "a1"), **revision("c1", "a1"), **revision("m1", ("b1", "c1"))},
    ),
    "two roots, merged": ("head", {**revision("a1"), **revision("b1"), **revision("m1", ("a1", "b1"))}),
    "a prefix of another": ("abcd", {**revision("abcd"), **revision("abcdef", "abcd")}),
    "ids that are not hex": (
        "head",
        {
            **revision("v3.2.0.a"),
            **revision("v3.2.0.a2", "v3.2.0.a"),
            **revision(LONG, "v3.2.0.a2"),
            **revision("über 1/2", LONG),
        },
    ),
    "several places": (
        "heads",
        {
            **revision("a1"),
            **revision("b1", folder="other/place"),
            "alembic.ini": INI + "version_path_separator = os\n"
            "version_locations = %(here)s/migrations/versions:%(here)s/other/place\n",
        },
    ),
    "folders in folders": (
        "head",
        {
            **revision("a1"),
            **revision("b1", "a1", folder="migrations/versions/2024/05"),
            "alembic.ini": INI + "recursive_version_locations = true\n",
        },
    ),
    "a package": (
        "head",
        {
            **revision("a1", folder="shop/db/versions"),
            "shop/__init__.py": "",
            "shop/db/__init__.py": "",
            "shop/db/env.py": env()["migrations/env.py"],
            "alembic.ini": "[alembic]\nscript_location = shop:db\nprepend_sys_path = .\n",
        },
    ),
    "pyproject.toml beside an ini": (
        "head",
        {**revision("a1"), "pyproject.toml": TOML, "alembic.ini": "[alembic]\n"},
    ),
    "pyproject.toml alone": (
        "head",
        {
            **revision("a1"),
            **revision("b1", "a1", folder="more"),
            "pyproject.toml": TOML
            + 'version_locations = ["%(here)s/migrations/versions", "%(here)s/more"]\n',
        },
    ),
}


@pytest.mark.parametrize("shape", HISTORIES)
def test_histories_of_every_shape(shape: str, project: Project, compare: Comparison) -> None:
    destination, files = HISTORIES[shape]
    folder = project({**env(), **files}, config=None if shape.endswith("alone") else "alembic.ini")
    compare(folder, destination=destination, every=False)
    if destination == "one@+1":
        return
    for place in folder.rglob("env.py"):
        place.write_text("raise SystemExit(9)\n" + place.read_text())
    again = compare.run("upgrade", destination, cwd=folder, database=compare.database)
    assert again.code == 0, again
    assert again.logs[-1]["message"].startswith("Nothing to do"), again
    complete = destination in {"head", "heads"}
    assert compare.run("check", cwd=folder, database=compare.database).code == (0 if complete else 3)


SECTION = INI + "[other]\nscript_location = %(here)s/migrations\ngreeting = hello\n"
LAYOUTS: dict[str, tuple[dict[str, str], tuple[str, ...], dict[str, str]]] = {
    "-c": ({"etc/my.ini": INI.replace("here)s", "here)s/..")}, ("-c", "etc/my.ini"), {}),
    "ALEMBIC_CONFIG": (
        {"etc/my.ini": INI.replace("here)s", "here)s/..")},
        (),
        {"ALEMBIC_CONFIG": "etc/my.ini"},
    ),
    "-n and -x": (
        {
            "alembic.ini": SECTION,
            **env(
                before="assert config.get_main_option('greeting') == 'hello'\n"
                "assert context.get_x_argument(as_dictionary=True) == {'data': 'true', 'dry': ''}"
            ),
        },
        ("-n", "other", "-x", "data=true", "-x", "dry"),
        {},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alembics_own_options(layout: str, project: Project, compare: Comparison) -> None:
    files, options, environment = LAYOUTS[layout]
    folder = project({**env(), **files}, config=None, revisions=THREE)
    compare(folder, *options, environment=environment)


@pytest.mark.parametrize("kind", ["sync", "asyncpg"])
def test_a_database_whose_name_has_every_kind_of_character(
    kind: str, project: Project, run_migrator: Runner, server: Server
) -> None:
    """SQLAlchemy takes the path of an address as it stands, and does not decode it."""
    folder = project(async_env() if kind == "asyncpg" else None, revisions=THREE)
    database = server.create_database("it's a 50% ?sh#op/%41 & näh")
    try:
        for _ in range(2):
            assert run_migrator("upgrade", cwd=folder, database=database).code == 0
        assert run_migrator("downgrade", "-1", cwd=folder, database=database).code == 0
        assert len(database.psql("SELECT 1 FROM alembic_version")) == 1
        assert run_migrator("restore", "latest", "--yes", cwd=folder, database=database).code == 0
    finally:
        for (name,) in server.psql("SELECT datname FROM pg_database WHERE datname LIKE 'it''s a 50%'"):
            server.drop_database(name)


def test_a_bare_migrations_folder(project: Project, run_migrator: Runner, database: Database) -> None:
    result = run_migrator(cwd=project(env(), config=None, revisions=THREE), database=database)
    assert result.code == 0, result


APP = "import time; time.sleep(0.5)\nfrom sqlalchemy import MetaData\nmetadata = MetaData()\n"


def test_env_is_loaded_once_and_only_to_apply(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    folder = project({"app.py": APP}, revisions=THREE, env="imports_app")
    loads = folder / "loads"
    loads.write_text("")
    count = 0
    for more, words in (
        (0, "status"),
        (0, "check"),
        (0, "current"),
        (0, "history"),
        (1, "upgrade"),
        (0, "upgrade"),
        (0, "verify"),
        (0, "status"),
        (1, "downgrade -1"),
        (1, "stamp head"),
        (0, "stamp head"),
    ):
        result = run_migrator(*words.split(), cwd=folder, database=database, env={"ENV_LOADS": str(loads)})
        assert result.code in (0, 3), result
        count += more
        assert loads.read_text().count("loaded") == count, result


TENANTS = """
TENANT = context.get_x_argument(as_dictionary=True).get("tenant", "public")
"""


@pytest.mark.parametrize("schema", ["TENANT", "TENANT.lower()"])
def test_one_tenant_is_not_taken_for_another(
    schema: str, project: Project, compare: Comparison, database: Database
) -> None:
    connected = (
        "connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS {TENANT}'))\n"
        "connection.execute(text(f'SET search_path TO {TENANT}')); connection.commit()"
    )
    files = env(before=TENANTS, connected=connected, configure=f"version_table_schema={schema}")
    folder = project(files, revisions=THREE)
    compare(folder, "-x", "tenant=one")
    other = compare.run("-x", "tenant=two", cwd=folder, database=database)
    assert other.code in (10, 33), other
    database.execute("CREATE SCHEMA IF NOT EXISTS two")
    other = compare.run("-x", "tenant=two", "--baseline", "base", cwd=folder, database=database)
    assert other.code == 0, other
    assert database.psql("SELECT count(*) FROM two.alembic_version, two.t3") == [(0,)]
    again = compare.run("-x", "tenant=one", cwd=folder, database=database)
    assert again.logs[-1]["message"].startswith("Nothing to do"), again


LOOP = """\
import os
from alembic import context
from sqlalchemy import create_engine, pool, text

engine = create_engine(os.environ["DATABASE_URL"]{pool})
for tenant in ("one", "two"):
    with engine.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {{tenant}}"))
        connection.execute(text(f"SET search_path TO {{tenant}}"))
        connection.commit()
        context.configure(connection=connection, version_table_schema=tenant)
        with context.begin_transaction():
            context.run_migrations()
"""


@pytest.mark.parametrize("pool", ["", ", poolclass=pool.NullPool"])
def test_an_env_that_goes_through_several_schemas(pool: str, project: Project, compare: Comparison) -> None:
    folder = project({"migrations/env.py": LOOP.format(pool=pool)}, revisions=THREE)
    result = compare(folder, every=False)
    assert sum(line["message"].startswith("applied ") for line in result.logs) == 6, result
    again = compare.run(cwd=folder, database=compare.database)
    assert again.code == 0, again
    assert again.logs[-1]["message"].startswith("Nothing to do"), again
    compare.database.execute("UPDATE two.alembic_version SET version_num = 'r002'; DROP TABLE two.t3")
    again = compare.run(cwd=folder, database=compare.database)
    assert again.code == 0, again
    assert compare.database.psql("SELECT count(*) FROM one.t3, two.t3") == [(0,)], again


def test_the_command_that_env_sees(project: Project, run_migrator: Runner, database: Database) -> None:
    says = "import sys; print('COMMAND', config.cmd_opts.cmd[0].__name__, file=sys.stderr)"
    folder = project(env(before=says), revisions=THREE)
    for words in ("upgrade", "downgrade -1", "stamp r001"):
        result = run_migrator(*words.split(), cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})
        assert result.code == 0, result
        assert f"COMMAND {words.split()[0]}\n" in result.stderr, result


def test_an_env_for_offline_use_only(project: Project, run_migrator: Runner, database: Database) -> None:
    text = async_env()["migrations/env.py"].split("async def")[0]
    text += "context.configure(url='postgresql://', literal_binds=True)\ncontext.run_migrations()\n"
    result = run_migrator(cwd=project({"migrations/env.py": text}, revisions=THREE), database=database)
    assert result.code == 31, result
    assert database.psql("SELECT to_regclass('alembic_version') IS NULL") == [(True,)]
