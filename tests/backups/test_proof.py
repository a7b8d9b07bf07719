"""A backup is proven by restoring it: what came back is compared with what was in the dump's own snapshot."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest

from migrator.backups.manifest import from_json
from migrator.backups.storage.open import open_store
from migrator.errors import BackupFailed
from tests.support import PLANTED
from tests.support.programs import Held
from tests.support.projects import linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database, Server

from .conftest import RICH, Workbench

Bench = Callable[..., Workbench]


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_restored_and_compared(each_database: Database, workbench: Bench, shape: str) -> None:
    each_database.execute(RICH)
    bench = workbench(each_database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_FORMAT=shape)
    backup = bench.back_up()
    assert backup.dump_format == shape
    assert backup.verified == "restore"
    assert [(proof.how, proof.ok, proof.why) for proof in backup.proofs] == [
        ("read", True, ""),
        ("restore", True, ""),
    ]
    assert backup.proofs[1].server_version == backup.server_version
    everything = backup.tables["public.everything"]
    assert (everything.rows, bool(everything.rows_hash)) == (501, True)
    assert backup.sequences["public.counter"].before == (10, True)
    assert backup.large_objects.startswith("1 ")
    assert from_json((bench.folder / f"{backup.id}.json").read_text()) == dataclasses.replace(
        backup, place=""
    )
    assert bench.databases() == {each_database.name}
    assert bench.sessions() == []


def writing(database: Database, stop: threading.Event, errors: list[Exception]) -> None:
    """Change rows, draw from the sequence, and truncate a table, as fast as the server takes it."""
    try:
        connection = database.connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            number = 0
            while not stop.is_set():
                number += 1
                cursor.execute("INSERT INTO busy (a, b) VALUES (nextval('drawn'), repeat('x', 100))")
                cursor.execute("UPDATE busy SET b = 'y' WHERE a = %s", [number // 2])
                cursor.execute("DELETE FROM busy WHERE a = %s", [number // 3])
        connection.close()
    except Exception as error:  # noqa: BLE001 - told by the test
        errors.append(error)


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_writers_go_on_meanwhile(database: Database, workbench: Bench, shape: str) -> None:
    """What is compared is what was in the snapshot, however much changes before, during and after the dump."""
    database.execute(
        "CREATE TABLE busy (a bigint PRIMARY KEY, b text); CREATE SEQUENCE drawn;"
        " CREATE TABLE big AS SELECT g, repeat(md5(g::text), 5) AS x FROM generate_series(1, 100000) g"
    )
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_FORMAT=shape)
    stop, errors = threading.Event(), list[Exception]()
    writer = threading.Thread(target=writing, args=(database, stop, errors))
    writer.start()
    try:
        while not database.psql("SELECT 1 FROM busy"):
            time.sleep(0.01)
        backup = bench.back_up()
        written = database.psql("SELECT last_value FROM drawn")[0][0]
    finally:
        stop.set()
        writer.join()
    assert errors == []
    assert backup.verified == "restore"
    drawn = backup.sequences["public.drawn"]
    assert drawn.before[0] < drawn.after[0] < written
    assert backup.tables["public.busy"].rows != database.psql("SELECT count(*) FROM busy")[0][0]
    assert bench.databases() == {database.name}


def test_a_role_that_may_not_create_databases(database: Database, workbench: Bench, server: Server) -> None:
    """It is said before anything is dumped."""
    role = server.create_role("no_createdb")
    try:
        server.psql(f"ALTER DATABASE {database.name} OWNER TO {role}")
        url = server.url(database.name, role)
        bench = workbench(database, DATABASE_URL=url, MIGRATOR_BACKUP_VERIFY="restore")
        with pytest.raises(
            BackupFailed, match=r"no_createdb may not create databases.*VERIFY=restore"
        ) as caught:
            bench.back_up()
        assert "ALTER ROLE" in caught.value.next_step
        assert bench.files() == []
        bench = workbench(database, DATABASE_URL=url, MIGRATOR_BACKUP_VERIFY="read")
        assert bench.back_up().verified == "read"
    finally:
        server.psql(f"ALTER DATABASE {database.name} OWNER TO postgres; DROP ROLE {role}")


def test_nobody_can_open_it_here(database: Database, workbench: Bench) -> None:
    recipient = str(pyrage.x25519.Identity.generate().to_public())
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_RECIPIENTS=recipient)
    with pytest.raises(BackupFailed, match="needs the private key"):
        bench.back_up()
    assert bench.files() == []


def test_what_does_not_restore_here_is_taken_for_no_backup(database: Database, workbench: Bench) -> None:
    """A check that the data no longer meets: pg_dump writes it, and every restore fails.  Only restoring tells."""
    database.execute(
        "CREATE FUNCTION fine(integer) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN true; END';"
        " CREATE TABLE t (a integer CHECK (fine(a))); INSERT INTO t VALUES (1);"
        " CREATE OR REPLACE FUNCTION fine(integer) RETURNS boolean LANGUAGE plpgsql IMMUTABLE"
        " AS 'BEGIN RETURN $1 > 1; END'"
    )
    good = workbench(database).back_up()
    assert good.verified == "read"
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore")
    before = set(bench.files())
    with pytest.raises(
        BackupFailed, match=r"cannot be restored: .*t_a_check.*not used as a backup"
    ) as caught:
        bench.back_up()
    assert caught.value.code == 36
    assert not [name for name in set(bench.files()) - before if ".bad" in name]
    store = open_store(bench.settings.backup_url, bench.settings)
    assert [backup.verified for backup in store.backups()] == ["", "read"]
    assert store.get("latest", database.name) == good
    assert bench.databases() == {database.name}
    assert bench.sessions() == []


def test_a_definition_that_is_spelled_anew_is_none_the_worse(
    each_database: Database, workbench: Bench
) -> None:
    """Postgres moves the casts of such a check on every dump and restore; a checked view comes back the same."""
    each_database.execute(
        "CREATE TABLE t (state varchar(10) CHECK (state IN ('new', 'old')), kind char(3) DEFAULT 'abc'"
        " CHECK (kind <> ALL (ARRAY['x'::varchar, 'y'])));"
        " CREATE VIEW v AS SELECT * FROM t WHERE state IN ('new', 'x');"
        " CREATE INDEX ON t (state) WHERE state IN ('a', 'b')"
    )
    backup = workbench(each_database, MIGRATOR_BACKUP_VERIFY="restore").back_up()
    assert backup.verified == "restore"


def test_nothing_reaches_out_of_the_scratch_database(
    database: Database, workbench: Bench, server: Server
) -> None:
    """A subscription is not made again, an event trigger does not fire, and no role or tablespace is new."""
    database.execute(
        "CREATE TABLE t (a int); CREATE PUBLICATION p FOR TABLE t; CREATE TABLE fired (what text)"
    )
    database.execute(
        "CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1 port=1' PUBLICATION x WITH (connect = false)"
    )
    database.execute(
        "CREATE FUNCTION f() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO fired VALUES (tg_tag); END';"
        " CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f();"
        " CREATE MATERIALIZED VIEW m AS SELECT 1 AS a"
    )
    shared = (
        "SELECT (SELECT count(*) FROM pg_roles), (SELECT count(*) FROM pg_tablespace),"
        " (SELECT count(*) FROM pg_subscription), (SELECT count(*) FROM pg_replication_slots),"
        " (SELECT count(*) FROM pg_database)"
    )
    before = server.psql(shared)
    try:
        backup = workbench(database, MIGRATOR_BACKUP_VERIFY="restore").back_up()
        assert backup.verified == "restore"
        assert server.psql(shared) == before
    finally:
        database.execute("ALTER SUBSCRIPTION s DISABLE")
        database.execute("ALTER SUBSCRIPTION s SET (slot_name = NONE)")
        database.execute("DROP SUBSCRIPTION s")


def test_options_that_one_server_alone_knows(each_database: Database, workbench: Bench) -> None:
    """Debian's 15.20 was seen to number a column's versions so; every other server refuses the statement."""
    each_database.execute("CREATE TABLE t AS SELECT g AS a, 'x' AS b FROM generate_series(1, 100) g")
    each_database.execute("ALTER TABLE t ALTER a SET (n_distinct = 5), ADD PRIMARY KEY (a)")
    connection = each_database.connect()
    with connection.cursor() as cursor:
        cursor.execute("SET allow_system_table_mods = on")
        cursor.execute(
            "UPDATE pg_attribute SET attoptions = array_append(attoptions, 'pg_attver=3')"
            " WHERE attrelid = 't'::regclass AND attnum > 0"
        )
    connection.commit()
    connection.close()
    bench = workbench(each_database, MIGRATOR_BACKUP_VERIFY="restore")
    assert "pg_attver" in each_database.server.dump(each_database.name).replace(
        "pg_attver=3);", "pg_attver=3) ;"
    )
    backup = bench.back_up()
    assert backup.verified == "restore"
    bench.restore(to=f"{each_database.name}_look")
    options = "SELECT attname, attoptions FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum > 0 ORDER BY 1"
    found = each_database.server.psql(options, dbname=f"{each_database.name}_look")
    assert found == [("a", ["n_distinct=5"]), ("b", None)]


def test_on_another_server(database: Database, workbench: Bench, servers: Callable[[str], Server]) -> None:
    """Of a newer major, without the roles and tablespaces of the original: definitions are compared by name."""
    other = servers("embedded18")
    database.execute(RICH)
    database.server.psql("CREATE ROLE only_here")
    database.execute("ALTER TABLE everything OWNER TO only_here; GRANT SELECT ON measured TO only_here")
    try:
        bench = workbench(
            database,
            MIGRATOR_BACKUP_VERIFY="restore",
            MIGRATOR_VERIFY_URL=other.url("postgres"),
            MIGRATOR_PG_BIN=str(other.bin),
        )
        names = other.psql("SELECT datname FROM pg_database ORDER BY 1")
        backup = bench.back_up()
        assert backup.proofs[-1].server_version.startswith("18")
        assert "by name" in backup.proofs[-1].why
        assert other.psql("SELECT datname FROM pg_database ORDER BY 1") == names
        assert PLANTED not in (bench.folder / f"{backup.id}.json").read_text()
    finally:
        database.execute("REASSIGN OWNED BY only_here TO postgres; DROP OWNED BY only_here")
        database.server.psql("DROP ROLE only_here")


def test_what_killed_proofs_left_is_dropped_and_what_others_work_with_is_not(
    database: Database, workbench: Bench, server: Server
) -> None:
    bench = workbench(database)
    name = f"{database.name}_verify_20260101T000000Z-00000"
    for number in range(4):
        server.psql(f'CREATE DATABASE "{name}{number}" TEMPLATE template0')
    for number in (0, 1):
        mark = f"migrator: scratch copy for a proof of {database.name}"
        server.psql(f"COMMENT ON DATABASE \"{name}{number}\" IS '{mark}'")
    server.psql(f"COMMENT ON DATABASE \"{name}3\" IS 'mine'")  # 2 has no comment: killed while it was made
    holder = server.connect("postgres")
    holder.cursor().execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [f"migrator scratch {name}1"])
    try:
        bench.back_up()
        assert bench.databases() == {database.name, f"{name}1", f"{name}3"}
    finally:
        holder.close()
    bench.back_up()
    assert bench.databases() == {database.name, f"{name}3"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_in_the_middle(
    database: Database,
    start_migrator: Callable[..., Running],
    run_migrator: Runner,
    project: Callable[..., Path],
    tmp_path: Path,
    number: int,
) -> None:
    database.execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 300) g")
    folder = project(revisions=linear_history(1))
    env = {"MIGRATOR_BACKUP_VERIFY": "restore"}
    like = f"{database.name}\\_verify\\_%"
    count = "SELECT count(*) FROM pg_database WHERE datname LIKE %s"
    held = Held(tmp_path / "bin", database.server.bin, "pg_restore", when="--dbname=")
    env["MIGRATOR_PG_BIN"] = str(held.folder)
    running = start_migrator("backup", cwd=folder, database=database, env=env)
    running.wait_for(held.reached)
    assert database.psql(count, [like]) == [(1,)]
    running.send(number)
    result = running.finish()
    assert result.code == (23 if number == signal.SIGTERM else -9), result
    if number == signal.SIGTERM:
        assert database.psql(count, [like]) == [(0,)]
    assert [path for path in run_migrator.backups.iterdir() if not path.name.endswith(".part")] == []
    env = {"MIGRATOR_BACKUP_VERIFY": "read"}
    done = run_migrator("backup", cwd=folder, database=database, env=env)
    assert done.code == 0, done
    deadline = time.monotonic() + 60
    while database.psql(count, [like]) != [
        (0,)
    ]:  # the killed one's session may have outlived it for a moment
        assert time.monotonic() < deadline
        assert run_migrator("backup", cwd=folder, database=database, env=env).code == 0
    assert not list(run_migrator.backups.glob("*.part"))


def test_a_sequence_that_another_session_has_locked_is_waited_for(
    database: Database, workbench: Bench
) -> None:
    """For longer than the second after which one attempt ends, to answer signals."""
    database.execute("CREATE SEQUENCE s")
    connection = database.connect()
    connection.cursor().execute("DROP SEQUENCE s")
    seen: list[float] = []

    def release() -> None:
        deadline = time.monotonic() + 60
        waiting = "SELECT 1 FROM pg_locks WHERE relation = 's'::regclass AND NOT granted"
        while time.monotonic() < deadline and not (seen and seen[-1] - seen[0] > 1.5):
            if database.psql(waiting):
                seen.append(time.monotonic())
            time.sleep(0.05)
        connection.rollback()

    releasing = threading.Thread(target=release)
    releasing.start()
    try:
        backup = workbench(database).back_up()
    finally:
        releasing.join()
        connection.close()
    assert seen[-1] - seen[0] > 1.5
    assert backup.sequences["public.s"].after == (1, False)
