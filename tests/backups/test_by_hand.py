"""The command that a failed restore prints, run as it is printed, by the role that could not restore."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from migrator.backups import archive
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
    backup = dataclasses.replace(BACKUP, place="s3://b/a.dump.age", encrypted_to=("age1x",))
    command = archive.by_hand(backup, "d", "--no-owner")
    assert command.startswith(
        "aws s3 cp s3://b/a.dump.age - | age -d -i KEY_FILE > COPY.dump && pg_restore --list COPY.dump | grep -vE "
    )
    assert " | pg_restore --no-owner --file=- --use-list=/dev/stdin COPY.dump | sed " in command
