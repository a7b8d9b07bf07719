"""The compose recipes as files: what each has in common, and that none is forgotten where recipes are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.runner import ROOT

COMPOSE = ROOT / "compose"
FILES = sorted(COMPOSE.rglob("docker-compose.yml"))
each_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)


def read(file: Path) -> dict[str, Any]:
    """Return a recipe, its anchors resolved."""
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def test_they_are_found() -> None:
    names = {file.parent.name for file in FILES}
    assert names == {"compose", "development", "pgbouncer", "s3", "sidecar", "two-databases", "wait"}


@each_recipe
def test_each_service_is_locked_down(file: Path) -> None:
    for name, service in read(file)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


@each_recipe
def test_no_secret_is_in_the_environment(file: Path) -> None:
    for name, service in read(file)["services"].items():
        for variable, value in service.get("environment", {}).items():
            secret = any(word in variable for word in ("PASSWORD", "_KEY", "DIRECT_URL", "DATABASE_URL"))
            assert not secret or (variable.endswith("_FILE") and value.startswith("/run/secrets/")), name


@each_recipe
def test_each_secret_has_its_file(file: Path) -> None:
    for secret in read(file)["secrets"].values():
        default = secret["file"].partition(":-")[2].rstrip("}")
        assert (file.parent / default).is_file(), default


@each_recipe
def test_a_migrator_has_time_to_roll_back_and_is_not_started_again(file: Path) -> None:
    migrators = {
        name: service
        for name, service in read(file)["services"].items()
        if service["image"] == "migrator:latest"
    }
    assert migrators
    for service in migrators.values():
        assert service["stop_grace_period"] == "1m"
        assert "restart" not in service


@each_recipe
def test_no_backend_starts_before_its_migrator_has_completed(file: Path) -> None:
    for name, service in read(file)["services"].items():
        if service["image"] == "migrator-example-backend:latest":
            conditions = [on["condition"] for on in service["depends_on"].values()]
            expected = (
                "service_healthy" if file.parent.name == "sidecar" else "service_completed_successfully"
            )
            assert expected in conditions, name


@each_recipe
def test_the_page_about_compose_names_it(file: Path) -> None:
    page = (ROOT / "docs" / "howto" / "compose.md").read_text(encoding="utf-8")
    assert f"(../../{file.relative_to(ROOT)})" in page


@each_recipe
def test_an_engine_runs_it(file: Path) -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "engine").glob("test_compose*.py"))
    folder = file.parent.relative_to(COMPOSE)
    assert f'recipe("{folder}")' in tests or (folder == Path() and 'ROOT / "compose"' in tests)
