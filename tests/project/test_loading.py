"""Sessions that an application opens while it is loaded by a command that only looks."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import psycopg2
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from migrator.project.loading import of_flask, reading_only
from tests.support.servers import Database

WORK_MEM: dict[str, dict[str, Any]] = {
    "psycopg2": {"options": "-c work_mem=9MB"},
    "psycopg": {"options": "-c work_mem=9MB"},
    "asyncpg": {"server_settings": {"work_mem": "9MB"}},
}
LOOK = text("SELECT current_setting('transaction_read_only'), current_setting('work_mem')")


def url(database: Database, driver: str) -> str:
    return database.url.replace("postgresql:", f"postgresql+{driver}:", 1)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_a_session_of_a_pool_only_reads_until_the_block_ends(database: Database, driver: str) -> None:
    engine = create_engine(url(database, driver), connect_args=WORK_MEM[driver])
    with reading_only(), engine.connect() as connection:
        assert tuple(connection.execute(LOOK).one()) == ("on", "9MB")
    with engine.connect() as connection:  # a pool outlives the block, and its session does not
        assert tuple(connection.execute(LOOK).one()) == ("off", "9MB")
    engine.dispose()
    assert "PGOPTIONS" not in os.environ


def test_a_session_of_asyncpg_only_reads(database: Database) -> None:
    async def look() -> tuple[Any, ...]:
        engine = create_async_engine(url(database, "asyncpg"), connect_args=WORK_MEM["asyncpg"])
        async with engine.connect() as connection:
            found = tuple((await connection.execute(LOOK)).one())
        await engine.dispose()
        return found

    with reading_only():
        assert asyncio.run(look()) == ("on", "9MB")
    assert asyncio.run(look()) == ("off", "9MB")


def test_a_session_without_sqlalchemy_only_reads(database: Database) -> None:
    with reading_only(), reading_only():
        connection = psycopg2.connect(database.url)
    with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
        connection.cursor().execute("CREATE TABLE t (id int)")
    connection.close()


@pytest.mark.parametrize(
    ("alembic", "flask"),
    [
        ("upgrade head", "db upgrade"),
        ("upgrade a1", "db upgrade a1"),
        ("-x a=b -x c=d downgrade -1", "db downgrade -x a=b -x c=d -1"),
    ],
)
def test_the_words_of_flask(alembic: str, flask: str) -> None:
    assert of_flask(alembic.split()) == flask.split()
