"""Behind PgBouncer: refused in transaction mode, by the direct address or in session mode all is well."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

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
Pooler = Callable[..., str]

PROGRAM = Path("/usr/sbin/pgbouncer")

INI = """\
[databases]
{mapped} = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {users}
pool_mode = {mode}
ignore_startup_parameters = extra_float_digits
{more}
"""


@pytest.fixture
def pooler(server: Server, database: Database, tmp_path: Path) -> Iterator[Pooler]:
    """Return a function that starts Debian's PgBouncer in a mode, and gives the database's address through it."""
    if not PROGRAM.exists():
        apt_install("pgbouncer")
    folder = server.folder / f"pooler-{tmp_path.name}"
    folder.mkdir()
    running: list[subprocess.Popen[bytes]] = []

    def start(mode: str, more: str = "", *, mapped: str = "*") -> str:
        listen = free_port()
        users = folder / "users"
        secret = server.password.replace('"', '""')
        users.write_text(f'"{server.user}" "{secret}"\n')
        ini = folder / "pgbouncer.ini"
        given = {"host": server.host, "port": server.port, "listen": listen, "users": users}
        ini.write_text(INI.format(mode=mode, more=more, mapped=mapped, **given))
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
    assert run_migrator("verify", cwd=folder, env=address).code in {0, ExitCode.BAD_SETTINGS}
    # Our search_path is left in no connection of the server's: the next client has its own.
    for _ in range(3):
        with psycopg2.connect(address["MIGRATOR_DATABASE_URL"]) as other, other.cursor() as cursor:
            cursor.execute("SHOW search_path")
            assert cursor.fetchone() == ('"$user", public',)


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


@pytest.mark.parametrize(
    ("mode", "size"), [("statement", 20), ("statement", 1), ("session", 1), ("transaction", 1)]
)
def test_a_pooler_that_gives_no_second_session_is_refused(
    mode: str, size: int, database: Database, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    env = {
        "MIGRATOR_DATABASE_URL": pooler(mode, f"default_pool_size = {size}"),
        "MIGRATOR_CONNECT_TIMEOUT": "2s",
    }
    with unchanged(database):
        result = run_migrator(cwd=folder, env=env)
    refusal(result, ExitCode.BAD_SETTINGS, "connection pooler", "MIGRATOR_DIRECT_URL")


def test_a_wrong_password_is_not_waited_for(
    server: Server, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    url = (
        pooler("session")
        .replace(f":{server.password}@", ":wrong@")
        .replace(quote(server.password, safe=""), "wrong")
    )
    result = run_migrator(cwd=project(revisions=linear_history(1)), env={"MIGRATOR_DATABASE_URL": url})
    refusal(result, ExitCode.ACCESS_DENIED, "authentication failed", "check user and password")


@pytest.mark.parametrize("how", ["read", "restore"])
def test_a_pooler_that_knows_the_target_alone(
    how: str, database: Database, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    env = {"MIGRATOR_DATABASE_URL": pooler("session", mapped=database.name), "MIGRATOR_BACKUP_VERIFY": how}
    result = run_migrator(cwd=folder, env=env)
    if how == "read":
        done(result)
    else:
        refusal(result, ExitCode.BACKUP_FAILED, "MIGRATOR_DIRECT_URL")


def test_a_pool_too_small_for_a_backup(
    database: Database, pooler: Pooler, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    address = pooler("session", "default_pool_size = 2\nquery_wait_timeout = 3")
    with unchanged(database):
        result = run_migrator(cwd=folder, env={"MIGRATOR_DATABASE_URL": address})
    refusal(result, ExitCode.BACKUP_FAILED, "takes 3 connections at once", "MIGRATOR_DIRECT_URL")
    assert "A backup takes 3, and one more" in result.stderr
