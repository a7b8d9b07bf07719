"""What is in the folder under its final name is whole; what a killed run leaves is found and removed."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from migrator.backups.manifest import Backup
from migrator.backups.storage import local as module
from migrator.backups.storage.interface import checksum, file_chunks, new_id
from migrator.backups.storage.local import FolderStore
from migrator.backups.storage.open import open_store
from migrator.errors import BackupFailed, NoSuchBackup

from .test_manifest import BACKUP


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    found = FolderStore(tmp_path / "backups")
    found.prepare()
    return found


def add(store: FolderStore, created_at: str = "2026-01-01T12:00:00+00:00", **facts: object) -> Backup:
    database = str(facts.get("database", "shop"))
    beside: dict[str, bytes] = facts.pop("beside", {})  # type: ignore[assignment]
    backup_id = new_id(database)
    with store.new_dump(backup_id) as part:
        part.write(b"abc")
        part.write(b"def")
        part.sync()
        backup = dataclasses.replace(
            BACKUP,
            **{"database": "shop", **facts},  # type: ignore[arg-type]
            id=backup_id,
            created_at=created_at,
            sha256=part.sha256,
            size_bytes=part.size,
        )
        return store.add(part, backup, beside)


def test_a_backup_is_two_files_that_only_we_can_read(store: FolderStore) -> None:
    backup = add(store)
    names = sorted(os.listdir(store.folder))
    assert names == [f"{backup.id}.dump", f"{backup.id}.json"]
    modes = {stat.S_IMODE((store.folder / name).stat().st_mode) for name in names}
    assert modes == {0o600}
    assert store.dump_path(backup.id).read_bytes() == b"abcdef"
    assert checksum(file_chunks(store.dump_path(backup.id))) == (backup.sha256, 6)
    assert store.backups() == [backup]


def test_names(store: FolderStore) -> None:
    first = add(store, "2026-01-01T12:00:00+00:00", name="before")
    second = add(store, "2026-01-02T12:00:00+00:00", name="before")
    other = add(store, "2026-01-03T12:00:00+00:00", database="crm")
    assert store.get("latest", "shop") == second
    assert store.get("before", "shop") == second
    assert store.get(first.id, "shop") == first
    assert store.get(other.id, "shop") == other
    assert store.get("latest", "crm") == other
    assert [backup.id for backup in store.backups()] == [other.id, second.id, first.id]
    assert store.backups("crm") == [other]
    for wanted in ("nothing", "../backups/" + first.id, ""):
        with pytest.raises(NoSuchBackup, match="There is no backup"):
            store.get(wanted, "shop")


def test_a_dump_without_manifest_or_a_manifest_without_dump_is_no_backup(
    store: FolderStore, caplog: pytest.LogCaptureFixture
) -> None:
    kept, lost, torn, renamed = add(store), add(store), add(store), add(store)
    store.dump_path(lost.id).unlink()
    (store.folder / f"{torn.id}.json").write_text('{"format": 1, "id":')
    os.rename(store.folder / f"{renamed.id}.json", store.folder / "x.json")
    (store.folder / "stray.dump").write_bytes(b"x")
    assert store.backups() == [kept]
    for word in ("is missing", "not JSON", "it was renamed"):
        assert word in caplog.text
    with pytest.raises(BackupFailed, match="renamed"):
        store.get("x", "shop")


def test_a_failure_leaves_nothing(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with store.new_dump(new_id("shop")) as part:
            part.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(store.folder) == []
    real = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(module.os, "rename", second_fails)
    with pytest.raises(OSError, match="No space"):
        add(store)
    assert os.listdir(store.folder) == []


def test_what_dead_runs_left_is_removed_and_what_lives_is_not(store: FolderStore) -> None:
    dead = store.folder / f"{new_id('shop')}.dump.part"
    dead.write_bytes(b"x")
    other_young = store.folder / f"{new_id('crm')}.dump.part"
    other_young.write_bytes(b"x")
    other_old = store.folder / f"{new_id('crm')}.dump.part"
    other_old.write_bytes(b"x")
    live_old = store.folder / f"{new_id('shop')}.dump.part"
    live_old.write_bytes(b"x")
    for path in (other_old, live_old):
        os.utime(path, (time.time() - 7200,) * 2)
    stranger = store.folder / "mine.tar"
    stranger.write_bytes(b"x")
    with live_old.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store.remove_stale("shop")
    left = {path.name for path in store.folder.iterdir()}
    assert left == {other_young.name, live_old.name, stranger.name}


@pytest.mark.parametrize("published", [1, 2])
def test_a_run_that_was_killed_before_its_manifest_was_published_leaves_nothing(
    store: FolderStore, published: int
) -> None:
    """Seen in a container: the kill came between the dump's rename and the manifest's."""
    whole = add(store)
    kept = set(os.listdir(store.folder))
    child = os.fork()
    if child == 0:
        real, left = os.rename, [published]

        def killed(source: object, target: object) -> None:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            real(source, target)  # type: ignore[arg-type]

        module.os.rename = killed  # type: ignore[attr-defined]
        add(store, beside={".globals.sql": b"CREATE ROLE a;"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(set(os.listdir(store.folder)) - kept) == 3
    assert [backup.id for backup in store.backups()] == [whole.id]
    store.remove_stale(whole.database)
    assert set(os.listdir(store.folder)) == kept


def test_the_id_is_a_file_name_whatever_the_database_is_called() -> None:
    for name in ("shop", "../../etc/passwd", "a b'\"ü\n", ".hidden", "x" * 63, "ü" * 30):
        backup_id = new_id(name)
        assert "/" not in backup_id
        assert not backup_id.startswith(".")
        assert len(backup_id) < 80
        assert backup_id.isascii()
    assert new_id("shop") != new_id("shop")


def test_a_missing_folder_is_made_and_an_impossible_one_explained(tmp_path: Path) -> None:
    place = tmp_path / "with %41 space" / "deep"
    store = open_store(place.as_uri())
    assert store.backups() == []
    store.prepare()
    assert place.is_dir()
    assert os.listdir(place) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BackupFailed, match="cannot be written") as caught:
        open_store((tmp_path / "file").as_uri()).prepare()
    assert str(tmp_path / "file") in str(caught.value)
    assert "MIGRATOR_BACKUP_URL" in caught.value.next_step
    with pytest.raises(BackupFailed):
        open_store((tmp_path / "file" / "below").as_uri()).prepare()
    with pytest.raises(BackupFailed, match="cannot be listed"):
        open_store((tmp_path / "file").as_uri()).backups()


def test_a_bad_dump_is_renamed_and_never_taken_for_a_backup(store: FolderStore) -> None:
    with store.new_dump(new_id("shop")) as part:
        part.write(b"rotten")
        part.sync()
        place = store.mark_bad(part, "it does not parse", "shop")
    backup = add(store)
    store.mark_bad(backup, "a bit flipped")
    assert place == str(store.folder / f"{part.id}.dump.bad")
    assert sorted(os.listdir(store.folder)) == sorted(
        f"{item}.{ending}" for item in (part.id, backup.id) for ending in ("dump.bad", "bad.json")
    )
    assert store.backups() == []
    with pytest.raises(NoSuchBackup):
        store.get(backup.id, "shop")
    assert {(bad.id, bad.why) for bad in store.bad("shop")} == {
        (part.id, "it does not parse"),
        (backup.id, "a bit flipped"),
    }
    assert store.bad("crm") == []
    for bad in store.bad():
        store.remove(bad)
    assert os.listdir(store.folder) == []


def test_killed_while_a_dump_is_marked_as_bad(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step was the last: what is bad is not listed, and can be removed as such."""
    for step in range(3):
        backup = add(store)
        real, done = Path.rename, [0]

        def die(
            path: Path, target: Path, real: object = real, done: list[int] = done, step: int = step
        ) -> Path:
            if done[0] == step:
                raise KeyboardInterrupt
            done[0] += 1
            return real(path, target)  # type: ignore[operator, no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", die)
            with contextlib.suppress(KeyboardInterrupt):
                store.mark_bad(backup, "rotten")
        listed = [item.id for item in store.backups()]
        assert listed == ([backup.id] if step == 0 else [])
        assert [bad.id for bad in store.bad("shop")] == ([] if step == 0 else [backup.id])
        store.remove(backup)
        assert os.listdir(store.folder) == []


def test_small_files_come_and_go_with_a_backup(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Backup:
        with store.new_dump(new_id("shop")) as part:
            part.write(b"abc")
            part.sync()
            facts = {"id": part.id, "database": "shop", "sha256": part.sha256, "size_bytes": 3}
            return store.add(part, dataclasses.replace(BACKUP, **facts), {".globals.sql": b"CREATE ROLE x"})  # type: ignore[arg-type]

    backup = made()
    beside = store.folder / f"{backup.id}.globals.sql"
    assert beside.read_bytes() == b"CREATE ROLE x"
    assert stat.S_IMODE(beside.stat().st_mode) == 0o600
    store.remove(backup)
    assert os.listdir(store.folder) == []
    store.remove(backup)  # as a second run that prunes would
    real = os.rename

    def last_fails(source: Path, target: Path) -> None:
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(module.os, "rename", last_fails)
    with pytest.raises(OSError, match="No space"):
        made()
    assert os.listdir(store.folder) == []
