"""Whatever an env.py does, migrator ends where plain Alembic ends, says so, and takes its process back.

Each project goes through `alembic upgrade head` on one database and through `migrator upgrade` on another;
the two are compared as pg_dump writes them, rows included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.comparison import Comparison
from tests.support.env_text import AUTOCOMMIT, OWN_ENGINE, async_env, env, with_schema
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]
THREE = linear_history(3)


CONNECTIONS = {
    "an engine with a pool": env(
        engine="create_engine(os.environ['DATABASE_URL'], pool_size=3, pool_pre_ping=True)"
    ),
    "an engine that echoes": env(
        engine="create_engine(os.environ['DATABASE_URL'], echo=True, echo_pool=True)"
    ),
    "a transaction around it all": env(run="with connection.begin():\n    run(connection)"),
    "engine.begin": env(
        before="e = create_engine(os.environ['DATABASE_URL'])\nwith e.begin() as c: run(c)", run="pass"
    ),
    "its own commit, no begin_transaction": env(
        run="context.configure(connection=connection)\ncontext.run_migrations()\nconnection.commit()"
    ),
    "an engine in autocommit": env(
        engine="create_engine(os.environ['DATABASE_URL'], isolation_level='AUTOCOMMIT')"
    ),
    "a connection in autocommit": env(connected=AUTOCOMMIT),
    "serializable": env(engine="create_engine(os.environ['DATABASE_URL'], isolation_level='SERIALIZABLE')"),
    "a transaction per migration": env(configure="transaction_per_migration=True"),
    "no transactional DDL": env(configure="transactional_ddl=False"),
    "a role": env(connected="connection.execute(text('SET ROLE pg_database_owner')); connection.commit()"),
    "locks and timeouts of its own": env(
        connected="connection.execute(text(\"SET lock_timeout = '4s'\"))\n"
        "connection.execute(text(\"SET statement_timeout = '60s'\"))\n"
        "connection.execute(text('SELECT pg_advisory_lock(1)')); connection.commit()"
    ),
    "libpq's own address": env(
        before="import psycopg2\npsycopg2.connect(os.environ['DATABASE_URL'].replace('+psycopg2', '')).close()"
    ),
    "another attempt after a failure": env(
        top="tries = []",
        before="def fail(step, **_):\n    tries.append(step)\n    if len(tries) < 3: raise RuntimeError(step)",
        configure="on_version_apply=fail",
        run="for attempt in range(3):\n    try:\n        run(connection)\n"
        "        break\n    except RuntimeError: connection.rollback()",
    ),
    "configure twice, and every option": env(
        top="def yes(*_, **__): return True",
        run="context.configure(url='postgresql://')\nrun(connection)",
        configure="process_revision_directives=yes, include_object=yes, include_name=yes, compare_type=True,"
        "compare_server_default=True, include_schemas=True, render_as_batch=True, render_item=yes,"
        "on_version_apply=[yes], user_module_prefix='x.', template_args={'a': 1}",
    ),
    "a look at the command": env(
        before="assert config.cmd_opts.cmd[0].__name__ == 'upgrade' and config.cmd_opts.revision == 'head'\n"
        "assert context.get_tag_argument() is None and context.get_starting_revision_argument() is None\n"
        "assert context.get_head_revision() == 'r003' == context.get_revision_argument()\n"
        "assert context.get_x_argument() == [] and not context.is_offline_mode()"
    ),
}


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_connections_of_every_kind(kind: str, project: Project, compare: Comparison) -> None:
    compare(project(CONNECTIONS[kind], revisions=THREE))


@pytest.mark.parametrize(
    "url",
    [
        "context.config.get_main_option('sqlalchemy.url')",
        "os.environ['DATABASE_URL']",
        "os.environ['DATABASE_URL'].replace('postgresql://', 'postgresql+asyncpg://')",
        "os.environ['DATABASE_URL'].replace('+asyncpg', '+psycopg')",
    ],
)
def test_async_engines(url: str, project: Project, compare: Comparison) -> None:
    compare(project(async_env(url), revisions=THREE), driver="asyncpg")


def test_an_address_goes_into_the_config_as_it_is(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    # Plain Alembic fails here: ConfigParser takes the password's percent signs for references.
    files = env(before="config.set_main_option('sqlalchemy.url', os.environ['DATABASE_URL'])")
    result = run_migrator(cwd=project(files, revisions=THREE), database=database)
    assert result.code == 0, result


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_a_driver_that_env_puts_in_or_that_the_address_names(
    driver: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    put = f"os.environ['DATABASE_URL'].replace('postgresql://', 'postgresql+{driver}://')"
    right = f"assert connection.dialect.driver == '{driver}'"
    files = async_env(put) if driver == "asyncpg" else env(engine=f"create_engine({put})", connected=right)
    folder = project(files, revisions=THREE)
    result = run_migrator(cwd=folder, database=database)
    assert result.code == 0, result
    named = database.url.replace("postgresql://", f"postgresql+{driver}://")
    given = {"MIGRATOR_DATABASE_URL": None, "DATABASE_URL": named, "MIGRATOR_BACKUP": "off"}
    result = run_migrator("downgrade", "-1", cwd=folder, database=database, env=given)
    assert result.code == 0, result


VERSION_TABLES = {
    "a name": env(configure="version_table='versions_of_mine'"),
    "a computed name": env(configure="version_table='-'.join(['of', 'mine'])"),
    "a schema": env(
        before="SCHEMA = 'app'", connected=with_schema("app"), configure="version_table_schema=SCHEMA"
    ),
    "a computed schema": env(connected=with_schema("app"), configure="version_table_schema='APP'.lower()"),
    "options": env(top="OPTIONS = {'version_table': 'mine'}", configure="**OPTIONS"),
    "a search_path": env(
        connected=with_schema("app")
        + "connection.execute(text('SET search_path TO app')); connection.commit()\n"
        "connection.dialect.default_schema_name = 'app'"
    ),
    "a search_path of the engine": env(
        engine="create_engine(os.environ['DATABASE_URL'], connect_args={'options': '-c search_path=app'})",
        connected=with_schema("app"),
    ),
    "a module of the application": {
        "migrations/env.py": "import application",
        "application.py": env(configure="version_table='far_away'")["migrations/env.py"],
    },
}


@pytest.mark.parametrize("kind", VERSION_TABLES)
def test_version_tables_are_found_again(kind: str, project: Project, compare: Comparison) -> None:
    folder = project(VERSION_TABLES[kind], revisions=THREE)
    compare(folder)
    again = compare.run(cwd=folder, database=compare.database)
    assert again.code == 0, again
    assert again.logs[-1]["message"].startswith("Nothing to do"), again


DICT_CONFIG = """
import logging.config
logging.config.dictConfig({
    "version": 1, "disable_existing_loggers": True,
    "formatters": {"f": {"format": "PLAIN %(message)s"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "f"}},
    "root": {"handlers": ["out"], "level": "DEBUG"},
    "loggers": {"migrator": {"handlers": ["out"], "level": "CRITICAL", "propagate": False}},
})
"""
REWRAP = """
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
sys.stderr = io.TextIOWrapper(sys.stderr.buffer, encoding="utf-8", line_buffering=True)
print(os.environ["DATABASE_URL"])
"""
PRINTS = """
import subprocess, sys
print(config.get_main_option("sqlalchemy.url"), os.environ["DATABASE_URL"])
print(dict(os.environ), file=sys.stderr)
config.print_stdout("the address is %s", os.environ["DATABASE_URL"])
subprocess.run(["echo", "from a child"])
os.write(1, b"from a library\\n")
print("no end of line", end="", flush=True)
"""
LATE = """
context.configure(connection=connection)
import logging; logging.disable(logging.CRITICAL)
with context.begin_transaction(): context.run_migrations()
"""
PROCESS = """
import locale, signal, socket, sys, warnings
os.chdir("/")
sys.path[:] = [place for place in sys.path if "python3" in place]
locale.setlocale(locale.LC_ALL, "C.UTF-8")
warnings.simplefilter("error")
socket.setdefaulttimeout(0.001)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.set_wakeup_fd(-1)
sys.excepthook = lambda *_: os._exit(1)
"""
THREADS = """
import concurrent.futures, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600)
"""
HABITS = {
    "dictConfig": env(before=DICT_CONFIG),
    "logging.disable": env(run=LATE.strip()),
    "prints": env(before=PRINTS, after="print('nor here', end='')"),
    "wraps its streams anew": env(before=REWRAP),
    "closes stdout": env(after="import sys; sys.stdout.close()"),
    "changes the process": env(before=PROCESS),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_that_reach_beyond_env(habit: str, project: Project, compare: Comparison) -> None:
    folder = project(HABITS[habit], revisions=THREE)
    result = compare(folder, environment={"MIGRATOR_REPORT_FILE": "report.json"})
    assert result.stdout.count("\n") == 1, result
    assert json.loads((folder / "report.json").read_text())["code"] == 0


def test_threads_that_never_end(project: Project, run_migrator: Runner, database: Database) -> None:
    result = run_migrator(cwd=project(env(before=THREADS), revisions=THREE), database=database)
    assert result.code == 0, result
    assert result.seconds < 170, result


LOGGING_INI = (Path(__file__).parents[2] / "support" / "env_files" / "file_config.ini").read_text()


def test_file_config_leaves_our_lines_and_its_files(project: Project, compare: Comparison) -> None:
    to_file = LOGGING_INI.replace("keys = console", "keys = console,file").replace(
        "level = INFO\nhandlers =", "level = INFO\nhandlers = file"
    )
    to_file += '\n[handler_file]\nclass = FileHandler\nargs = ("app.log",)\nformatter = generic\n'
    ini = "[alembic]\nscript_location = %(here)s/migrations\n" + to_file
    folder = project({"alembic.ini": ini}, env="file_config", revisions=THREE)
    result = compare.run(cwd=folder, database=compare.database)
    assert result.code == 0, result
    assert len(result.logs) == len(result.stderr.splitlines()) == 5, result
    assert (folder / "app.log").read_text().count("Running upgrade") == 3
    compare.run.watch(folder / "app.log")


def test_a_revision_that_sets_up_logging(project: Project, compare: Comparison) -> None:
    revisions = [*THREE[:2], Revision("r003", "r002", f"import os\n{DICT_CONFIG.strip()}")]
    compare(project(env(engine=OWN_ENGINE), revisions=revisions))
