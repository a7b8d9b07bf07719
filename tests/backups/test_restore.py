"""The way back is exact, cannot make things worse, and leaves the old database beside the new."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from migrator import process
from migrator.backups import archive, databases
from migrator.backups import restore as module
from migrator.backups.snapshot import Relation
from migrator.errors import LockBusy, RestoreFailed, SettingsError
from tests.support import PLANTED, installations, leaks
from tests.support.servers import Database, Server

from .conftest import RICH, Workbench

Bench = Callable[..., Workbench]


def test_the_round_trip_is_exact(each_database: Database, workbench: Bench) -> None:
    each_database.execute(RICH)
    before = each_database.dump()
    bench = workbench(each_database)
    backup = bench.back_up()
    each_database.execute("DROP TABLE everything CASCADE; SELECT lo_unlink(4711); CREATE TABLE newer (a int)")
    restored = bench.restore()
    assert each_database.dump() == before
    assert restored.backup == backup
    assert restored.kept == f"{each_database.name}_before_run2"
    assert restored.database == each_database.name
    assert restored.rows == sum(table.rows or 0 for table in backup.tables.values())
    kept = Database(each_database.server, restored.kept)
    assert kept.psql("SELECT count(*) FROM newer") == [(0,)]
    assert f'DROP DATABASE "{restored.kept}"' in restored.next_step
    assert each_database.psql("SELECT n FROM totals") == [(501,)]
    assert each_database.psql("SELECT nextval('counter')") == [(13,)]
    assert bench.databases() == {each_database.name, restored.kept}
    assert bench.sessions() == []


def test_the_planner_has_its_statistics(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 1000) AS a")
    bench = workbench(database)
    bench.back_up()
    bench.restore()
    assert database.psql("SELECT reltuples::int FROM pg_class WHERE relname = 't'") == [(1000,)]


def test_beside(each_database: Database, workbench: Bench) -> None:
    each_database.execute(RICH)
    bench = workbench(each_database)
    bench.back_up()
    name = each_database.name + ' "look" at=it'
    live = each_database.connect()
    restored = bench.restore(to=name, replace=False)
    assert (restored.database, restored.kept) == (name, "")
    live.cursor().execute("SELECT 1")  # nobody was sent away
    live.close()
    assert each_database.server.dump(name) == each_database.dump()
    with pytest.raises(RestoreFailed, match="There is a database"):
        bench.restore(to=name, replace=False)
    with pytest.raises(RestoreFailed, match="There is a database"):
        bench.restore(to=each_database.name)
    assert each_database.psql("SELECT count(*) FROM everything") == [(501,)]
    assert bench.databases() == {each_database.name, name}


def test_replacing_must_be_asked_for(database: Database, workbench: Bench) -> None:
    bench = workbench(database)
    bench.back_up()
    with pytest.raises(SettingsError, match="replaces the database"):
        bench.restore(replace=False)
    for name in ("", "ü" * 32):
        with pytest.raises(RestoreFailed, match="no name for a database"):
            bench.restore(to=name, replace=False)


@pytest.mark.parametrize(("client", "server_kind"), [("embedded18", "debian"), ("embedded18", "embedded")])
def test_a_newer_client_restores_onto_an_older_server(
    client: str, server_kind: str, servers: Callable[[str], Server], workbench: Bench
) -> None:
    """pg_restore 17+ sets transaction_timeout, which servers before 17 refuse."""
    server = servers(server_kind)
    database = server.create_database()
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a; CREATE SEQUENCE s START 5")
    before = database.dump()
    bench = workbench(database, MIGRATOR_PG_BIN=str(installations.binaries(client)))
    backup = bench.back_up()
    assert backup.client_major == 18
    database.execute("DROP TABLE t")
    bench.restore()
    assert database.dump() == before
    database.execute("CREATE ROLE gone_soon; CREATE TABLE u (a int); ALTER TABLE u OWNER TO gone_soon")
    bench.back_up()
    database.execute("DROP TABLE u; DROP ROLE gone_soon")
    with pytest.raises(RestoreFailed, match=r"gone_soon.*OWNER TO"):
        bench.restore(run_id="run3")
    server.drop_database(database.name)


def test_sessions_are_ended_and_find_the_new_database(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT 'old' AS a")
    bench = workbench(database)
    bench.back_up()
    database.execute("UPDATE t SET a = 'newer'")
    seen: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                with database.connect() as connection, connection.cursor() as cursor:
                    for _ in range(20):
                        cursor.execute("SELECT a FROM t")
                        seen.append(cursor.fetchone()[0])  # type: ignore[index]
                        time.sleep(0.001)
                connection.close()
            except psycopg2.Error:
                time.sleep(0.001)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    idle = database.connect()
    busy = database.connect()
    busy.cursor().execute("UPDATE t SET a = 'in a transaction'")
    try:
        restored = bench.restore()
        time.sleep(0.3)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert seen[0] == "newer"
    assert seen[-1] == "old"
    assert database.psql("SELECT a FROM t") == [("old",)]
    assert Database(database.server, restored.kept).psql("SELECT a FROM t") == [("newer",)]
    for connection in (idle, busy):
        with pytest.raises(psycopg2.Error):
            connection.cursor().execute("SELECT 1")


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
        with pytest.raises(RestoreFailed, match="prepared transaction") as caught:
            bench.restore()
    finally:
        databases.SWAP_PATIENCE = patience
    assert "was not changed" in caught.value.state
    assert bench.databases() == {database.name}
    database.execute("ROLLBACK PREPARED 'held'")
    bench.restore()


def test_what_belongs_to_the_database_as_a_whole(
    database: Database, workbench: Bench, server: Server
) -> None:
    name = database.name
    server.psql("CREATE ROLE the_owner")
    server.psql('CREATE ROLE "a ""reader"""')
    for sql in (
        f"ALTER DATABASE {name} OWNER TO the_owner",
        f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",
        f'GRANT CONNECT, TEMPORARY ON DATABASE {name} TO "a ""reader""" WITH GRANT OPTION',
        f'ALTER DATABASE {name} SET search_path = app, "$user", \'a, "b"\', public',
        f"ALTER DATABASE {name} SET app.secret TO 'it''s; a \\ =secret'",
        f"ALTER DATABASE {name} SET work_mem = '5MB'",
        f"ALTER ROLE the_owner IN DATABASE {name} SET statement_timeout = '7s'",
        f"ALTER DATABASE {name} CONNECTION LIMIT 77",
        f"COMMENT ON DATABASE {name} IS 'the \\ shop''s'",
    ):
        server.psql(sql)
    facts = (
        "SELECT pg_get_userbyid(datdba), datacl::text, datconnlimit, shobj_description(oid, 'pg_database'),"
        " (SELECT array_agg((setrole::regrole::text, setconfig)::text ORDER BY setrole) FROM pg_db_role_setting"
        "   WHERE setdatabase = d.oid), datcollate, pg_encoding_to_char(encoding)"
        " FROM pg_database d WHERE datname = %s"
    )
    before = server.psql(facts, [name])
    bench = workbench(database)
    backup = bench.back_up()
    assert "secret" not in Path(backup.place).with_suffix(".json").read_text()
    restored = bench.restore()
    assert restored.notes == ()
    after = server.psql(facts, [name])
    assert sorted(re.findall(r"[^{},]+", after[0][1])) == sorted(re.findall(r"[^{},]+", before[0][1]))
    assert [row[:1] + row[2:] for row in after] == [row[:1] + row[2:] for row in before]
    for kept in (name, restored.kept):
        server.drop_database(kept)
    server.psql("DROP ROLE the_owner")
    server.psql('DROP ROLE "a ""reader"""')


def test_a_database_that_is_gone_comes_back(database: Database, workbench: Bench) -> None:
    database.execute(RICH)
    before = database.dump()
    bench = workbench(database)
    bench.back_up()
    database.server.drop_database(database.name)
    restored = bench.restore()
    assert database.dump() == before
    assert restored.kept == ""
    assert "is gone" in restored.notes[0]
    comment = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s"
    assert database.psql(comment, [database.name]) == [(None,)]


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
    with pytest.raises(RestoreFailed) as caught:
        bench.restore()
    assert caught.value.code == 43
    if damage != "gone":
        assert "is not what was written" in str(caught.value)
        assert str(place) in str(caught.value)
    assert bench.databases() == {database.name}


def test_the_backup_of_another_database_is_not_put_in_its_place(database: Database, workbench: Bench) -> None:
    other = database.server.create_database(database.name + "_other")
    backup = workbench(other).back_up()
    bench = workbench(database)
    with pytest.raises(RestoreFailed, match="There is no backup of database"):
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
        bench.restore()
    assert 'ALTER ROLE "app_role" CREATEDB' in caught.value.next_step
    by_hand = caught.value.next_step.partition("as it is: ")[2]
    assert by_hand == archive.by_hand(backup, app_database.name)
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
    real = module.archive.restore_into

    def lose(client: Any, path: Path, connection: str, environment: dict[str, str], major: int) -> None:
        real(client, path, connection, environment, major)
        name = re.search(r"dbname='([^']*)'", connection)
        assert name is not None
        database.server.psql("DELETE FROM t WHERE a = 1", dbname=name[1])
        database.server.psql("DROP TABLE u; CREATE TABLE w (a int)", dbname=name[1])

    monkeypatch.setattr(module.archive, "restore_into", lose)
    with pytest.raises(RestoreFailed) as caught:
        bench.restore()
    for fact in ("public.u is missing", "public.w was not in the backup", "public.t has 9 rows and not 10"):
        assert fact in str(caught.value)
    assert bench.databases() == {database.name}


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
        "fill": (process, "run"),
        "compare": (module.snapshot, "count_exactly"),
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


def test_nothing_secret_is_in_any_argument(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT g, repeat(md5(g::text), 50) FROM generate_series(1, 20000) g")
    bench = workbench(database)
    bench.back_up()
    watch = leaks.ArgumentWatch(os.getpid())
    restored = bench.restore()
    watch.finish()
    assert any(b"dbname=" in arguments for arguments in watch.seen)
    assert watch.leaks() == []
    assert PLANTED not in restored.message


@pytest.mark.parametrize("name", ["shop", "ü" * 31, "x" * 63])
@pytest.mark.parametrize("suffix", ["_before_20260101T120000Z-abcdef", "_restore_" + "r" * 60])
def test_names_are_shortened_to_what_postgres_takes(name: str, suffix: str) -> None:
    found = databases.shorten(name, suffix)
    assert len(found.encode()) <= 63
    assert found.startswith(name[:10])
    assert found != databases.shorten(name, suffix + "x")


def test_shown_names_are_quoted_where_sql_needs_it() -> None:
    def shown(schema: str, name: str) -> str:
        return Relation(1, schema, name, "r", None, False, True).shown

    assert shown("public", "orders_2") == "public.orders_2"
    assert shown("Public", 'o"x') == '"Public"."o""x"'
