"""An env.py that migrates several databases: Alembic's own `multidb` template, unmodified.

One command brings all of them to head, each under its own lock, with its own backup and ledger; they end where
`alembic upgrade head` ends, and whatever fails, the next run finishes the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import alembic
import pytest

from tests.support import plain_alembic
from tests.support.projects import linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import LEDGER, Database, Server

Project = Callable[..., Path]

TEMPLATE = (Path(alembic.__file__).parent / "templates" / "multidb" / "env.py").read_text()
LOGGING = (Path(__file__).parents[2] / "support" / "env_files" / "file_config.ini").read_text()

# As the template's script.py.mako renders them.
REVISION = """
from alembic import op
revision = {id!r}
down_revision = {down!r}
branch_labels = None
depends_on = None

def upgrade(engine_name: str) -> None:
    globals()["upgrade_%s" % engine_name]()

def downgrade(engine_name: str) -> None:
    globals()["downgrade_%s" % engine_name]()

def upgrade_one() -> None:
    op.execute("{one}")

def downgrade_one() -> None:
    op.execute("DROP TABLE one_{id}")

def upgrade_two() -> None:
    op.execute("{two}")

def downgrade_two() -> None:
    op.execute("DROP TABLE two_{id}")
"""


def revision(id: str, down: str | None, *, two: str = "") -> str:
    return REVISION.format(
        id=id, down=down, one=f"CREATE TABLE one_{id} (id int)", two=two or f"CREATE TABLE two_{id} (id int)"
    )


def write(
    project: Project, one: Database, two: Database, *, env: str = TEMPLATE, name: str = "app", reads: str = ""
) -> Path:
    """Write the project with the addresses of both databases in its ini, as the template wants them."""
    urls = [item.url.replace("postgresql:", "postgresql+psycopg2:").replace("%", "%%") for item in (one, two)]
    ini = (
        "[alembic]\nscript_location = %(here)s/migrations\nprepend_sys_path = .\ndatabases = one, two\n\n"
        f"[one]\nsqlalchemy.url = {urls[0]}\n\n[two]\nsqlalchemy.url = {urls[1]}\n{LOGGING}"
    )
    return project(
        {
            "alembic.ini": ini,
            "migrations/env.py": env,
            "migrations/versions/r1.py": reads + revision("r1", None),
            "migrations/versions/r2.py": revision("r2", "r1"),
        },
        name=name,
    )


@dataclass(frozen=True)
class Pair:
    one: Database
    two: Database

    def dumps(self, *options: str) -> tuple[str, str]:
        return self.one.dump(*options), self.two.dump(*options)

    def at(self) -> list[list[tuple[object, ...]]]:
        return [item.psql("SELECT version_num FROM alembic_version") for item in (self.one, self.two)]


@pytest.fixture
def pair(server: Server) -> Iterator[Pair]:
    yield from _pair(server)


@pytest.fixture
def plain(server: Server) -> Iterator[Pair]:
    """The databases that plain Alembic migrates."""
    yield from _pair(server)


def _pair(server: Server) -> Iterator[Pair]:
    made = Pair(server.create_database(), server.create_database())
    yield made
    for item in (made.one, made.two):
        server.drop_database(item.name)


SETS = "import os\nos.environ['SHOP'] = 'set'\n"
READS = "import os\nassert os.environ['SHOP'] == 'set'\n"


@pytest.mark.parametrize(("first", "reads"), [("one", ""), ("two", ""), ("one", READS)])
def test_all_end_where_plain_alembic_ends(
    first: str, reads: str, project: Project, run_migrator: Runner, pair: Pair, plain: Pair, tmp_path: Path
) -> None:
    theirs = write(project, plain.one, plain.two, env=SETS + TEMPLATE, name="theirs", reads=reads)
    running = plain_alembic.start("upgrade", "head", cwd=theirs, database=plain.one, env={})
    said, _ = running.communicate(timeout=180)
    assert running.returncode == 0, said

    folder = write(project, pair.one, pair.two, env=SETS + TEMPLATE, reads=reads)
    target = getattr(pair, first)
    env = {"MIGRATOR_BACKUP": "always", "MIGRATOR_BACKUP_URL": f"file://{tmp_path}/backups"}
    result = run_migrator("--format", "json", cwd=folder, database=target, env=env)
    assert result.code == 0, result
    assert pair.dumps(LEDGER) == plain.dumps(), result
    for item in (pair.one, pair.two):
        rows = item.psql("SELECT revision FROM migrator_ledger WHERE event = 'applied' ORDER BY at")
        assert rows == [("r1",), ("r2",)]
    (other,) = result.answer["others"]
    assert other["backup"]["id"] != result.answer["backup"]["id"]
    assert len(other["revisions"]) == len(result.answer["revisions"]) == 2
    assert "upgraded from base to r2" in result.logs[-1]["message"], result
    assert target.name in result.logs[-1]["message"], result

    env["MIGRATOR_BACKUP"] = "auto"
    for words in ("upgrade", "check", "verify", "wait-for-current"):
        again = run_migrator(words, cwd=folder, database=target, env=env)
        assert again.code == 0, again
    back = run_migrator("downgrade", "-1", cwd=folder, database=target, env=env)
    assert back.code == 0, back
    assert pair.at() == [[("r1",)], [("r1",)]], back
    assert not list(folder.glob("*.sql")), "as its offline mode writes them"


def upgrade(run: Runner, folder: Path, pair: Pair, *words: str, **env: str) -> Result:
    return run(*words, cwd=folder, database=pair.one, env={"MIGRATOR_BACKUP": "off", **env})


def test_a_failure_in_the_second_is_told_and_the_next_run_goes_on(
    project: Project, run_migrator: Runner, pair: Pair
) -> None:
    folder = write(project, pair.one, pair.two)
    file = folder / "migrations" / "versions" / "r2.py"
    right = file.read_text()
    file.write_text(revision("r2", "r1", two="SELECT 1/0"))
    result = upgrade(run_migrator, folder, pair)
    assert result.code == 40, result
    assert pair.one.psql("SELECT version_num FROM alembic_version") == [("r2",)], result
    assert pair.two.psql("SELECT to_regclass('two_r1') IS NULL") == [(True,)], result
    said = result.logs[-1]["message"]
    assert f"{pair.two.name}: Revision r2 failed: division by zero" in said, result
    assert f"Before that: {pair.one.name} upgraded from base to r2" in said, result

    nothing_changed = upgrade(run_migrator, folder, pair)
    assert nothing_changed.code == 39, nothing_changed

    pending = upgrade(run_migrator, folder, pair, "check")
    assert pending.code == 3, pending
    file.write_text(right)
    fixed = upgrade(run_migrator, folder, pair, "--edited", "warn")
    assert fixed.code == 0, fixed
    assert pair.at() == [[("r2",)], [("r2",)]], fixed


def test_with_a_manifest_the_others_are_looked_at_all_the_same(
    project: Project, run_migrator: Runner, pair: Pair
) -> None:
    folder = write(project, pair.one, pair.two)
    assert upgrade(run_migrator, folder, pair, "freeze").code == 0
    assert upgrade(run_migrator, folder, pair).code == 0
    pair.two.execute("DROP TABLE two_r1, two_r2, alembic_version, migrator_ledger")
    result = upgrade(run_migrator, folder, pair)
    assert result.code == 0, result
    assert pair.at() == [[("r2",)], [("r2",)]], result


def test_two_phase_commits(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server(settings={"max_prepared_transactions": "10"})
    pair = Pair(server.create_database(), server.create_database())
    env = TEMPLATE.replace("USE_TWOPHASE = False", "USE_TWOPHASE = True")
    assert env != TEMPLATE
    result = upgrade(run_migrator, write(project, pair.one, pair.two, env=env), pair)
    assert result.code == 0, result
    assert pair.at() == [[("r2",)], [("r2",)]], result
    assert pair.one.psql("SELECT count(*) FROM pg_prepared_xacts") == [(0,)]


def test_a_target_that_is_none_of_them(
    project: Project, run_migrator: Runner, database: Database, pair: Pair
) -> None:
    folder = write(project, pair.one, pair.two)
    result = run_migrator(cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"})
    assert result.code == 10, result
    assert "env.py migrates several databases, but not " in result.logs[-1]["message"], result
    for item in (database, pair.one, pair.two):
        assert item.psql("SELECT count(*) FROM pg_class WHERE relname ~ '^(alembic|one|two)_'") == [(0,)]


def test_another_that_is_not_of_postgres(project: Project, run_migrator: Runner, pair: Pair) -> None:
    folder = write(project, pair.one, pair.two)
    ini = folder / "alembic.ini"
    before, _, after = ini.read_text().partition("[two]\n")
    ini.write_text(f"{before}[two]\nsqlalchemy.url = sqlite://\n{after.partition(chr(10))[2]}")
    result = upgrade(run_migrator, folder, pair)
    assert result.code == 10, result
    assert "a database that is not Postgres (sqlite)" in result.logs[-1]["message"], result
    assert pair.one.psql("SELECT to_regclass('one_r1') IS NULL") == [(True,)], result


def test_another_that_does_not_answer(project: Project, run_migrator: Runner, pair: Pair) -> None:
    """The env.py opens all of its connections before it migrates, so nothing is changed."""
    folder = write(project, pair.one, pair.two)
    ini = folder / "alembic.ini"
    ini.write_text(ini.read_text().replace(f"/{pair.two.name}", "/gone"))
    result = upgrade(run_migrator, folder, pair)
    assert result.code == 30, result
    assert 'database "gone" does not exist' in result.logs[-1]["message"], result
    assert pair.one.psql("SELECT to_regclass('one_r1') IS NULL") == [(True,)], result


UNMARKED = """
from alembic import context
from sqlalchemy import create_engine
config = context.config
for name in config.get_main_option("databases").split(", "):
    with create_engine(config.get_section_option(name, "sqlalchemy.url")).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
"""


def test_another_database_that_env_does_not_name_is_refused(
    project: Project, run_migrator: Runner, pair: Pair
) -> None:
    folder = write(project, pair.two, pair.one, env=UNMARKED)
    for file in (folder / "migrations" / "versions").glob("*.py"):
        file.unlink()
    for item in linear_history(1):
        (folder / "migrations" / "versions" / "r001.py").write_text(item.render())
    result = upgrade(run_migrator, folder, pair)
    assert result.code == 10, result
    assert "run_migrations(engine_name=...)" in result.logs[-1]["message"], result
    for item in (pair.one, pair.two):
        assert item.psql("SELECT count(*) FROM pg_class WHERE relname = 'alembic_version'") == [(0,)]
