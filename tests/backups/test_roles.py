"""Roles and tablespaces are beside a backup, without passwords; where they cannot be read, that is said."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.backups import databases
from migrator.backups.dump import disk_space, globals
from migrator.backups.exported_snapshot import Sizes
from migrator.errors import BackupFailed
from migrator.postgres.session import connect
from tests.support import PLANTED
from tests.support.servers import Database

from .conftest import APPLICATION, Workbench

Bench = Callable[..., Workbench]


@pytest.fixture
def owner(each_database: Database) -> Iterator[str]:
    """A role with a password, which is a member of another, on each server."""
    server, name = each_database.server, f"own er_{secrets.token_hex(3)}"
    server.create_role(name, "LOGIN CREATEDB CONNECTION LIMIT 7")
    server.psql(f'CREATE ROLE "{name}_group"')
    server.psql(f'GRANT "{name}_group" TO "{name}" WITH ADMIN OPTION')
    server.psql(f"ALTER ROLE \"{name}\" SET statement_timeout = '77s'")
    yield name
    server.psql(f'REASSIGN OWNED BY "{name}" TO postgres', dbname=each_database.name)
    server.psql(f'DROP OWNED BY "{name}"', dbname=each_database.name)
    server.psql(f'DROP ROLE "{name}"')
    server.psql(f'DROP ROLE "{name}_group"')


def written(bench: Workbench) -> tuple[str, str]:
    """Back up; return the file beside it, and the manifest's note."""
    backup = bench.back_up()
    path = bench.folder / f"{backup.id}.globals.sql"
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_text(), backup.globals_note


def recreated(sql: str, database: Database, owner: str, *, settings: bool) -> None:
    """Drop the roles, run what is said of them, and look whether they are as they were."""
    server = database.server
    attributes = (
        "SELECT rolcanlogin, rolcreatedb, rolsuper, rolconnlimit, rolconfig FROM pg_roles WHERE rolname = %s"
    )
    before = server.psql(attributes, [owner])
    server.psql(f'DROP ROLE "{owner}"')
    server.psql(f'DROP ROLE "{owner}_group"')
    for statement in sql.splitlines():
        if owner in statement and not statement.startswith("--"):
            # The grantor is who granted it: on this server that is the superuser, who is there.
            server.psql(statement)
    (after,) = server.psql(attributes, [owner])
    assert after[:4] == before[0][:4]
    assert after[4] == (before[0][4] if settings else None)
    member = "SELECT admin_option FROM pg_auth_members WHERE member = %s::regrole"
    assert server.psql(member, [f'"{owner}"']) == [(True,)]


def test_they_come_back_from_the_file(owner: str, each_database: Database, workbench: Bench) -> None:
    sql, note = written(workbench(each_database))
    assert note == ""
    assert "PASSWORD" not in sql
    assert "SCRAM-SHA-256" not in sql
    assert PLANTED not in sql
    recreated(sql, each_database, owner, settings=True)


def test_a_role_without_rights_reads_them_too(owner: str, each_database: Database, workbench: Bench) -> None:
    each_database.execute(f'GRANT ALL ON SCHEMA public TO "{owner}"')
    url = each_database.server.url(each_database.name, user=owner)
    sql, note = written(workbench(each_database, DATABASE_URL=url))
    assert note == ""
    assert f'CREATE ROLE "{owner}"' in sql
    assert "SCRAM-SHA-256" not in sql


@pytest.mark.parametrize("why", ["missing", "refused"])
def test_without_pg_dumpall_they_are_written_from_the_catalog(
    why: str, owner: str, each_database: Database, workbench: Bench, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("pg_dump", "pg_restore"):
        (programs / name).symlink_to(each_database.server.bin / name)
    if why == "refused":
        (programs / "pg_dumpall").write_text(
            "#!/bin/sh\necho 'pg_dumpall: error: permission denied' >&2; exit 1\n"
        )
        (programs / "pg_dumpall").chmod(0o755)
    sql, note = written(workbench(each_database, MIGRATOR_PG_BIN=str(programs)))
    assert "only roles are saved, without settings and tablespaces: " in note
    assert {"missing": "there is no pg_dumpall", "refused": "permission denied"}[why] in note
    assert not re.search(r"^CREATE ROLE \"?pg_", sql, re.MULTILINE)
    recreated(sql, each_database, owner, settings=False)


@pytest.mark.parametrize("name", ["a=b", "postgres://x", "it's", 'quo"ted', "-d"])
def test_any_database_name(name: str, database: Database, workbench: Bench) -> None:
    """pg_dumpall takes a name that looks like a connection string for one."""
    server = database.server
    quoted = '"' + name.replace('"', '""') + '"'
    server.psql(f"CREATE DATABASE {quoted}")
    try:
        sql, note = written(workbench(Database(server, name)))
        assert note == ""
        assert "CREATE ROLE postgres" in sql
    finally:
        server.psql(f"DROP DATABASE {quoted} WITH (FORCE)")


def test_options_that_only_one_kind_of_server_has_are_noted(
    each_database: Database, workbench: Bench
) -> None:
    """What Debian's 15.20 puts into pg_attribute, put there by hand: any pg_dump but its own writes it."""
    each_database.execute("CREATE TABLE t (a int, b int); ALTER TABLE t ALTER a SET (n_distinct = 5)")
    assert workbench(each_database).back_up().oddities == ()
    each_database.execute(
        "UPDATE pg_attribute SET attoptions = '{pg_attver=3}' WHERE attrelid = 't'::regclass AND attname = 'b'"
    )
    assert workbench(each_database).back_up().oddities == ("pg_attver",)


def test_room_for_a_second_copy(
    database: Database, workbench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench(database)
    with connect(bench.target, APPLICATION, 60) as session:
        disk_space.check_scratch(session, Sizes(10**6, 10**6, {}))
        assert caplog.text == ""
        with pytest.raises(BackupFailed, match=r"needs about 1000000\.0 TB on the server") as caught:
            disk_space.check_scratch(session, Sizes(10**18, 10**18, {}))
        assert str(database.server.data) in str(caught.value)
        monkeypatch.setattr(disk_space, "_data_folder", lambda _: None)
        disk_space.check_scratch(session, Sizes(10**18, 10**18, {}))
    assert "migrator cannot see how much is free there" in caplog.text
    assert globals.ENDING == ".globals.sql"


def test_a_role_drops_its_scratch_database_though_a_superuser_is_in_it(
    each_database: Database, workbench: Bench, owner: str
) -> None:
    """DROP DATABASE WITH (FORCE) refuses where an autovacuum worker, or a monitor, is in it; both leave soon."""
    server = each_database.server
    scratch = f"{each_database.name}_scratch"
    server.psql(f'CREATE DATABASE {scratch} OWNER "{owner}"')
    inside = server.connect(scratch)  # the superuser's

    def leave() -> None:
        waiting = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'DROP DATABASE %%' AND pid = %s"
        end = time.monotonic() + 30
        while not server.psql(waiting, [session.pid]) and time.monotonic() < end:
            time.sleep(0.05)
        inside.close()

    target = workbench(each_database, DATABASE_URL=server.url("postgres", user=owner)).target
    with connect(target, APPLICATION, 60) as session:
        leaver = threading.Thread(target=leave, daemon=True)
        leaver.start()
        databases.drop(session, scratch)
        leaver.join()
    assert server.psql("SELECT count(*) FROM pg_database WHERE datname = %s", [scratch]) == [(0,)]
