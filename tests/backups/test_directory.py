"""A backup in directory format: whole or none, by several workers, and readable by hand."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.backups.dump import pg_dump
from migrator.backups.storage import files, local
from migrator.backups.storage.local import FolderStore
from migrator.backups.storage.open import open_store
from migrator.backups.storage.parts import DirectoryPart
from migrator.errors import BackupFailed
from tests.support.servers import Database, Server

from .conftest import RICH, Workbench
from .test_backup_failures import noise, slow_network
from .test_backup_failures import small_disk as small_disk

Bench = Callable[..., Workbench]
PARALLEL = {"MIGRATOR_BACKUP_FORMAT": "directory", "MIGRATOR_BACKUP_JOBS": "3"}
ROWS = "".join(
    f"CREATE TABLE t{number} AS SELECT g, repeat(md5((g + {number})::text), 8) AS x FROM generate_series(1, 8000) g;"
    for number in range(6)
)


@pytest.fixture(scope="module")
def modern(servers: Callable[[str], Server]) -> Server:
    """A server whose pg_dump has zstd."""
    return servers("zstd")


@pytest.fixture
def fresh(modern: Server) -> Iterator[Database]:
    database = modern.create_database()
    yield database
    modern.drop_database(database.name)


@pytest.mark.parametrize("compression", ["auto", "zstd:5", "gzip:6", "lz4"])
def test_a_round_trip(compression: str, fresh: Database, workbench: Bench) -> None:
    fresh.execute(RICH)
    before = fresh.dump()
    bench = workbench(fresh, MIGRATOR_BACKUP_COMPRESSION=compression, **PARALLEL)
    backup = bench.back_up()
    assert bench.files() == [f"{backup.id}.dir", f"{backup.id}.globals.sql", f"{backup.id}.json"]
    assert (backup.dump_format, backup.jobs) == ("directory", 3)
    assert backup.compression == {"auto": "zstd:1", "lz4": "lz4:1"}.get(compression, compression)
    ending = {"z": ".zst", "g": ".gz", "l": ".lz4"}[backup.compression[0]]
    assert any(path.suffix == ending for path in Path(backup.place).iterdir())
    fresh.execute("DROP TABLE everything CASCADE")
    bench.restore()
    assert fresh.dump() == before


def test_its_checksum_can_be_had_by_hand_and_nobody_else_may_read_it(
    fresh: Database, workbench: Bench
) -> None:
    fresh.execute(ROWS)
    backup = workbench(fresh, **PARALLEL).back_up()
    place = Path(backup.place)
    by_hand = "sha256sum -- * | LC_ALL=C sort -k 2 | sha256sum"
    assert subprocess.check_output(["sh", "-c", by_hand], cwd=place).split()[0].decode() == backup.sha256
    assert backup.size_bytes == sum(path.stat().st_size for path in place.iterdir())
    assert place.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_writers_go_on_and_the_counts_are_those_of_the_dump(
    jobs: str, fresh: Database, workbench: Bench
) -> None:
    """Several workers read one snapshot."""
    fresh.execute("CREATE TABLE a (n int); CREATE TABLE b (n int)")
    stop = threading.Event()

    def write() -> None:
        connection = fresh.connect()
        with connection.cursor() as cursor:
            while not stop.is_set():
                cursor.execute("INSERT INTO a VALUES (1); INSERT INTO b VALUES (1)")
                connection.commit()
        connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    bench = workbench(fresh, **{**PARALLEL, "MIGRATOR_BACKUP_JOBS": jobs})
    try:
        backup = bench.back_up()
    finally:
        stop.set()
        writer.join()
    assert backup.tables["public.a"].rows == backup.tables["public.b"].rows
    bench.restore()  # which compares the counts
    assert fresh.psql("SELECT count(*) FROM a") == fresh.psql("SELECT count(*) FROM b")


def _flip(place: Path) -> None:
    path = max(place.iterdir(), key=lambda item: item.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(place: Path) -> None:
    path = max(place.iterdir(), key=lambda item: item.stat().st_size)
    os.truncate(path, path.stat().st_size - 1)


def _remove(place: Path) -> None:
    min(place.iterdir(), key=lambda item: item.stat().st_size).unlink()


def _exchange(place: Path) -> None:
    first, second = [path for path in sorted(place.iterdir()) if path.name != "toc.dat"][:2]
    first.rename(place / "x")
    second.rename(first)
    (place / "x").rename(second)


def _add(place: Path) -> None:
    (place / "more").write_text("")


@pytest.mark.parametrize("harm", [_flip, _truncate, _remove, _exchange, _add])
def test_a_disk_that_lies_is_found_out(
    harm: Callable[[Path], None], fresh: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.execute(ROWS)
    real = DirectoryPart.sync

    def sync(part: DirectoryPart) -> None:
        real(part)
        harm(part.temporary)

    monkeypatch.setattr(DirectoryPart, "sync", sync)
    bench = workbench(fresh, **PARALLEL)
    with pytest.raises(BackupFailed):
        bench.back_up()
    assert open_store(bench.settings.backup_url).backups() == []
    assert not [name for name in bench.files() if name.endswith((".dir", ".part"))]


def test_a_folder_that_was_changed_later_is_not_restored(fresh: Database, workbench: Bench) -> None:
    fresh.execute(ROWS)
    bench = workbench(fresh, **PARALLEL)
    backup = bench.back_up()
    before = fresh.dump()
    _flip(Path(backup.place))
    with pytest.raises(Exception, match="is damaged"):
        bench.restore()
    assert fresh.dump() == before


def test_a_disk_that_fills_up(small_disk: Path, fresh: Database, workbench: Bench) -> None:
    noise(fresh, 4)
    bench = workbench(fresh, MIGRATOR_BACKUP_URL=small_disk.as_uri(), **PARALLEL)
    with pytest.raises(BackupFailed, match="No space left") as caught:
        bench.back_up()
    for part in (str(small_disk), "bytes free", "bytes of data"):
        assert part in str(caught.value)
    assert list(small_disk.iterdir()) == []
    assert bench.sessions() == []


def test_what_a_killed_run_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    dead = tmp_path / "shop-20260101T000000Z-abcdef.dir.part"
    dead.mkdir()
    (dead / "toc.dat").write_text("half")
    other = tmp_path / "other-20260101T000000Z-abcdef.dir.part"
    other.mkdir()
    with store.new_directory("shop-20260102T000000Z-abcdef") as living:
        store.remove_stale("shop")
        assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, living.temporary.name]
        old = time.time() - 2 * local.STALE_AFTER
        os.utime(other, (old, old))
        store.remove_stale("shop")
        assert [path.name for path in tmp_path.iterdir()] == [living.temporary.name]
    assert list(tmp_path.iterdir()) == []


def test_it_is_removed_as_a_whole(fresh: Database, workbench: Bench) -> None:
    fresh.execute("CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(fresh, **PARALLEL)
    backup = bench.back_up()
    open_store(bench.settings.backup_url).remove(backup)
    assert bench.files() == []


def test_a_worker_that_gets_no_lock_costs_a_second_dump_and_no_backup(
    fresh: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody queues for ACCESS EXCLUSIVE once pg_dump has its locks: a second session gets none any more."""
    fresh.execute(
        "CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g; CREATE TABLE u AS SELECT 1 AS a"
    )
    real = pg_dump.Dump._run
    seen: list[str] = []

    def run(dump: pg_dump.Dump, *arguments: Any) -> Any:
        finished = real(dump, *arguments)
        seen.append(dump.how.dump_format)
        if len(seen) > 1:
            return finished
        words = 'pg_dump: error: could not obtain lock on relation "public.t"\n'
        return dataclasses.replace(finished, status=1, stderr=words)

    monkeypatch.setattr(pg_dump.Dump, "_run", run)
    bench = workbench(fresh, **PARALLEL)
    backup = bench.back_up()
    assert seen == ["directory", "custom"]
    assert (backup.dump_format, backup.jobs) == ("custom", 1)
    assert "starts again, with one worker" in caplog.text
    assert bench.files() == [f"{backup.id}.dump", f"{backup.id}.globals.sql", f"{backup.id}.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_at_any_moment(number: int, fresh: Database, workbench: Bench) -> None:
    from .test_kill import kill_after, nobody_is_left, start

    fresh.execute(ROWS)
    bench = workbench(fresh, **PARALLEL)
    bench.folder.mkdir()
    codes = set()
    for step in range(14):
        codes.add(kill_after(start(bench, "back_up", **PARALLEL), number, 0.04 * step))
        nobody_is_left(bench)
        for backup in open_store(bench.settings.backup_url).backups():
            assert files.folder_checksum(Path(backup.place)) == (backup.sha256, backup.size_bytes)
        if number == signal.SIGTERM:
            assert not [name for name in bench.files() if name.endswith(".part")]
    whole = bench.back_up()
    assert whole.tables["public.t5"].rows == 8000
    assert not [name for name in bench.files() if name.endswith(".part")]
    assert codes & {23, -9}, "no kill came in time"
    assert codes <= {0, 23 if number == signal.SIGTERM else -9}


def test_a_server_that_goes_away_midway(private_server: Callable[..., Server], workbench: Bench) -> None:
    server = private_server("zstd")
    database = server.create_database()
    noise(database, 12)
    database.execute("CREATE TABLE second AS SELECT * FROM noise")

    def crash() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(files.size_of(path) > 100_000 for path in bench.folder.glob("*.dir.part")):
                break
            time.sleep(0.002)
        server.stop("immediate")

    with slow_network(database) as address:
        bench = workbench(database, **PARALLEL, DATABASE_URL=address)
        crasher = threading.Thread(target=crash)
        crasher.start()
        with pytest.raises(BackupFailed):
            bench.back_up()
        crasher.join()
    assert bench.files() == []
    server.start()
    assert workbench(database, **PARALLEL).back_up().tables["public.second"].rows == 120


def test_somebody_queues_for_the_whole_table_meanwhile(fresh: Database, workbench: Bench) -> None:
    """Whether the workers have their locks by then or not: there is a backup, and the other gets the table after it."""
    fresh.execute(ROWS)
    bench = workbench(fresh, **PARALLEL)
    locked: list[float] = []

    def queue() -> None:
        connection = fresh.connect()
        with connection.cursor() as cursor:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                cursor.execute(
                    "SELECT count(DISTINCT pid) FROM pg_locks"
                    " WHERE relation = 't3'::regclass AND pid <> pg_backend_pid()"
                )
                if cursor.fetchall()[0][0] > 1:  # the snapshot's session, and pg_dump's first
                    break
            cursor.execute("LOCK TABLE t3 IN ACCESS EXCLUSIVE MODE")
            locked.append(time.monotonic())
            connection.commit()
        connection.close()

    other = threading.Thread(target=queue)
    other.start()
    backup = bench.back_up()
    other.join(60)
    assert locked
    assert backup.tables["public.t3"].rows == 8000
    assert [found.id for found in open_store(bench.settings.backup_url).backups()] == [backup.id]
    assert not [name for name in bench.files() if name.endswith(".part")]
