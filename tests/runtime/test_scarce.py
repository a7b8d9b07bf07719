"""A machine that lacks files, memory or programs: the code and the sentence name it, and it is no defect."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.pipeline.unexpected import translate
from migrator.postgres.errors import QueryFailed
from migrator.runtime import resource_errors
from tests.support.projects import linear_history
from tests.support.runner import PATIENCE, Runner
from tests.support.servers import Database


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files in system"), "fs.file-max"),
        (MemoryError(), "memory"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (ImportError("libpq.so: cannot open shared object file: Too many open files"), "ulimit -n"),
        (ImportError("libpq.so: failed to map segment from shared object"), "memory"),
    ],
)
def test_what_is_lacking_is_named(error: Exception, word: str) -> None:
    assert word in resource_errors.lack(error)
    meaning = translate(error)
    assert int(meaning.code) == 20
    assert word in meaning.message
    wrapped = ValueError("a library's own words")
    wrapped.__cause__ = error
    assert resource_errors.lack(wrapped)


def test_what_was_only_being_handled_is_not_the_cause() -> None:
    error = ValueError("another thing")
    error.__context__ = OSError(errno.EROFS, "Read-only file system")
    assert resource_errors.lack(error) == ""
    assert int(translate(error).code) == 70


def test_a_server_that_lacks_something_is_no_defect_of_ours() -> None:
    meaning = translate(QueryFailed("could not extend file: No space left on device", "53100"))
    assert int(meaning.code) == 20
    assert "53100" in meaning.message


def limited(runner: Runner, database: Database, folder: Path, limit: str, **extra: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-c", f'{limit}; exec "$@"', "bash", *runner.command, "upgrade", "--baseline", "base"],
        cwd=folder,
        env=runner.environment(database, {"MIGRATOR_WAIT_TIMEOUT": "2s", **extra}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_too_few_open_files_are_not_a_missing_program(
    database: Database, project: Callable[..., Path], run_migrator: Runner
) -> None:
    database.execute("CREATE TABLE kept (a int)")
    folder = project(revisions=linear_history(1))
    code, said = limited(run_migrator, database, folder, "ulimit -n 12")
    assert code == 36, said
    assert "pg_dump cannot be started: the limit of open files of this process is reached (ulimit -n)" in said
    assert "There is no pg_dump" not in said
    code, said = limited(run_migrator, database, folder, "ulimit -n 5")
    assert code == 20, said
    assert "report it" not in said
    assert database.psql("SELECT to_regclass('t1')::text") == [(None,)]


def test_a_program_for_another_machine_is_said(
    database: Database, project: Callable[..., Path], run_migrator: Runner, tmp_path: Path
) -> None:
    database.execute("CREATE TABLE kept (a int)")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("pg_dump", "\x7fELF of another kind"), ("pg_restore", "#!/no/such/interpreter\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    folder = project(revisions=linear_history(1))
    code, said = limited(run_migrator, database, folder, "true", MIGRATOR_PG_BIN=str(programs))
    assert code == 36, said
    assert "pg_dump cannot be started: it is not built for this machine" in said
    assert (
        resource_errors.cannot_start(FileNotFoundError(errno.ENOENT, ""))
        == "its loader or interpreter is missing"
    )
