"""The image without a shell, the slim one, images that are built on it, and a backend's image that it is put into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.containers import Migrator
from tests.engine.engine import ROOT, Engine
from tests.engine.images import LOCKED_DOWN, derive, figures, look, python
from tests.support.projects import linear_history

pytestmark = pytest.mark.engine

NO_SHELL = "migrator-test-no-shell:latest"
FROZEN = "migrator-test-frozen:latest"
BACKEND = "migrator-test-backend:latest"
WITH_BACKEND = "migrator-test-with-backend:latest"
ON_PYTHON = "migrator-test-on-python:latest"
LITERAL_LIMIT = 45.0
"""MB that all layers of the slim image add to a base that has Python."""
BACKUPS_OFF = ("-e", "MIGRATOR_BACKUP=off")
SHELLS = "for name in ('sh', 'bash', 'dash', 'rbash'): pathlib.Path('/usr/bin', name).unlink()"


@pytest.fixture(scope="module")
def no_shell(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image with every shell deleted."""
    lines = f'FROM {image}\nUSER 0:0\nRUN ["python", "-c", "import pathlib\\n{SHELLS}"]\nUSER 10001:10001\n'
    yield derive(engine, tmp_path_factory.mktemp("no-shell"), NO_SHELL, lines)
    engine.run("rmi", "-f", NO_SHELL, expect=None)


def test_no_shell_is_needed(migrator: Migrator, no_shell: str, project: Callable[..., Path]) -> None:
    gone = migrator.engine.run("run", "--rm", "--entrypoint", "sh", no_shell, "-c", "true", expect=None)
    assert gone.returncode == 127

    folder = project(revisions=linear_history(3))
    options = (*LOCKED_DOWN, "-v", f"{folder}:/app:ro")
    first = migrator.run("upgrade", "r002", options=options, image=no_shell)
    assert first.code == 0, first.output
    migrator.psql("INSERT INTO t1 VALUES (1, 'something to lose')")
    second = migrator.run("upgrade", options=options, image=no_shell)
    assert second.code == 0, second.output
    back = migrator.run("downgrade", "-1", options=options, image=no_shell)
    assert back.code == 0, back.output
    restored = migrator.run(
        "restore", "latest", "--to", f"{migrator.database}_copy", options=options, image=no_shell
    )
    assert restored.code == 0, restored.output

    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r002"]
    copy = migrator.server.psql("SELECT count(*) FROM t1", f"{migrator.database}_copy")
    assert copy == ["1"]


# -- slim ------------------------------------------------------------------------------------------------------


def test_the_slim_one_migrates_where_no_backup_is_asked_for(
    migrator: Migrator, slim_image: str, project: Callable[..., Path]
) -> None:
    folder = project(revisions=linear_history(3))
    options = (*LOCKED_DOWN, *BACKUPS_OFF, "-v", f"{folder}:/app:ro")
    for arguments in (("upgrade", "r001"), ("upgrade",), ("upgrade",), ("downgrade", "-1"), ("verify",)):
        ran = migrator.run(*arguments, options=options, image=slim_image)
        assert ran.code == (41 if arguments == ("verify",) else 0), ran.output
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r002"]


def test_the_slim_one_names_the_full_one_where_a_backup_is_due(
    migrator: Migrator, slim_image: str, project: Callable[..., Path]
) -> None:
    folder = project(revisions=linear_history(2))
    mounted = ("-v", f"{folder}:/app:ro")
    assert migrator.run("upgrade", "r001", options=(*BACKUPS_OFF, *mounted), image=slim_image).code == 0
    migrator.psql("INSERT INTO t1 VALUES (1, 'something to lose')")

    refused = migrator.run("upgrade", options=mounted, image=slim_image)
    assert refused.code == 36, refused.output
    assert "There is no pg_dump" in refused.output
    assert "migrator:0.0.0-tests-pg17" in refused.output
    assert "MIGRATOR_BACKUP=off" in refused.output

    bucket = ("-e", "MIGRATOR_BACKUP_URL=s3://shop-backups/here", *mounted)
    refused = migrator.run("backups", options=bucket, image=slim_image)
    assert refused.code == 10, refused.output
    assert "use migrator:0.0.0-tests, the full image" in refused.output

    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r001"]


@pytest.mark.parametrize("env", ["async_engine"])
def test_the_slim_one_has_every_driver(
    migrator: Migrator, slim_image: str, project: Callable[..., Path], env: str
) -> None:
    folder = project(revisions=linear_history(1), env=env)
    ran = migrator.run("upgrade", options=(*BACKUPS_OFF, "-v", f"{folder}:/app:ro"), image=slim_image)
    assert ran.code == 0, ran.output
    program = "import psycopg, psycopg2, asyncpg; print(psycopg.pq.version() > 0)"
    shown = migrator.engine.run("run", "--rm", "--entrypoint", "python", slim_image, "-c", program).stdout
    assert shown == "True\n"


# -- a server that is newer than the client ----------------------------------------------------------------------


def test_a_server_newer_than_the_client_is_refused_by_the_right_tag(
    migrator: Migrator, project: Callable[..., Path], tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(2))
    mounted = ("-v", f"{folder}:/app:ro")
    assert migrator.run("upgrade", "r001", options=mounted).code == 0
    migrator.psql("INSERT INTO t1 VALUES (1, 'something to lose')")
    older = tmp_path / "older"
    older.mkdir()
    for name in ("pg_dump", "pg_restore"):
        (older / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) 16.9'\n")
        (older / name).chmod(0o755)
    options = (*mounted, "-v", f"{older}:/older:ro", "-e", "MIGRATOR_PG_BIN=/older")

    refused = migrator.run("upgrade", options=options)

    assert refused.code == 36, refused.output
    assert "an older client cannot dump it" in refused.output
    assert "migrator:0.0.0-tests-pg17" in refused.output
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r001"]


# -- built on it, and put into another ---------------------------------------------------------------------------


@pytest.fixture
def frozen(engine: Engine, image: str, project: Callable[..., Path]) -> Iterator[str]:
    """A project's own image, its history frozen as docs/howto/freeze-the-history.md says."""
    folder = project(revisions=linear_history(2))
    lines = f'FROM {image}\nCOPY --chown=10001 . /app/\nRUN ["migrator", "freeze"]\n'
    (folder / ".dockerignore").write_text("Dockerfile\n.dockerignore\n")
    yield derive(engine, folder, FROZEN, lines)
    engine.run("rmi", "-f", FROZEN, expect=None)


def test_a_derived_image_can_freeze_its_history(migrator: Migrator, frozen: str) -> None:
    assert migrator.run("freeze", "--check", image=frozen, options=LOCKED_DOWN).code == 0
    assert migrator.run("upgrade", image=frozen, options=LOCKED_DOWN).code == 0
    again = migrator.run("upgrade", "--format", "json", image=frozen, options=LOCKED_DOWN)
    assert again.code == 0, again.output
    assert "manifest" not in again.stderr, "a stale or missing manifest is warned of"
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r002"]


@pytest.fixture(scope="module")
def python_base(engine: Engine) -> Iterator[str]:
    """A backend's image that has another Python, in another place."""
    standin = ROOT / "tests" / "engine" / "standins" / "python" / "Dockerfile"
    engine.build(ROOT / "tests" / "engine" / "projects" / "derived", BACKEND, "-f", str(standin))
    yield BACKEND
    engine.run("rmi", "-f", BACKEND, expect=None)


@pytest.fixture(scope="module")
def with_backend(engine: Engine, slim_image: str, python_base: str) -> Iterator[str]:
    """The example: migrator in a backend's image."""
    arguments = {"MIGRATOR_IMAGE": slim_image, "BACKEND_IMAGE": python_base}
    options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    engine.build(ROOT / "examples" / "backend-image", WITH_BACKEND, *options)
    yield WITH_BACKEND
    engine.run("rmi", "-f", WITH_BACKEND, expect=None)


def test_a_backend_runs_it_with_its_own_python_and_its_own_pins(
    migrator: Migrator, with_backend: str
) -> None:
    options = (*LOCKED_DOWN, *BACKUPS_OFF, "--entrypoint", "python3")
    ran = migrator.run("/opt/migrator/entrypoint.py", "upgrade", image=with_backend, options=options)
    assert ran.code == 0, ran.output
    assert migrator.psql("SELECT name FROM customers") == ["SQLAlchemy 2.0.44"], (
        "the backend's, not migrator's"
    )
    again = migrator.run("-m", "migrator", "upgrade", image=with_backend, options=options)
    assert again.code == 0, again.output
    shown = migrator.engine.run(
        "run", "--rm", "--entrypoint", "python3", with_backend, "-c", "import sys; print(sys.prefix)"
    )
    assert shown.stdout == "/usr/local\n"


def test_on_debians_own_python_the_copied_folder_runs_by_itself(
    migrator: Migrator, slim_image: str, backend_image: str, project: Callable[..., Path], tmp_path: Path
) -> None:
    lines = f"FROM {slim_image} AS migrator\nFROM {backend_image}\nCOPY --from=migrator /opt/migrator /opt/migrator\n"
    tag = derive(migrator.engine, tmp_path, "migrator-test-copied:latest", lines)
    try:
        folder = project(revisions=linear_history(2))
        options = (*LOCKED_DOWN, *BACKUPS_OFF, "-v", f"{folder}:/app:ro", "-w", "/app")
        entrypoint = ("--entrypoint", "/opt/migrator/bin/python")
        ran = migrator.run(
            "/opt/migrator/entrypoint.py", "upgrade", image=tag, options=(*options, *entrypoint)
        )
        assert ran.code == 0, ran.output
        assert migrator.psql("SELECT version_num FROM alembic_version") == ["r002"]
    finally:
        migrator.close()
        migrator.containers.clear()
        migrator.engine.run("rmi", "-f", tag, expect=None)


@pytest.fixture(scope="module")
def on_python(engine: Engine, python_base: str) -> Iterator[str]:
    """The slim image on a base that has Python."""
    engine.build(ROOT, ON_PYTHON, "--build-arg=VARIANT=slim", f"--build-arg=BASE_IMAGE={python_base}")
    yield ON_PYTHON
    engine.run("rmi", "-f", ON_PYTHON, expect=None)


def test_on_a_base_with_python_it_uses_that_and_adds_little(
    migrator: Migrator, on_python: str, project: Callable[..., Path]
) -> None:
    found = figures(look(migrator.engine, "size", on_python))
    assert 10 < sum(size for name, (size, _) in found.items() if name != "the base image") <= LITERAL_LIMIT, (
        found
    )

    folder = project(revisions=linear_history(2))
    ran = migrator.run(
        "upgrade", options=(*LOCKED_DOWN, *BACKUPS_OFF, "-v", f"{folder}:/app:ro"), image=on_python
    )
    assert ran.code == 0, ran.output
    assert python(migrator.engine, on_python, "import sys; print(sys.base_prefix)") == "/usr/local\n"
