"""Sessions that an application opens while it is loaded by a command that only looks."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from migrator.config.database_url import parse
from migrator.project.config import set_address
from migrator.project.loading import find_env, flask_arguments, reading_only
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
    assert flask_arguments(alembic.split()) == flask.split()


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("shop:db:migrations", "."),
        ("shop:db", "."),
        ("shop.db:migrations", "src"),
        ("shop:migrations", "lib:src"),
    ],
)
def test_env_py_is_found_where_alembic_finds_it(
    location: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its package is not imported: the address has to be told before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "path_importer_cache", {})  # knows relative folders by their first place
    inside = tmp_path / ("src" if "src" in path else ".") / location.replace(".", "/").replace(":", "/")
    inside.mkdir(parents=True)
    (inside / "env.py").touch()
    for package in (inside, *inside.parents):
        if package.name in {"shop", "db"}:
            (package / "__init__.py").touch()
    ini = tmp_path / "alembic.ini"
    ini.write_text(
        f"[alembic]\nscript_location = {location}\nprepend_sys_path = {path}\npath_separator = os\n"
    )
    try:
        found = find_env(Config(str(ini)))
        assert not {"shop", "shop.db"} & sys.modules.keys()
        theirs = ScriptDirectory.from_config(Config(str(ini))).env_py_location
    finally:
        for name in ("shop", "shop.db"):
            sys.modules.pop(name, None)
    assert found.resolve() == Path(theirs).resolve()


def test_the_driver_of_the_file_is_not_the_one_that_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy 2.1 without psycopg: the first address names psycopg2; `env.py`, found since, wants asyncpg."""
    monkeypatch.setattr("migrator.project.config._sync_driver", lambda: "psycopg2")
    monkeypatch.setattr(os, "environ", {**os.environ})
    env_file = tmp_path / "env.py"
    config, target = Config(), parse("postgresql://a@127.0.0.1/b")
    set_address(config, env_file, target)
    assert config.get_main_option("sqlalchemy.url") == "postgresql+psycopg2://a@127.0.0.1/b"
    env_file.write_text("from sqlalchemy.ext.asyncio import AsyncEngine")
    set_address(config, env_file, target)
    assert config.get_main_option("sqlalchemy.url") == "postgresql+asyncpg://a@127.0.0.1/b"
