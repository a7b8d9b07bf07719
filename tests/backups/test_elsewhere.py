"""Whole runs whose backups are in a bucket and encrypted: made, proven, listed, restored, and no key in any output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import leaks
from tests.support.buckets import Bucket, Fault, FaultyProxy
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

from .test_sealing import Key, make_key

SESSION_TOKEN = "FwoGZXIvYXdzEJr//////////wEaD" + "Qx7" * 60


class Elsewhere:
    """A project, its database, and its backups in a bucket."""

    def __init__(
        self, runner: Runner, database: Database, folder: Path, bucket: Bucket, **variables: str
    ) -> None:
        self.runner, self.database, self.folder = runner, database, folder
        # Without a ledger, which remembers what happened, a database that came back is as it was to the last byte.
        more = {"AWS_SESSION_TOKEN": SESSION_TOKEN, "MIGRATOR_LEDGER": "off"}
        self.env = {**bucket.variables(), **more, **variables}

    def __call__(self, *arguments: str, code: int = 0, **env: str) -> Any:
        """Run a command to its end; returns its answer."""
        done = self.runner(
            *arguments, "--format", "json", cwd=self.folder, database=self.database, env={**self.env, **env}
        )
        assert done.code == code, done
        for secret in (self.env["AWS_SECRET_ACCESS_KEY"], SESSION_TOKEN):
            assert secret not in done.stdout + done.stderr
        return done.answer


@pytest.fixture
def elsewhere(
    run_migrator: Runner, database: Database, project: Callable[..., Path], bucket: Bucket
) -> Callable[..., Elsewhere]:
    def make(**variables: str) -> Elsewhere:
        return Elsewhere(run_migrator, database, project(revisions=linear_history(3)), bucket, **variables)

    return make


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return make_key(tmp_path, "key")


def test_there_and_back(elsewhere: Callable[..., Elsewhere], bucket: Bucket, database: Database) -> None:
    run = elsewhere(MIGRATOR_LOG_LEVEL="debug")
    run("upgrade", "+1")
    before = database.dump()
    outcome = run("upgrade")
    (backup,) = run("backups")
    assert outcome["backup"]["id"] == backup["id"]
    assert backup["place"] == f"s3://{bucket.name}/pre/fix/{backup['id']}.dump"
    assert bucket.content(f"pre/fix/{backup['id']}.dump")[:5] == b"PGDMP"
    run("verify-backup", "latest")
    run("restore", "latest", "--yes", "--drop-old")
    assert database.dump() == before
    for name in bucket.names():
        assert leaks.find(bucket.content(name).decode("latin-1")) is None


def test_the_container_that_migrates_cannot_read_them(
    elsewhere: Callable[..., Elsewhere], bucket: Bucket, database: Database, key: Key, tmp_path: Path
) -> None:
    run = elsewhere(MIGRATOR_BACKUP_RECIPIENTS=key.public)
    run("upgrade", "+1")
    before = database.dump()
    run("upgrade")
    (backup,) = run("backups")
    assert backup["place"].endswith(f"{backup['id']}.dump.age")
    stored = bucket.content(f"pre/fix/{backup['id']}.dump.age")
    assert stored.startswith(b"age-encryption.org/v1\n")
    assert b"PGDMP" not in stored
    refused = run("restore", "latest", "--yes", code=43)
    assert "MIGRATOR_BACKUP_IDENTITY_FILE" in refused["next_step"]
    assert "age -d" in refused["next_step"]
    other = make_key(tmp_path, "other")
    run("restore", "latest", "--yes", code=43, MIGRATOR_BACKUP_IDENTITY_FILE=str(other.file))
    run("restore", "latest", "--yes", "--drop-old", MIGRATOR_BACKUP_IDENTITY_FILE=str(key.file))
    assert database.dump() == before


def test_in_a_folder_too(
    elsewhere: Callable[..., Elsewhere], database: Database, key: Key, tmp_path: Path
) -> None:
    folder = tmp_path / "sealed"
    run = elsewhere(MIGRATOR_BACKUP_RECIPIENTS=key.public, MIGRATOR_BACKUP_URL=folder.as_uri())
    run("upgrade", "+1")
    before = database.dump()
    run("upgrade")
    assert not [path for path in folder.iterdir() if b"PGDMP" in path.read_bytes()]
    run("restore", "latest", "--yes", "--drop-old", MIGRATOR_BACKUP_IDENTITY_FILE=str(key.file))
    assert database.dump() == before


def test_nothing_is_applied_where_the_backup_fails(
    elsewhere: Callable[..., Elsewhere], bucket: Bucket, moto: str, database: Database
) -> None:
    run = elsewhere()
    run("upgrade", "+1")
    before = database.dump()
    proxy = FaultyProxy(moto)
    try:
        for fault in (
            Fault("create", 403, "AccessDenied"),
            Fault("part", 400, "ExpiredToken"),
            Fault("get", 403, "AccessDenied", ending=".dump"),
            Fault("put", 403, "AccessDenied", ending=".json"),
        ):
            proxy.faults = [fault]
            outcome = run("upgrade", code=36, MIGRATOR_S3_ENDPOINT=proxy.address)
            assert (
                "MIGRATOR_BACKUP_URL" in outcome["next_step"] or "AWS_SESSION_TOKEN" in outcome["next_step"]
            )
            assert database.dump() == before
            assert run("backups") == []
            assert (bucket.names(), bucket.uploads()) == ([], [])
    finally:
        proxy.close()
    run("upgrade")
