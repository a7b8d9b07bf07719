"""No backup, no apply: code 36 whatever the reason, and the reason and the way out in the message."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.installations import as_root
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]


@pytest.fixture
def at_first(database: Database, project: Project, run_migrator: Runner) -> Path:
    """A project of two revisions whose database is at the first, with something to lose."""
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    database.execute(
        "INSERT INTO t1 SELECT n, md5(n::text) || md5((n + 1)::text) FROM generate_series(1, 20000) n"
    )
    return folder


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system of its own on a new folder."""
    folder.mkdir()
    as_root("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        as_root("umount", str(folder))


def test_a_folder_that_is_full(
    database: Database, at_first: Path, run_migrator: Runner, tmp_path: Path
) -> None:
    with mounted(tmp_path / "full", f"size=64k,mode=0777,uid={os.geteuid()}") as folder:
        with unchanged(database):
            result = run_migrator(
                cwd=at_first, database=database, env={"MIGRATOR_BACKUP_URL": folder.as_uri()}
            )
        assert list(folder.iterdir()) == []
    refusal(
        result,
        ExitCode.BACKUP_FAILED,
        str(folder),
        "bytes",
        "free",
        "free space there",
        "MIGRATOR_BACKUP_URL",
    )


def test_a_folder_that_is_mounted_read_only(
    database: Database, at_first: Path, run_migrator: Runner, tmp_path: Path
) -> None:
    with mounted(tmp_path / "read-only", "size=1m,ro") as folder, unchanged(database):
        env = {"MIGRATOR_BACKUP_URL": folder.as_uri()}
        result = run_migrator(cwd=at_first, database=database, env=env)
    refusal(result, ExitCode.BACKUP_FAILED, str(folder), "Read-only file system", "MIGRATOR_BACKUP=off")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(
    database: Database, at_first: Path, run_migrator: Runner, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with unchanged(database):
        env = {"MIGRATOR_BACKUP_URL": (tmp_path / place).as_uri()}
        result = run_migrator(cwd=at_first, database=database, env=env)
    refusal(result, ExitCode.BACKUP_FAILED, str(tmp_path / place), "MIGRATOR_BACKUP_URL")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_clients(
    database: Database, at_first: Path, run_migrator: Runner, tmp_path: Path
) -> None:
    with unchanged(database):
        env = {"MIGRATOR_PG_BIN": str(tmp_path)}
        result = run_migrator(cwd=at_first, database=database, env=env)
    refusal(result, ExitCode.BACKUP_FAILED, str(tmp_path), "pg_dump", "MIGRATOR_PG_BIN")


def test_a_client_that_is_older_than_the_server(
    private_server: Callable[..., Server],
    servers: Callable[[str], Server],
    project: Project,
    run_migrator: Runner,
) -> None:
    old, new = servers("embedded"), private_server("embedded18")
    assert old.major < new.major
    database = new.create_database()
    folder = project(revisions=linear_history(2))
    bring_to(database, 1)
    with unchanged(database):
        env = {"MIGRATOR_PG_BIN": str(old.bin), "MIGRATOR_IMAGE_VERSION": "1.4.2"}
        result = run_migrator(cwd=folder, database=database, env=env)
    refusal(
        result,
        ExitCode.BACKUP_FAILED,
        f"PostgreSQL {new.major}",
        f"pg_dump is {old.major}",
        f"migrator:1.4.2-pg{new.major}",
        f"postgresql-client-{new.major}",
    )
    done(run_migrator(cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"}))


def test_a_pg_dump_that_fails_or_lies(
    database: Database, at_first: Path, run_migrator: Runner, tmp_path: Path
) -> None:
    real = database.server.bin
    for body, words in {
        "echo 'pg_dump: error: boom' >&2; exit 3": ("boom",),
        "exit 0": ("cannot be read back",),
        f'"{real}/pg_dump" "$@" | head -c 3000': ("cannot be read back",),
        "kill -9 $$": ("signal 9",),
    }.items():
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "pg_dump").write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exec "{real}/pg_dump" --version\n{body}\n'
        )
        (programs / "pg_restore").write_text(f'#!/bin/sh\nexec "{real}/pg_restore" "$@"\n')
        for program in programs.iterdir():
            program.chmod(0o755)
        with unchanged(database):
            env = {"MIGRATOR_PG_BIN": str(programs)}
            result = run_migrator(cwd=at_first, database=database, env=env)
        refusal(result, ExitCode.BACKUP_FAILED, *words)
        left = (
            {path.name for path in run_migrator.backups.iterdir()} if run_migrator.backups.exists() else set()
        )
        assert {name for name in left if not name.endswith((".dump.bad", ".bad.json"))} == set()
        assert run_migrator("backups", "--format", "json", cwd=at_first, database=database).answer == []


def test_a_role_that_may_not_read_everything(
    database: Database, at_first: Path, run_migrator: Runner
) -> None:
    role = database.server.create_role(f"half_{database.name}")
    database.execute(f'GRANT ALL ON alembic_version TO "{role}"; GRANT ALL ON SCHEMA public TO "{role}"')
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, user=role)}
    with unchanged(database):
        result = run_migrator(cwd=at_first, database=database, env=env)
    refusal(result, ExitCode.BACKUP_FAILED, role, "public.t1", "pg_read_all_data", "MIGRATOR_BACKUP=off")


def test_without_a_backup_only_by_name(database: Database, at_first: Path, run_migrator: Runner) -> None:
    env = {"MIGRATOR_BACKUP_URL": "file:///proc/nowhere", "MIGRATOR_BACKUP": "off"}
    result = done(run_migrator("--format", "json", cwd=at_first, database=database, env=env))
    assert result.answer["backup"] is None
    assert "MIGRATOR_BACKUP=off" in result.answer["message"]
