"""Fifty runs start at once, time and again: one applies, the others find the work done, and nothing is done twice."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.forked import Forked
from tests.support.outcomes import left_behind
from tests.support.projects import Revision
from tests.support.runner import migrator_command
from tests.support.servers import Database, Server

Project = Callable[..., Path]

RUNS = 50
INSTALLED_ROUNDS = int(os.environ.get("RACE_ROUNDS", "2"))
"""With the installed command, whose fifty starts take ten seconds on two cores; 20 is a matter of minutes."""
FORKED_ROUNDS = 20


def sql(*statements: str) -> str:
    """Return a revision's body: one statement at a time, as asyncpg wants it."""
    return "\n".join(f"op.execute({statement!r})" for statement in statements)


def done(revision: str) -> str:
    """Return the statement that shows how often a revision was run."""
    return f"INSERT INTO done VALUES ('{revision}')"


BACKFILL = """\
for first in range(1, 2001, 500):
    op.execute(f"UPDATE orders SET total = id * 2 WHERE id BETWEEN {first} AND {first + 499}")
"""
CONCURRENTLY = """\
with op.get_context().autocommit_block():
    op.execute("CREATE INDEX CONCURRENTLY orders_total ON orders (total)")
"""
HISTORY = [
    Revision(
        "r001",
        None,
        sql(
            "CREATE TABLE done (revision text)",
            "CREATE TABLE orders (id int PRIMARY KEY, total int)",
            "INSERT INTO orders SELECT generate_series(1, 2000)",
            done("r001"),
        ),
    ),
    Revision("r002", "r001", sql("SELECT pg_sleep(0.5)", done("r002"))),
    Revision("r003", "r002", sql("ALTER TABLE orders ADD COLUMN note text", done("r003"))),
    Revision("r004", "r003", BACKFILL + sql(done("r004"))),
    Revision("r005", "r004", CONCURRENTLY + sql(done("r005"))),
    Revision("r006", "r005", sql(done("r006"))),
]
IDS = [revision.id for revision in HISTORY]


def environment(database: Database, backups: Path) -> dict[str, str]:
    """Return what each of the runs gets."""
    return {
        **os.environ,
        "MIGRATOR_DATABASE_URL": database.url,
        "MIGRATOR_BACKUP_URL": backups.as_uri(),
        "MIGRATOR_PG_BIN": str(database.server.bin),
    }


def installed(folder: Path, env: dict[str, str], out: Path) -> list[tuple[int, str, str]]:
    """Run fifty installed commands at once; return the exit code and the output of each."""
    started = []
    for number in range(RUNS):
        place = out / str(number)
        place.mkdir(parents=True)
        with (place / "stdout").open("wb") as stdout, (place / "stderr").open("wb") as stderr:
            command = [*migrator_command(), "upgrade", "--format", "json"]
            child = subprocess.Popen(command, cwd=folder, env=env, stdout=stdout, stderr=stderr)
        started.append((child, place))
    try:
        codes = [child.wait(600) for child, _ in started]
    finally:
        for child, _ in started:
            child.kill()
            child.wait(60)
    return [
        (code, (place / "stdout").read_text(), (place / "stderr").read_text())
        for code, (_, place) in zip(codes, started, strict=True)
    ]


def forked(folder: Path, env: dict[str, str], out: Path) -> list[tuple[int, str, str]]:
    """Run the command line fifty times at once in forked processes, which all arrive within a moment."""
    runs = [Forked("upgrade", "--format", "json", cwd=folder, env=env, out=out / str(n)) for n in range(RUNS)]
    try:
        codes = [run.finish(600) for run in runs]
    finally:
        for run in runs:
            run.end()
    return [(code, run.stdout, run.stderr) for code, run in zip(codes, runs, strict=True)]


def check(database: Database, results: list[tuple[int, str, str]]) -> None:
    """Assert that one run did all of the work, once, and that the others said that there was none left."""
    wrong = [result for result in results if result[0] != 0]
    assert not wrong, (
        f"{len(wrong)} of {RUNS} failed; the first with {wrong[0][0]}:\n{wrong[0][1]}{wrong[0][2]}"
    )
    answers = [json.loads(stdout) for _, stdout, _ in results]
    applied = [
        [item["revision"] for item in answer["revisions"]] for answer in answers if answer["revisions"]
    ]
    assert applied == [IDS]
    others = [answer for answer in answers if not answer["revisions"]]
    assert len(others) == RUNS - 1
    assert all(answer["message"].startswith("Nothing to do: ") for answer in others)
    assert all(answer["after"] == ["r006"] for answer in others)
    assert database.psql("SELECT revision, count(*) FROM done GROUP BY 1 ORDER BY 1") == [
        (id, 1) for id in IDS
    ]
    assert database.psql("SELECT count(*), count(total), sum(total) FROM orders") == [
        (2000, 2000, 2001 * 2000)
    ]
    assert database.psql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'orders_total'::regclass") == [
        (True,)
    ]
    assert database.psql("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r006",)]
    ledger = database.psql("SELECT event, revision FROM migrator_ledger WHERE revision <> '' ORDER BY number")
    assert ledger == [("applied", id) for id in IDS]
    assert left_behind(database) == []


def rounds(
    server: Server,
    folder: Path,
    place: Path,
    race: Callable[[Path, dict[str, str], Path], list[tuple[int, str, str]]],
    count: int,
) -> None:
    """Race on one new database after another."""
    log_began = server.log.stat().st_size
    for number in range(count):
        database = server.create_database()
        results = race(folder, environment(database, place / "backups"), place / str(number))
        check(database, results)
        server.drop_database(database.name)
    said = server.log.read_bytes()[log_began:].decode(errors="replace")
    assert "deadlock detected" not in said


@pytest.mark.parametrize("env_file", ["plain_url", "async_engine"])
def test_fifty_at_once_twenty_times_in_a_row(
    server: Server, project: Project, tmp_path: Path, env_file: str
) -> None:
    folder = project(revisions=HISTORY, env=env_file)
    rounds(server, folder, tmp_path / "rounds", forked, FORKED_ROUNDS if env_file == "plain_url" else 2)


def test_fifty_of_the_installed_command(server: Server, project: Project, tmp_path: Path) -> None:
    rounds(server, project(revisions=HISTORY), tmp_path / "rounds", installed, INSTALLED_ROUNDS)
