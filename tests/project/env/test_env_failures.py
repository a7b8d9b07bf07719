"""When a revision fails, or a signal comes: whatever env.py makes of it, what is said is what happened."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.env_text import AUTOCOMMIT, OWN_ENGINE, async_env, env
from tests.support.outcomes import refusal
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
ALL, SOME = "Everything was rolled back.", "A part of r003 was committed"

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


def test_a_failure_after_the_revisions_blames_none(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    held = "op.execute('CREATE TABLE a (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)')"
    revision = Revision("d001", None, f"{held}\nop.execute('INSERT INTO a VALUES (1), (1)')")
    result = run_migrator(cwd=project(env(), revisions=[revision]), database=database)
    assert result.code == 39, result
    assert "duplicate key" in result.logs[-1]["message"], result
    assert "Next: fix the cause, then" in result.logs[-1]["message"], result
    assert database.psql("SELECT to_regclass('a') IS NULL") == [(True,)]


BEGUN = "with connection.begin():\n    {}"
NOT_ALEMBICS = {
    "a block": env(run=BEGUN.format("run(connection)")),
    "a statement ahead": env(connected="connection.execute(text('SELECT 1'))"),
    "no transaction of Alembic's": env(
        run="context.configure(connection=connection)\ncontext.run_migrations()\nconnection.commit()"
    ),
    "an error of its own": env(
        run=BEGUN.format("try: run(connection)\n    except Exception: raise RuntimeError('no luck')")
    ),
    "an async engine": {
        name: text.replace("await connection.run_sync", "await connection.begin(); await connection.run_sync")
        for name, text in async_env().items()
    },
}


@pytest.mark.parametrize("kind", NOT_ALEMBICS)
def test_an_autocommit_block_in_a_transaction_that_env_py_began(
    kind: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    revisions = [*THREE[:2], Revision("r003", "r002", BLOCK, BLOCK)]
    folder = project(NOT_ALEMBICS[kind], revisions=revisions)
    result = run_migrator(cwd=folder, database=database)
    sentence = refusal(
        result,
        ExitCode.ROLLED_BACK,
        "Revision r003 failed: it calls autocommit_block() in a transaction that env.py began, not Alembic.",
        "Everything was rolled back",
        "in env.py, begin no transaction before context.configure()",
    )
    assert "fix revision" not in sentence, result
    assert database.psql("SELECT to_regclass('t1') IS NULL") == [(True,)]

    project(env())  # as it says
    for words in ("upgrade", "downgrade -1"):
        result = run_migrator(*words.split(), cwd=folder, database=database)
        assert result.code == 0, result


def test_an_assertion_of_a_revision_is_the_revisions(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    body = "op.get_bind()\nassert sa is None, 'not so'"
    folder = project(NOT_ALEMBICS["a block"], revisions=[*THREE[:2], Revision("r003", "r002", body)])
    result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "AssertionError: not so", "fix revision r003")


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
