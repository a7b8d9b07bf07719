"""Revisions that import the application do so where they do under plain Alembic: once env.py has set what that reads.

Alembic imports the revisions within `context.run_migrations`. An application that was loaded before has read another
setting by then: a table lands in another schema, and nobody is told.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from migrator.project.history.imports import imports_more
from tests.project.env.test_env_files import HABITS
from tests.support.comparison import Comparison
from tests.support.env_shapes import SHAPES
from tests.support.env_text import env
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import ENV_FILES, Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

TEMPLATE = (ENV_FILES / "plain_url.py").read_text()
SETS = 'import os\nos.environ.setdefault("SHOP_SCHEMA", "shop")\n'
TELLS = TEMPLATE.replace("target_metadata=", "include_schemas=True, target_metadata=").replace(
    "target_metadata = None", "config.set_main_option('shop.schema', 'shop')\ntarget_metadata = None"
)
SETTINGS = 'import os\nSCHEMA = os.environ.get("SHOP_SCHEMA", "public")\n'
APPLICATION = {
    "shop/__init__.py": "",
    "shop/settings.py": SETTINGS,
    "shop/helpers.py": "from shop.settings import SCHEMA\n",
    "migrations/env.py": SETS + TELLS,
}
MAKES = "op.create_table('orders', sa.Column('id', sa.Integer), schema=SCHEMA)"
DROPS = "op.drop_table('orders', schema=SCHEMA)"


@pytest.fixture
def compare(run_migrator: Runner, database: Database, plain: Database) -> Comparison:
    for one in (database, plain):
        one.execute("CREATE SCHEMA shop")
    return Comparison(run_migrator, database, plain)


def importing(text: str, upgrade: str = MAKES, downgrade: str = DROPS) -> str:
    """Return the second revision's file, with lines ahead of its imports."""
    return f"{text}\n{Revision('r002', 'r001', upgrade, downgrade).render()}"


def schemas(database: Database) -> list[tuple[str, ...]]:
    """Return the schemas in which there is a table of orders."""
    return database.psql("SELECT schemaname FROM pg_tables WHERE tablename = 'orders'")


WAYS = {
    "an import": "from shop.settings import SCHEMA",
    "a second name": "import os, shop.settings\nSCHEMA = shop.settings.SCHEMA",
    "on a line with another": "import os; import shop.settings as s; SCHEMA = s.SCHEMA",
    "over two lines": "from shop.settings import (\n    SCHEMA,\n)",
    "with a backslash": "from \\\n    shop.settings \\\n    import SCHEMA",
    "in a try": "try:\n    from shop.settings import SCHEMA\nexcept ImportError:\n    SCHEMA = 'public'",
    "in an if": "import sys\nif sys.version_info > (3,):\n    from shop.settings import SCHEMA",
    "in a class": "class Mine:\n    from shop.settings import SCHEMA\nSCHEMA = Mine.SCHEMA",
    "a helper of the application": "from shop.helpers import SCHEMA",
    "a helper beside the revisions": "from migrations.beside import SCHEMA",
    "a function that is called": (
        "def find():\n    from shop.settings import SCHEMA\n    return SCHEMA\nSCHEMA = find()"
    ),
    "a decorator": "def found(f):\n    from shop.settings import SCHEMA\n    return SCHEMA\n@found\ndef SCHEMA(): pass",
    "importlib": "import importlib\nSCHEMA = importlib.import_module('shop.settings').SCHEMA",
    "importlib's function": "from importlib import import_module as load\nSCHEMA = load('shop.settings').SCHEMA",
    "__import__": "SCHEMA = __import__('shop.settings').settings.SCHEMA",
    "runpy": "import runpy\nSCHEMA = runpy.run_module('shop.settings')['SCHEMA']",
    "exec": "exec('from shop.settings import SCHEMA')",
    "the variable itself": "import os\nSCHEMA = os.environ.get('SHOP_SCHEMA', 'public')",
    "the variable by another name": "from os import getenv as get\nSCHEMA = get('SHOP_SCHEMA', 'public')",
    "Alembic's context": (
        "from alembic import context\n"
        "try:\n    SCHEMA = context.config.get_main_option('shop.schema')\nexcept NameError:\n    SCHEMA = 'public'"
    ),
    "its operations": (
        "from alembic import op as do\nimport sqlalchemy as sa\n"
        "try: SCHEMA = do.get_context().opts['include_schemas'] and 'shop'\nexcept NameError: SCHEMA = 'public'"
    ),
    "after __future__": "from __future__ import annotations\nfrom shop.settings import SCHEMA",
}


@pytest.mark.parametrize("way", WAYS)
def test_it_reads_what_env_py_has_set(way: str, project: Project, compare: Comparison) -> None:
    files = {**APPLICATION, "migrations/beside.py": "from shop.settings import SCHEMA\n"}
    files["migrations/versions/r002.py"] = importing(WAYS[way])
    folder = project(files, revisions=linear_history(1))
    compare(folder)
    assert schemas(compare.database) == [("shop",)]


SETTERS = {
    "a file of variables": (
        "import os, pathlib\n"
        "lines = pathlib.Path('shop.env').read_text().split()\n"
        "os.environ.update(line.split('=') for line in lines)\n" + TEMPLATE
    ),
    "the path": "import sys\nsys.path.insert(0, 'src')\n" + TEMPLATE,
    "an attribute of the application's": "import shop.config\nshop.config.schema = 'shop'\n" + TEMPLATE,
    "what -x says": TEMPLATE.replace(
        "config = context.config",
        "import os\nconfig = context.config\n"
        "os.environ['SHOP_SCHEMA'] = context.get_x_argument(as_dictionary=True)['schema']",
    ),
    "the functions": TEMPLATE.replace(
        "context.run_migrations()", "with schema('shop'): context.run_migrations()"
    ).replace("import context", "import context\nfrom shop.config import schema_is as schema"),
    "a connection for both": env(top=SETS)["migrations/env.py"],
    "an offline mode that is none": SETS
    + TEMPLATE.replace(
        "    context.configure(\n        url", "    raise SystemExit('online only')\n    dict(\n url"
    ),
}
CONFIG = """
import contextlib, os
schema = None

@contextlib.contextmanager
def schema_is(name):
    global schema
    schema = name
    yield
    schema = None
"""


@pytest.mark.parametrize("setter", SETTERS)
def test_env_py_sets_it_in_whatever_way(setter: str, project: Project, compare: Comparison) -> None:
    models = 'import os\nfrom shop import config\nSCHEMA = config.schema or os.environ.get("SHOP_SCHEMA", "public")\n'
    files = {
        "shop/__init__.py": "",
        "shop/config.py": CONFIG,
        "shop/models.py": models,
        "shop.env": "SHOP_SCHEMA=shop\n",
        "migrations/env.py": SETTERS[setter],
        "migrations/versions/r002.py": importing("from shop.models import SCHEMA"),
    }
    if setter == "the path":
        files |= {"src/there/__init__.py": "SCHEMA = 'shop'\n"}
        files["migrations/versions/r002.py"] = importing("from there import SCHEMA")
    folder = project(files, revisions=linear_history(1))
    compare(folder, *(("-x", "schema=shop") if setter == "what -x says" else ()))
    assert schemas(compare.database) == [("shop",)]
    assert not list(folder.glob("*.sql"))


def test_every_command_sees_the_same(project: Project, run_migrator: Runner, database: Database) -> None:
    database.execute("CREATE SCHEMA shop; CREATE TABLE public.orders (id int)")
    folder = project(
        {**APPLICATION, "migrations/versions/r002.py": importing(WAYS["an import"])},
        revisions=linear_history(1),
    )
    told = {"MIGRATOR_BASELINE": "base", "MIGRATOR_BACKUP": "off"}

    def run(words: str, code: int = 0) -> None:
        result = run_migrator(*words.split(), cwd=folder, database=database, env=told)
        assert result.code == code, result

    run("check", 3)
    run("history")
    run("upgrade")
    assert sorted(schemas(database)) == [("public",), ("shop",)]
    for words in ("check", "status", "verify", "upgrade", "freeze", "upgrade", "wait-for-current"):
        run(words)
    run("downgrade -1")
    assert schemas(database) == [("public",)]
    run("upgrade")
    run("downgrade base --yes")
    assert schemas(database) == [("public",)]


def test_a_bootstrap_sets_it(project: Project, run_migrator: Runner, database: Database) -> None:
    database.execute("CREATE SCHEMA shop")
    ground = "import contextlib, os\n@contextlib.contextmanager\ndef prepare(config):\n"
    files = {
        **APPLICATION,
        **env(before="assert os.environ['SHOP_SCHEMA'] == 'shop'"),
        "ground.py": f"{ground}    os.environ['SHOP_SCHEMA'] = 'shop'\n    yield\n",
        "migrations/versions/r002.py": importing(WAYS["an import"]),
    }
    folder = project(files, revisions=linear_history(1))
    result = run_migrator(cwd=folder, database=database, env={"MIGRATOR_BOOTSTRAP": "ground:prepare"})
    assert result.code == 0, result
    assert schemas(database) == [("shop",)]


def test_each_section_has_an_env_py_of_its_own(project: Project, compare: Comparison) -> None:
    """The history of the second section imports the application, and that of the first one does not."""
    folder = project(APPLICATION, revisions=linear_history(1))
    ini = (folder / "alembic.ini").read_text()
    second = ini.replace("[alembic]", "[shop]").replace("/migrations", "/others")
    table = "connection=connection, version_table='shop_version'"
    more = {
        "alembic.ini": f"{ini}\n{second}version_table = shop_version\n",
        "others/env.py": SETS + TEMPLATE.replace("connection=connection", table),
        "others/versions/r002.py": importing(WAYS["an import"]).replace("'r001'", "None"),
    }
    project(more, config=None)
    compare(folder, every=False)
    compare(folder, "-n", "shop", every=False, environment={"MIGRATOR_BASELINE": "base"})
    assert schemas(compare.database) == [("shop",)]


def test_a_package_that_holds_the_revisions_is_not_imported_first(
    project: Project, compare: Comparison
) -> None:
    files = {**APPLICATION, "shop/__init__.py": "from shop.settings import SCHEMA\n"}
    files["shop/steps/r001.py"] = "from shop import SCHEMA\n" + Revision("r001", None, MAKES, DROPS).render()
    folder = project(files)
    ini = folder / "alembic.ini"
    ini.write_text(f"{ini.read_text()}version_locations = shop:steps\n")
    compare(folder, every=False)
    assert schemas(compare.database) == [("shop",)]


@pytest.mark.parametrize("words", ["history", "alembic heads", "upgrade"])
def test_a_package_that_holds_env_py_is_told_the_address_first(
    words: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    """Alembic imports the package to find the folder, before anything else."""
    files = {
        "shop/__init__.py": "import os\nfrom sqlalchemy import create_engine\n"
        "engine = create_engine(os.environ['DATABASE_URL'])\n",
        **{f"shop/{name}": text for name, text in env(top="import shop", engine="shop.engine").items()},
        "shop/migrations/versions/r001.py": linear_history(1)[0].render(),
        "alembic.ini": "[alembic]\nscript_location = shop:migrations\nprepend_sys_path = .\n",
    }
    folder = project(files)
    told = {"DATABASE_URL": None, "MIGRATOR_DATABASE_URL": database.url, "MIGRATOR_BACKUP": "off"}
    done(run_migrator(*words.split(), cwd=folder, env=told))
    if words == "upgrade":
        assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


ONCE = """
from alembic import context
from sqlalchemy import engine_from_config, pool

def run():
    engine = engine_from_config(
        context.config.get_section(context.config.config_ini_section), poolclass=pool.NullPool
    )
    with engine.connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
run()
"""


def test_a_module_that_runs_the_migrations_while_it_is_imported(
    project: Project, compare: Comparison
) -> None:
    """It is imported once in a process: what was loaded ahead may not be all that it does."""
    files = {
        **APPLICATION,
        "migrations/env.py": f"{SETS}import shop.migrate\n",
        "shop/migrate.py": ONCE,
        "migrations/versions/r002.py": importing(WAYS["an import"]),
    }
    compare(project(files, revisions=linear_history(1)))
    assert schemas(compare.database) == [("shop",)]


def test_env_py_writes_nothing_before_the_lock_is_held(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    writes = "connection.execute(text('CREATE TABLE noted (id int)')); connection.commit()"
    files = {
        "shop/__init__.py": "",
        "shop/settings.py": SETTINGS,
        **env(connected=writes),
        "migrations/versions/r002.py": importing(
            "from shop.settings import SCHEMA", "raise ValueError('no')"
        ),
    }
    folder = project(files, revisions=linear_history(1))
    for words in ("check", "history", "freeze"):
        with unchanged(database):
            run_migrator(*words.split(), cwd=folder, database=database)


def test_what_fails_says_what_failed_first(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    files = {
        **APPLICATION,
        "migrations/env.py": "raise LookupError('no SHOP_KEY')\n# run_migrations\n",
        "migrations/versions/r002.py": importing("import shop.gone"),
    }
    folder = project(files, revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(
        result, ExitCode.BAD_HISTORY, "r002.py, line 1", "shop.gone", "env.py", "LookupError: no SHOP_KEY"
    )


def test_two_files_of_one_id_are_found_whatever_env_py_does_to_warnings(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    copy = importing("import shop.settings")
    files = {
        **APPLICATION,
        "migrations/env.py": f"import logging, warnings\nwarnings.simplefilter('ignore')\n{TEMPLATE}",
        "migrations/versions/r002.py": copy,
        "migrations/versions/copy.py": copy,
    }
    folder = project(files, revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.BAD_HISTORY, "r002", "more than once")


ONLY_ONCE = "import shop\nassert not hasattr(shop, 'loaded'), 'twice'\nshop.loaded = True\n"


def test_an_env_py_that_cannot_be_loaded_twice_changes_nothing(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    """What docs/why/env-py.md says of it."""
    files = {
        **APPLICATION,
        "migrations/env.py": ONLY_ONCE + TEMPLATE,
        "migrations/versions/r002.py": importing(WAYS["an import"]),
    }
    folder = project(files, revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.BAD_HISTORY, "env.py failed: AssertionError: twice")


def test_the_history_needs_no_database(project: Project, run_migrator: Runner) -> None:
    """Neither an address, nor one that does not answer keeps the revisions from being read."""
    shown = "<base> -> r001"
    for text in (TEMPLATE, env()["migrations/env.py"]):
        files = {**APPLICATION, "migrations/env.py": SETS + text}
        files["migrations/versions/r002.py"] = importing(
            "from shop.settings import SCHEMA\nassert SCHEMA == 'shop'"
        )
        folder = project(files, revisions=linear_history(1))
        assert shown in done(run_migrator("history", cwd=folder)).stdout
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"postgresql://postgres@127.0.0.1:{silent.getsockname()[1]}/shop"
            result = done(run_migrator("history", cwd=folder, env={"DATABASE_URL": url}))
        assert shown in result.stdout
        assert result.seconds < 60, result


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_env_py_are_harmless_ahead_of_the_run(
    habit: str, project: Project, compare: Comparison
) -> None:
    files = {**HABITS[habit], "migrations/versions/r002.py": importing(f"{WAYS['the variable itself']}")}
    result = compare(project(files, revisions=linear_history(1)))
    assert result.stdout.count("\n") == 1, result


@pytest.mark.parametrize("shape", ["asyncpg", "SET search_path in the transaction", "an exit of its own"])
def test_env_py_has_no_offline_mode(shape: str, project: Project, compare: Comparison) -> None:
    for one in (compare.database, compare.plain):
        one.execute("CREATE SCHEMA app")
    text = SHAPES[shape]["migrations/env.py"]
    files = {**APPLICATION, "migrations/env.py": SETS + text}
    files["migrations/versions/r002.py"] = importing(WAYS["an import"])
    driver = "asyncpg" if shape == "asyncpg" else "psycopg2"
    folder = project(files, revisions=linear_history(1))
    compare(folder, environment={"MIGRATOR_BASELINE": "base"}, driver=driver)
    assert schemas(compare.database) == [("shop",)]


TABLES_AT_ONCE = """
from sqlalchemy import Column, Integer, MetaData, Table, create_engine
import os
SCHEMA = "shop"
engine = create_engine(os.environ["DATABASE_URL"])
metadata = MetaData(schema=SCHEMA)
sessions = Table("sessions", metadata, Column("id", Integer))
metadata.create_all(engine)
"""


def test_an_application_that_makes_tables_when_it_is_loaded(project: Project, compare: Comparison) -> None:
    """env.py may write nothing ahead of the lock, so it fails there; the application may, as under plain Alembic."""
    files = {
        **APPLICATION,
        "shop/settings.py": TABLES_AT_ONCE,
        "migrations/env.py": f"from shop.settings import metadata\n{TEMPLATE}",
        "migrations/versions/r002.py": importing(WAYS["an import"]),
    }
    compare(project(files, revisions=linear_history(1)), environment={"MIGRATOR_BASELINE": "base"})
    assert schemas(compare.database) == [("shop",)]


PURE = {
    "what alembic writes": "from typing import Sequence, Union",
    "the dialect": "from sqlalchemy.dialects import postgresql\nimport sqlalchemy.orm as orm",
    "in upgrade alone": "def helper():\n    from shop.settings import SCHEMA\n    import os; os.environ['A']",
    "in a method": "class A:\n    def f(self):\n        import shop.settings",
    "for types alone": (
        "from typing import TYPE_CHECKING\nimport typing as t\n"
        "if TYPE_CHECKING:\n    import shop.settings\nif t.TYPE_CHECKING:\n    import shop.settings"
    ),
    "words in a text": "'''import shop.settings\nfrom shop import settings\nos.environ'''",
    "a comment": "import json  # and import nothing else\n# import shop",
    "the older name": "from sqlalchemy.ext.declarative import declarative_base",
    "a column of that name": "columns = ['environment', 'import_id', 'evaluation', 'exec']",
    "the revision's own class": "class A:\n    x = 1\ntry:\n    import json\nexcept ImportError:\n    json = None",
    "context in a function": "from alembic import context, op\ndef f(): return context.get_x_argument()",
    "Windows' line endings": "import json\r\nfrom alembic import op\r\n",
}


@pytest.mark.parametrize("kind", PURE)
def test_what_needs_no_env_py(kind: str, tmp_path: Path) -> None:
    (tmp_path / "r001.py").write_text(importing(PURE[kind]), newline="")
    assert not imports_more([str(tmp_path)])


@pytest.mark.parametrize("way", WAYS)
def test_what_needs_it(way: str, tmp_path: Path) -> None:
    (tmp_path / "r001.py").write_text(importing(WAYS[way]))
    (tmp_path / "r000.py").write_text(linear_history(1)[0].render())
    assert imports_more([str(tmp_path)])


def test_env_py_is_not_loaded_for_what_a_function_imports(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    """The application takes seconds in real projects; a run with nothing to do need not wait for it."""
    files = {**APPLICATION, "migrations/env.py": "import sys; print('env.py', file=sys.stderr)\n" + TEMPLATE}
    files["migrations/versions/r002.py"] = importing(
        "SCHEMA = 'public'", f"from shop.settings import SCHEMA as _\n{MAKES}"
    )
    folder = project(files, revisions=linear_history(1))
    assert run_migrator(cwd=folder, database=database).stderr.count("env.py\n") == 1
    for words in ("upgrade", "status", "history", "check"):
        assert "env.py\n" not in run_migrator(*words.split(), cwd=folder, database=database).stderr
