"""Shapes of env.py as projects have them: what each sets on its connection before the revisions run."""

from __future__ import annotations

from tests.support.env_text import env

NULL = "engine_from_config(config.get_section(config.config_ini_section), poolclass=pool.NullPool{})"
IN_TRANSACTION = """\
context.configure(connection=connection{configure})
with context.begin_transaction():
    {line}
    context.run_migrations()"""
ASYNC = """\
import asyncio
from alembic import context
from sqlalchemy import pool, text
from sqlalchemy.ext.asyncio import create_async_engine

def run(connection):
    context.configure(connection=connection, version_table_schema="app")
    with context.begin_transaction():
        connection.execute(text("SET search_path TO app"))
        context.run_migrations()

async def main():
    url = context.config.get_main_option("sqlalchemy.url")
    engine = create_async_engine(url{options}, poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()

asyncio.run(main())
"""
APPLICATION = """\
import os
from sqlalchemy import create_engine

engine = create_engine(os.environ["DATABASE_URL"], pool_size=1, max_overflow=0)
"""


def inside(line: str, configure: str = ', version_table_schema="app"') -> dict[str, str]:
    """Return an env.py that runs a line in the transaction of its revisions."""
    return env(run=IN_TRANSACTION.format(configure=configure, line=line))


def ahead(line: str, configure: str = ', version_table_schema="app"') -> dict[str, str]:
    """Return an env.py that runs a line between configure and the transaction."""
    run = IN_TRANSACTION.format(configure=configure, line="pass").replace("\nwith", f"\n{line}\nwith")
    return env(run=run)


SEARCH_PATH = 'context.execute("SET search_path TO app")'
SHAPES: dict[str, dict[str, str]] = {
    "as alembic init writes it": env(),
    "a transaction for each revision": env(configure="transaction_per_migration=True"),
    "SET search_path in the transaction": inside(SEARCH_PATH),
    "SET search_path after configure": ahead(SEARCH_PATH),
    "SET LOCAL search_path": inside('context.execute("SET LOCAL search_path TO app")'),
    "SET search_path before configure": env(
        connected="connection.execute(text('SET search_path TO app')); connection.commit()",
        configure='version_table_schema="app"',
    ),
    "SET ROLE": inside('context.execute("SET ROLE {role}")', configure=""),
    "an advisory lock of the transaction": inside('context.execute("SELECT pg_advisory_xact_lock(77)")', ""),
    "an advisory lock of the session": ahead('context.execute("SELECT pg_advisory_lock(78)")', ""),
    "an advisory lock of a connection that stays open": env(
        before="guard = create_engine(os.environ['DATABASE_URL']).connect()\n"
        "guard.execute(text('SELECT pg_advisory_lock(79)'))",
    ),
    "a lock_timeout of its own": inside("context.execute(\"SET LOCAL lock_timeout = '250ms'\")", ""),
    "a statement_timeout of its own": ahead("context.execute(\"SET statement_timeout = '90s'\")", ""),
    "a temporary table": inside('context.execute("CREATE TEMP TABLE scratch (id int) ON COMMIT DROP")', ""),
    "options of the connection": env(
        engine=NULL.format(", connect_args={'options': '-csearch_path=app -cwork_mem=9MB'}"),
        configure='version_table_schema="app"',
    ),
    "a listener on connect": env(
        top="from sqlalchemy import event",
        engine=NULL.format("")
        + "\n@event.listens_for(engine, 'connect')\n"
        + "def prepare(raw, _):\n    raw.cursor().execute(\"SET work_mem = '9MB'\"); raw.commit()\n",
    ),
    "its own transaction": env(run="with connection.begin():\n    run(connection)"),
    "its own transaction, and a setting": env(
        connected="connection.begin(); connection.execute(text(\"SET LOCAL work_mem = '9MB'\"))",
        run="run(connection)\nconnection.commit()",
    ),
    "serializable": env(engine=NULL.format(", isolation_level='SERIALIZABLE'")),
    "the application's pool": {
        **env(
            top="from application import engine as pooled",
            engine="pooled",
            connected="connection.execute(text('SET search_path TO app')); connection.commit()",
            configure='version_table_schema="app"',
        ),
        "application.py": APPLICATION,
    },
    "psycopg": env(
        engine="create_engine(config.get_main_option('sqlalchemy.url')"
        ".replace('postgresql:', 'postgresql+psycopg:'), poolclass=pool.NullPool)",
    ),
    "asyncpg": {"migrations/env.py": ASYNC.replace("{options}", "")},
    "asyncpg with server_settings": {
        "migrations/env.py": ASYNC.replace(
            "{options}", ', connect_args={"server_settings": {"work_mem": "9MB"}}'
        )
    },
    "an error of its own": env(
        run="try:\n    run(connection)\nexcept Exception as error:\n    raise RuntimeError('no luck') from error"
    ),
    "an exit of its own": env(
        run="try:\n    run(connection)\nexcept Exception:\n    raise SystemExit('no luck')"
    ),
}
