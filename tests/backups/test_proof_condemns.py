"""A proof condemns a backup for what the backup is, and for nothing that only a server or a program is."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.backups import databases, reuse
from migrator.backups.manifest import summary
from migrator.backups.storage.open import open_store
from migrator.cli import formatters
from migrator.errors import BackupFailed
from migrator.postgres.session import Session, connect
from tests.support.servers import Database, Server

from .conftest import APPLICATION, Workbench
from .test_verify_backup import manifest, prove

Bench = Callable[..., Workbench]


def test_a_client_older_than_the_server_that_it_is_proven_on(
    database: Database, workbench: Bench, servers: Callable[[str], Server]
) -> None:
    """It is said before anything is dumped; and a backup that is there already stays one."""
    other = servers("embedded18")
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    backup = workbench(database).back_up()
    bench = workbench(database, MIGRATOR_VERIFY_URL=other.url("postgres"), MIGRATOR_BACKUP_VERIFY="restore")
    before = bench.files()
    with pytest.raises(BackupFailed, match=r"PostgreSQL 18.*older client") as caught:
        prove(bench, "restore")
    assert "MIGRATOR_VERIFY_URL" in caught.value.next_step
    assert bench.files() == before
    with pytest.raises(BackupFailed, match=r"PostgreSQL 18.*older client"):
        bench.back_up()
    assert bench.files() == before
    assert prove(bench).id == backup.id


def stand_in(folder: Path, server: Server, **scripts: str) -> Path:
    """Return a folder of the server's programs, some of which are shell scripts instead."""
    folder.mkdir()
    for program in ("pg_dump", "pg_restore", "psql"):
        path = folder / program
        if program in scripts:
            path.write_text("#!/bin/sh\nreal=" + str(server.bin / program) + "\n" + scripts[program])
            path.chmod(0o755)
        else:
            path.symlink_to(server.bin / program)
    return folder


def test_a_dump_of_the_copy_that_fails(database: Database, workbench: Bench, tmp_path: Path) -> None:
    """It says nothing of the backup."""
    database.execute("CREATE TABLE t (a int)")
    backup = workbench(database).back_up()
    script = 'case "$*" in *--schema-only*) echo "pg_dump: error: out of memory" >&2; exit 1;; esac\nexec $real "$@"\n'
    folder = stand_in(tmp_path / "bin", database.server, pg_dump=script)
    bench = workbench(database, MIGRATOR_PG_BIN=str(folder))
    with pytest.raises(BackupFailed, match=r"did not finish: .*out of memory"):
        prove(bench, "restore")
    assert [(proof["how"], proof["ok"]) for proof in manifest(bench)["proofs"]][-1] == ("restore", False)
    assert bench.databases() == {database.name}
    assert prove(workbench(database)).id == backup.id


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_a_pg_restore_that_is_killed(
    database: Database, workbench: Bench, tmp_path: Path, shape: str
) -> None:
    """Out of memory, for one: what ended it was not the backup."""
    database.execute("CREATE TABLE t (a int)")
    backup = workbench(database, MIGRATOR_BACKUP_FORMAT=shape).back_up()
    script = 'case "$*" in *--version*) exec $real "$@";; esac\nkill -9 $$\n'
    folder = stand_in(tmp_path / "bin", database.server, pg_restore=script)
    bench = workbench(database, MIGRATOR_PG_BIN=str(folder))
    with pytest.raises(BackupFailed, match=r"did not finish: .*signal 9"):
        prove(bench)
    assert Path(backup.place).exists()
    assert prove(workbench(database)).id == backup.id


def test_what_another_major_makes_of_a_schema(
    database: Database, workbench: Bench, servers: Callable[[str], Server]
) -> None:
    """Since 17 a partition has its parent's identity; that it had none on 15 is no loss."""
    other = servers("embedded18")
    database.execute(
        "CREATE TABLE p (a int GENERATED ALWAYS AS IDENTITY, b int) PARTITION BY RANGE (b);"
        " CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (1) TO (10); INSERT INTO p (b) VALUES (1), (2)"
    )
    variables = {
        "MIGRATOR_BACKUP_VERIFY": "restore",
        "MIGRATOR_VERIFY_URL": other.url("postgres"),
        "MIGRATOR_PG_BIN": str(other.bin),
    }
    bench = workbench(database, **variables)
    backup = bench.back_up()
    assert backup.verified == "restore"
    assert "majors differ" in backup.proofs[-1].why
    assert prove(bench, "restore").proofs[-1].ok


_SPELLED = (
    "CREATE TABLE s (a text DEFAULT 'a\\b', b text CHECK (b <> 'x\\y'), c bytea DEFAULT '\\x6162');"
    " COMMENT ON TABLE s IS 'c:\\d';"
    " CREATE TABLE p (at timestamptz) PARTITION BY RANGE (at);"
    " CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2026-01-01 00:00+01') TO ('2026-02-01 00:00+01');"
    " CREATE VIEW v AS SELECT a FROM s; CREATE FUNCTION f(int) RETURNS int LANGUAGE sql RETURN $1 + 1"
)


@pytest.mark.parametrize(
    "setting",
    [
        "standard_conforming_strings = off",
        "quote_all_identifiers = on",
        "bytea_output = escape",
        "TimeZone = 'Asia/Kolkata'",
        "DateStyle = 'German'",
        "IntervalStyle = 'iso_8601'",
    ],
)
def test_a_database_that_writes_values_otherwise(
    each_database: Database, workbench: Bench, setting: str
) -> None:
    """A setting of the original is none of the copy: what they print is compared as the original prints it."""
    each_database.execute(_SPELLED)
    each_database.server.psql(f"ALTER DATABASE {each_database.name} SET {setting}")
    bench = workbench(each_database, MIGRATOR_BACKUP_VERIFY="restore")
    assert bench.back_up().verified == "restore"
    assert prove(bench, "restore").proofs[-1].ok


def test_a_database_with_a_percent_sign_in_its_name(server: Server, workbench: Bench) -> None:
    """Its copy bears a comment with the name, which is no place for a parameter."""
    name = f"100%s {uuid.uuid4().hex[:8]} %"
    try:
        bench = workbench(server.create_database(name), MIGRATOR_BACKUP_VERIFY="restore")
        assert bench.back_up().verified == "restore"
        assert prove(bench, "restore").proofs[-1].ok
        assert bench.databases() == {name}
    finally:
        server.drop_database(name)


def test_a_database_that_talks_in_another_encoding(database: Database, workbench: Bench) -> None:
    """What a client is told to speak by ALTER DATABASE cannot say every name."""
    database.execute("""CREATE TABLE "preis_€" AS SELECT '€'::text AS "für" """)
    database.server.psql(f"ALTER DATABASE {database.name} SET client_encoding = 'LATIN1'")
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore")
    backup = bench.back_up()
    assert 'public."preis_€"' in backup.tables
    assert prove(bench, "restore").proofs[-1].ok
    bench.restore(to=f"{database.name}_look")
    connection = database.server.connect(f"{database.name}_look", client_encoding="UTF8")
    with connection.cursor() as cursor:
        cursor.execute('SELECT "für" FROM "preis_€"')
        assert cursor.fetchall() == [("€",)]
    connection.close()


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_a_database_without_an_encoding(server: Server, workbench: Bench, shape: str) -> None:
    """SQL_ASCII takes any bytes, in names as well; those that are not UTF-8 are refused in plain words."""
    name = f"ascii_{uuid.uuid4().hex[:8]}"
    server.psql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'")
    database = Database(server, name)
    try:
        connection = database.connect(client_encoding="UTF8")
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("""CREATE TABLE "preis_€" AS SELECT E'\\\\xe9' || '€' AS a""")
        bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_FORMAT=shape)
        backup = bench.back_up()
        assert 'public."preis_€"' in backup.tables
        bench.restore(to=f"{name}_look")
        cursor.execute("""DO $$ BEGIN EXECUTE E'CREATE TABLE "caf\\xe9" ()'; END $$""")
        connection.close()
        with pytest.raises(BackupFailed, match="invalid byte sequence"):
            bench.back_up()
    finally:
        server.drop_database(name)


ONLY_THE_RESTORE = 'case "$*" in *dbname*) {};; esac\nexec $real "$@"\n'


def unfinished(
    case: str, database: Database, workbench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Workbench, str]:
    """Return a bench whose proof by restore comes to no end, and what it says then."""
    scripts: dict[str, str] = {}
    said = "did not finish: .*signal 9"
    if case == "a program is killed":
        scripts = {"pg_dump": 'case "$*" in *--schema-only*) kill -9 $$;; esac\nexec $real "$@"\n'}
    if case == "the restore is cancelled":
        error = "pg_restore: error: canceling statement due to lock timeout"
        scripts = {"pg_restore": ONLY_THE_RESTORE.format(f'echo "{error}" >&2; exit 1')}
        said = "could not be restored here: .*lock timeout"
    if case == "reading is killed":
        scripts = {
            "pg_restore": 'case "$*" in *--section=data*--file=-*) kill -9 $$;; esac\nexec $real "$@"\n'
        }
    if case in ("no room", "the server is gone"):
        statement = "DO $$ BEGIN RAISE disk_full USING MESSAGE = 'no room left'; END $$"
        said = "did not finish: .*no room left"
        if case == "the server is gone":
            statement, said = "SELECT pg_terminate_backend(pg_backend_pid())", "did not finish: .*terminat"

        def create(session: Session, *_: object) -> None:
            session.query(statement)

        monkeypatch.setattr(databases, "create", create)
    folder = stand_in(tmp_path / "bin", database.server, **scripts)
    return workbench(database, MIGRATOR_PG_BIN=str(folder), MIGRATOR_BACKUP_VERIFY="restore"), said


@pytest.mark.parametrize(
    "case",
    ["a program is killed", "the restore is cancelled", "reading is killed", "no room", "the server is gone"],
)
def test_in_a_run_too(
    case: str, database: Database, workbench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept, as something that nothing takes for a backup, until somebody proves it."""
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    older = workbench(database).back_up()
    with monkeypatch.context() as patched:
        bench, said = unfinished(case, database, workbench, tmp_path, patched)
        for _ in range(2):  # a run that is tried again and again keeps one
            with pytest.raises(
                BackupFailed, match=said + ".*not used as a backup until it is verified"
            ) as caught:
                bench.back_up()
    assert caught.value.code == 36
    assert not [name for name in bench.files() if ".bad" in name]
    store = open_store(bench.settings.backup_url, bench.settings)
    kept, good = store.backups(database.name)
    assert (kept.verified, good) == ("", older)
    assert [proof.ok for proof in kept.proofs][-1] is False
    assert f"migrator verify-backup {kept.id}" in caught.value.next_step
    assert "NOT VERIFIED" in formatters.of_backups([summary(kept)]).text
    assert "not verified:" in formatters.of_backup(kept).text
    assert store.get("latest", database.name) == older
    for how in ("read", "restore"):
        again = workbench(database, MIGRATOR_BACKUP_MAX_AGE="1h", MIGRATOR_BACKUP_VERIFY=how)
        with connect(again.target, APPLICATION, 60) as session:
            assert reuse.find(session, again.settings, ("r1",), None) == (older if how == "read" else None)
    assert prove(workbench(database), "restore", kept.id).verified == "restore"
    assert store.get("latest", database.name).id == kept.id
