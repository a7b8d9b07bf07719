"""A backup is whole, proven, and says what is in it; or there is none, and a message that says why."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.backups import clients, pg_restore
from migrator.backups.dump.backup import _children_name
from migrator.backups.exported_snapshot import savepoint
from migrator.backups.verification.verify_new import Proving
from migrator.config.database_url import parse
from migrator.pipeline.stages.backup import decide
from migrator.postgres.errors import Refused
from migrator.postgres.session import Session, connect
from migrator.runtime import subprocesses
from tests.support import PLANTED, leaks
from tests.support.servers import Database, Server, normalise

from .conftest import RICH, Workbench

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


def test_a_savepoint_undoes_its_block_though_one_within_it_was_undone(database: Database) -> None:
    with connect(parse(database.url), "test", 10) as session:
        session.query("CREATE TEMP TABLE kept (n int); BEGIN")
        with contextlib.suppress(Refused), savepoint(session):
            session.query("INSERT INTO kept VALUES (1)")
            with contextlib.suppress(Refused), savepoint(session):
                session.query("SELECT 1 / 0")
            session.query("INSERT INTO kept SELECT 1 / 0")
        with savepoint(session):
            session.query("INSERT INTO kept VALUES (2)")
        session.query("COMMIT")
        assert session.query("SELECT n FROM kept") == [(2,)]


def test_a_backup_of_everything(
    each_database: Database, workbench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    each_database.execute(RICH)
    caplog.set_level(logging.INFO, "migrator")
    bench = workbench(each_database)
    backup = bench.back_up(name="before", revisions=("a1", "b2"))
    assert bench.files() == [f"{backup.id}.dump", f"{backup.id}.globals.sql", f"{backup.id}.json"]
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
        subprocesses.run(
            [database.server.bin / "pg_restore", "--data-only", "--file=-", backup.place],
            environment=subprocesses.base_environment(),
            on_output=chunks.append,
        )
        rows = b"".join(chunks).decode().partition("FROM stdin;\n")[2].partition("\n\\.")[0].splitlines()
        assert len(rows) == backup.tables["public.t"].rows
    assert backups[0].tables["public.t"].rows != backups[-1].tables["public.t"].rows


def test_more_tables_take_no_more_questions(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = Session.query

    def query(session: Session, sql: str, *arguments: Any, **options: Any) -> Any:
        asked.append(sql)
        return real(session, sql, *arguments, **options)

    def questions() -> int:
        asked.clear()
        workbench(database).back_up()
        return len(
            [sql for sql in asked if "pg_stat_" not in sql]
        )  # how often those come is for the clock to say

    database.execute("CREATE TABLE t (a int); CREATE SEQUENCE s")
    monkeypatch.setattr(Session, "query", query)
    few = questions()
    database.execute(
        "DO $$ BEGIN FOR k IN 1..40 LOOP EXECUTE format('CREATE TABLE t%s (a int PRIMARY KEY)', k); END LOOP; END $$"
    )
    assert questions() == few


def test_only_pg_dump_locks_the_tables(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The locks of a server have room for so many, and as many again would be too many."""
    database.execute("CREATE TABLE t (a int PRIMARY KEY); INSERT INTO t VALUES (1)")
    held: list[Any] = []
    real = Proving.meanwhile

    def meanwhile(proving: Proving, session: Session) -> None:
        real(proving, session)
        held.extend(
            session.query(
                "SELECT relation::regclass::text, mode FROM pg_locks"
                " WHERE pid = pg_backend_pid() AND relation IN ('public.t'::regclass, 'public.t_pkey'::regclass)"
            )
        )

    monkeypatch.setattr(Proving, "meanwhile", meanwhile)
    assert workbench(database).back_up().tables["public.t"].rows == 1
    assert held == []


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
    assert pg_restore.read_whole(client, place).status != 0


def test_a_statement_timeout_of_the_role_does_not_end_it(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT g, repeat(md5(g::text), 40) FROM generate_series(1, 20000) g")
    database.execute(  # at once: what comes after it has 20 ms
        f"ALTER DATABASE {database.name} SET statement_timeout = '20ms';"
        f" ALTER DATABASE {database.name} SET idle_in_transaction_session_timeout = '20ms';"
        f" ALTER DATABASE {database.name} SET default_transaction_isolation = 'serializable'"
    )
    assert workbench(database).back_up().tables["public.t"].rows == 20000


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
    subprocesses.run(
        [each_database.server.bin / "pg_restore", "--file=-", backup.place],
        environment=subprocesses.base_environment(),
        on_output=chunks.append,
    )
    assert normalise(b"".join(chunks).decode()) == each_database.dump()
