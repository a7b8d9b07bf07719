"""Settings for a test's database, and one call that backs it up or restores it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.backups.manifest import Backup
from migrator.backups.restore.restore import restore
from migrator.backups.restore.result import Restored
from migrator.backups.storage.interface import new_id
from migrator.config.settings import Settings, load
from migrator.pipeline.stages.backup import back_up
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import connect
from tests.support import buckets, leaks
from tests.support.buckets import Bucket
from tests.support.servers import Database

APPLICATION = "migrator/test-host 20260101-run"

RICH = (Path(__file__).parent / "rich.sql").read_text(encoding="utf-8")
LARGE = """
CREATE TABLE t (a int PRIMARY KEY, x text DEFAULT E'it\\'s\nBEGIN;');
INSERT INTO t VALUES (1, 'BEGIN;'), (2, NULL);
CREATE TABLE lines (x text);
INSERT INTO lines VALUES ('COMMIT;'), ('-- Data for Name: 1; Type: BLOBS; Schema: -; Owner: -'), ('BEGIN;');
CREATE PROCEDURE p() LANGUAGE plpgsql AS $$
BEGIN
COMMIT;
COPY t (a) FROM stdin;
END $$;
COMMENT ON TABLE t IS 'a "quotation''
COMMIT;
$$ goes on';
SELECT lo_from_bytea(17, 'large'), lo_from_bytea(18, 'COMMIT;');
"""
"""Large objects, and texts that look like the transaction that pg_restore puts round them."""


class Workbench:
    """A database, its settings, and its backup folder."""

    def __init__(self, database: Database, folder: Path, **variables: str) -> None:
        self.database = database
        self.folder = folder
        environment = {
            "DATABASE_URL": database.url,
            "MIGRATOR_BACKUP_URL": folder.as_uri(),
            "MIGRATOR_PG_BIN": str(database.server.bin),
            **variables,
        }
        self.settings: Settings = load({}, environment, folder.parent)
        self.target = self.settings.required_target

    def back_up(self, **options: Any) -> Backup:
        """Back the database up in this process."""
        with connect(self.target, APPLICATION, 60) as session:
            given = {"run_id": "run1", "revisions": ("r1",), "application_name": APPLICATION}
            return back_up(session, self.settings, **{**given, **options})

    def restore(self, wanted: str = "latest", **options: Any) -> Restored:
        """Restore in this process."""
        given = {"to": None, "run_id": "run2", "application_name": APPLICATION, "replace": True}
        return restore(self.target, self.settings, wanted, **{**given, **options})

    def files(self) -> list[str]:
        """Return what is in the backup folder."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []

    def databases(self) -> set[str]:
        """Return the databases that start with this one's name."""
        names = {row[0] for row in self.database.server.psql("SELECT datname::text FROM pg_database")}
        return {name for name in names if name.startswith(self.database.name)}

    def sessions(self) -> list[Any]:
        """Return the sessions that bear our name, anywhere on the server; one that is closed ends soon after."""
        asked = "SELECT datname, application_name, query FROM pg_stat_activity WHERE application_name LIKE %s"
        deadline = time.monotonic() + 10
        while found := self.database.server.psql(asked, [APPLICATION[:20] + "%"]):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return found


@pytest.fixture
def workbench(tmp_path: Path) -> Iterator[Callable[..., Workbench]]:
    """Make a Workbench for a database; afterwards drop what restores left, and look for the password in the folder."""
    made: list[Workbench] = []

    def make(database: Database, **variables: str) -> Workbench:
        bench = Workbench(database, tmp_path / "backups", **variables)
        made.append(bench)
        return bench

    yield make
    for bench in made:
        for name in bench.databases() - {bench.database.name}:
            bench.database.server.psql(f"DROP DATABASE {quote_identifier(name)} WITH (FORCE)")
        found = leaks.find_in_files([bench.folder]) if bench.folder.is_dir() else []
        assert not found, found


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Run a server that speaks S3; returns its address."""
    with buckets.server() as address:
        yield address


@pytest.fixture
def bucket(moto: str) -> Bucket:
    """Make a bucket for a test."""
    return Bucket(moto, new_id("bucket").lower().replace("_", "-"))
