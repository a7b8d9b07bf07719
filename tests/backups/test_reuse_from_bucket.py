"""A backup in a bucket is reused only where what lies there is still what was proven."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyrage
import pytest

from migrator.backups import reuse
from migrator.backups.manifest import Backup
from migrator.postgres.session import connect
from tests.support.buckets import Bucket, FaultyProxy
from tests.support.servers import Database

from .conftest import APPLICATION, Workbench

Bench = Callable[..., Workbench]


@pytest.fixture
def proxy(moto: str) -> Iterator[FaultyProxy]:
    found = FaultyProxy(moto)
    yield found
    found.close()


@pytest.fixture
def bench(database: Database, workbench: Bench, bucket: Bucket, proxy: FaultyProxy) -> Workbench:
    """A database with something in it, whose backups are in a bucket behind the proxy."""
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 100) AS a")
    return workbench(database, **bucket.variables(proxy.address), MIGRATOR_BACKUP_MAX_AGE="1h")


def reused(bench: Workbench) -> Backup | None:
    with connect(bench.target, APPLICATION, 60) as session:
        return reuse.find(session, bench.settings, ("r1",), None)


def dumps_read(proxy: FaultyProxy) -> int:
    return sum(asked.is_a("get") and ".dump" in asked.path for asked in proxy.asked)


def key(backup: Backup) -> str:
    return backup.place.partition("//")[2].partition("/")[2]


def test_the_object_that_was_proven_is_not_read_again(bench: Workbench, proxy: FaultyProxy) -> None:
    backup = bench.back_up()
    assert backup.stored_tag
    before = dumps_read(proxy)
    assert reused(bench) == backup
    assert dumps_read(proxy) == before


def test_an_encrypted_one(database: Database, workbench: Bench, bucket: Bucket) -> None:
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    variables = {"MIGRATOR_BACKUP_RECIPIENTS": recipient, "MIGRATOR_BACKUP_MAX_AGE": "1h"}
    bench = workbench(database, **bucket.variables(), **variables)
    backup = bench.back_up()
    assert backup.stored_tag
    assert reused(bench) == backup


@pytest.mark.parametrize("change", ["a bit", "its length", "it is gone"])
def test_another_object_is_not_reused(
    change: str, bench: Workbench, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="migrator.backup")
    backup = bench.back_up()
    content = bytearray(bucket.content(key(backup)))
    content[len(content) // 2] ^= 1
    if change == "it is gone":
        bucket.client.delete_object(Bucket=bucket.name, Key=key(backup))
    else:
        bucket.put(key(backup), bytes(content) + (b"x" if change == "its length" else b""))
    assert reused(bench) is None
    if change == "a bit":
        assert f"{backup.id} is not reused: its content was changed" in caplog.text


def test_the_same_bytes_by_another_way_are_read_and_reused(
    bench: Workbench, bucket: Bucket, proxy: FaultyProxy
) -> None:
    """A copy of the bucket has other ETags; and older manifests have none."""
    backup = bench.back_up()
    bucket.put(key(backup), bucket.content(key(backup)))  # in one piece, and not in parts
    before = dumps_read(proxy)
    assert reused(bench) == backup
    assert dumps_read(proxy) == before + 1
    manifest = str(Path(key(backup)).with_suffix(".json"))
    document = json.loads(bucket.content(manifest))
    del document["stored_tag"]
    bucket.put(manifest, json.dumps(document).encode())
    found = reused(bench)
    assert found is not None
    assert (found.id, found.stored_tag) == (backup.id, "")
    assert dumps_read(proxy) == before + 2
