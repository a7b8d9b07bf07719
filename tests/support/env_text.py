"""Texts of env.py files: one skeleton with places to put lines in, and the async one."""

from __future__ import annotations

_SKELETON = """\
import os
from alembic import context
from sqlalchemy import create_engine, engine_from_config, pool, text
{top}
config = context.config

def run(connection):
    context.configure(connection=connection{configure})
    with context.begin_transaction():
        context.run_migrations()

{before}
engine = {engine}
with engine.connect() as connection:
    {connected}
    {run}
{after}
"""

_ASYNC = """\
import asyncio, os
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine

def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    engine = create_async_engine({url})
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()

{before}
asyncio.run(main())
"""

OWN_ENGINE = "create_engine(os.environ['DATABASE_URL'])"
AUTOCOMMIT = "connection = connection.execution_options(isolation_level='AUTOCOMMIT')"


def env(
    *,
    top: str = "",
    before: str = "",
    engine: str = "engine_from_config(config.get_section(config.config_ini_section), poolclass=pool.NullPool)",
    connected: str = "pass",
    configure: str = "",
    run: str = "run(connection)",
    after: str = "",
) -> dict[str, str]:
    """Return an env.py as a project's file, with lines put in at one or another place."""
    configure = f", {configure}" if configure else ""
    inner = {"connected": connected.replace("\n", "\n    "), "run": run.replace("\n", "\n    ")}
    text = _SKELETON.format(top=top, before=before, engine=engine, configure=configure, after=after, **inner)
    return {"migrations/env.py": text}


def async_env(url: str = "os.environ['DATABASE_URL']", before: str = "") -> dict[str, str]:
    """Return an async env.py as a project's file; `url` is the expression for its address."""
    return {"migrations/env.py": _ASYNC.format(url=url, before=before)}


def with_schema(name: str) -> str:
    """Return lines that make a schema on the connection; they work with SQLAlchemy 1.4 as well."""
    return f"with engine.begin() as first: first.execute(text('CREATE SCHEMA IF NOT EXISTS {name}'))\n"
