"""A Flask application with Flask-Migrate: its env.py works within the context that `flask db` pushes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.histories.projects import History, Installation, run
from tests.histories.test_histories import LEDGER, difference
from tests.support.runner import Runner
from tests.support.servers import Database, Server

pytestmark = pytest.mark.histories

APPLICATION = """
import os
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()
migrate = Migrate(transaction_per_migration=True)

class Customer(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String(80))

@migrate.configure
def note(config):
    config.set_main_option("shop.noted", "yes")
    return config

def create_app():
    with open(os.environ["LOADS"], "a") as file: print("loaded", file=file)
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    migrate.init_app(app, db)
    return app
"""
NOTED = "assert context.config.get_main_option('shop.noted') == 'yes'\n"


@pytest.fixture(scope="module")
def installed() -> Installation:
    return History("flask-migrate", "flask_migrate/templates/flask/alembic.ini.mako", "", 2).install()


@pytest.fixture
def migrator(installed: Installation, tmp_path: Path, _clean_environment: None) -> Iterator[Runner]:
    """The `migrator` that is installed beside Flask."""
    runner = Runner(tmp_path, [str(installed.bin / "migrator")])
    yield runner
    runner.close()


@pytest.fixture
def theirs(server: Server) -> Iterator[Database]:
    """The database that `flask db upgrade` migrates."""
    database = server.create_database()
    yield database
    server.drop_database(database.name)


@pytest.fixture
def shop(installed: Installation, theirs: Database, tmp_path: Path) -> Path:
    """A project as `flask db init` and `flask db migrate` make it, migrated by `flask db upgrade` once."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.py").write_text(APPLICATION)
    flask(installed, folder, theirs, "init")
    flask(installed, folder, theirs, "migrate", "-m", "customers")
    file = folder / "migrations" / "env.py"
    file.write_text(file.read_text() + f"\n{NOTED}")
    flask(installed, folder, theirs, "upgrade")
    return folder


def flask(installed: Installation, folder: Path, database: Database, *words: str) -> None:
    url = database.url.replace("postgresql:", "postgresql+psycopg2:", 1)
    env = {**os.environ, "FLASK_APP": "shop:create_app", "DATABASE_URL": url, "LOADS": os.devnull}
    run(str(installed.bin / "flask"), "db", *words, cwd=folder, env=env)


def test_it_ends_where_flask_db_upgrade_ends(
    shop: Path, migrator: Runner, database: Database, theirs: Database, tmp_path: Path
) -> None:
    loads = tmp_path / "loads"
    loads.write_text("")
    env = {"FLASK_APP": "shop:create_app", "LOADS": str(loads), "MIGRATOR_BACKUP": "off"}
    result = migrator(cwd=shop, env=env, database=database)
    assert result.code == 0, result
    assert difference(theirs.dump(), database.dump(LEDGER)) == ""
    assert loads.read_text() == "loaded\n"
    for words in ("upgrade", "check", "status"):
        again = migrator(*words.split(), cwd=shop, env=env, database=database)
        assert again.code == 0, again
    assert loads.read_text() == "loaded\n", "nothing was to be done"
    back = migrator("alembic", "downgrade", "-1", cwd=shop, env=env, database=database)
    assert back.code == 0, back
    assert database.psql("SELECT to_regclass('customer') IS NULL") == [(True,)]


def test_the_application_is_named_in_flaskenv(shop: Path, migrator: Runner, database: Database) -> None:
    (shop / ".flaskenv").write_text("FLASK_APP=shop:create_app\n")
    result = migrator(cwd=shop, env={"LOADS": os.devnull}, database=database)
    assert result.code == 0, result
    result = migrator(
        "-c",
        "migrations/alembic.ini",
        "downgrade",
        "-1",
        "--yes",
        cwd=shop,
        env={"LOADS": os.devnull},
        database=database,
    )
    assert result.code == 0, result


def test_revisions_that_import_the_application_within_its_context(
    shop: Path, migrator: Runner, database: Database, theirs: Database
) -> None:
    """The way of Superset: what they import does not load outside of the context, and not twice in one process."""
    (shop / "shop_models.py").write_text(
        "from flask import current_app\nfrom shop import db\nassert current_app.name == 'shop'\n"
        "class Order(db.Model):\n    id = db.Column(db.Integer, primary_key=True)\n"
    )
    (file,) = (shop / "migrations" / "versions").glob("*.py")
    file.write_text(f"{file.read_text()}\nfrom shop_models import Order\n")
    env = {"FLASK_APP": "shop:create_app", "LOADS": os.devnull, "MIGRATOR_BACKUP": "off"}
    for words in ("upgrade", "check", "upgrade"):
        result = migrator(words, cwd=shop, env=env, database=database)
        assert result.code == 0, result
    assert difference(theirs.dump(), database.dump(LEDGER)) == ""


BAD = {
    "none:create_app": (10, "FLASK_APP=none:create_app"),
    "shop:create_app": (31, "failed to load: KeyError: 'LOADS'"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_application_that_does_not_load(
    name: str, shop: Path, migrator: Runner, database: Database
) -> None:
    code, said = BAD[name]
    result = migrator(cwd=shop, env={"FLASK_APP": name}, database=database)
    assert result.code == code, result
    assert said in result.logs[-1]["message"], result
    assert database.psql("SELECT to_regclass('alembic_version') IS NULL") == [(True,)]


LOOKS = ("check", "status --exit-code", "verify", "wait-for-current --wait-timeout 1s")
READS_ARGV = """
import os, sys
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()

class Customer(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String(80))

def create_app():
    program, *words = sys.argv
    with open(os.environ["LOADS"], "a") as file: print(os.path.basename(program), *words, file=file)
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    Migrate(app, db)
    with app.app_context():
        if "db" not in words:
            db.create_all()
        if db.inspect(db.engine).has_table("loads"):
            db.session.execute(db.text("INSERT INTO loads VALUES (1)"))
            db.session.commit()
    return app
"""


def test_an_application_sees_the_words_of_flask_db_and_writes_nothing_where_a_command_only_looks(
    shop: Path, migrator: Runner, database: Database, tmp_path: Path
) -> None:
    (shop / "shop.py").write_text(READS_ARGV)
    for file in ((shop / "migrations" / "env.py"), *(shop / "migrations" / "versions").glob("*.py")):
        file.write_text(file.read_text().replace(NOTED, "") + "\nimport shop\n" * (file.name != "env.py"))
    loads = tmp_path / "loads"
    env = {"FLASK_APP": "shop:create_app", "LOADS": str(loads), "MIGRATOR_BACKUP": "off"}
    for words, code in zip(LOOKS, (3, 3, 41, 24), strict=True):
        result = migrator(*words.split(), cwd=shop, env=env, database=database)
        assert result.code == code, result
        assert database.psql("SELECT to_regclass('customer') IS NULL") == [(True,)], words
    result = migrator(cwd=shop, env=env, database=database)
    assert result.code == 0, result
    named = env | {"MIGRATOR_VERSION_TABLE": "alembic_version"}
    result = migrator("-x", "a=b", "downgrade", "-1", cwd=shop, env=named, database=database)
    assert result.code == 35, result
    assert set(loads.read_text().splitlines()) == {"flask db upgrade", "flask db upgrade -x a=b"}

    database.execute("CREATE TABLE loads (n int)")
    for words in LOOKS:
        result = migrator(*words.split(), cwd=shop, env=env, database=database)
        assert result.code == 31, result
        assert "read-only transaction" in result.logs[-1]["message"], result
        assert "write nothing while it loads" in result.logs[-1]["message"], result
    assert database.psql("SELECT count(*) FROM loads") == [(0,)]
    result = migrator(cwd=shop, env=env, database=database)
    assert result.code == 0, result
