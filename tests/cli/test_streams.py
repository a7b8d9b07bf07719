"""stdout and stderr that cannot be written to: the exit code is still what happened to the database."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.projects import Revision, linear_history
from tests.support.runner import PATIENCE, Runner
from tests.support.servers import Database

LOUD = Revision(
    "r002", "r001", "import sys; print('\\u00e9' * 200000, flush=True)\nop.execute('CREATE TABLE t2 (a int)')"
)
"""It prints more than a pipe holds, and what ASCII does not have."""

NOT_WRITTEN = "the answer was not fully written to stdout"


class Shell:
    """Runs the command in a shell, which redirects what it prints."""

    def __init__(self, runner: Runner, database: Database, folder: Path) -> None:
        self._runner, self._database, self._folder = runner, database, folder

    def __call__(self, arguments: str, redirections: str, **extra: str) -> tuple[int, str]:
        """Return the exit code, and what got out of the shell."""
        env = self._runner.environment(self._database, {"MIGRATOR_BACKUP": "off", **extra})
        command = f"{shlex.join(self._runner.command)} {arguments} {redirections}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=self._folder,
            env=env,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        return done.returncode, (done.stdout + done.stderr).decode("latin-1")


@pytest.fixture
def shell(run_migrator: Runner, database: Database, project: Callable[..., Path]) -> Shell:
    return Shell(run_migrator, database, project(revisions=[*linear_history(1), LOUD]))


@pytest.mark.parametrize("redirections", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&- | head -c 0"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_code_is_what_happened_to_the_database(
    redirections: str, form: str, shell: Shell, database: Database
) -> None:
    assert shell(f"--format {form} upgrade", redirections) == (0, "")
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert shell(f"--format {form} show nothing", redirections) == (31, "")


@pytest.mark.parametrize("arguments", ["--help", "--version", "history", "alembic history"])
def test_help_and_answers_end_with_0(arguments: str, shell: Shell) -> None:
    assert shell(arguments, ">/dev/full 2>&-") == (0, "")


def test_that_an_answer_for_a_program_was_not_written_is_said(shell: Shell) -> None:
    for redirections, why in (
        (">&-", "it was closed"),
        (">/dev/full", "No space left"),
        ("| head -c 0", "Broken pipe"),
    ):
        code, said = shell("--format json history", redirections)
        assert code == 0
        assert NOT_WRITTEN in said
        assert why in said
    assert shell("history", "| head -c 0") == (0, "")


def test_a_script_of_sql_that_is_cut_off_is_no_failure(shell: Shell) -> None:
    code, said = shell("alembic upgrade head --sql", "| head -1")
    assert code == 0
    assert said.startswith("BEGIN;")
    code, said = shell("alembic upgrade head --sql", ">/dev/full")
    assert code == 0
    assert NOT_WRITTEN in said


def test_what_an_encoding_does_not_have_is_escaped_as_in_json(
    run_migrator: Runner, database: Database, project: Callable[..., Path]
) -> None:
    message = "a \u00fc \u20ac \U0001f600"
    folder = project(revisions=[Revision("r001", None, message=message)])
    env = {"PYTHONIOENCODING": "ascii:strict"}
    result = run_migrator("--format", "json", "history", cwd=folder, database=database, env=env)
    assert result.code == 0, result
    assert result.answer[0]["message"] == message
    shown = run_migrator("history", cwd=folder, database=database, env=env)
    assert shown.stdout.endswith("a \\u00fc \\u20ac \\ud83d\\ude00\n")
    applied = run_migrator("upgrade", cwd=folder, database=database, env=env)
    assert applied.code == 0, applied
    assert all(json.loads(line) for line in applied.stderr.splitlines())


def test_a_reader_that_is_slow_to_read_a_pipe_that_does_not_block(
    run_migrator: Runner, database: Database, project: Callable[..., Path]
) -> None:
    folder = project(revisions=[*linear_history(1), LOUD])
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    env = run_migrator.environment(database, {"MIGRATOR_BACKUP": "off"})
    child = subprocess.Popen(
        [*run_migrator.command, "--format", "json", "upgrade"],
        cwd=folder,
        env=env,
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    assert child.wait(PATIENCE) == 0, said[-2000:]
    assert said.count("\u00e9") == 200000
    assert '"outcome": "OK"\n}\n' in said
