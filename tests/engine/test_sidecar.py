"""The sidecar in its container: locked down, as process 1, asked from inside and from elsewhere, and stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.containers import Migrator, wait_for
from tests.engine.engine import ROOT
from tests.image.test_run import LOCKED_DOWN, STOP_SECONDS
from tests.support import leaks
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, linear_history

pytestmark = pytest.mark.engine


def health_check() -> list[str]:
    """Return the words of the health check that docs/howto/run-a-sidecar.md gives."""
    page = (ROOT / "docs" / "howto" / "run-a-sidecar.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)]
    (services,) = [block["services"] for block in blocks if "services" in block]
    kind, *words = services["migrator"]["healthcheck"]["test"]
    assert kind == "CMD"
    return list(words)


def options(folder: Path, *more: str) -> tuple[str, ...]:
    """Return what it is run with: nothing that it does not need, and little memory."""
    return (*LOCKED_DOWN, "--user", "4242:4242", "-m", "192m", "-v", f"{folder}:/app:ro", *more)


@pytest.mark.parametrize("variant", ["image", "slim_image"])
def test_it_is_healthy_when_the_database_is_at_the_heads(
    variant: str, migrator: Migrator, project: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    engine, image = migrator.engine, request.getfixturevalue(variant)
    folder = project(revisions=linear_history(3))
    listen = ("-e", "MIGRATOR_SIDECAR_LISTEN=0.0.0.0:8086", "-e", "MIGRATOR_SIDECAR_INTERVAL=1s")
    container = migrator.start("sidecar", options=options(folder, *listen), image=image)

    def healthy() -> bool:
        return engine.run("exec", container, *health_check(), expect=None).returncode == 0

    wait_for(healthy, 60, "it is healthy")
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r003"]
    asked = _ask(migrator, container, image)
    assert asked["ready"] is True
    assert asked["report"]["revisions"][-1]["revision"] == "r003"
    migrator.psql("UPDATE alembic_version SET version_num = 'r002'")
    wait_for(lambda: not healthy(), 60, "it is not healthy")
    _stopped(migrator, container, 0)


def test_a_run_that_is_under_way_ends_with_its_container(
    migrator: Migrator, project: Callable[..., Path]
) -> None:
    folder = project(revisions=[Revision("r001", None, "SELECT pg_sleep(300)")])
    container = migrator.start("sidecar", options=options(folder))
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(300)' AND state = 'active'"
    wait_for(lambda: migrator.psql(sleeping), 60, "the revision")
    _stopped(migrator, container, 23)
    assert migrator.psql("SELECT to_regclass('alembic_version') IS NULL") == ["t"]


def _ask(migrator: Migrator, container: str, image: str) -> dict[str, Any]:
    """Ask from another container on the network."""
    networks = migrator.inspect(container)["NetworkSettings"]["Networks"]
    address = networks[migrator.server.network]["IPAddress"]
    program = f"from urllib.request import urlopen; print(urlopen('http://{address}:8086/').read().decode())"
    there = ("--rm", "--network", migrator.server.network, "--entrypoint", "python", image, "-c", program)
    text = migrator.engine.run("run", *there).stdout
    assert leaks.find(text) is None
    return dict(json.loads(text))


def _stopped(migrator: Migrator, container: str, code: int) -> None:
    with Stopwatch() as watch:
        migrator.engine.run("stop", "-t", "60", container)
    ran = migrator.finished(container)
    assert ran.code == code, ran.output
    assert watch.within(STOP_SECONDS)
