"""What prepares the ground for env.py: entered before it, left after it, and only where env.py is loaded at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.env_text import env
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]
THREE = linear_history(3)
NAME = {"MIGRATOR_BOOTSTRAP": "shop.ground:prepare", "MIGRATOR_BACKUP": "off"}

# It writes down that it was there, and hands env.py the connection, as an application's own command does.
GROUND = """
import contextlib, os, pathlib
from sqlalchemy import create_engine

marks = pathlib.Path(os.environ["MARKS"])

def mark(text):
    with marks.open("a") as file: print(text, file=file)

mark("imported")

@contextlib.contextmanager
def prepare(config):
    mark(f"entered {config.cmd_opts.x} {config.get_main_option('sqlalchemy.url') == os.environ['DATABASE_URL']}")
    with create_engine(os.environ["DATABASE_URL"]).begin() as connection:
        config.attributes["connection"] = connection
        yield
    mark("left")
"""
ENV = """
from alembic import context
from shop.ground import mark

connection = context.config.attributes["connection"]
mark("env.py")
context.configure(connection=connection)
context.run_migrations()
"""


def files(ground: str = GROUND) -> dict[str, str]:
    return {"migrations/env.py": ENV, "shop/__init__.py": "", "shop/ground.py": ground}


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    place = tmp_path / "marks"
    place.write_text("")
    return place


def test_it_is_entered_before_env_and_left_after_it(
    project: Project, run_migrator: Runner, database: Database, marks: Path
) -> None:
    folder = project(files(), revisions=THREE)
    variables = {**NAME, "MARKS": str(marks)}
    result = run_migrator("-x", "tenant=one", cwd=folder, database=database, env=variables)
    assert result.code == 0, result
    expected = ["imported", "entered ['tenant=one'] True", "env.py", "left"]
    assert marks.read_text().splitlines() == expected
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]

    for words in ("upgrade", "status", "check", "verify", "history"):
        again = run_migrator(*words.split(), cwd=folder, database=database, env=variables)
        assert again.code == 0, again
    assert marks.read_text().splitlines() == expected, "nothing was to be done"

    back = run_migrator("downgrade", "-1", cwd=folder, database=database, env=variables)
    assert back.code == 0, back
    assert len(marks.read_text().splitlines()) == 2 * len(expected)


def test_alembics_own_commands_have_it_too(
    project: Project, run_migrator: Runner, database: Database, marks: Path
) -> None:
    folder = project(files(), revisions=THREE)
    variables = {**NAME, "MARKS": str(marks)}
    result = run_migrator("alembic", "upgrade", "r002", cwd=folder, database=database, env=variables)
    assert result.code == 0, result
    assert marks.read_text().splitlines() == ["imported", "entered None True", "env.py", "left"]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


PLAIN = "def prepare(config): pass\n"
MANAGER = "import contextlib\n@contextlib.contextmanager\ndef prepare(config):\n"
BAD = {
    "no module": ("none.such:prepare", PLAIN, 10, "there is no module none"),
    "no such name": ("shop.ground:prepares", PLAIN, 10, "shop.ground has no prepares"),
    "nothing to call": ("shop.ground:prepare", "prepare = 1\n", 10, "prepare is int, which cannot be called"),
    "no context manager": ("shop.ground:prepare", PLAIN, 10, "returns NoneType, not a context manager"),
    "not decorated": (
        "shop.ground:prepare",
        "def prepare(config): yield\n",
        10,
        "returns generator, not a context",
    ),
    "not a name": ("shop.ground.prepare", PLAIN, 10, "MIGRATOR_BOOTSTRAP: 'shop.ground.prepare' does not"),
    "its import fails": ("shop.ground:prepare", "import nowhere\n", 31, "No module named 'nowhere'"),
    "it raises": (
        "shop.ground:prepare",
        f"{MANAGER}    raise LookupError('no key')\n    yield",
        31,
        "no key",
    ),
    "it exits": ("shop.ground:prepare", "raise SystemExit(3)\n", 31, "sys.exit(3)"),
    "it moves the revisions": (
        "shop.ground:prepare",
        f"{MANAGER}    config.set_main_option('version_' + 'locations', 'elsewhere')\n    yield\n",
        31,
        "changed the folders of the revisions",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_that_is_bad_changes_nothing(
    kind: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    name, ground, code, said = BAD[kind]
    folder = project({**files(ground), **env()}, revisions=THREE)
    result = run_migrator(cwd=folder, database=database, env={**NAME, "MIGRATOR_BOOTSTRAP": name})
    assert result.code == code, result
    assert said in result.logs[-1]["message"], result
    assert "was not changed" in result.logs[-1]["message"], result
    assert database.psql("SELECT to_regclass('alembic_version') IS NULL") == [(True,)]


def test_a_failing_revision_goes_through_it_and_is_told_as_such(
    project: Project, run_migrator: Runner, database: Database, marks: Path
) -> None:
    broken = [*THREE[:2], Revision("r003", "r002", "raise ValueError('broken here')")]
    folder = project(files(), revisions=broken)
    result = run_migrator(cwd=folder, database=database, env={**NAME, "MARKS": str(marks)})
    assert result.code == 39, result
    assert "r003 failed: ValueError: broken here" in result.logs[-1]["message"], result
    assert database.psql("SELECT to_regclass('t1') IS NULL") == [(True,)], "it rolled its transaction back"


def test_one_that_fails_at_its_end_tells_what_was_committed(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    folder = project(
        {**files(f"{MANAGER}    yield\n    raise OSError('no way out')\n"), **env()}, revisions=THREE
    )
    result = run_migrator(cwd=folder, database=database, env=NAME)
    assert result.code == 40, result
    assert "shop.ground:prepare failed: OSError: no way out" in result.logs[-1]["message"], result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]


PLACES = f"{MANAGER}    config.set_main_option('version_locations', '%(here)s/migrations/steps')\n    yield\n"


def test_it_says_where_the_revisions_are(project: Project, run_migrator: Runner, database: Database) -> None:
    folder = project({**files(PLACES), **env()}, revisions=THREE)
    (folder / "migrations" / "versions").rename(folder / "migrations" / "steps")
    result = run_migrator(cwd=folder, database=database, env=NAME)
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
    again = run_migrator("check", cwd=folder, database=database, env=NAME)
    assert again.code == 0, again
    listed = run_migrator("history", "--format", "json", cwd=folder, env=NAME)
    assert len(listed.answer) == 3, listed
