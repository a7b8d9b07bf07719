"""docs/howto/migrating-from with a container engine: its compose files, and the way from Flyway to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.test_migrating_from import FLYWAY, NEXT, SECTIONS, SHOP, blocks, part
from tests.engine.compose import Compose, Program
from tests.engine.containers import secret_file, wait_for
from tests.engine.engine import Engine
from tests.support.projects import write_project

pytestmark = pytest.mark.engine

# What the page leaves out, for it is as it was: the server, and an application, which here says that it has started.
AROUND: dict[str, Any] = {
    "services": {
        "db": {
            "image": "postgres:17",
            "environment": {
                "POSTGRES_USER": "shop",
                "POSTGRES_DB": "shop",
                "POSTGRES_PASSWORD_FILE": "/run/secrets/postgres_password",
            },
            "secrets": ["postgres_password"],
        },
        "backend": {
            "image": "migrator:latest",
            "entrypoint": ["/opt/migrator/bin/python", "-c", "print('served')"],
        },
    },
}


@pytest.fixture
def flyway(engine: Engine, image: str, compose_program: Program, tmp_path: Path) -> Iterator[Compose]:
    """The page's compose file for those who come from Flyway, in a folder with the password's file."""
    (text,) = blocks(part("From Flyway", "After"), "yaml")[:1]
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "docker-compose.yml").write_text(text)
    (folder / "docker-compose.override.yml").write_text(yaml.safe_dump(AROUND))
    secret_file(tmp_path).rename(folder / "postgres_password.txt")
    compose = Compose(engine, compose_program, folder)
    yield compose
    compose.down()


def test_the_compose_files_are_ones(engine: Engine, compose_program: Program, tmp_path: Path) -> None:
    texts = [text for section in SECTIONS.values() for text in blocks(section, "yaml") if "services:" in text]
    assert len(texts) == 6
    (tmp_path / "postgres_password.txt").write_text("x")
    for text in texts:
        (tmp_path / "docker-compose.yml").write_text(text)
        Compose(engine, compose_program, tmp_path).run("config", "-q")


def test_from_flyway(flyway: Compose) -> None:
    flyway.run("up", "-d", "db")
    ready = ("exec", flyway.inspect("db")["Id"], "pg_isready", "-q", "-h", "127.0.0.1", "-U", "shop")
    wait_for(lambda: flyway.engine.run(*ready, expect=None).returncode == 0, 60, "Postgres answers")
    flyway.psql(SHOP + FLYWAY)
    dump, revision = blocks(SECTIONS["From Flyway"], "sh")[0], blocks(SECTIONS["From Flyway"], "python")[0]
    words = dump.partition(">")[0].split()
    lines = flyway.engine.run("exec", flyway.inspect("db")["Id"], *words, "-U", "shop").stdout.splitlines()
    baseline = "".join(f"{line}\n" for line in lines if not line.startswith("\\"))
    files = {"migrations/baseline.sql": baseline, "migrations/versions/baseline.py": revision}
    write_project(flyway.folder, files, config=None)

    flyway.up()
    wait_for(lambda: "served" in flyway.logs("backend"), 60, "the backend has started")
    assert flyway.exit_code("migrator") == 0, flyway.logs("migrator")
    assert flyway.psql("SELECT version_num FROM alembic_version") == ["baseline"]
    assert flyway.psql("SELECT count(*) FROM flyway_schema_history") == ["2"]

    write_project(flyway.folder, {"migrations/versions/next.py": NEXT}, config=None)
    flyway.run("run", "--rm", "-T", "migrator")
    assert flyway.psql("SELECT version_num FROM alembic_version") == ["next"]
