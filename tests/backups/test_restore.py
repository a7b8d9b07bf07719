"""The way back is exact, cannot make things worse, and leaves the old database beside the new."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
import pytest

from migrator.backups import databases
from migrator.backups.exported_snapshot import Relation
from migrator.backups.restore.restore import RestoreOptions
from migrator.errors import RestoreFailed, SettingsError
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
        with pytest.raises(RestoreFailed, match="not a name for a database"):
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


def wait_until(wanted: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
        wait_until(lambda: seen)
        restored = bench.restore()
        wait_until(lambda: seen[-1] == "old")
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
    assert "does not exist any more" in restored.notes[0]
    comment = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s"
    assert database.psql(comment, [database.name]) == [(None,)]


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


def test_the_old_database_is_dropped_where_that_is_wanted(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    bench = workbench(database)
    bench.back_up()
    restored = bench.restore(options=RestoreOptions(drop_old=True))
    assert (restored.kept, restored.dropped) == ("", f"{database.name}_before_run2")
    assert bench.databases() == {database.name}
    assert "was dropped" in restored.message


@pytest.mark.parametrize("drop_old", [True, False])
def test_a_template_stays_one_and_the_old_one_can_be_dropped(
    database: Database, workbench: Bench, drop_old: bool
) -> None:
    facts = "SELECT datistemplate FROM pg_database WHERE datname = %s"
    bench = workbench(database)
    bench.back_up()
    database.server.psql(f"ALTER DATABASE {database.name} IS_TEMPLATE true")
    try:
        restored = bench.restore(options=RestoreOptions(drop_old=drop_old))
        assert database.psql(facts, [database.name]) == [(True,)]
        assert bool(restored.dropped) == drop_old
        if restored.kept:
            assert database.psql(facts, [restored.kept]) == [(False,)]
    finally:
        database.server.psql(f"ALTER DATABASE {database.name} IS_TEMPLATE false")


def test_replication_slots_that_stay_behind_are_named(
    private_server: Callable[..., Server], workbench: Bench
) -> None:
    server = private_server()
    server.psql("ALTER SYSTEM SET wal_level = 'logical'")
    server.restart()
    database = server.create_database()
    bench = workbench(database)
    bench.back_up()
    database.execute("SELECT pg_create_logical_replication_slot('feed', 'pgoutput')")
    restored = bench.restore()
    assert "are lost with it: feed." in " ".join(restored.notes)
    assert server.psql("SELECT database::text FROM pg_replication_slots") == [(restored.kept,)]


def test_what_was_kept_longer_than_told_is_dropped(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t (a int)")
    bench = workbench(database, MIGRATOR_KEEP_OLD="2d")
    bench.back_up()
    old, new, foreign = (
        f"{database.name}_before_{moment}"
        for moment in ("20200101T000000Z-abcdef", f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-abcdef", "christmas")
    )
    for name in (old, new, foreign, f"x{old}"):
        database.server.psql(f'CREATE DATABASE "{name}"')
    restored = bench.restore()
    assert bench.databases() == {database.name, restored.kept, new, foreign}
    assert database.server.has_database(f"x{old}")
    database.server.drop_database(f"x{old}")


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_event_triggers_come_last(
    jobs: str, each_database: Database, workbench: Callable[..., Workbench]
) -> None:
    each_database.execute("""
        CREATE TABLE ddl (tag text);
        CREATE FUNCTION noted() RETURNS event_trigger LANGUAGE plpgsql AS
          $$ BEGIN INSERT INTO public.ddl VALUES (tg_tag); END $$;
        CREATE MATERIALIZED VIEW one AS SELECT 1 AS a; CREATE MATERIALIZED VIEW two AS SELECT a FROM one;
        CREATE EVENT TRIGGER noted ON ddl_command_end EXECUTE FUNCTION noted();
        COMMENT ON EVENT TRIGGER noted IS 'each'; ALTER EVENT TRIGGER noted ENABLE ALWAYS;
        CREATE TABLE after (a int)""")
    before = each_database.dump()
    bench = workbench(each_database, MIGRATOR_RESTORE_JOBS=jobs)
    bench.back_up()
    bench.restore()
    assert each_database.dump() == before
    assert each_database.psql("SELECT tag FROM ddl") == [("CREATE TABLE",)]


def test_subscriptions_are_named_and_not_made(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t (a int)")
    where = "CONNECTION 'host=127.0.0.1 port=1 dbname=nowhere'"
    database.psql(
        f'CREATE SUBSCRIPTION "from afar" {where} PUBLICATION p WITH (connect = false, slot_name = NONE)'
    )
    bench = workbench(database)
    bench.back_up()
    restored = bench.restore()
    assert "Subscriptions are not restored (from afar)" in " ".join(restored.notes)
    assert database.psql(
        "SELECT d.datname FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid"
    ) == [(restored.kept,)]
    Database(database.server, restored.kept).psql('DROP SUBSCRIPTION "from afar"')
