"""Each recipe beside the plain one, from an empty engine to a backend that answers, and what it is there for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.engine.compose import Compose
from tests.engine.containers import secret_file
from tests.support import PLANTED
from tests.support.ports import free_port
from tests.support.projects import Revision

pytestmark = pytest.mark.engine

HEAD, BEFORE_HEAD = "1c64b2e7f905", "9af80d36c2e1"
REVISION = "SELECT version_num FROM alembic_version"
Recipe = Callable[[str], Compose]


def assert_up(compose: Compose) -> None:
    """Bring a project of the example schema up, and look at it from outside."""
    compose.up()
    compose.wait_for_backend()
    assert [row["slug"] for row in compose.get("/")[1]] == ["demo-shop", "demo-shop-uk"]
    assert compose.psql(REVISION) == [HEAD]
    assert (
        compose.inspect("migrator")["State"]["FinishedAt"] <= compose.inspect("backend")["State"]["StartedAt"]
    )
    compose.assert_no_leak()
    compose.assert_locked_down()


# -- PgBouncer --------------------------------------------------------------------------------------------


def test_pgbouncer(recipe: Recipe, pgbouncer_image: str, tmp_path: Path) -> None:
    compose = recipe("pgbouncer")
    address = f"postgresql://shop:{quote(PLANTED, safe='')}@db:5432/shop"
    compose.environment["DIRECT_URL_SECRET"] = str(secret_file(tmp_path, address))
    assert_up(compose)

    # The backend's connections came by way of the pooler, which took the planted password from the secret.
    assert "login attempt: db=shop user=shop" in compose.logs("pgbouncer")
    down = compose.migrator("downgrade", "-1")
    assert compose.psql(REVISION) == [BEFORE_HEAD], down

    # What the direct address is there for: without it, a run that has something to do is refused.
    refused = compose.run("run", "--rm", "-T", "-e", "MIGRATOR_DIRECT_URL_FILE=", "migrator", expect=10)
    assert "MIGRATOR_DIRECT_URL" in refused.stdout + refused.stderr
    assert compose.psql(REVISION) == [BEFORE_HEAD]


# -- backups in a bucket ----------------------------------------------------------------------------------


def listed(compose: Compose) -> list[dict[str, Any]]:
    """Return the backups that migrator lists; its log goes to the other stream."""
    done = compose.run("run", "--rm", "-T", "migrator", "backups", "--format", "json")
    return list(json.loads(done.stdout))


def test_s3(recipe: Recipe, s3_image: str, tmp_path: Path) -> None:
    compose = recipe("s3")
    compose.environment["S3_KEY_SECRET"] = str(secret_file(tmp_path))
    assert_up(compose)
    assert listed(compose) == []

    compose.psql("CREATE TABLE public.kept AS SELECT 'before' AS word")
    down = compose.migrator("downgrade", "-1")
    assert "s3://shop-backups/shop" in down
    assert compose.psql(REVISION) == [BEFORE_HEAD]
    (backup,) = listed(compose)
    assert HEAD in json.dumps(backup)

    compose.psql("DROP TABLE public.kept")
    compose.migrator("restore", "latest", "--to", "shop_look")
    assert compose.psql("SELECT word FROM public.kept", "shop_look") == ["before"]


# -- development ------------------------------------------------------------------------------------------


@pytest.fixture
def developer() -> Iterator[tuple[int, int]]:
    """A user id and group id that are neither root's nor the image's: this process's own, or nobody's in particular."""
    if os.geteuid() == 0:
        yield 4321, 4322
    else:
        yield os.getuid(), os.getgid()


def test_development(recipe: Recipe, developer: tuple[int, int]) -> None:
    compose = recipe("development")
    uid, gid = developer
    (compose.folder / ".env").write_text(f"UID={uid}\nGID={gid}\n")
    project = compose.folder / "project"
    if os.geteuid() == 0:
        for path in (project, *project.rglob("*")):
            os.chown(path, uid, gid)
    compose.up()
    assert compose.engine.wait(compose.inspect("migrator")["Id"]) == 0, compose.logs("migrator")
    assert compose.psql("SELECT count(*) FROM customers") == ["0"]

    models = project / "shop" / "models.py"
    models.write_text(models.read_text() + "    phone: Mapped[str | None]\n")
    before = set(project.rglob("*"))
    said = compose.migrator("revision", "--autogenerate", "-m", "a phone number for customers")
    (made,) = set(project.rglob("*")) - before
    assert made.name.endswith("_a_phone_number_for_customers.py"), said
    assert (made.stat().st_uid, made.stat().st_gid) == (uid, gid)
    assert "op.add_column('customers', sa.Column('phone', sa.String(), nullable=True))" in made.read_text()

    compose.migrator()
    phone = "SELECT data_type FROM information_schema.columns WHERE table_name = 'customers' AND column_name = 'phone'"
    assert compose.psql(phone) == ["character varying"]
    compose.migrator("downgrade", "-1")
    assert compose.psql(phone) == []
    compose.assert_no_leak()
    compose.assert_locked_down()


# -- two services and two databases -----------------------------------------------------------------------


def test_two_databases(recipe: Recipe, tmp_path: Path) -> None:
    compose = recipe("two-databases")
    billing_port = free_port()
    compose.environment |= {
        "BILLING_PORT": str(billing_port),
        "BILLING_PASSWORD_SECRET": str(secret_file(tmp_path, f"billing {PLANTED}")),
        "SUPERUSER_PASSWORD_SECRET": str(secret_file(tmp_path, f"superuser {PLANTED}")),
    }
    compose.up()
    compose.wait_for_backend("/")
    compose.wait_for_backend("/invoices", billing_port)
    assert compose.get("/invoices", billing_port)[1] == [
        {"number": "2025-0001", "total": "119.00", "paid_on": None}
    ]
    assert compose.psql(REVISION, "shop", "postgres") == [HEAD]
    assert compose.psql(REVISION, "billing", "postgres") == ["b93d20f7c615"]
    owners = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema)'"
    assert compose.psql(owners, "shop", "postgres") == ["shop"]
    assert compose.psql(owners, "billing", "postgres") == ["billing"]
    for role, other in (("shop", "billing"), ("billing", "shop")):
        may_connect = f"SELECT has_database_privilege('{role}', '{other}', 'CONNECT')"
        assert compose.psql(may_connect, "postgres", "postgres") == ["f"]

    compose.migrator("downgrade", "-1", service="billing-migrator")
    assert compose.psql(REVISION, "billing", "postgres") == ["a4c8e1f05b62"]
    assert compose.psql(REVISION, "shop", "postgres") == [HEAD]
    assert "a4c8e1f05b62" not in compose.migrator("backups", service="shop-migrator")

    # The one fails, and the other can be started all the same.
    failing = Revision("c0ffee", "b93d20f7c615", "SELECT 1 / 0").render()
    (compose.folder / "billing" / "migrations" / "versions" / "c0ffee.py").write_text(failing)
    compose.run("stop", "shop", "billing")
    assert compose.run("up", "-d", expect=None).returncode == 1
    assert compose.exit_code("billing-migrator") == 39, compose.logs("billing-migrator")
    assert compose.inspect("billing")["State"]["Running"] is False
    compose.run("up", "-d", "shop")
    compose.wait_for_backend("/")
    compose.assert_no_leak()
    compose.assert_locked_down()


# -- up --wait --------------------------------------------------------------------------------------------


def test_wait(recipe: Recipe) -> None:
    compose = recipe("wait")
    if compose.program.major == 1:  # has no --wait
        compose.up()
        compose.wait_for_backend()
    else:
        compose.run("up", "--wait")
        assert compose.get("/healthz")[0] == 200  # at once
        # Where there is no backend in the file.
        compose.run("up", "--wait", "db")
        assert "Nothing to do" in compose.migrator()
    assert compose.psql(REVISION) == [HEAD]
    compose.assert_no_leak()
    compose.assert_locked_down()
