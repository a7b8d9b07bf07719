"""Applications that have a command of their own to migrate end, under migrator, where that command ends.

Unmodified, from an empty database to head, and back by one where their authors support it; where they do not, migrator
says so before anything runs. The databases are compared as pg_dump writes them, rows and version tables included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.histories.applications import APPLICATIONS, Application
from tests.histories.projects import Installation, run
from tests.histories.test_histories import LEDGER, difference
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server

pytestmark = pytest.mark.histories


@pytest.fixture(params=APPLICATIONS, ids=lambda application: application.history.name)
def application(request: pytest.FixtureRequest) -> Application:
    found: Application = request.param
    return found


@pytest.fixture
def installed(application: Application) -> Installation:
    return application.history.install()


@pytest.fixture
def migrator(installed: Installation, tmp_path: Path, _clean_environment: None) -> Iterator[Runner]:
    """The `migrator` that is installed beside the application."""
    runner = Runner(tmp_path, [str(installed.bin / "migrator")])
    yield runner
    runner.close()


@pytest.fixture
def theirs(server: Server) -> Iterator[Database]:
    """The database that the application's own command migrates."""
    database = server.create_database()
    yield database
    server.drop_database(database.name)


def told(application: Application, folder: Path) -> dict[str, str]:
    """Return the variables that migrator is given."""
    variables = {**application.environment(folder), "MIGRATOR_BACKUP": "off"}
    if application.history.address_variable:
        variables["MIGRATOR_URL_VARIABLE"] = application.history.address_variable
    if application.ground:
        (folder / "ground.py").write_text(application.ground)
        variables["MIGRATOR_BOOTSTRAP"] = "ground:prepare"
    if "@" in application.destination:
        variables["MIGRATOR_DESTINATION"] = application.destination
    return variables


def test_it_ends_where_its_own_command_ends(
    application: Application,
    installed: Installation,
    migrator: Runner,
    database: Database,
    theirs: Database,
    tmp_path: Path,
) -> None:
    application.run(application.command, installed, theirs, tmp_path)
    if application.first:
        url = database.url.replace("postgresql:", "postgresql+psycopg2:", 1)
        run(str(installed.bin / "python"), "-c", application.first, url)
    variables = told(application, tmp_path)
    folder = application.working_folder(installed, tmp_path)

    def each(*words: str, code: int = 0) -> list[Result]:
        """Run migrator for each section of the ini."""
        results = []
        for section in application.sections or ("alembic",):
            command = (
                "-c",
                str(application.ini(installed, tmp_path)),
                "-n",
                section,
                "--format",
                "json",
                *words,
            )
            results.append(migrator(*command, cwd=folder, env=variables, database=database))
            assert results[-1].code == code, results[-1]
        return results

    done = each(*application.options, "upgrade", application.destination)
    assert sum(len(result.answer["revisions"]) for result in done) == application.history.revisions
    assert difference(theirs.dump(), database.dump(LEDGER)) == ""

    for again in each("upgrade", application.destination):
        assert again.answer["revisions"] == [], again
    if "MIGRATOR_DESTINATION" in variables:
        each("check")

    if application.back:
        application.run(application.back, installed, theirs, tmp_path)
        each("downgrade", "-1", "--yes")
        assert difference(theirs.dump(), database.dump(LEDGER)) == ""
        each("check", code=3)
    if application.one_way:
        (refused,) = each("downgrade", "-1", "--yes", code=31)
        assert application.one_way in refused.logs[-1]["message"], refused
        assert difference(theirs.dump(), database.dump(LEDGER)) == ""
    if application.back:
        each(*application.options, "upgrade", application.destination)
