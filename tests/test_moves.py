"""The version row is moved by the very statements that plain Alembic sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.runtime.migration import HeadMaintainer

from migrator.history.moves import quick_moves
from migrator.outcome import ExitCode
from tests.support import plain_alembic
from tests.support.env_text import async_env, env
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]
OFF = {"MIGRATOR_BACKUP": "off"}
SEEN = """
from sqlalchemy import event
from sqlalchemy.engine import Engine

@event.listens_for(Engine, "before_cursor_execute")
def note(connection, cursor, statement, *_):
    if "version_num" in statement:
        with open("seen.txt", "a") as file:
            file.write(statement + "\\n")
"""
ASYNCPG = "'postgresql+asyncpg://' + os.environ['DATABASE_URL'].partition('://')[2]"
ODD = [
    *linear_history(3),
    Revision("r4.x", "r003", "SELECT 1", "SELECT 1"),
    Revision("r 5é", "r4.x", "SELECT 1", "SELECT 1"),
    Revision("end", "r 5é", "SELECT 1", "SELECT 1"),
]


@pytest.mark.parametrize(
    "files",
    [
        env(before=SEEN),
        env(before=SEEN, configure="version_table='Odd \"name\"', version_table_schema='public'"),
        env(before=SEEN, configure="transaction_per_migration=True"),
        async_env(ASYNCPG, before=SEEN),
    ],
    ids=["bare", "a name to quote", "a transaction each", "asyncpg"],
)
def test_the_statements_are_plain_alembics(
    files: dict[str, str],
    server: Server,
    project: Project,
    run_migrator: Runner,
) -> None:
    folder = project(files, revisions=ODD)
    seen = folder / "seen.txt"
    texts = []
    for of_migrator in (False, True):
        database = server.create_database()
        for arguments in (("upgrade", "head"), ("downgrade", "r001")):
            if of_migrator:
                done(run_migrator(*arguments, cwd=folder, database=database, env=OFF))
            else:
                process = plain_alembic.start(*arguments, cwd=folder, database=database, env={})
                said, _ = process.communicate(timeout=180)
                assert process.returncode == 0, said
        lines = seen.read_text().splitlines()
        texts.append([line for line in lines if line.startswith(("UPDATE", "INSERT", "DELETE"))])
        seen.unlink()
    assert texts[0] == texts[1]
    assert len(texts[0]) == 11


def test_a_row_that_is_gone_is_noticed(database: Database, project: Project, run_migrator: Runner) -> None:
    gone = Revision("r003", "r002", "DELETE FROM alembic_version")
    result = run_migrator(cwd=project(revisions=[*linear_history(2), gone]), database=database, env=OFF)
    refusal(result, ExitCode.ROLLED_BACK, "expected to match one row when updating 'r002' to 'r003'")


def test_an_alembic_without_that_method_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A project may bring an Alembic of its own."""
    monkeypatch.delattr(HeadMaintainer, "_update_version")
    with quick_moves():
        assert not hasattr(HeadMaintainer, "_update_version")
    assert not hasattr(HeadMaintainer, "_update_version")
