"""A project with FastAPI Users, made with Alembic's own commands.

Its revisions import `fastapi_users_db_sqlalchemy`. That and `fastapi_users.db` import each other: where the former
comes first, the latter lacks the tables from then on, and env.py cannot import the application any more.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.histories.projects import History, Installation, run
from tests.histories.test_histories import LEDGER, difference
from tests.support.runner import Runner
from tests.support.servers import Database

pytestmark = pytest.mark.histories

USERS = """
from fastapi_users.db import SQLAlchemyBaseUserTableUUID, SQLAlchemyUserDatabase
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase

from app.settings import SCHEMA

class Base(DeclarativeBase):
    metadata = MetaData(schema=SCHEMA)

class User(SQLAlchemyBaseUserTableUUID, Base):
    pass
"""
FILES = {
    ".env": "USERS_SCHEMA=users\n",
    "app/__init__.py": "",
    "app/settings.py": "import os\nSCHEMA = os.environ.get('USERS_SCHEMA')\n",
    "app/users.py": USERS,
}
FIRST = """
import os
for line in open(os.path.join(os.path.dirname(__file__), "..", ".env")):
    os.environ.setdefault(*line.strip().split("="))
from app.users import Base
"""
DATA = """\"\"\"the first user

Revision ID: 0002
\"\"\"
from alembic import op
from app.users import User

revision = "0002"
down_revision = {down!r}

def upgrade():
    op.bulk_insert(User.__table__, [dict(
        id="00000000-0000-0000-0000-000000000001", email="a@example.org", hashed_password="x",
        is_active=True, is_superuser=False, is_verified=False,
    )])

def downgrade():
    op.execute(User.__table__.delete())
"""


@pytest.fixture(scope="module")
def installed() -> Installation:
    return History("fastapi-users", "", "0002", 2).install()


@pytest.fixture
def migrator(installed: Installation, tmp_path: Path, _clean_environment: None) -> Runner:
    """The `migrator` that is installed beside FastAPI Users."""
    return Runner(tmp_path, [str(installed.bin / "migrator")])


@pytest.fixture
def project(installed: Installation, database: Database, tmp_path: Path) -> Path:
    """A project as `alembic init` and `alembic revision --autogenerate` make it."""
    folder = tmp_path / "project"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    plain(installed, folder, "init", "migrations")
    url = database.url.replace("postgresql:", "postgresql+psycopg2:", 1).replace("%", "%%")
    replace(folder / "alembic.ini", "driver://user:pass@localhost/dbname", url)
    env = folder / "migrations" / "env.py"
    replace(env, "target_metadata = None", "target_metadata = Base.metadata")
    env.write_text(FIRST + env.read_text())
    replace(
        folder / "migrations" / "script.py.mako",
        "from alembic import op",
        "from alembic import op\nimport fastapi_users_db_sqlalchemy",
    )
    plain(installed, folder, "revision", "--autogenerate", "-m", "users", "--rev-id", "0001")
    (folder / "migrations" / "versions" / "0002.py").write_text(DATA.format(down="0001"))
    return folder


def plain(installed: Installation, folder: Path, *words: str) -> None:
    run(str(installed.bin / "alembic"), *words, cwd=folder, env=dict(os.environ))


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{old} is not in {file}"
    file.write_text(text.replace(old, new))


def test_it_ends_where_plain_alembic_ends(
    installed: Installation, project: Path, migrator: Runner, database: Database
) -> None:
    (first,) = (project / "migrations" / "versions").glob("0001*.py")
    assert "fastapi_users_db_sqlalchemy.generics.GUID()" in first.read_text()
    database.execute("CREATE SCHEMA users")
    theirs = database.server.create_database()
    theirs.execute("CREATE SCHEMA users")
    ini = project / "alembic.ini"
    replace(ini, f"/{database.name}", f"/{theirs.name}")
    plain(installed, project, "upgrade", "head")
    assert theirs.psql("SELECT email FROM users.user") == [("a@example.org",)]

    variables = {"MIGRATOR_BACKUP": "off"}

    def each(words: str, code: int = 0) -> None:
        result = migrator(*words.split(), cwd=project, env=variables, database=database)
        assert result.code == code, result

    for words in ("history", "check", "upgrade", "status", "verify", "upgrade", "freeze", "upgrade"):
        each(words, 3 if words == "check" else 0)
    assert difference(theirs.dump(), database.dump(LEDGER)) == ""
    plain(installed, project, "downgrade", "-1")
    each("downgrade -1")
    assert difference(theirs.dump(), database.dump(LEDGER)) == ""
    database.server.drop_database(theirs.name)
    migrator.close()
