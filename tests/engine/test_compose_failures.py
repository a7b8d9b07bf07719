"""What compose shows, and what is left, when a migration fails and when it is stopped in the middle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

from tests.engine.compose import Compose
from tests.engine.containers import wait_for
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, linear_history, write_project

pytestmark = pytest.mark.engine

REVISION = "SELECT version_num FROM alembic_version"
TABLES = "SELECT relname FROM pg_class WHERE relname ~ '^t[0-9]$' ORDER BY 1"
FAILING = "CREATE TABLE t2 (id int); SELECT 1 / 0"
SLEEPING = "CREATE TABLE t2 (id int); SELECT pg_sleep(300)"
ASLEEP = (
    "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(300)%' AND pid <> pg_backend_pid()"
)
STOP_SECONDS = 45  # well below stop_grace_period, after which it would have been killed
Recipe = Callable[[str], Compose]


def bring(compose: Compose, second: str) -> None:
    """Put a project of two revisions in the place of the example schema; the second does what `second` says."""
    revisions = [*linear_history(1), Revision("r002", "r001", second, "DROP TABLE t2")]
    made = write_project(compose.root / "made", revisions=revisions, config=None) / "migrations"
    place = compose.root / "migrations"
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(made, place, dirs_exist_ok=True)


def state(compose: Compose, service: str) -> str:
    """Return the line that `docker compose ps` shows for a service."""
    shown = compose.run("ps", "--all").stdout.splitlines()
    return next(line for line in shown if f"{compose.name}-{service}" in line.replace("_", "-"))


def test_a_failing_migration_keeps_the_backend_from_starting(recipe: Recipe) -> None:
    compose = recipe("wait")
    bring(compose, FAILING)
    up = compose.run("up", "-d", expect=None)
    assert up.returncode == 1
    assert "39" in up.stderr  # v1: exited with code 39; v2: didn't complete successfully: exit 39
    assert "division by zero" in compose.logs("migrator")
    assert compose.never_started("backend")
    assert any(text in state(compose, "migrator") for text in ("Exit 39", "Exited (39)"))
    if compose.program.major >= 2:
        assert compose.run("up", "--wait", expect=None).returncode == 1
        assert compose.never_started("backend")

    # Two ways to have migrator's own code, in CI.
    compose.migrator(expect=39)
    compose.run("up", "--exit-code-from", "migrator", "db", "migrator", expect=39)

    bring(compose, "CREATE TABLE t2 (id int)")
    compose.up()
    compose.wait_for_backend()
    assert compose.psql(REVISION) == ["r002"]


def test_a_sidecar_that_fails_and_then_holds_the_backend_back_until_it_is_ready(recipe: Recipe) -> None:
    compose = recipe("sidecar")
    bring(compose, FAILING)
    assert compose.run("up", "-d", expect=None).returncode == 1
    assert compose.exit_code("migrator") == 39, compose.logs("migrator")
    assert compose.never_started("backend")

    bring(compose, "CREATE TABLE t2 (id int)")
    compose.up()
    compose.wait_for_backend()
    assert compose.inspect("migrator")["State"]["Health"]["Status"] == "healthy"
    assert compose.psql(REVISION) == ["r002"]
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8086/').read().decode())"
    told = json.loads(compose.run("exec", "-T", "migrator", "python", "-c", ask).stdout)
    assert told["ready"] is True
    compose.assert_no_leak()
    compose.assert_locked_down()

    compose.run("stop", "migrator")
    assert compose.exit_code("migrator") == 0


def test_a_run_that_is_stopped_in_the_middle_rolls_back(recipe: Recipe) -> None:
    compose = recipe("")
    bring(compose, SLEEPING)
    # With no service that depends on its completion, --wait is content as soon as migrator runs.
    compose.run("up", "--wait" if compose.program.major >= 2 else "-d", "db", "migrator")
    assert compose.inspect("migrator")["State"]["Status"] == "running"
    wait_for(lambda: database_answers(compose) and compose.psql(ASLEEP) == ["1"], 60, "r002 runs")

    with Stopwatch() as watch:
        compose.run("stop")
    assert watch.within(STOP_SECONDS)

    assert compose.exit_code("migrator") == 23, compose.logs("migrator")
    compose.run("start", "db")
    wait_for(lambda: database_answers(compose), 60, "Postgres answers")
    assert compose.psql(TABLES) == []

    bring(compose, "CREATE TABLE t2 (id int)")
    compose.up()
    compose.wait_for_backend()
    assert compose.psql(TABLES) == ["t1", "t2"]
    compose.assert_no_leak()


def database_answers(compose: Compose) -> bool:
    """Tell whether the server answers over TCP."""
    container = compose.inspect("db")["Id"]
    return (
        compose.engine.run("exec", container, "pg_isready", "-q", "-h", "127.0.0.1", expect=None).returncode
        == 0
    )
