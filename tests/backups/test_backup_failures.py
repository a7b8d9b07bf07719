"""A backup that cannot be made says why and what to do, and leaves nothing that looks like one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.backups import exported_snapshot
from migrator.backups.dump import pg_dump
from migrator.backups.dump.backup import preflight
from migrator.backups.storage import parts
from migrator.backups.verification import fingerprint
from migrator.errors import BackupFailed
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import connect
from tests.support import leaks
from tests.support.proxy import Proxy
from tests.support.servers import Database, Server

from .conftest import APPLICATION, Workbench

Bench = Callable[..., Workbench]


def test_a_disk_that_lies_is_found_out(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that changed between the writing and the reading back end the backup, wherever they are."""
    database.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 2000) g")
    bench = workbench(database)
    real = parts.FilePart.sync

    def corrupt(part: Any) -> None:
        real(part)
        if part.path.suffix == ".dump":
            with part.temporary.open("r+b") as file:
                file.seek(part.size // 2)
                byte = file.read(1)
                file.seek(part.size // 2)
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(parts.FilePart, "sync", corrupt)
    with pytest.raises(BackupFailed, match=r"faulty.*kept for inspection") as caught:
        bench.back_up()
    assert "MIGRATOR_BACKUP_URL" in caught.value.next_step
    assert [name.partition(".")[2] for name in bench.files()] == ["bad.json", "dump.bad"]


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
    with pytest.raises(BackupFailed, match=r"cannot be read back.*kept for inspection as .*\.dump\.bad"):
        bench.back_up()
    assert [name.partition(".")[2] for name in bench.files()] == ["bad.json", "dump.bad"]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of one megabyte, or of the size given by `indirect`."""
    size = getattr(request, "param", "1m")
    place = tmp_path / "small"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place]).returncode
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


@contextlib.contextmanager
def slow_network(database: Database) -> Iterator[str]:
    """Give an address by which 10 MB take ten seconds and more: whoever is to be caught in the middle is."""
    with Proxy(database.server.port) as network:
        network.throttle(1e6)
        yield network.environment(database)["MIGRATOR_DATABASE_URL"]


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


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
def test_a_disk_that_is_clearly_too_small_is_refused_at_once(
    small_disk: Path, database: Database, workbench: Bench
) -> None:
    noise(database, 28)
    bench = workbench(database, MIGRATOR_BACKUP_URL=small_disk.as_uri())
    refused = pytest.raises(BackupFailed, match=r"needs about 1\d\d kB .* 6\d\.\d kB .* are free")
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
    with pytest.raises(BackupFailed, match=f"0.8 times the share that {first.id} needed"):
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


def test_a_role_that_may_not_read_large_objects(role: str, database: Database, workbench: Bench) -> None:
    """A right to read all tables does not help there; the statement that is printed does."""
    database.execute(
        "SELECT lo_from_bytea(17, 'a'), lo_from_bytea(18, 'b'), lo_from_bytea(19, 'c');"
        " GRANT SELECT ON LARGE OBJECT 19 TO PUBLIC; GRANT pg_read_all_data TO plain_role"
    )
    bench = workbench(database, DATABASE_URL=as_role(database, role))
    with pytest.raises(
        BackupFailed, match=r"plain_role may not read 2 large objects \(17, \.\.\.\)"
    ) as caught:
        bench.back_up()
    typed = caught.value.next_step.partition("as a superuser: ")[2].partition(";")[0]
    subprocess.run(
        [str(database.server.bin / "psql"), "--no-psqlrc", "--set=ON_ERROR_STOP=1"],
        input=typed + "\n",
        env={**os.environ, **database.environment()},
        text=True,
        check=True,
    )
    bench.back_up()
    listed = subprocess.run(
        [str(database.server.bin / "pg_restore"), "--list", str(next(bench.folder.glob("*.dump")))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert listed.count(" BLOB - ") == 3


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


@pytest.mark.parametrize("proof", ["read", "restore"])
def test_a_locked_table_ends_the_wait(
    proof: str, database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg_dump, "LOCK_WAIT", 1.5)
    monkeypatch.setattr(exported_snapshot, "LOCK_WAIT", 1.5)
    database.execute("CREATE TABLE free (a int); CREATE TABLE t (a int)")
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY=proof)
    with database.connect() as holder:
        holder.cursor().execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(BackupFailed, match=r"kept public\.t locked for 2 s"):
            bench.back_up()
        assert bench.files() == []
        assert bench.sessions() == []
    holder.close()
    bench.back_up()


def test_what_fails_beside_pg_dump_ends_it(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schema is read while pg_dump is at it."""
    noise(database, 4)

    def schema(_: object) -> tuple[str, ...]:
        raise QueryFailed("the connection is gone", lost=True)

    monkeypatch.setattr(fingerprint, "schema", schema)
    bench = workbench(database)
    with pytest.raises(BackupFailed, match="the connection is gone"):
        bench.back_up()
    assert bench.files() == []
    assert bench.sessions() == []


def test_pg_dump_killed_midway_leaves_nothing(database: Database, workbench: Bench) -> None:
    noise(database, 15)

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(
                (bench.folder / name).stat().st_size > 100_000 for name in bench.files() if "dump" in name
            ):
                break
            time.sleep(0.002)
        for pid in leaks.process_tree(os.getpid())[1:]:
            if b"--snapshot" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, 9)

    with slow_network(database) as address:
        bench = workbench(database, DATABASE_URL=address)
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

    def crash() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(
            (bench.folder / name).stat().st_size > 100_000 for name in bench.files() if "dump" in name
        ):
            time.sleep(0.002)
        server.stop("immediate")

    with slow_network(database) as address:
        bench = workbench(database, DATABASE_URL=address)
        crasher = threading.Thread(target=crash)
        crasher.start()
        with pytest.raises(BackupFailed):
            bench.back_up()
        crasher.join()
    assert bench.files() == []
    server.start()
    assert workbench(database).back_up().tables["public.noise"].rows == 150
