"""A restore that fails leaves the database under its own name and as it was, and nothing half restored."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrator.backups import databases, pg_restore
from migrator.backups.clients import Login, WouldLose
from migrator.backups.restore import restore as module
from migrator.backups.restore import write_detection
from migrator.backups.restore.tables import restore_tables
from migrator.errors import AccessDenied, BackupFailed, LockBusy, NoSuchBackup, RestoreFailed
from migrator.postgres.session import Session
from migrator.runtime import subprocesses
from tests.support.servers import Database, Server

from .conftest import Workbench
from .test_verify_backup import prove

Bench = Callable[..., Workbench]


def test_a_swap_that_cannot_be_done_leaves_the_original(database: Database, workbench: Bench) -> None:
    """A prepared transaction cannot be sent away."""
    server = database.server
    if server.psql("SHOW max_prepared_transactions") == [("0",)]:
        server.psql("ALTER SYSTEM SET max_prepared_transactions = 5")
        server.restart()
    database.execute("CREATE TABLE t AS SELECT 'old' AS a")
    bench = workbench(database)
    bench.back_up()
    connection = database.connect()
    connection.tpc_begin("held")
    connection.cursor().execute("UPDATE t SET a = 'prepared'")
    connection.tpc_prepare()
    connection.close()
    patience = databases.SWAP_PATIENCE
    databases.SWAP_PATIENCE = 0.0
    try:
        with pytest.raises(RestoreFailed, match=r"prepared transaction.*ROLLBACK PREPARED 'held'") as caught:
            bench.restore()
    finally:
        databases.SWAP_PATIENCE = patience
    assert "was not changed" in caught.value.state
    assert bench.databases() == {database.name}
    database.execute("ROLLBACK PREPARED 'held'")
    bench.restore()


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("damage", ["first", "middle", "last", "truncated", "longer", "gone"])
def test_a_damaged_dump_is_refused(damage: str, database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS a")
    bench = workbench(database)
    place = Path(bench.back_up().place)
    size = place.stat().st_size
    if damage == "truncated":
        os.truncate(place, size - 1)
    elif damage == "longer":
        with place.open("ab") as file:
            file.write(b"\0")
    elif damage == "gone":
        place.unlink()
    else:
        flip(place, {"first": 0, "middle": size // 2, "last": size - 1}[damage])
    with pytest.raises((RestoreFailed, NoSuchBackup)) as caught:
        bench.restore()
    assert caught.value.code == (36 if damage == "gone" else 43)
    if damage != "gone":
        assert "is damaged" in str(caught.value)
        assert str(place) in str(caught.value)
    assert bench.databases() == {database.name}


def test_the_backup_of_another_database_is_not_put_in_its_place(database: Database, workbench: Bench) -> None:
    other = database.server.create_database(database.name + "_other")
    backup = workbench(other).back_up()
    bench = workbench(database)
    with pytest.raises(NoSuchBackup, match="There is no backup of database"):
        bench.restore()
    with pytest.raises(RestoreFailed, match=f"is of database {other.name}") as caught:
        bench.restore(backup.id)
    assert "--to NAME" in caught.value.next_step
    bench.restore(backup.id, to=database.name + "_look")


def test_an_owner_that_does_not_exist(database: Database, workbench: Bench, server: Server) -> None:
    server.psql("CREATE ROLE short_lived")
    database.execute("CREATE TABLE t (a int); ALTER TABLE t OWNER TO short_lived")
    bench = workbench(database)
    bench.back_up()
    database.execute("DROP TABLE t; DROP ROLE short_lived")
    with pytest.raises(RestoreFailed, match="short_lived") as caught:
        bench.restore()
    assert "CREATE ROLE" in caught.value.next_step
    assert "--no-owner" in caught.value.next_step
    assert bench.databases() == {database.name}


def test_a_database_owner_that_does_not_exist(database: Database, workbench: Bench, server: Server) -> None:
    server.psql("CREATE ROLE short_lived")
    server.psql(f"ALTER DATABASE {database.name} OWNER TO short_lived")
    bench = workbench(database)
    bench.back_up()
    server.psql(f"ALTER DATABASE {database.name} OWNER TO postgres")
    server.psql("DROP ROLE short_lived")
    with pytest.raises(RestoreFailed, match="belongs to role short_lived") as caught:
        bench.restore()
    assert caught.value.next_step == 'CREATE ROLE "short_lived";'


@pytest.fixture
def app_database(server: Server) -> Iterator[Database]:
    """A database that belongs to a role that may log in, and no more."""
    server.create_role("app_role")
    database = server.create_database()
    server.psql(f"ALTER DATABASE {database.name} OWNER TO app_role")
    database.url = database.url.replace("//postgres:", "//app_role:")
    yield database
    for name in server.psql("SELECT datname FROM pg_database WHERE datdba = 'app_role'::regrole"):
        server.drop_database(name[0])
    server.psql("DROP ROLE app_role")


def test_a_role_that_may_not_create_databases(app_database: Database, workbench: Bench) -> None:
    app_database.execute("SET ROLE app_role; CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    bench = workbench(app_database)
    backup = bench.back_up()
    with pytest.raises(RestoreFailed, match="may not create databases") as caught:
        bench.restore(to=app_database.name + "_look")
    assert 'ALTER ROLE "app_role" CREATEDB' in caught.value.next_step
    by_hand = caught.value.next_step.partition("in place: ")[2]
    assert by_hand == pg_restore.by_hand(backup, app_database.name)
    app_database.execute("SET ROLE app_role; DELETE FROM t; CREATE TABLE newer (a int)")
    done = subprocess.run(
        ["sh", "-ec", by_hand],
        env={
            **app_database.environment(),
            "PGUSER": "app_role",
            "PATH": f"{app_database.server.bin}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert app_database.psql("SELECT count(*) FROM t") == [(10,)]
    app_database.server.psql("ALTER ROLE app_role CREATEDB")
    restored = bench.restore()
    assert app_database.psql("SELECT count(*), to_regclass('newer') FROM t") == [(10, None)]
    app_database.server.drop_database(restored.kept)


def test_what_goes_before_a_restore_from_within_is_backed_up_whole(
    app_database: Database, workbench: Bench
) -> None:
    app_database.execute("SET ROLE app_role; CREATE TABLE audit AS SELECT generate_series(1, 10) AS a")
    bench = workbench(app_database, MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA="audit")
    bench.back_up()
    restored = bench.restore(options=module.RestoreOptions(incomplete=True))
    assert "it lacks the rows of public.audit" in " ".join(restored.notes)
    assert app_database.psql("SELECT count(*) FROM audit") == [(0,)]
    bench.restore(restored.safety, run_id="run3")
    assert app_database.psql("SELECT count(*) FROM audit") == [(10,)]


def test_a_session_that_we_may_not_end_is_named(app_database: Database, workbench: Bench) -> None:
    app_database.server.psql("ALTER ROLE app_role CREATEDB")
    bench = workbench(app_database)
    bench.back_up()
    superuser = app_database.connect(application_name="the admin")
    patience = databases.SWAP_PATIENCE
    databases.SWAP_PATIENCE = 0.0
    try:
        with pytest.raises(RestoreFailed, match=r"session \d+ of postgres \(the admin\)"):
            bench.restore()
    finally:
        databases.SWAP_PATIENCE = patience
    superuser.cursor().execute("SELECT 1")
    superuser.close()
    assert bench.databases() == {app_database.name}


def test_rows_that_did_not_come_back_are_noticed(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a; CREATE TABLE u (a int)")
    bench = workbench(database)
    bench.back_up()
    real = module.pg_restore.restore_into

    def lose(client: Any, path: Path, login: Login, *more: Any, **options: Any) -> None:
        real(client, path, login, *more, **options)
        name = login.target.database
        database.server.psql("DELETE FROM t WHERE a = 1", dbname=name)
        database.server.psql("DROP TABLE u; CREATE TABLE w (a int)", dbname=name)

    monkeypatch.setattr(module.pg_restore, "restore_into", lose)
    with pytest.raises(RestoreFailed) as caught:
        bench.restore()
    for fact in ("public.u is missing", "public.w was not in the backup", "public.t has 9 rows, not 10"):
        assert fact in str(caught.value)
    assert bench.databases() == {database.name}


def test_a_standby_is_refused(private_server: Callable[..., Server], workbench: Bench) -> None:
    server = private_server()
    database = server.create_database()
    database.execute("CREATE TABLE t (a int)")
    bench = workbench(database)
    backup = bench.back_up()
    server.stop()
    (server.data / "standby.signal").touch()
    server.start()
    with pytest.raises(AccessDenied, match="is a standby") as caught:
        bench.restore()
    assert "primary" in caught.value.next_step
    with pytest.raises(AccessDenied, match="is a standby"):
        restore_tables(
            bench.target, bench.settings, backup.id, ["t"], schema="", run_id="run3", application_name="x"
        )
    for variables, name in (
        ({}, "MIGRATOR_DATABASE_URL"),
        ({"MIGRATOR_VERIFY_URL": server.url("postgres")}, "MIGRATOR_VERIFY_URL"),
    ):
        with pytest.raises(
            BackupFailed, match="is a standby, so verification by restore cannot create"
        ) as proof:
            prove(workbench(database, **variables), "restore")
        assert proof.value.next_step.startswith(f"point {name} at the primary")
    assert prove(bench, "read").id == backup.id


class Stop(BaseException):
    """What a signal handler raises."""


@pytest.mark.parametrize("moment", ["create", "mark", "fill", "compare", "finish"])
def test_an_interruption_leaves_nothing(
    moment: str, database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    bench = workbench(database)
    bench.back_up()

    def stop(*_: object, **__: object) -> None:
        raise Stop

    place: tuple[object, str] = {
        "create": (databases, "create"),
        "mark": (databases, "mark"),
        "fill": (subprocesses, "run"),
        "compare": (module.exported_snapshot, "count_exactly"),
        "finish": (databases, "copy_settings"),
    }[moment]
    with monkeypatch.context() as patch:
        if moment == "fill":
            from migrator.backups import clients

            found = clients.installed(bench.settings)
            patch.setattr(clients, "installed", lambda _: found)
        patch.setattr(*place, stop)
        with pytest.raises(Stop):
            bench.restore()
    assert bench.databases() == {database.name}
    assert bench.sessions() == []
    assert bench.restore().rows == 10


def test_what_a_killed_restore_left_is_dropped_by_the_next(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    bench = workbench(database)
    bench.back_up()
    left = database.name + "_restore_run1"
    foreign = database.name + "_restore_mine"
    for name in (left, foreign):
        database.server.create_database(name)
    database.psql(f"COMMENT ON DATABASE {left} IS 'migrator: half-restored copy of {database.name}'")
    restored = bench.restore()
    assert bench.databases() == {database.name, restored.kept, foreign}
    again = bench.restore(run_id="run3")
    assert bench.databases() == {database.name, restored.kept, again.kept, foreign}


def test_two_restores_of_one_database_at_once(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench(database)
    bench.back_up()
    real = databases.mark

    def meanwhile(session: Any, name: str, original: str) -> None:
        real(session, name, original)
        with pytest.raises(LockBusy, match="Another restore"):
            bench.restore(run_id="second")

    monkeypatch.setattr(module, "_LOCK_PATIENCE", 0.3)
    monkeypatch.setattr(databases, "mark", meanwhile)
    bench.restore()


def test_a_server_that_goes_away_in_the_middle(
    private_server: Callable[..., Server], workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = private_server()
    database = server.create_database()
    database.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 1000) g")
    bench = workbench(database)
    bench.back_up()
    database.execute("DELETE FROM t")
    real = module.pg_restore.restore_into

    def crash(*arguments: Any, **options: Any) -> None:
        server.stop("immediate")
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.pg_restore, "restore_into", crash)
        with pytest.raises(RestoreFailed) as caught:
            bench.restore(run_id="20260101T000000Z-abcdef")
    assert "was not changed" in caught.value.state
    server.start()
    assert database.psql("SELECT count(*) FROM t") == [(0,)]
    restored = bench.restore()
    assert database.psql("SELECT count(*) FROM t") == [(1000,)]
    assert bench.databases() == {database.name, restored.kept}


@pytest.mark.parametrize("here", [True, False])
def test_who_has_written_since_is_counted_by_what_the_snapshot_has_not_seen(
    here: bool, database: Database, workbench: Bench
) -> None:
    other = database.server.create_database()
    before = (database if here else other).connect()
    try:
        cursor = before.cursor()
        cursor.execute("SELECT txid_current()")  # and it stays open
        (number,) = cursor.fetchone() or (0,)
        for _ in range(10):
            database.execute("SELECT txid_current()")
        backup = workbench(database).back_up()
        assert backup.running_xids == ((number,) if here else ())
        asked = cast(Session, SimpleNamespace(value=lambda _: backup.unseen_xid))
        if here:
            with pytest.raises(WouldLose, match=r"^1 transaction that this run cannot account"):
                write_detection.refuse_losses(asked, backup, frozenset())
        assert (
            write_detection.refuse_losses(asked, backup, frozenset(backup.running_xids)) == backup.unseen_xid
        )
    finally:
        before.close()
        database.server.drop_database(other.name)
