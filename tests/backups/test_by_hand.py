"""The command that a failed restore prints, run as it is printed, by the role that could not restore."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.backups import pg_restore
from migrator.errors import RestoreFailed
from tests.support.servers import Database, Server

from .conftest import LARGE, Workbench
from .test_manifest import BACKUP

Bench = Callable[..., Workbench]
AUDIT = """
CREATE FUNCTION audit() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
PERFORM 'a
CREATE EVENT TRIGGER in_a_text';
END $$;
CREATE EVENT TRIGGER audit ON ddl_command_start EXECUTE FUNCTION audit();
COMMENT ON EVENT TRIGGER audit IS 'of a superuser;
and nobody else';
ALTER EVENT TRIGGER audit DISABLE;
"""


@pytest.fixture
def maker(each_server: Server) -> Iterator[Database]:
    """A database of a role that may create others, and is no superuser; it connects as that."""
    each_server.create_role("maker_role")
    each_server.psql("ALTER ROLE maker_role CREATEDB")
    database = each_server.create_database()
    each_server.psql(f"ALTER DATABASE {database.name} OWNER TO maker_role")
    if each_server.major < 15:
        database.execute("GRANT ALL ON SCHEMA public TO maker_role")
    database.url = database.url.replace("//postgres:", "//maker_role:")
    yield database
    for (name,) in each_server.psql("SELECT datname FROM pg_database WHERE datdba = 'maker_role'::regrole"):
        each_server.drop_database(name)
    each_server.psql("DROP ROLE maker_role")


@pytest.mark.parametrize("function", ["postgres", "maker_role"])
def test_without_what_only_a_superuser_may_make(function: str, maker: Database, workbench: Bench) -> None:
    maker.execute(f"SET ROLE maker_role; {LARGE}")
    maker.execute(f"{AUDIT} ALTER FUNCTION audit() OWNER TO {function}")
    bench = workbench(maker)
    bench.back_up()
    with pytest.raises(RestoreFailed) as caught:
        bench.restore()
    command = caught.value.next_step.partition("into an empty database: ")[2]
    name = f"{maker.name}_by_hand"
    maker.server.psql(f"CREATE DATABASE {name} OWNER maker_role")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("NEW_DATABASE", name)],
        env={
            **maker.environment(),
            "PGUSER": "maker_role",
            "PATH": f"{maker.server.bin}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "transaction" not in done.stderr
    copy = Database(maker.server, name)
    assert copy.psql("SELECT count(*) FROM lines") == maker.psql("SELECT count(*) FROM lines")
    sources = "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1"
    assert copy.psql(sources) == maker.psql(sources)
    assert copy.psql("SELECT count(*) FROM pg_event_trigger") == [(0,)]


def test_a_copy_is_made_of_what_cannot_be_read_twice() -> None:
    backup = dataclasses.replace(
        BACKUP, client_version="16.2", place="s3://b/a.dump.age", encrypted_to=("age1x",)
    )
    command = pg_restore.by_hand(backup, "d", "--no-owner")
    assert command.startswith(
        "aws s3 cp s3://b/a.dump.age - | age -d -i KEY_FILE > COPY.dump"
        " && pg_restore --list COPY.dump | grep -vE "
    )
    restoring = "pg_restore --no-owner --use-list=/dev/stdin --exit-on-error --single-transaction --dbname=d COPY.dump"
    assert command.endswith(f" | {restoring}")


BOTH: list[tuple[dict[str, Any], int]] = [({}, 1), ({"oddities": ("pg_attver",)}, 3)]
"""pg_restore alone, and the longer command that takes out what other servers do not know."""
DAMAGED: list[Callable[[Path], object]] = [
    lambda place: os.truncate(place, place.stat().st_size * 6 // 10),  # in the middle of rows
    lambda place: os.truncate(place, place.stat().st_size - 10),  # where only a little is missing
    lambda place: os.truncate(place, 200),
    Path.unlink,
]


@pytest.mark.parametrize("options", [(), ("--no-owner", "--no-privileges")])
@pytest.mark.parametrize("damage", DAMAGED, ids=["middle", "end", "head", "gone"])
def test_a_damaged_dump_changes_nothing(
    damage: Callable[[Path], object], options: tuple[str, ...], database: Database, workbench: Bench
) -> None:
    """Whatever has come until pg_restore found out, and by any shell."""
    database.execute(
        "CREATE TABLE t (a text); INSERT INTO t SELECT md5(g::text) FROM generate_series(1, 20000) g;"
        " CREATE TABLE u AS SELECT a FROM t ORDER BY a"
    )
    bench = workbench(database, MIGRATOR_BACKUP_FORMAT="custom", MIGRATOR_BACKUP_COMPRESSION="gzip:1")
    backup = bench.back_up()
    database.execute("DELETE FROM t WHERE a < '8'")
    before = database.dump()
    damage(Path(backup.place))
    if options:  # into an empty database
        database.execute("DROP TABLE t, u")
        before = database.dump()
    for found, code in BOTH:
        done = run_by_hand(
            pg_restore.by_hand(dataclasses.replace(backup, **found), database.name, *options), database
        )
        assert done.returncode == code, done
        # two pg_restores write to one standard error: the words of one may stand between those of the other
        assert "pg_restore:" in done.stderr
        assert " error: " in done.stderr
        assert database.dump() == before


def test_a_damaged_folder_changes_nothing(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t AS SELECT 1 AS a; CREATE TABLE u AS SELECT 1 AS a")
    backup = workbench(database, MIGRATOR_BACKUP_FORMAT="directory").back_up()
    max(Path(backup.place).glob("[0-9]*")).unlink()
    database.execute("DELETE FROM t")
    before = database.dump()
    for found, code in BOTH:
        done = run_by_hand(pg_restore.by_hand(dataclasses.replace(backup, **found), database.name), database)
        assert (done.returncode, database.dump()) == (code, before), done


def run_by_hand(command: str, database: Database) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", command],
        env={**database.environment(), "PATH": f"{database.server.bin}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
