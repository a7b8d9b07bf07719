"""A revision that rolls back its own transaction: settings outlast it, and the run and the ledger say what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.env_text import env
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

PSYCOPG = "config.get_main_option('sqlalchemy.url').replace('postgresql:', 'postgresql+psycopg:')"
DRIVERS = {
    "psycopg2": env(),
    "psycopg": env(engine=f"create_engine({PSYCOPG}, poolclass=pool.NullPool)"),
}
ROLLBACKS = {
    "SQL": "op.execute('CREATE TABLE lost (id int)')\nop.execute('ROLLBACK')",
    "driver": "op.execute('CREATE TABLE lost (id int)')\nop.get_bind().connection.rollback()",
    "session": "from sqlalchemy.orm import Session\nop.execute('CREATE TABLE lost (id int)')\n"
    "Session(bind=op.get_bind()).connection().connection.rollback()",
}
LOOK = (
    "op.execute(\"CREATE TABLE seen AS SELECT current_user::text AS role, current_setting('lock_timeout') AS waits,"
    " current_setting('statement_timeout') AS works\")"
)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("how", ROLLBACKS)
def test_settings_outlast_it_and_it_is_told(
    database: Database, project: Project, run_migrator: Runner, how: str, driver: str
) -> None:
    role = database.server.create_role(f"owns_{database.name}")
    database.execute(f'GRANT ALL ON SCHEMA public TO "{role}"')
    history = [
        Revision("a1", None, "CREATE TABLE kept (id int)"),
        Revision("b1", "a1", ROLLBACKS[how]),
        Revision("c1", "b1", LOOK),
    ]
    folder = project(DRIVERS[driver], revisions=history)
    env_ = {
        "MIGRATOR_ROLE": role,
        "MIGRATOR_LOCK_TIMEOUT": "7s",
        "MIGRATOR_STATEMENT_TIMEOUT": "70s",
        "MIGRATOR_BACKUP": "off",
    }
    done(run_migrator("upgrade", "a1", cwd=folder, database=database, env=env_))
    result = done(run_migrator("upgrade", "--format", "json", cwd=folder, database=database, env=env_))
    assert database.psql("SELECT to_regclass('lost') IS NULL, to_regclass('kept') IS NULL") == [(True, False)]
    assert database.psql("SELECT * FROM seen") == [(role, "7s", "70s")]
    assert database.psql("SELECT tableowner FROM pg_tables WHERE tablename = 'seen'") == [(role,)]
    found = [finding for finding in result.answer["findings"] if finding["rule"] == "rolled-back"]
    assert [finding["place"] for finding in found] == ["b1"]
    told = database.psql(
        "SELECT revision, coalesce(details->>'rolled_back', 'no') FROM migrator_ledger"
        " WHERE event = 'applied' ORDER BY 1"
    )
    assert told == [("a1", "no"), ("b1", "true"), ("c1", "no")]


def test_a_rollback_takes_the_revision_before_along(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Alembic then finds no row to move. Nothing of the revision was committed."""
    history = [
        Revision("a1", None, "SELECT 1"),
        Revision("b1", "a1", "CREATE TABLE lost (id int)"),
        Revision("c1", "b1", "op.execute('ROLLBACK')"),
    ]
    folder = project(env(), revisions=history)
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    assert database.psql("SELECT to_regclass('lost')") == [(None,)]
    refusal(result, ExitCode.ROLLED_BACK, "Everything was rolled back", "use a savepoint in c1")
    assert "part of c1" not in result.stderr


BLOCK = "with op.get_context().autocommit_block():\n    op.execute('{}')"
RESETS = {
    "a script of pg_dump": "op.execute('SET statement_timeout = 0; SET lock_timeout = 0; SET row_security = off')",
    "RESET ALL": "op.execute('RESET ALL')\nop.execute('RESET ROLE')",
    "DISCARD ALL": BLOCK.format("DISCARD ALL"),
    "a login": "op.execute('SET SESSION AUTHORIZATION DEFAULT')\nop.execute('SET lock_timeout = 0')\n"
    "op.execute('SET statement_timeout = 0')",
}


@pytest.mark.parametrize("how", RESETS)
def test_each_revision_begins_with_the_settings(
    database: Database, project: Project, run_migrator: Runner, how: str
) -> None:
    """Such a script set lock_timeout to 0, and the next revision waited for its lock as long as it took."""
    role = database.server.create_role(f"owns_{database.name}")
    database.execute(f'GRANT ALL ON SCHEMA public TO "{role}"')
    history = [
        Revision("a1", None, "SELECT 1"),
        Revision("b1", "a1", RESETS[how]),
        Revision("c1", "b1", LOOK),
    ]
    env_ = {
        "MIGRATOR_ROLE": role,
        "MIGRATOR_LOCK_TIMEOUT": "7s",
        "MIGRATOR_STATEMENT_TIMEOUT": "70s",
        "MIGRATOR_BACKUP": "off",
    }
    done(run_migrator(cwd=project(env(), revisions=history), database=database, env=env_))
    assert database.psql("SELECT * FROM seen") == [(role, "7s", "70s")]


def test_a_rollback_of_sqlalchemy_leaves_nothing_to_commit(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    # Plain Alembic ends with 0 here, and nothing is done.
    body = (
        "from sqlalchemy.orm import Session\nsession = Session(bind=op.get_bind())\nsession.connection()\n"
        "op.execute('CREATE TABLE lost (id int)')\nsession.rollback()"
    )
    history = [
        Revision("a1", None, "SELECT 1"),
        Revision("b1", "a1", body),
        Revision("c1", "b1", "CREATE TABLE kept (id int)"),
    ]
    folder = project(env(), revisions=history)
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.ROLLED_BACK, "committed none of them", "b1 rolled back", "begin_nested()")
    assert database.psql("SELECT to_regclass('lost') IS NULL, to_regclass('kept') IS NULL") == [(True, True)]
