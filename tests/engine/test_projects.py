"""The two ways to bring a project: mounted at /app, and in an image built FROM migrator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.containers import Migrator
from tests.engine.engine import Engine
from tests.support.projects import linear_history

pytestmark = pytest.mark.engine

PROJECTS = Path(__file__).parent / "projects"
DERIVED = "migrator-test-derived:latest"


@pytest.fixture(scope="module")
def derived(engine: Engine, image: str) -> Iterator[str]:
    """An application's own image, FROM migrator."""
    engine.build(PROJECTS / "derived", DERIVED, f"--build-arg=MIGRATOR_IMAGE={image}")
    yield DERIVED
    engine.run("rmi", "-f", DERIVED, expect=None)


@pytest.mark.parametrize("config", ["alembic.ini", "pyproject.toml"])
def test_a_mounted_project(migrator: Migrator, project: Callable[..., Path], config: str) -> None:
    folder = project(revisions=linear_history(2), config=config)
    ran = migrator.run("upgrade", options=("-v", f"{folder}:/app:ro"))
    assert ran.code == 0, ran.output
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r002"]


def test_an_async_project(migrator: Migrator, project: Callable[..., Path]) -> None:
    folder = project(revisions=linear_history(2), env="async_engine")
    ran = migrator.run("upgrade", options=("-v", f"{folder}:/app:ro"))
    assert ran.code == 0, ran.output
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r002"]


def test_an_image_of_its_own_brings_its_own_dependencies(migrator: Migrator, derived: str) -> None:
    ran = migrator.run("upgrade", image=derived, options=("--read-only", "--cap-drop", "ALL"))
    assert ran.code == 0, ran.output
    # Its pinned SQLAlchemy, not migrator's.
    assert migrator.psql("SELECT name FROM customers") == ["SQLAlchemy 2.0.44"]

    again = migrator.run("upgrade", image=derived)
    assert again.code == 0, again.output

    back = migrator.run("downgrade", "-1", image=derived)
    assert back.code == 0, back.output
    assert migrator.psql("SELECT count(*) FROM customers") == ["0"]
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["0001"]
    assert any(name.endswith(".json") for name in migrator.backup_files())


def test_the_command_line_of_alembic_is_there(migrator: Migrator, derived: str) -> None:
    ran = migrator.run("alembic", "history", image=derived)
    assert ran.code == 0, ran.output
    assert "0001 -> 0002 (head)" in ran.stdout
