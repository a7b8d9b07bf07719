"""Fixtures: real servers, a fresh database per test, little projects, and the real command.

    def test_upgrade(database, project, run_migrator):
        folder = project(revisions=linear_history(3))
        result = run_migrator("upgrade", cwd=folder, database=database)
        assert result.code == 0, result
        assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]

`server` and `database` are Debian's Postgres; `each_server` and `each_database` run a test on every major.
A test fails if the planted password comes out anywhere: `run_migrator` searches output, logs, reports,
backups and process arguments; `database` searches migrator's own tables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.support import installations, leaks
from tests.support.projects import Revision, write_project
from tests.support.runner import Runner, Running
from tests.support.servers import Database, Server

pytest_plugins = ["tests.engine.fixtures"]

MAJORS = ("debian", "embedded")
OURS = ("MIGRATOR_", "POSTGRES_", "PG", "SQLALCHEMY_")


def pytest_configure(config: pytest.Config) -> None:
    """Have the servers installed before workers start, none of which is to see a half installed package."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        installations.debian()


class ByPlace(LoadScopeScheduling):  # type: ignore[misc] # xdist has no types
    """Keep with one worker what shares something: a file, the container engine, the real projects' installations.

    xdist's own groups do not reach its scheduler: they are written into ids that pytest 9 has cached by then.
    """

    def _split_scope(self, nodeid: str) -> str:
        """Return what a test shares with others."""
        place = nodeid.partition("::")[0]
        shared = {"tests/engine/": "engine", "tests/image/": "engine", "tests/histories/": "histories"}
        return next((name for folder, name in shared.items() if place.startswith(folder)), place)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what one worker has to do alone and takes longest: the container engine's tests, the real projects."""
    alone = ("tests/engine/", "tests/image/", "tests/histories/")
    items.sort(key=lambda item: not item.nodeid.startswith(alone))
    for item in items:
        if {"servers", "private_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByPlace:
    """Hand the tests out by what they share."""
    return ByPlace(config, log)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away every variable that could name a database or change a setting."""
    for name in list(os.environ):
        if name.startswith(OURS) or name in {"DATABASE_URL", "ALEMBIC_CONFIG"}:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """Return the session's server of a kind, starting it when a test first asks."""
    started: dict[str, Server] = {}

    def get(kind: str) -> Server:
        if kind not in started:
            server = started[kind] = Server(installations.binaries(kind))
            server.start()
        return started[kind]

    yield get
    for server in started.values():
        server.remove()


@pytest.fixture(scope="session")
def server(servers: Callable[[str], Server], request: pytest.FixtureRequest) -> Server:
    """Debian's Postgres, or the kind given by `indirect`. It is shared: see `private_server` to break one."""
    return servers(getattr(request, "param", "debian"))


@pytest.fixture(scope="session", params=MAJORS)
def each_server(servers: Callable[[str], Server], request: pytest.FixtureRequest) -> Server:
    """Every server, one after another."""
    return servers(request.param)


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    """An empty database of its own on `server`."""
    yield from _fresh(server)


@pytest.fixture
def each_database(each_server: Server) -> Iterator[Database]:
    """An empty database of its own on every server."""
    yield from _fresh(each_server)


def _fresh(server: Server) -> Iterator[Database]:
    database = server.create_database()
    yield database
    if server.has_database(
        database.name
    ):  # what a test has set for everyone, a timeout say, is not for the search
        server.psql(f'ALTER DATABASE "{database.name}" RESET ALL')
    found = leaks.find_in_tables(database) if server.has_database(database.name) else []
    server.drop_database(database.name)
    assert not found, "the planted password got into the database:\n" + "\n".join(found)


@pytest.fixture
def private_server() -> Iterator[Callable[..., Server]]:
    """Make servers for one test alone: `private_server("embedded", settings={"max_connections": "5"})`.

    `start=False` returns it stopped, its port free.
    """
    made: list[Server] = []

    def make(
        kind: str = "debian", *, settings: Mapping[str, str] | None = None, start: bool = True
    ) -> Server:
        server = Server(installations.binaries(kind), settings=settings)
        made.append(server)
        if start:
            server.start()
        return server

    yield make
    for server in made:
        server.remove()


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Path]:
    """Write an Alembic project below the test's folder; see `write_project`. `name=` makes a second one."""

    def write(
        files: Mapping[str, str] | None = None,
        *,
        revisions: Sequence[Revision] = (),
        name: str = "project",
        **options: Any,
    ) -> Path:
        return write_project(tmp_path / name, files, revisions=revisions, **options)

    return write


@pytest.fixture
def run_migrator(tmp_path: Path, _clean_environment: None) -> Iterator[Runner]:
    """Run the real command to its end and return a `Result`; `run_migrator.backups` is its backup folder."""
    runner = Runner(tmp_path)
    yield runner
    runner.close()


@pytest.fixture
def start_migrator(run_migrator: Runner) -> Callable[..., Running]:
    """Start the real command and return it running, to send it signals; searched as `run_migrator` is."""
    return run_migrator.start
