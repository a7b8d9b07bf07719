"""A bucket holds whole backups or none: uploading, listing, reading, marking, removing, and what dead runs leave."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from migrator.backups.manifest import Backup
from migrator.backups.storage import s3_stale, s3_upload
from migrator.backups.storage.interface import checksum, new_id
from migrator.backups.storage.open import open_store
from migrator.backups.storage.s3 import S3Store
from migrator.backups.storage.s3_upload import first_size, part_size
from migrator.config.settings import load
from migrator.errors import BackupFailed, NoSuchBackup
from tests.support.buckets import Bucket
from tests.support.sink import sink

from .test_manifest import BACKUP

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1024 * 1024


def open_it(bucket: Bucket, tmp_path: Path, address: str = "", **variables: str) -> S3Store:
    environment = {**bucket.variables(address), **variables}
    settings = load({}, environment, tmp_path, needs_target=False)
    store = open_store(settings.backup_url, settings)
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> S3Store:
    return open_it(bucket, tmp_path)


def add(
    store: S3Store, content: bytes = b"abcdef", created_at: str = "2026-01-01T12:00:00+00:00", **facts: object
) -> Backup:
    backup_id = new_id(str(facts.get("database", "shop")))
    with store.new_dump(backup_id) as part:
        for start in range(0, len(content), 700_000):
            part.write(content[start : start + 700_000])
        part.sync()
        assert checksum(part.chunks()) == part.stored
        given = {"database": "shop", "created_at": created_at, **facts, "id": backup_id}
        given |= {"sha256": part.sha256, "size_bytes": part.size, "encrypted_to": part.encrypted_to}
        given |= {"stored_sha256": part.stored[0], "stored_bytes": part.stored[1]}
        return store.add(part, dataclasses.replace(BACKUP, **given))  # type: ignore[arg-type]


def test_a_backup_is_a_dump_and_its_manifest(store: S3Store, bucket: Bucket) -> None:
    store.prepare()
    assert (bucket.names(), bucket.uploads()) == ([], [])
    backup = add(store)
    assert bucket.names() == [f"pre/fix/{backup.id}.dump", f"pre/fix/{backup.id}.json"]
    assert bucket.content(f"pre/fix/{backup.id}.dump") == b"abcdef"
    assert backup.place == f"s3://{bucket.name}/pre/fix/{backup.id}.dump"
    assert bucket.uploads() == []
    assert store.backups() == [backup]
    assert b"".join(store.chunks(backup)) == b"abcdef"
    with store.local(backup) as path:
        assert path.read_bytes() == b"abcdef"
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    store.remove(backup)
    assert bucket.names() == []
    store.remove(backup)


def test_at_the_top_of_a_bucket(bucket: Bucket, tmp_path: Path) -> None:
    store = open_it(bucket, tmp_path, MIGRATOR_BACKUP_URL=f"s3://{bucket.name}")
    backup = add(store)
    assert bucket.names() == [f"{backup.id}.dump", f"{backup.id}.json"]
    assert store.backups() == [backup]


def test_many_parts_are_put_together_in_order(
    store: S3Store, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "PART", 5 * MEGABYTE)
    content = os.urandom(23 * MEGABYTE + 11)
    backup = add(store, content)
    assert bucket.content(f"pre/fix/{backup.id}.dump") == content
    answer = bucket.client.head_object(Bucket=bucket.name, Key=f"pre/fix/{backup.id}.dump", PartNumber=1)
    assert answer["PartsCount"] == 5


def test_ten_thousand_parts_suffice_for_what_one_object_may_hold() -> None:
    for expected in (0, 10**9, 10**12, 5 * 10**12):
        first = first_size(expected)
        sizes = [part_size(number, first) for number in range(1, 10_001)]
        assert sizes[:4000] == [first] * 4000
        assert sum(sizes[:4000]) >= expected or sum(sizes) >= expected
        assert sum(sizes[:4000]) >= min(expected, 4000 * first)
        assert sum(sizes) >= 2 * 10**12
        assert sizes[0] >= 16 * MEGABYTE
    assert sum(part_size(number, first_size(5 * 10**12)) for number in range(1, 4001)) >= 5 * 10**12


def test_names_and_other_databases(store: S3Store) -> None:
    first = add(store, created_at="2026-01-01T12:00:00+00:00", name="before")
    second = add(store, created_at="2026-01-02T12:00:00+00:00", name="before")
    other = add(store, created_at="2026-01-03T12:00:00+00:00", database="crm")
    assert store.get("latest", "shop") == second
    assert store.get("before", "shop") == second
    assert store.get(first.id, "shop") == first
    assert store.get(other.id, "shop") == other
    assert [backup.id for backup in store.backups()] == [other.id, second.id, first.id]
    assert store.backups("crm") == [other]
    for wanted in ("nothing", "../" + first.id, ""):
        with pytest.raises(NoSuchBackup, match="There is no backup"):
            store.get(wanted, "shop")


def test_what_does_not_belong_together_is_no_backup(
    store: S3Store, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    kept, lost, torn, short, later = (add(store) for _ in range(5))
    bucket.client.delete_object(Bucket=bucket.name, Key=f"pre/fix/{lost.id}.dump")
    bucket.put(f"pre/fix/{torn.id}.json", b'{"format": 1, "id":')
    bucket.put(f"pre/fix/{short.id}.dump", b"abc")
    bucket.put("pre/fix/x.json", bucket.content(f"pre/fix/{kept.id}.json"))
    document = json.loads(bucket.content(f"pre/fix/{later.id}.json"))
    bucket.put(f"pre/fix/{later.id}.json", json.dumps({**document, "format": 99}).encode())
    bucket.put("pre/fix/stray.dump", b"x")
    bucket.put("pre/fix/deeper/x.json", b"x")
    bucket.put("pre/fix-of-others/x.json", b"x")
    assert store.backups() == [kept]
    for words in ("is missing", "not JSON", "has 3 bytes, not 6", "it was renamed", "use a newer image"):
        assert words in caplog.text
    with pytest.raises(BackupFailed, match="has 3 bytes"):
        store.get(short.id, "shop")


def test_a_failure_leaves_nothing(store: S3Store, bucket: Bucket) -> None:
    def fail(*, late: bool) -> None:
        with store.new_dump(new_id("shop")) as part:
            part.write(b"half")
            if late:
                part.sync()
                assert len(bucket.names()) == 1
            raise KeyboardInterrupt

    for late in (False, True):
        with pytest.raises(KeyboardInterrupt):
            fail(late=late)
        assert (bucket.names(), bucket.uploads()) == ([], [])


def test_a_bad_dump_is_renamed_and_listed_as_such(store: S3Store, bucket: Bucket) -> None:
    with store.new_dump(new_id("shop")) as part:
        part.write(b"rotten")
        part.sync()
        place = store.mark_bad(part, "it does not parse", "shop")
    backup = add(store)
    store.mark_bad(backup, "a bit flipped")
    assert bucket.names() == sorted(
        f"pre/fix/{name}.{ending}" for name in (part.id, backup.id) for ending in ("bad.json", "dump.bad")
    )
    assert place == f"s3://{bucket.name}/pre/fix/{part.id}.dump.bad"
    assert store.backups() == []
    assert {(bad.id, bad.why) for bad in store.bad("shop")} == {
        (part.id, "it does not parse"),
        (backup.id, "a bit flipped"),
    }
    assert store.bad("crm") == []
    for bad in store.bad():
        store.remove(bad)
    assert bucket.names() == []


def test_small_files_beside_a_dump(store: S3Store, bucket: Bucket) -> None:
    with store.new_dump(new_id("shop")) as part:
        part.write(b"abc")
        part.sync()
        facts = {"id": part.id, "sha256": part.sha256, "size_bytes": 3, "database": "shop"}
        backup = store.add(part, dataclasses.replace(BACKUP, **facts), {".globals.sql": b"CREATE ROLE x"})  # type: ignore[arg-type]
    assert store.beside(backup, ".globals.sql") == b"CREATE ROLE x"
    assert store.beside(backup, ".other") is None
    store.remove(backup)
    assert bucket.names() == []


def test_what_dead_runs_left_is_removed_and_what_lives_is_not(
    store: S3Store, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(key: str) -> None:
        made = bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
        more = {"Bucket": bucket.name, "Key": key, "UploadId": made["UploadId"]}
        bucket.client.upload_part(**more, PartNumber=1, Body=b"x")

    ours, others = f"pre/fix/{new_id('shop')}.dump", f"pre/fix/{new_id('crm')}.dump"
    for key in (ours, others, "pre/fix/mine.tar", f"elsewhere/{new_id('shop')}.dump"):
        begin(key)
    orphan, whole = f"pre/fix/{new_id('crm')}.dump.age", add(store)
    bucket.put(orphan, b"x")
    bucket.put("pre/fix/mine.tar", b"x")
    store.mark_bad(add(store), "rotten")
    before = bucket.names()
    store.remove_stale("shop")
    assert (len(bucket.uploads()), bucket.names()) == (4, before)
    monkeypatch.setattr(s3_stale, "IDLE", timedelta(seconds=-5))
    store.remove_stale("shop")
    assert ours not in bucket.uploads()
    assert others in bucket.uploads()
    monkeypatch.setattr(s3_stale, "OLD", timedelta(seconds=-5))
    store.remove_stale("shop")
    assert sorted(name.partition("/")[0] for name in bucket.uploads()) == ["elsewhere", "pre"]
    assert "pre/fix/mine.tar" in bucket.uploads()
    assert bucket.names() == [name for name in before if name != orphan]
    assert store.backups() == [whole]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_upload_is_no_backup_and_goes_away(
    number: int, store: S3Store, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while parts are on their way, and while the whole object is read back."""
    for killed, moment in enumerate(("part", "read"), 1):
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.backups.upload", "40", moment],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), **bucket.variables()},
            stdout=subprocess.PIPE,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"here\n"
        worker.send_signal(number)
        worker.communicate(timeout=180)
        assert worker.returncode == (23 if number == signal.SIGTERM else -9)
        assert store.backups() == []
        left = bucket.uploads() + bucket.names()
        assert len(left) == (0 if number == signal.SIGTERM else killed)
    monkeypatch.setattr(s3_stale, "IDLE", timedelta(seconds=-5))
    monkeypatch.setattr(s3_stale, "OLD", timedelta(seconds=-5))
    store.remove_stale("shop")
    assert bucket.uploads() + bucket.names() == []


def test_two_gigabytes_in_two_hundred_megabytes() -> None:
    """To a server that compares and forgets: moto keeps what it gets in memory."""
    with sink() as server:
        facts = uploaded(2048, server.variables())
        assert facts["bytes"] == server.size(facts["dump"]) == 2048 * MEGABYTE
        assert facts["stored_sha256"] == server.sha256(facts["dump"])
    assert 20 * 10**6 <= facts["memory"] <= 200 * 10**6, facts


def uploaded(megabytes: int, variables: dict[str, str]) -> dict[str, Any]:
    """Upload in a process of its own; return what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.backups.upload", str(megabytes)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts
