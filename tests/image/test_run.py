"""The image from outside: who it runs as, what it is made of, and that signals reach it."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.containers import Migrator, wait_for
from tests.engine.engine import Engine, reach, sudo
from tests.engine.fixtures import PLANTED_ROOTS, VERSION
from tests.support.pace import Stopwatch
from tests.support.projects import Revision, linear_history

pytestmark = pytest.mark.engine

LOCKED_DOWN = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
BUILD_TOOLS = {"pip", "pip3", "gcc", "cc", "g++", "make", "ld", "strip", "uv", "easy_install"}
BUILD_PACKAGES = {"pip", "setuptools", "wheel", "ensurepip"}
STOP_SECONDS = 10


def configuration(engine: Engine, image: str) -> dict[str, Any]:
    """Return what the image says about itself."""
    return dict(json.loads(engine.run("image", "inspect", image).stdout)[0]["Config"])


@pytest.fixture(scope="module")
def archive(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as `docker save` writes it."""
    path = tmp_path_factory.mktemp("archive") / "image.tar"
    with path.open("wb") as output:
        command = [*reach(engine.docker, engine.settings), "save", image]
        subprocess.run(command, stdout=output, env=engine.process_environment, check=True, timeout=120)
    return path


def layers(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open each layer of a saved image."""
    with tarfile.open(archive) as whole:
        manifest = json.load(whole.extractfile("manifest.json") or io.BytesIO())
        for name in manifest[0]["Layers"]:
            with tarfile.open(fileobj=whole.extractfile(name)) as layer:
                yield layer


def names(archive: Path) -> set[str]:
    """Return the path of every file in the image."""
    return {
        member.name.removeprefix("./") for layer in layers(archive) for member in layer if member.isfile()
    }


def test_it_runs_python_itself_as_a_user_that_is_not_root(engine: Engine, image: str) -> None:
    config = configuration(engine, image)
    assert config["User"] == "10001:10001"
    assert config["WorkingDir"] == "/app"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Entrypoint"] == ["/opt/migrator/bin/python", "/opt/migrator/entrypoint.py"]  # no shell
    assert not config.get("Volumes")


def test_it_says_what_it_is(engine: Engine, image: str) -> None:
    labels = configuration(engine, image)["Labels"]
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"] == "migrator"
    assert labels[f"{prefix}version"] == VERSION
    assert len(labels[f"{prefix}revision"]) == 40
    assert labels[f"{prefix}created"].startswith("20")
    assert labels[f"{prefix}licenses"] == "Apache-2.0"


def test_nothing_that_builds_is_left_in_it(archive: Path) -> None:
    found = names(archive)
    programs = {name for name in found if "bin/" in name and name.rpartition("/")[2] in BUILD_TOOLS}
    packages = {name for name in found if BUILD_PACKAGES & set(name.split("/")[:-1])}
    assert programs == set()
    assert packages == set()


def test_its_bytecode_is_compiled(archive: Path) -> None:
    found = {name for name in names(archive) if name.startswith("opt/migrator/")}
    sources = [name for name in found if name.endswith(".py")]
    missing = [
        source
        for source in sources
        if (Path(source).parent / "__pycache__" / f"{Path(source).stem}.cpython-313.pyc").as_posix()
        not in found
    ]
    assert len(sources) > 300
    assert missing == []


def test_the_tls_roots_of_the_build_are_in_no_layer(archive: Path) -> None:
    planted = PLANTED_ROOTS.encode()
    for layer in layers(archive):
        for member in layer:
            content = layer.extractfile(member).read() if member.isfile() else b""  # type: ignore[union-attr]
            assert planted not in content, member.name


def test_its_dependencies_work(engine: Engine, image: str) -> None:
    program = (
        "import alembic, asyncpg, psycopg, psycopg2, sqlalchemy.ext.asyncio, greenlet; print('all there')"
    )
    result = engine.run("run", "--rm", *LOCKED_DOWN, "--entrypoint", "python", image, "-c", program)
    assert result.stdout == "all there\n"


@pytest.mark.parametrize("user", ["10001:10001", "4242:4242", "0:0"])
def test_any_user_id_migrates_on_a_read_only_root(
    migrator: Migrator, project: Callable[..., Path], user: str
) -> None:
    folder = project(revisions=linear_history(3))
    options = (*LOCKED_DOWN, "--user", user, "-v", f"{folder}:/app:ro")

    first = migrator.run("upgrade", "r001", options=options)
    assert first.code == 0, first.output
    migrator.psql("INSERT INTO t1 VALUES (1, 'something to lose')")
    second = migrator.run("upgrade", options=options)
    assert second.code == 0, second.output

    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r003"]
    assert any(name.endswith(".json") for name in migrator.backup_files()), migrator.backup_files()


def test_an_outcome_names_the_image(migrator: Migrator, project: Callable[..., Path]) -> None:
    folder = project(revisions=linear_history(1))
    ran = migrator.run("upgrade", "--format", "json", options=("-v", f"{folder}:/app:ro"))
    assert ran.code == 0, ran.output
    assert ran.answer["image_version"] == VERSION


@pytest.mark.parametrize("signal", ["TERM", "INT"])
def test_a_stopped_run_rolls_back_and_says_so_quickly(
    migrator: Migrator, project: Callable[..., Path], signal: str
) -> None:
    sleeping = Revision("r002", "r001", "CREATE TABLE t2 (id int); SELECT pg_sleep(300)", "DROP TABLE t2")
    folder = project(revisions=[*linear_history(1), sleeping])
    options = ("-v", f"{folder}:/app:ro", f"--stop-signal=SIG{signal}")
    container = migrator.start("upgrade", options=options)
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pg_sleep(300)%'"
    wait_for(lambda: int(migrator.psql(f"{query} AND pid <> pg_backend_pid()")[0]), 60, "r002 runs")
    first_process = sudo("cat", f"/proc/{migrator.inspect(container)['State']['Pid']}/cmdline").stdout
    assert first_process.startswith("/opt/migrator/bin/python"), first_process

    with Stopwatch() as watch:
        migrator.engine.run("stop", "-t", "60", container)

    ran = migrator.finished(container)
    assert ran.code == 23, ran.output
    assert watch.within(STOP_SECONDS), ran.output
    assert migrator.psql("SELECT to_regclass('t2') IS NULL") == ["t"]
    others = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    wait_for(lambda: migrator.psql(others) == ["0"], 10, "no session is left")


def test_a_run_that_waits_for_postgres_can_be_stopped(
    migrator: Migrator, project: Callable[..., Path]
) -> None:
    folder = project(revisions=linear_history(1))
    options = (
        "-v",
        f"{folder}:/app:ro",
        "-e",
        "POSTGRES_HOST=nowhere.invalid",
        "-e",
        "MIGRATOR_WAIT_TIMEOUT=5m",
    )
    container = migrator.start("upgrade", options=options)
    wait_for(lambda: "nowhere.invalid" in migrator.engine.logs(container), 30, "it waits")

    with Stopwatch() as watch:
        migrator.engine.run("stop", "-t", "60", container)

    assert migrator.finished(container).code == 23
    assert watch.within(STOP_SECONDS)
