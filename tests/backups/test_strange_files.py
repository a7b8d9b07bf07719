"""What bears the name of a file in the folder and is none: a FIFO, a device, a socket, a folder, gigabytes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from migrator.backups.storage import files
from migrator.backups.storage.local import FolderStore
from migrator.backups.storage.s3 import S3Store
from migrator.errors import BackupFailed, NoSuchBackup
from tests.support.buckets import Bucket
from tests.support.servers import Database

from . import test_s3, test_store
from .conftest import Workbench
from .test_verify_backup import prove


def a_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{here}/{path.name}")  # whose name may be longer than 107 bytes
    finally:
        os.close(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Fail a test that waits for ever, as the opening of a FIFO would."""

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    found = FolderStore(tmp_path / "backups")
    found.prepare()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest(store: FolderStore, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    good, odd = test_store.add(store), test_store.add(store)
    (store.folder / f"{odd.id}.json").unlink()
    KINDS[kind](store.folder / f"{odd.id}.json")
    KINDS[kind](store.folder / "x.bad.json")
    assert store.backups() == [good]
    assert f"{odd.id}.json is not a usable backup: it is {kind}, not a file" in caplog.text
    assert store.get("latest", "shop") == good
    assert store.bad("shop") == []
    with pytest.raises((NoSuchBackup, BackupFailed)):
        store.get(odd.id, "shop")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dump_that_is_no_file(store: FolderStore, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    good, odd = test_store.add(store), test_store.add(store)
    Path(odd.place).unlink()
    KINDS[kind](Path(odd.place))
    assert store.backups() == [good]
    assert "is missing" in caplog.text
    with pytest.raises(
        files.NotRegular, match=f"it is {kind}"
    ):  # one that took its place after it was listed
        list(store.chunks(odd))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dead_run_seems_to_have_left(store: FolderStore, kind: str) -> None:
    path = store.folder / "shop-20260101T120000Z-abcdef.dump.part"
    KINDS[kind](path)
    store.remove_stale("shop")
    assert not os.path.lexists(path)


def test_a_link_to_a_file_is_one(store: FolderStore, tmp_path: Path) -> None:
    backup = test_store.add(store)
    for ending in ("json", "dump"):
        path = store.folder / f"{backup.id}.{ending}"
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    assert store.backups() == [backup]
    assert b"".join(store.chunks(backup)) == b"abcdef"


def test_a_manifest_of_gigabytes(store: FolderStore, caplog: pytest.LogCaptureFixture) -> None:
    good, odd = test_store.add(store), test_store.add(store)
    os.truncate(store.folder / f"{odd.id}.json", 5_000_000_000)
    (store.folder / f"{odd.id}.bad.json").touch()
    os.truncate(store.folder / f"{odd.id}.bad.json", 5_000_000_000)
    assert store.backups() == [good]
    assert store.bad() == []
    assert f"it has more than {files.SMALL} bytes" in caplog.text


def test_a_big_manifest_in_a_bucket(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store: S3Store = test_s3.open_it(bucket, tmp_path)
    good, odd = test_s3.add(store), test_s3.add(store)
    monkeypatch.setattr(files, "SMALL", 100_000)
    for name in (f"{odd.id}.json", f"{odd.id}.bad.json"):
        store.client.put_object(Bucket=bucket.name, Key=store.key(name), Body=b" " * 100_001)
    assert store.backups() == [good]
    assert store.bad() == []
    assert "has more than 100000 bytes" in caplog.text


def test_none_is_written_that_nobody_would_read(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALL", 100)
    with pytest.raises(BackupFailed, match=r"would have \d+ bytes"):
        test_store.add(store)
    assert os.listdir(store.folder) == []


def test_in_the_folder_of_a_dump(database: Database, workbench: Callable[..., Workbench]) -> None:
    """It is no dump any more, and is found out, by a restore too."""
    database.execute("CREATE TABLE t (a int)")
    bench = workbench(database, MIGRATOR_BACKUP_FORMAT="directory")
    place = Path(bench.back_up().place)
    os.mkfifo(place / "9999.dat.gz")
    said = re.escape("is damaged: 9999.dat.gz: it is a FIFO, not a file.")
    with pytest.raises(Exception, match=said):
        bench.restore()
    with pytest.raises(BackupFailed, match=said):
        prove(bench)
    assert f"{place.name}.bad" in bench.files()
    with contextlib.suppress(NoSuchBackup):
        pytest.fail(f"{bench.restore().backup.id} was restored")
