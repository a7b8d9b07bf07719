"""The plain recipe: up, up again, a wrong password, one step back and up again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.engine.compose import PLUGIN, STANDALONE, Compose, Program, running
from tests.engine.containers import PASSWORD_FILE, USER, secret_file, wait_for
from tests.engine.engine import ROOT, Engine
from tests.support import leaks
from tests.support.pace import Stopwatch

pytestmark = pytest.mark.engine

FOLDER = ROOT / "compose"
HEAD, BEFORE_HEAD = "1c64b2e7f905", "9af80d36c2e1"
REVISION = "SELECT version_num FROM alembic_version"
QUICK_SECONDS = 15


@pytest.fixture(scope="module")
def shop(
    engine: Engine,
    image: str,
    backend_image: str,
    compose_program: Program,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Compose]:
    """The shop, up, with the planted password as its secret."""
    secret = secret_file(tmp_path_factory.mktemp("secrets"))
    environment = {"POSTGRES_PASSWORD_SECRET": str(secret)}
    with running(Compose(engine, compose_program, FOLDER, environment)) as compose:
        compose.up()
        compose.wait_for_backend()
        yield compose


def test_each_is_the_program_that_its_name_says(
    compose_program: Program, request: pytest.FixtureRequest
) -> None:
    debian_12 = "VERSION_CODENAME=bookworm" in Path("/etc/os-release").read_text()
    standalone = STANDALONE in request.node.callspec.params.values()
    if debian_12 and standalone:
        assert compose_program.version.startswith("1.29.")
    else:
        assert compose_program.major >= 2


def run_by_hand(shop: Compose, *arguments: str) -> CompletedProcess[str]:
    """Type `docker run ... migrator` against the compose project's database."""
    options = [
        *("--network", f"{shop.name}_default", "-v", f"{shop.name}_backups:/backups"),
        *("-v", f"{ROOT / 'migrations'}:/app/migrations:ro"),
        *("-v", f"{shop.environment['POSTGRES_PASSWORD_SECRET']}:{PASSWORD_FILE}:ro"),
        *("-e", "POSTGRES_HOST=db", "-e", f"POSTGRES_USER={USER}", "-e", f"POSTGRES_DB={USER}"),
        *("-e", f"POSTGRES_PASSWORD_FILE={PASSWORD_FILE}"),
    ]
    result = shop.engine.run("run", "--rm", *options, "migrator", *arguments, expect=None)
    assert leaks.find(result.stdout + result.stderr) is None
    return result


def test_up_migrates_before_the_backend_starts(shop: Compose) -> None:
    assert shop.exit_code("migrator") == 0, shop.logs("migrator")
    status, shops = shop.get("/")
    assert status == 200
    assert [row["slug"] for row in shops] == ["demo-shop", "demo-shop-uk"]
    assert all(row["products"] == 24 and row["orders"] > 0 for row in shops)
    assert shop.get("/revenue")[0] == 200
    assert shop.psql(REVISION) == [HEAD]

    migrator, backend = shop.inspect("migrator"), shop.inspect("backend")
    assert migrator["State"]["FinishedAt"] <= backend["State"]["StartedAt"]
    shop.assert_no_leak()
    shop.assert_locked_down()


def test_up_again_does_nothing_quickly(shop: Compose) -> None:
    before = shop.psql("SELECT count(*) FROM pg_class")

    with Stopwatch() as watch:
        shop.run("up", "-d")
    assert watch.within(QUICK_SECONDS)

    wait_for(lambda: shop.inspect("migrator")["State"]["Status"] == "exited", 30, "migrator has ended")
    state = shop.inspect("migrator")
    assert state["State"]["ExitCode"] == 0
    log = shop.engine.run("logs", "--since", state["State"]["StartedAt"], state["Id"])
    assert "Nothing to do" in log.stdout
    assert "applied" not in log.stdout + log.stderr
    assert shop.psql("SELECT count(*) FROM pg_class") == before
    assert shop.get("/")[0] == 200
    shop.assert_no_leak()


@pytest.mark.parametrize("compose_program", [STANDALONE], indirect=True)
def test_one_step_down_by_hand_with_its_backup_and_up_again(shop: Compose) -> None:
    down = run_by_hand(shop, "downgrade", "-1")
    assert down.returncode == 0, down.stderr
    assert shop.psql(REVISION) == [BEFORE_HEAD]
    assert shop.psql("SELECT to_regclass('sales.daily_revenue') IS NULL") == ["t"]
    assert shop.get("/revenue")[0] == 503
    said = down.stdout + down.stderr
    assert "upgrade" in said.partition(BEFORE_HEAD)[2], said  # how to come back
    assert "backup" in said, said

    backups = run_by_hand(shop, "backups", "--format", "json")
    assert backups.returncode == 0, backups.stderr
    assert HEAD in backups.stdout, backups.stdout

    up = run_by_hand(shop, "upgrade")
    assert up.returncode == 0, up.stderr
    assert shop.psql(REVISION) == [HEAD]
    assert shop.get("/revenue")[0] == 200


def test_one_step_down_with_compose_run_and_up_again(shop: Compose) -> None:
    down = shop.migrator("downgrade", "-1")
    assert shop.psql(REVISION) == [BEFORE_HEAD], down
    assert shop.get("/revenue")[0] == 503

    assert BEFORE_HEAD in shop.migrator("status")
    assert HEAD in shop.migrator("backups", "--format", "json")

    shop.up()  # which waits for nobody where the backend runs already
    wait_for(lambda: shop.psql(REVISION) == [HEAD], 60, "the revision is applied again")
    assert shop.get("/revenue")[0] == 200


@pytest.mark.parametrize("compose_program", [PLUGIN], indirect=True)
def test_a_wrong_password_keeps_the_backend_from_starting(
    engine: Engine, image: str, backend_image: str, compose_program: Program, tmp_path: Path
) -> None:
    # Out of the box, with the committed development password.
    with running(Compose(engine, compose_program, FOLDER)) as compose:
        compose.run("up", "-d", "db")
        wait_for(lambda: compose.inspect("db")["State"]["Health"]["Status"] == "healthy", 60, "healthy")

        compose.environment = {"POSTGRES_PASSWORD_SECRET": str(secret_file(tmp_path))}
        refused = compose.run("up", "-d", expect=None)

        assert refused.returncode != 0
        assert compose.exit_code("migrator") == 30, compose.logs("migrator")
        assert compose.never_started("backend")
        compose.assert_no_leak()

        compose.environment = {}
        compose.run("up", "-d", "--force-recreate")  # compose 2 does not see that a secret has another file
        compose.wait_for_backend()
        assert compose.get("/")[0] == 200
