"""The client is the server's own major, else the nearest newer one; an older one is refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator import __version__
from migrator.backups import clients
from migrator.backups.clients import Client, Login
from migrator.config.database_url import parse
from migrator.config.settings import Settings
from migrator.errors import BackupFailed, RestoreFailed
from migrator.runtime import subprocesses
from tests.support import PLANTED, installations
from tests.support.servers import Server

from .conftest import Workbench


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pg_dump (PostgreSQL) 17.2", ("17.2", 17)),
        ("pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", ("15.18", 15)),
        ("pg_dump (PostgreSQL) 18beta1", ("18beta1", 18)),
        ("pg_restore (PostgreSQL) 19devel", ("19devel", 19)),
        ("pg_dump (PostgreSQL) 9.6.24", ("9.6.24", 9)),
        ("pg_dump: command not found", None),
        ("", None),
    ],
)
def test_versions(text: str, expected: tuple[str, int] | None) -> None:
    assert clients.parse_version(text) == expected


def client(major: int) -> Client:
    return Client(Path(f"/opt/{major}"), f"{major}.1", major)


@pytest.mark.parametrize(
    ("installed", "server", "chosen"),
    [
        ((15, 16, 17), 16, 16),
        ((15, 17, 18), 16, 17),
        ((18, 17, 16), 14, 16),
        ((15,), 16, None),
        ((), 16, None),
    ],
)
def test_choice(installed: tuple[int, ...], server: int, chosen: int | None) -> None:
    found = clients.choose([client(major) for major in installed], server)
    assert (found.major if found else None) == chosen


def test_an_archive_of_a_newer_client_needs_one_as_new() -> None:
    found = clients.choose([client(15), client(16), client(17)], 15, 16)
    assert found is not None
    assert found.major == 16


def fake(folder: Path, version: str) -> Path:
    folder.mkdir()
    for name in ("pg_dump", "pg_restore"):
        (folder / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        (folder / name).chmod(0o755)
    return folder


def test_an_older_client_is_refused_by_name_and_with_the_fix(tmp_path: Path) -> None:
    settings = Settings(pg_bin=str(fake(tmp_path / "old", "13.14 (Debian 13.14-0+deb11u1)")))
    with pytest.raises(BackupFailed) as caught:
        clients.for_dump(settings, "16.2", 16)
    assert caught.value.code == 36
    assert "PostgreSQL 16.2" in str(caught.value)
    assert "13.14" in str(caught.value)
    image = f"migrator:{__version__}-pg16"
    for remedy in (image, "postgresql-client-16", "MIGRATOR_PG_BIN", "MIGRATOR_BACKUP=off"):
        assert remedy in caught.value.next_step


def test_no_client_at_all(tmp_path: Path) -> None:
    with pytest.raises(BackupFailed, match="no pg_dump") as caught:
        clients.for_dump(Settings(pg_bin=str(tmp_path)), "16.2", 16)
    assert "postgresql-client-16" in caught.value.next_step
    with pytest.raises(RestoreFailed, match="written by pg_dump 16"):
        clients.for_restore(Settings(pg_bin=str(fake(tmp_path / "old", "13.1"))), 16, 16)


def test_two_programs_of_different_versions_are_no_client(tmp_path: Path) -> None:
    folder = fake(tmp_path / "mixed", "16.1")
    (folder / "pg_restore").write_text("#!/bin/sh\necho 'pg_restore (PostgreSQL) 15.1'\n")
    assert clients.installed(Settings(pg_bin=str(folder))) == []


def test_clients_on_path_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake(tmp_path / 'a', '41.1')}:{fake(tmp_path / 'b', '40.1')}:/usr/bin:/bin")
    chosen = clients.choose(clients.installed(Settings()), 40)
    assert chosen is not None
    assert chosen.folder == tmp_path / "b"


def test_a_real_server_that_is_newer_than_the_client(
    private_server: Callable[..., Server], workbench: Callable[..., Workbench]
) -> None:
    server = private_server("embedded18")
    debian = installations.binaries("debian")
    bench = workbench(server.create_database(), MIGRATOR_PG_BIN=str(debian))
    with pytest.raises(BackupFailed, match=r"18\.\d+, and pg_dump is 1[3-7]\.\d+"):
        bench.back_up()
    assert bench.files() == []


def test_the_environment_is_the_connection_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("MIGRATOR_DATABASE_URL", "s")
    monkeypatch.setenv("PGPASSWORD_FILE", "s")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGSSLCERTMODE", "disable")
    target = parse("host=h port=1 user=u dbname=d password='p%@:/ '")
    found = Login(target, "us", 5).environment()
    given = {name: value for name, value in found.items() if name.startswith("PG")}
    assert given == {
        "PGHOST": "h",
        "PGPORT": "1",
        "PGUSER": "u",
        "PGDATABASE": "d",
        "PGPASSWORD": "p%@:/ ",
        "PGAPPNAME": "us",
        "PGCONNECT_TIMEOUT": "5",
        "PGSSLCERTMODE": "disable",
    }
    assert found.keys() - given.keys() <= {"PATH", "LANG", "LC_ALL", *subprocesses._INHERITED}
    assert found["LC_ALL"] == "C.UTF-8"


def test_no_password_in_the_arguments_and_any_name_fits() -> None:
    target = parse(f"host=h dbname=d password='{PLANTED}' keepalives_idle=60 tcp_user_timeout=9")
    argument = Login(target, "us", 5).to("it's=a \\ name").argument
    assert PLANTED not in argument
    assert "keepalives_idle='60'" in argument
    assert "tcp_user_timeout='9'" in argument
    assert argument.endswith(r"dbname='it\'s=a \\ name'")
