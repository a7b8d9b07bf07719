"""A backup is whole, proven, and says what is in it; or there is none, and a message that says why."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator import process
from migrator.backups import archive, clients, dump, snapshot
from migrator.backups.dump import _children_name
from migrator.errors import BackupFailed
from migrator.postgres import connect
from migrator.stages.backup import decide, preflight
from tests.support import PLANTED, leaks
from tests.support.servers import Database, Server, normalise

from .conftest import APPLICATION, RICH, Workbench

Bench = Callable[..., Workbench]


@pytest.mark.parametrize(
    ("mode", "pending", "empty", "reason"),
    [
        ("auto", True, False, ""),
        ("auto", False, False, "nothing is pending"),
        ("auto", True, True, "the database is empty"),
        ("always", False, False, ""),
        ("always", False, True, ""),
        ("off", True, False, "switched off by MIGRATOR_BACKUP=off"),
    ],
)
def test_decide(mode: str, pending: bool, empty: bool, reason: str) -> None:
    assert decide(mode, pending, empty) == reason


def test_a_backup_of_everything(
    each_database: Database, workbench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    each_database.execute(RICH)
    caplog.set_level(logging.INFO, "migrator")
    bench = workbench(each_database)
    backup = bench.back_up(name="before", revisions=("a1", "b2"))
    assert bench.files() == [f"{backup.id}.dump", f"{backup.id}.json"]
    assert backup.size_bytes == Path(backup.place).stat().st_size
    assert subprocess.check_output(["sha256sum", backup.place]).split()[0].decode() == backup.sha256
    assert backup.revisions == ("a1", "b2")
    assert backup.tables["public.everything"].rows == 501
    assert backup.tables['"Odd ""schema"""."T a,b"'].rows == 2
    assert backup.tables["public.parent"].rows == 1  # and none of its child's
    assert backup.tables["public.measured"].rows is None
    assert backup.tables["public.measured_2020"].rows == 213
    assert backup.server_version.startswith(str(each_database.server.major))
    assert backup.database_size_bytes > backup.size_bytes
    manifest = json.loads(Path(backup.place).with_suffix(".json").read_text())
    assert manifest["name"] == "before"
    assert manifest["verified"] == "read"
    assert PLANTED not in json.dumps(manifest)
    assert f"backing up {each_database.name} (" in caplog.text
    assert f"as {backup.id}" in caplog.text
    assert bench.sessions() == []  # disconnected, and not a moment later


def test_the_counts_are_those_of_the_dump(database: Database, workbench: Bench) -> None:
    """Writers go on meanwhile: what was counted is what was dumped."""
    database.execute("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 1000)")
    bench = workbench(database)
    stop = threading.Event()

    def write() -> None:
        connection = database.connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            while not stop.is_set():
                cursor.execute("INSERT INTO t VALUES (0)")
        connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        backups = [bench.back_up() for _ in range(5)]
    finally:
        stop.set()
        writer.join()
    for backup in backups:
        chunks: list[bytes] = []
        process.run(
            [database.server.bin / "pg_restore", "--data-only", "--file=-", backup.place],
            environment=process.base_environment(),
            on_output=chunks.append,
        )
        rows = b"".join(chunks).decode().partition("FROM stdin;\n")[2].partition("\n\\.")[0].splitlines()
        assert len(rows) == backup.tables["public.t"].rows
    assert backups[0].tables["public.t"].rows != backups[-1].tables["public.t"].rows


def test_a_big_table_is_estimated(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "COUNTED_BYTES", 100_000)
    database.execute(
        "CREATE TABLE big AS SELECT g FROM generate_series(1, 5000) g; CREATE TABLE small (a int)"
    )
    database.execute("ANALYZE")
    tables = workbench(database).back_up().tables
    assert tables["public.big"] == snapshot.Table(None, 5000)
    assert tables["public.small"].rows == 0


def test_nothing_secret_is_in_any_argument(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT g, repeat(md5(g::text), 50) FROM generate_series(1, 20000) g")
    watch = leaks.ArgumentWatch(os.getpid())
    workbench(database).back_up()
    watch.finish()
    assert any(b"--snapshot" in arguments for arguments in watch.seen)
    assert watch.leaks() == []


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.99])
def test_truncation_is_found_by_reading(database: Database, workbench: Bench, fraction: float) -> None:
    database.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g")
    bench = workbench(database)
    place = Path(bench.back_up().place)
    os.truncate(place, int(place.stat().st_size * fraction))
    client = clients.installed(bench.settings)[0]
    assert archive.read_whole(client, place).status != 0


def test_a_disk_that_lies_is_found_out(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that changed between the writing and the reading back end the backup, wherever they are."""
    database.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 2000) g")
    bench = workbench(database)
    real = dump.Part.sync

    def corrupt(part: Any) -> None:
        real(part)
        if part.path.suffix == ".dump":
            with part.temporary.open("r+b") as file:
                file.seek(part.size // 2)
                byte = file.read(1)
                file.seek(part.size // 2)
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(dump.Part, "sync", corrupt)
    with pytest.raises(BackupFailed, match="faulty"):
        bench.back_up()
    assert bench.files() == []


def test_an_archive_that_does_not_parse_is_no_backup(
    database: Database, workbench: Bench, tmp_path: Path
) -> None:
    """A pg_dump that exits 0 having written rubbish: only reading the archive tells."""
    real = database.server.bin
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "pg_restore").symlink_to(real / "pg_restore")
    script = f'#!/bin/sh\ncase "$1" in --version) exec {real}/pg_dump --version;; esac\necho PGDMP rubbish\n'
    (fake / "pg_dump").write_text(script)
    (fake / "pg_dump").chmod(0o755)
    bench = workbench(database, MIGRATOR_PG_BIN=str(fake))
    with pytest.raises(BackupFailed, match="cannot be read back"):
        bench.back_up()
    assert bench.files() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place]).returncode
    ):
        pytest.fail("this test mounts a small tmpfs: it needs root and CAP_SYS_ADMIN")
    yield place
    subprocess.run(["umount", place], check=True)


def noise(database: Database, megabytes: int) -> None:
    """Fill a table with what does not compress."""
    database.execute(
        "CREATE TABLE noise AS SELECT string_agg(decode(md5(random()::text || g || h), 'hex'), '') AS bytes"
        f" FROM generate_series(1, {megabytes * 10}) g, generate_series(1, 6250) h GROUP BY g"
    )


def test_a_disk_that_fills_up(small_disk: Path, database: Database, workbench: Bench) -> None:
    noise(database, 4)
    bench = workbench(database, MIGRATOR_BACKUP_URL=small_disk.as_uri())
    with pytest.raises(BackupFailed, match="No space left") as caught:
        bench.back_up()
    for part in (str(small_disk), "bytes free", "bytes of data"):
        assert part in str(caught.value)
    assert "MIGRATOR_BACKUP_URL" in caught.value.next_step
    assert list(small_disk.iterdir()) == []
    assert bench.sessions() == []


def test_a_disk_that_is_clearly_too_small_is_refused_at_once(
    small_disk: Path, database: Database, workbench: Bench
) -> None:
    noise(database, 25)
    bench = workbench(database, MIGRATOR_BACKUP_URL=small_disk.as_uri())
    refused = pytest.raises(BackupFailed, match=r"needs about 2\.\d MB .* 1\.0 MB .* are free")
    with connect(bench.target, APPLICATION, 10) as session, refused:
        preflight(session, bench.settings)


def test_the_last_backup_tells_how_well_the_data_compresses(
    small_disk: Path, database: Database, workbench: Bench
) -> None:
    noise(database, 1)
    database.execute("DELETE FROM noise WHERE ctid > '(0,5)'")
    bench = workbench(database, MIGRATOR_BACKUP_URL=small_disk.as_uri())
    first = bench.back_up()
    manifest = Path(first.place).with_suffix(".json")
    document = json.loads(manifest.read_text())
    document["size_bytes"] = document["database_size_bytes"] // 2
    manifest.write_text(json.dumps(document))
    with pytest.raises(BackupFailed, match=f"0.8 times what {first.id} took"):
        bench.back_up()


def test_a_folder_that_cannot_be_written(tmp_path: Path, database: Database, workbench: Bench) -> None:
    place = tmp_path / "readonly"
    place.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], check=True)
    else:
        place.chmod(0o500)
    try:
        bench = workbench(database, MIGRATOR_BACKUP_URL=place.as_uri())
        with pytest.raises(
            BackupFailed, match=r"cannot be written to .*(Read-only file system|denied)"
        ) as caught:
            bench.back_up()
        assert "MIGRATOR_BACKUP_URL" in caught.value.next_step
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", place], check=True)


def as_role(database: Database, role: str) -> str:
    return database.url.replace("//postgres:", f"//{role}:")


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """A role without privileges."""
    name = server.create_role("plain_role")
    yield name
    server.psql("DROP OWNED BY plain_role")
    server.psql("DROP ROLE plain_role")


def test_a_role_that_may_not_read_everything(role: str, database: Database, workbench: Bench) -> None:
    database.execute(
        "CREATE TABLE t (a int); CREATE SCHEMA s; CREATE TABLE s.u (a int); GRANT SELECT ON s.u TO public"
    )
    bench = workbench(database, DATABASE_URL=as_role(database, role))
    with pytest.raises(BackupFailed, match=r"plain_role may not read public\.t, s\.u") as caught:
        bench.back_up()
    assert 'GRANT pg_read_all_data TO "plain_role"' in caught.value.next_step
    assert "MIGRATOR_BACKUP=off" in caught.value.next_step
    assert bench.files() == []
    database.execute("GRANT pg_read_all_data TO plain_role")
    assert bench.back_up().tables.keys() == {"public.t", "s.u"}
    database.execute("REVOKE pg_read_all_data FROM plain_role")


def test_row_level_security_is_refused(role: str, database: Database, workbench: Bench) -> None:
    database.execute(
        "CREATE TABLE t (a int); INSERT INTO t VALUES (1); GRANT SELECT ON t TO plain_role;"
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY"
    )
    bench = workbench(database, DATABASE_URL=as_role(database, role))
    with pytest.raises(BackupFailed, match=r"Row-level security hides rows of public\.t") as caught:
        bench.back_up()
    assert "BYPASSRLS" in caught.value.next_step


@pytest.mark.parametrize("counted", [True, False])
def test_a_locked_table_ends_the_wait(
    counted: bool, database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "LOCK_WAIT", 1.5)
    monkeypatch.setattr(snapshot, "LOCK_WAIT", 1.5)
    if not counted:
        monkeypatch.setattr(snapshot, "count", lambda *_: {})
    database.execute("CREATE TABLE t (a int)")
    bench = workbench(database)
    with database.connect() as holder:
        holder.cursor().execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(BackupFailed, match=r"kept .*t.* locked for 2 s"):
            bench.back_up()
        assert bench.files() == []
        assert bench.sessions() == []
    holder.close()
    bench.back_up()


def test_pg_dump_killed_midway_leaves_nothing(database: Database, workbench: Bench) -> None:
    noise(database, 15)
    bench = workbench(database)

    def kill() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if any(
                (bench.folder / name).stat().st_size > 100_000 for name in bench.files() if "dump" in name
            ):
                break
            time.sleep(0.002)
        for pid in leaks.process_tree(os.getpid())[1:]:
            if b"--snapshot" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, 9)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(BackupFailed, match="signal 9"):
        bench.back_up()
    killer.join()
    assert bench.files() == []


def test_the_server_gone_midway(private_server: Callable[..., Server], workbench: Bench) -> None:
    server = private_server()
    database = server.create_database()
    noise(database, 15)
    bench = workbench(database)

    def crash() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not any(name.endswith(".dump.part") for name in bench.files()):
            time.sleep(0.002)
        server.stop("immediate")

    crasher = threading.Thread(target=crash)
    crasher.start()
    with pytest.raises(BackupFailed):
        bench.back_up()
    crasher.join()
    assert bench.files() == []
    server.start()
    assert bench.back_up().tables["public.noise"].rows == 150


def test_a_statement_timeout_of_the_role_does_not_end_it(database: Database, workbench: Bench) -> None:
    noise(database, 5)
    database.execute(f"ALTER DATABASE {database.name} SET statement_timeout = '20ms'")
    database.execute(f"ALTER DATABASE {database.name} SET idle_in_transaction_session_timeout = '20ms'")
    database.execute(f"ALTER DATABASE {database.name} SET default_transaction_isolation = 'serializable'")
    assert workbench(database).back_up().tables["public.noise"].rows == 50


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'quo"ted', "UPPER", "ü" * 31 + "x", "a=b", "postgres://x", "%s", "-d"]
)
def test_any_database_name(name: str, server: Server, workbench: Bench) -> None:
    server.psql("CREATE DATABASE " + clients_quote(name))
    try:
        database = Database(server, name)
        database.execute("CREATE TABLE t AS SELECT 1 AS a")
        bench = workbench(database)
        assert bench.back_up().database == name
        database.execute("DROP TABLE t")
        restored = bench.restore()
        assert restored.database == name
        assert len(restored.kept.encode()) <= 63
        assert database.psql("SELECT a FROM t") == [(1,)]
        server.psql("DROP DATABASE " + clients_quote(restored.kept))
    finally:
        server.psql(f"DROP DATABASE IF EXISTS {clients_quote(name)} WITH (FORCE)")


def clients_quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def test_the_dumps_sessions_bear_the_runs_name() -> None:
    long = "migrator/" + "h" * 40 + " 20260101-abcd"
    for name in ("migrator/h 1", long):
        found = _children_name(name)
        assert len(found) <= 63
        assert found.endswith(name[-8:] + " backup")


def test_the_rows_of_the_archive_are_the_rows_of_the_database(
    each_database: Database, workbench: Bench
) -> None:
    each_database.execute(RICH)
    backup = workbench(each_database).back_up()
    chunks: list[bytes] = []
    process.run(
        [each_database.server.bin / "pg_restore", "--file=-", backup.place],
        environment=process.base_environment(),
        on_output=chunks.append,
    )
    assert normalise(b"".join(chunks).decode()) == each_database.dump()
