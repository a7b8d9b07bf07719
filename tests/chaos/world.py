"""What the runs work on: a server of their own, a history of every kind of revision, and a database before it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos.injections import OWN_TRANSACTION
from tests.support.env_shapes import SHAPES
from tests.support.forked import Forked
from tests.support.installations import debian
from tests.support.projects import Revision, write_project
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
_INDEX = 'op.execute("CREATE INDEX items_total ON items (total)")\nop.execute("SELECT pg_sleep(0.1)")\n'
_CONCURRENTLY = """\
with op.get_context().autocommit_block():
    op.execute("SELECT pg_sleep(0.05)")
    op.execute("CREATE INDEX CONCURRENTLY items_total ON items (total)")
op.execute("SELECT pg_sleep(0.1)")
"""
_COUNT = 'op.execute("UPDATE counter SET n = n + 1")\n'
_COUNTS = f"""\
with op.get_context().autocommit_block():
    {_COUNT}op.execute("SELECT pg_sleep(0.1)")
"""
UNDO_BY_HAND = "UPDATE counter SET n = 0"
"""What a person types to undo what r006 does outside of its transaction."""

OWNER = "owner"

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
    Revision("r006", "r005", _COUNTS + _body("r006")),
    Revision(
        "r007",
        "r006",
        _body(
            "r007",
            "ALTER TABLE busy ADD COLUMN note text",
            "ALTER TABLE made ADD CONSTRAINT made_id CHECK (id > 0)",
            "SELECT pg_sleep(0.1)",
        ),
    ),
]
WHOLE = [
    replace(revision, upgrade={"r004": _INDEX + _body("r004"), "r006": _COUNT + _body("r006")}[revision.id])
    if revision.id in {"r004", "r006"}
    else revision
    for revision in HISTORY
]
"""The same, without a statement that leaves its transaction."""
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

    def run(
        self, database: Database, env_file: str, env: Mapping[str, str], out: Path, *command: str
    ) -> Forked:
        """Start `migrator upgrade`, or another command, on a database."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MIGRATOR_", "PG"))},
            "MIGRATOR_DATABASE_URL": database.url,
            "MIGRATOR_PG_BIN": str(self.server.bin),
            "MIGRATOR_LOG_LEVEL": "debug",
            "MIGRATOR_LOG_FORMAT": "json",
            "MIGRATOR_WAIT_TIMEOUT": "20s",
            "MIGRATOR_LOCK_TIMEOUT": "1s",
            **env,
        }
        return Forked(
            *(command or ("upgrade",)),
            "--format",
            "json",
            cwd=self.folder / env_file.replace(" ", "_"),
            env=environment,
            out=out,
        )


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """Make a world in a folder of its own."""
    for name, env in SHAPES.items():
        files = {file: text.replace("{role}", OWNER) for file, text in env.items()}
        write_project(
            folder / name.replace(" ", "_"),
            {**files, "migrations/verify.toml": VERIFY},
            revisions=WHOLE if name in OWN_TRANSACTION else HISTORY,
        )
    with running(debian(), settings={"max_connections": "40", "search_path": "app"}) as server:
        before = server.create_database("before")
        before.execute(
            f"CREATE ROLE {OWNER} SUPERUSER; CREATE SCHEMA app;"
            "CREATE TABLE effects (revision text); CREATE TABLE items (id int PRIMARY KEY, total int);"
            f" INSERT INTO items SELECT generate_series(1, {ROWS}); {EFFECT.format('r001')};"
            " CREATE TABLE busy (id int); CREATE TABLE counter (n int); INSERT INTO counter VALUES (0);"
            " CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);"
            " INSERT INTO alembic_version VALUES ('r001')"
        )
        yield World(server, folder)
    shutil.rmtree(folder, ignore_errors=True)
