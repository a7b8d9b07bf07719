"""Behind PgBouncer: refused in transaction mode, by the direct address or in session mode all is well."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from migrator.outcome import ExitCode
from tests.support.installations import apt_install
from tests.support.outcomes import done, refusal, unchanged
from tests.support.ports import free_port
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]
Pooler = Callable[[str], str]

PROGRAM = Path("/usr/sbin/pgbouncer")

INI = """\
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = {mode}
ignore_startup_parameters = extra_float_digits
"""


@pytest.fixture
def pooler(server: Server, database: Database, tmp_path: Path) -> Iterator[Pooler]:
    """Return a function that starts Debian's PgBouncer in a mode, and gives the database's address through it."""
    if not PROGRAM.exists():
        apt_install("pgbouncer")
    folder = server.folder / f"pooler-{tmp_path.name}"
    folder.mkdir()
    running: list[subprocess.Popen[bytes]] = []

    def start(mode: str) -> str:
        listen = free_port()
        users = folder / "users"
        secret = server.password.replace('"', '""')
        users.write_text(f'"{server.user}" "{secret}"\n')
        ini = folder / "pgbouncer.ini"
        ini.write_text(INI.format(host=server.host, port=server.port, listen=listen, users=users, mode=mode))
        options = {}
        if server.account is not None:
            for path in (folder, users, ini):
                shutil.chown(path, server.account.pw_uid, server.account.pw_gid)
            options = {"user": server.account.pw_uid, "group": server.account.pw_gid, "extra_groups": []}
        log = (folder / "log").open("wb")
        running.append(subprocess.Popen([str(PROGRAM), str(ini)], stdout=log, stderr=log, **options))  # type: ignore[call-overload]
        log.close()
        url = database.url.replace(f":{server.port}/", f":{listen}/")
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg2.connect(url).close()
                return url
            except psycopg2.OperationalError:
                if time.monotonic() > deadline:
                    raise AssertionError((folder / "log").read_text()) from None
                time.sleep(0.1)

    yield start
    for child in running:
        child.terminate()
        child.wait(60)


def test_transaction_pooling_is_refused(
    database: Database, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    address = {"MIGRATOR_DATABASE_URL": pooler("transaction")}
    with unchanged(database):
        result = run_migrator(cwd=folder, env=address)
    refusal(result, ExitCode.BAD_SETTINGS, "connection pooler in transaction mode", "MIGRATOR_DIRECT_URL")
    direct = {**address, "MIGRATOR_DIRECT_URL": database.url}
    done(run_migrator(cwd=folder, database=database, env=direct))
    # With nothing to do no lock is needed, and the pooler is no hindrance.
    again = done(run_migrator(cwd=folder, env=address))
    assert "Nothing to do" in again.stdout


def test_env_py_that_reads_the_pooled_address_gets_the_direct_one(
    database: Database, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2), env="own_variable")
    env = {"DATABASE_URL": pooler("transaction"), "MIGRATOR_DIRECT_URL": database.url}
    done(run_migrator(cwd=folder, env=env))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


def test_session_pooling_works(
    database: Database, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    env = {"MIGRATOR_DATABASE_URL": pooler("session")}
    result = done(run_migrator("--format", "json", cwd=folder, env=env))
    assert result.answer["backup"]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
