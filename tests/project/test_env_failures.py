"""When a revision fails, or a signal comes: whatever env.py makes of it, what is said is what happened."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.env_text import AUTOCOMMIT, OWN_ENGINE, async_env, env
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]
THREE = linear_history(3)

BLOCK = "with op.get_context().autocommit_block(): op.execute('SELECT 1')"
SESSION = """
from sqlalchemy.orm import Session
here = Session(bind=op.get_bind())
here.execute(sa.text("SELECT 1"))
here.commit()
"""
ALL, SOME = "Everything was rolled back.", "A part of r003 was committed too"

FAILURES = {
    "one transaction": (env(), "", 39, ALL),
    "a pool that keeps its connection": (env(engine=OWN_ENGINE), "", 39, ALL),
    "an async engine": (async_env(), "", 39, ALL),
    "a session's commit": (env(), SESSION, 39, ALL),
    "a transaction per migration": (
        env(configure="transaction_per_migration=True"),
        "",
        40,
        "2 of 3 revisions",
    ),
    "COMMIT": (env(), "op.execute('COMMIT')", 40, SOME),
    "the connection's commit": (
        env(configure="transaction_per_migration=True"),
        "op.get_bind().commit()",
        40,
        SOME,
    ),
    "an autocommit block": (env(), BLOCK, 40, SOME),
    "a connection in autocommit": (env(connected=AUTOCOMMIT), "", 40, SOME),
    "swallowed": (env(run="try: run(connection)\nexcept BaseException as error: print(error)"), "", 39, ALL),
    "made an exit": (env(run="try: run(connection)\nexcept Exception: raise SystemExit(0)"), "", 39, ALL),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_is_left_is_what_is_said(
    kind: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    files, text, code, said = FAILURES[kind]
    body = f"op.execute('CREATE TABLE part (id int)')\n{text}\nraise ValueError('broken here')"
    folder = project(files, revisions=[*THREE[:2], Revision("r003", "r002", body)])
    result = run_migrator(cwd=folder, database=database)
    assert result.code == code, result
    assert "Revision r003 failed: ValueError: broken here." in result.logs[-1]["message"], result
    assert said in result.logs[-1]["message"], result
    assert database.psql("SELECT to_regclass('part') IS NOT NULL") == [(said == SOME,)]
    assert database.psql("SELECT to_regclass('t1') IS NOT NULL") == [(code == 40,)]


@pytest.mark.parametrize("kept", [False, True])
def test_an_env_that_never_commits(
    kept: bool, project: Project, run_migrator: Runner, database: Database
) -> None:
    # Plain Alembic ends with 0 here, and nothing is done.
    keep = "import builtins\nbuiltins.kept = connection\n" if kept else ""
    run = f"{keep}context.configure(connection=connection)\ncontext.run_migrations()"
    result = run_migrator(cwd=project(env(run=run), revisions=THREE), database=database)
    assert result.code == 39, result
    assert "committed none of them" in result.logs[-1]["message"], result


HANDLERS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""
LOADS = """
import os
print('loading', file=sys.stderr, flush=True)
while not os.path.exists('go'):
    time.sleep(0.02)
"""
MOMENTS = {
    "while env.py loads": (HANDLERS + LOADS, ""),
    "in a statement": (HANDLERS + "signal.set_wakeup_fd(-1)", "op.execute('SELECT pg_sleep(30)')"),
    "in Python": (HANDLERS + "signal.set_wakeup_fd(-1)", "import time; time.sleep(30)"),
}


@pytest.mark.parametrize("make", [env, async_env])
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_in_spite_of_the_applications_handlers(
    moment: str,
    make: Callable[..., dict[str, str]],
    project: Project,
    start_migrator: Start,
    database: Database,
) -> None:
    before, body = MOMENTS[moment]
    revisions = [*THREE[:2], Revision("r003", "r002", body)]
    folder = project(make(before=before), revisions=revisions)
    running = start_migrator(cwd=folder, database=database)
    running.wait_for("applied 2 of 3" if body else "loading")
    time.sleep(0.3)
    with Stopwatch() as watch:
        running.send(signal.SIGTERM)
        (folder / "go").touch()
        result = running.finish()
    assert result.code == 23, result
    assert watch.within(10), result
    assert database.psql("SELECT to_regclass('t1') IS NULL") == [(True,)]
