"""wait-for-current: reads only, until nothing is pending."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal, unchanged
from tests.support.pace import Stopwatch
from tests.support.projects import bring_to, linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
Start = Callable[..., Running]


def test_it_waits_until_another_run_has_migrated(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(3))
    waiting = start_migrator("wait-for-current", "--format", "json", cwd=folder, database=database)
    waiting.wait_for("3 pending")
    bring_to(database, 1)
    waiting.wait_for("2 pending")
    done(run_migrator(cwd=folder, database=database))
    result = done(waiting.finish())
    assert result.answer["current"] == ["r003"]


def test_a_lost_connection_is_made_again(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(1))
    waiting = start_migrator("wait-for-current", cwd=folder, database=database)
    waiting.wait_for("1 pending")
    database.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'migrator/%'"
    )
    waiting.wait_for("connecting again")
    done(run_migrator(cwd=folder, database=database))
    assert "nothing is pending" in done(waiting.finish()).stdout


def test_it_gives_up_in_time(database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(3))
    bring_to(database, 1)
    with unchanged(database), Stopwatch() as watch:
        result = run_migrator("wait-for-current", "--wait-timeout", "2s", cwd=folder, database=database)
    refusal(result, ExitCode.NOT_CURRENT, "at r001 after 2 s", "2 of this image's revisions are pending")
    assert result.seconds >= 2
    assert watch.within(10)


def test_select_on_the_version_table_is_all_it_needs(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 2)
    role = database.server.create_role(f"reads_{database.name}")
    database.execute(f"GRANT SELECT ON alembic_version TO {role}")
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, user=role)}
    assert "nothing is pending" in done(run_migrator("wait-for-current", cwd=folder, env=env)).stdout


def test_an_image_older_than_the_schema_is_told_so(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    bring_to(database, 2)
    (folder / "migrations/versions/r002.py").unlink()
    result = run_migrator("wait-for-current", cwd=folder, database=database)
    refusal(result, ExitCode.DATABASE_AHEAD, "r002", "older than the schema")


def test_at_head_a_manifest_is_enough(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    """An application whose revisions import half of it would hold up each of its workers."""
    folder = project(revisions=linear_history(2))
    for command in ("upgrade", "freeze"):
        done(run_migrator(command, cwd=folder, database=database))
    poison = tmp_path / "poison"
    for name in ("alembic", "sqlalchemy"):
        (poison / name).mkdir(parents=True)
        (poison / name / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (str(poison), os.environ.get("PYTHONPATH", ""))))}
    assert (
        "nothing is pending"
        in done(run_migrator("wait-for-current", cwd=folder, database=database, env=env)).stdout
    )
    done(run_migrator("backup", cwd=folder, database=database, env=env))
    database.execute("DELETE FROM alembic_version")
    assert run_migrator("wait-for-current", cwd=folder, database=database, env=env).code == ExitCode.INTERNAL
