"""What the runs work on: a server of their own, a history of every kind of revision, and a database before it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.forked import Forked
from tests.support.installations import debian
from tests.support.projects import ENV_FILES, Revision, write_project
from tests.support.servers import Database, Server, running

EFFECT = "INSERT INTO effects VALUES ('{}')"
ROWS = 300


def _body(revision: str, *statements: str) -> str:
    return "\n".join(f"op.execute({text!r})" for text in (*statements, EFFECT.format(revision)))


_SLICES = """\
for first in range(1, 301, 100):
    op.execute(f"UPDATE items SET total = id * 2 WHERE id BETWEEN {first} AND {first + 99}")
    op.execute("SELECT pg_sleep(0.05)")
"""
_CONCURRENTLY = """\
with op.get_context().autocommit_block():
    op.execute("SELECT pg_sleep(0.05)")
    op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS items_total ON items (total)")
    op.execute("SELECT pg_sleep(0.05)")
"""

FIRST = [
    Revision(
        "r001",
        None,
        _body(
            "r001",
            "CREATE TABLE effects (revision text)",
            "CREATE TABLE items (id int PRIMARY KEY, total int)",
            f"INSERT INTO items SELECT generate_series(1, {ROWS})",
        ),
    )
]
HISTORY = [
    *FIRST,
    Revision("r002", "r001", _body("r002", "CREATE TABLE made (id int PRIMARY KEY)")),
    Revision("r003", "r002", _SLICES + _body("r003")),
    Revision("r004", "r003", _CONCURRENTLY + _body("r004")),
    Revision("r005", "r004", _body("r005", "ALTER TABLE items ADD COLUMN note text", "SELECT pg_sleep(0.1)")),
    Revision("r006", "r005", _body("r006", "SELECT pg_sleep(0.1)")),
    Revision(
        "r007",
        "r006",
        _body("r007", "ALTER TABLE made ADD CONSTRAINT made_id CHECK (id > 0)", "SELECT pg_sleep(0.1)"),
    ),
]
IDS = [revision.id for revision in HISTORY]
SIGNS = {
    "r002": "to_regclass('made') IS NOT NULL",
    "r003": f"(SELECT count(total) FROM items) = {ROWS}",
    "r005": "EXISTS (SELECT 1 FROM pg_attribute WHERE attrelid = 'items'::regclass AND attname = 'note')",
    "r007": "EXISTS (SELECT 1 FROM pg_constraint WHERE conname = 'made_id')",
}
"""SQL that is true if the revision was applied, for those that are one transaction."""

VERIFY = '[[assertions]]\nname = "slow"\nsql = "SELECT count(*) FROM pg_sleep(0.15)"\nexpect = 1\n'


@dataclass(frozen=True)
class World:
    """One worker's server, with the database that every run's is a copy of, and its folder."""

    server: Server
    folder: Path

    def database(self) -> Database:
        """Return a new database at r001, which plain SQL brought there."""
        return self.server.create_database(template="before")

    def run(self, database: Database, env_file: str, env: Mapping[str, str], out: Path) -> Forked:
        """Start `migrator upgrade` on a database."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MIGRATOR_", "PG"))},
            "MIGRATOR_DATABASE_URL": database.url,
            "MIGRATOR_PG_BIN": str(self.server.bin),
            "MIGRATOR_LOG_LEVEL": "debug",
            "MIGRATOR_LOG_FORMAT": "json",
            "MIGRATOR_WAIT_TIMEOUT": "20s",
            **env,
        }
        return Forked("upgrade", "--format", "json", cwd=self.folder / env_file, env=environment, out=out)


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """Make a world in a folder of its own."""
    text = (ENV_FILES / "plain_url.py").read_text()
    texts = {
        "plain_url": text,
        "per_migration": text.replace(
            "connection=connection, ", "connection=connection, transaction_per_migration=True, "
        ),
        "async_engine": (ENV_FILES / "async_engine.py").read_text(),
    }
    for name, env in texts.items():
        files = {"migrations/env.py": env, "migrations/verify.toml": VERIFY}
        write_project(folder / name, files, revisions=HISTORY)
    with running(debian(), settings={"max_connections": "40"}) as server:
        before = server.create_database("before")
        before.execute(
            "CREATE TABLE effects (revision text); CREATE TABLE items (id int PRIMARY KEY, total int);"
            f" INSERT INTO items SELECT generate_series(1, {ROWS}); {EFFECT.format('r001')};"
            " CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);"
            " INSERT INTO alembic_version VALUES ('r001')"
        )
        yield World(server, folder)
    shutil.rmtree(folder, ignore_errors=True)
