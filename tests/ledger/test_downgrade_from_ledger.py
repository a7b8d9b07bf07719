"""Going back with an image that has never seen the revisions: by the SQL that the ledger kept of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support import plain_alembic
from tests.support.env_text import AUTOCOMMIT, async_env, env
from tests.support.ledgers import agrees, events, runs
from tests.support.outcomes import done, left_behind, refusal, unchanged
from tests.support.projects import Revision, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import LEDGER, Database

Project = Callable[..., Path]
OFF = {"MIGRATOR_BACKUP": "off"}
KINDS = {
    "one transaction": env(),
    "a transaction each": env(configure="transaction_per_migration=True"),
    "autocommit": env(connected=AUTOCOMMIT),
    "asyncpg": async_env(),
}


class Images:
    """Two images of one project: the newer one has all revisions, the older one the first few."""

    def __init__(self, project: Project, run: Runner, database: Database) -> None:
        self._project, self._run, self._database = project, run, database

    def build(self, revisions: Sequence[Revision], older: int, files: dict[str, str] | None = None) -> None:
        self.newer = self._project(files, revisions=revisions, name="newer")
        self.older = self._project(files, revisions=revisions[:older], name="older")

    def upgrade(self, *arguments: str, **variables: str) -> Result:
        return done(self._run(*arguments, cwd=self.newer, database=self._database, env={**OFF, **variables}))

    def downgrade(self, *arguments: str, **variables: str) -> Result:
        """Go back with the older image; ``--yes`` is for the SQL that was shown."""
        return self.asks(*arguments, "--yes", **variables)

    def asks(self, *arguments: str, **variables: str) -> Result:
        """Go back with the older image, without consent."""
        return self._run(
            "downgrade", *arguments, cwd=self.older, database=self._database, env={**OFF, **variables}
        )


@pytest.fixture
def images(project: Project, run_migrator: Runner, database: Database) -> Images:
    return Images(project, run_migrator, database)


def rows(database: Database) -> set[str]:
    return {row[0] for row in database.psql("SELECT version_num FROM alembic_version")}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_and_there_again(kind: str, images: Images, database: Database) -> None:
    images.build(linear_history(4), 2, KINDS[kind])
    images.upgrade("upgrade", "r002")
    before = database.dump(LEDGER)
    images.upgrade()
    after = database.dump(LEDGER)
    result = done(images.downgrade("r002"))
    assert database.dump(LEDGER) == before
    shown = [line["message"] for line in result.logs]
    assert shown.index("r004: DROP TABLE t4") < shown.index("r003: DROP TABLE t3")
    assert "downgraded from r004 to r002" in result.stdout
    agrees(database, ["r001", "r002"])
    images.upgrade()
    assert database.dump(LEDGER) == after
    agrees(database, ["r001", "r002", "r003", "r004"])
    assert runs(database)[-2:] == [("downgrade", "OK"), ("upgrade", "OK")]
    assert left_behind(database) == []


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["-1"], "r003"),
        (["-3"], "r001"),
        (["r003"], "r003"),  # which the older image does not have either
        (["head"], "r002"),
        (["base", "--yes"], ""),
    ],
)
def test_where_to(words: list[str], left: str, images: Images, database: Database) -> None:
    images.build(linear_history(4), 2)
    images.upgrade()
    done(images.downgrade(*words))
    assert rows(database) == ({left} if left else set())
    tables = {
        row[0] for row in database.psql("SELECT tablename::text FROM pg_tables WHERE tablename ~ '^t[0-9]'")
    }
    assert tables == {f"t{number}" for number in range(1, int(left[-1] if left else 0) + 1)}


def test_to_base_wants_consent(images: Images, database: Database) -> None:
    images.build(linear_history(4), 2)
    images.upgrade()
    with unchanged(database):
        refusal(images.asks("base"), ExitCode.UNSAFE, "it reverts all 4 revisions")
        refusal(
            images.downgrade("nonsense"),
            ExitCode.BAD_HISTORY,
            "The ledger has no applied revision 'nonsense'",
        )


BRANCHES = [
    Revision("a1", None, "CREATE TABLE a1 (id int)", "DROP TABLE a1"),
    Revision("b1", None, "CREATE TABLE b1 (id int)", "DROP TABLE b1"),
    Revision("a2", "a1", "CREATE TABLE a2 (id int)", "DROP TABLE a2"),
    Revision("m1", ("a2", "b1"), "CREATE TABLE m1 (id int)", "DROP TABLE m1"),
    Revision("c1", "m1", "CREATE TABLE c1 (id int)", "DROP TABLE c1"),
    Revision("d1", "m1", "CREATE TABLE d1 (id int)", "DROP TABLE d1"),
]


@pytest.mark.parametrize("older", [2, 3, 4, 5])
def test_branches_and_merges_as_alembic_itself_leaves_them(
    older: int, images: Images, database: Database
) -> None:
    images.build(BRANCHES, older)
    images.upgrade("upgrade", "heads")
    assert rows(database) == {"c1", "d1"}
    done(images.downgrade("heads"))
    kept = [item.id for item in BRANCHES[:older]]
    parents = {
        name
        for item in BRANCHES[:older]
        for name in ([item.down] if isinstance(item.down, str) else item.down or ())
    }
    assert rows(database) == {name for name in kept if name not in parents}
    agrees(database, kept)
    images.upgrade("upgrade", "heads")
    assert rows(database) == {"c1", "d1"}


def depending(folder: Path, revision: str, on: str) -> None:
    file = folder / f"migrations/versions/{revision}.py"
    file.write_text(file.read_text().replace("depends_on = None", f"depends_on = {on!r}"))


def test_dependencies_as_alembic_itself_leaves_them(images: Images, database: Database) -> None:
    revisions = [
        Revision("x1", None, "CREATE TABLE x1 (id int)", "DROP TABLE x1"),
        Revision("y1", None, "CREATE TABLE y1 (id int)", "DROP TABLE y1"),
        Revision("r1", None, "CREATE TABLE r1 (id int)", "DROP TABLE r1"),
    ]
    images.build(revisions, 2)
    for folder, names in ((images.newer, ("y1", "r1")), (images.older, ("y1",))):
        for name in names:
            depending(folder, name, "x1")
    images.upgrade("upgrade", "heads")
    assert rows(database) == {"y1", "r1"}
    done(images.downgrade("heads"))
    assert rows(database) == {"y1"}  # x1 is what y1 stands on
    images.upgrade("upgrade", "heads")
    assert rows(database) == {"y1", "r1"}


def test_what_has_no_sql_says_so_at_upgrade_time(images: Images, database: Database) -> None:
    python = "rows = op.get_bind().execute(__import__('sqlalchemy').text('SELECT 1')).fetchall()"
    revisions = [
        *linear_history(2),
        Revision("r003", "r002", "CREATE TABLE t3 (id int)", f"import sqlalchemy\n{python}"),
    ]
    images.build(revisions, 2)
    result = images.upgrade("--format", "json")
    assert [item["no_way_back"] for item in result.answer["revisions"][:2]] == ["", ""]
    reason = result.answer["revisions"][2]["no_way_back"]
    assert reason
    with unchanged(database):
        refused = images.downgrade("r002")
    refusal(refused, ExitCode.BAD_HISTORY, "The ledger has no SQL to revert r003", reason[:20])


def test_adopted_revisions_have_no_sql(images: Images, database: Database) -> None:
    images.build(linear_history(3), 2)
    process = plain_alembic.start("upgrade", "head", cwd=images.newer, database=database, env={})
    assert process.wait(60) == 0
    images.upgrade()
    with unchanged(database):
        refusal(images.downgrade("r002"), ExitCode.BAD_HISTORY, "r003 (not migrated by migrator)")


def test_names_mean_what_they_meant(images: Images, database: Database) -> None:
    """What env.py's search_path made is not looked for in another: no row says which path a session has."""
    connected = (
        "connection.execute(text('CREATE SCHEMA IF NOT EXISTS tenant'))\n"
        "connection.execute(text('SET search_path TO tenant, public')); connection.commit()"
    )
    images.build(linear_history(3), 2, env(connected=connected, configure="version_table_schema='tenant'"))
    database.execute("CREATE TABLE public.t3 (precious int)")
    images.upgrade("--baseline", "base")
    with unchanged(database):
        said = refusal(images.downgrade("r002"), ExitCode.BAD_HISTORY, "with the search_path tenant, public")
    option = re.search("PGOPTIONS='([^']*)'", said)
    assert option, said
    done(images.downgrade("r002", PGOPTIONS=option[1]))
    there = database.psql("SELECT to_regclass('tenant.t3')::text, to_regclass('public.t3')::text")
    assert there == [(None, "t3")]
    assert database.psql("SELECT version_num FROM tenant.alembic_version") == [("r002",)]


def test_names_that_are_translated_are_not_kept(images: Images, database: Database) -> None:
    connected = (
        "connection.execute(text('CREATE SCHEMA IF NOT EXISTS tenant')); connection.commit()\n"
        "connection = connection.execution_options(schema_translate_map={None: 'tenant'})"
    )
    make = "op.create_table('t1', sa.Column('id', sa.Integer))"
    revisions = [
        *linear_history(1),
        Revision("r002", "r001", make.replace("t1", "t2"), "op.drop_table('t2')"),
    ]
    images.build(revisions, 1, env(connected=connected, configure="version_table_schema='tenant'"))
    database.execute("CREATE TABLE public.t2 (precious int)")
    images.upgrade("--baseline", "base")
    refused = images.downgrade("r001")
    refusal(refused, ExitCode.BAD_HISTORY, "env.py translates schema names")
    assert database.psql("SELECT to_regclass('public.t2') IS NOT NULL") == [(True,)]


def test_an_autocommit_block_on_the_way_back(images: Images, database: Database) -> None:
    up = "with op.get_context().autocommit_block():\n    op.execute('CREATE INDEX CONCURRENTLY i ON t2 (note)')"
    down = "with op.get_context().autocommit_block():\n    op.execute('DROP INDEX CONCURRENTLY i')"
    images.build([*linear_history(2), Revision("r003", "r002", up, down)], 2)
    images.upgrade()
    done(images.downgrade("r002"))
    assert database.psql("SELECT to_regclass('i')::text") == [(None,)]
    agrees(database, ["r001", "r002"])


@pytest.mark.parametrize(
    ("table", "code", "left"), [("t4", ExitCode.ROLLED_BACK, "r004"), ("t3", ExitCode.PARTIAL, "r003")]
)
def test_sql_that_fails(table: str, code: ExitCode, left: str, images: Images, database: Database) -> None:
    images.build(linear_history(4), 2)
    images.upgrade()
    database.execute(f"CREATE VIEW v AS SELECT id FROM {table}")
    refusal(images.downgrade("r002"), code, "because other objects depend on it", "[2BP01]")
    assert rows(database) == {left}
    agrees(database, [f"r00{number}" for number in range(1, int(left[-1]) + 1)])
    assert runs(database)[-1] == ("downgrade", code.name)
    database.execute("DROP VIEW v")
    done(images.downgrade("r002"))
    agrees(database, ["r001", "r002"])


def test_a_lock_that_is_not_to_be_had_is_asked_for_again(
    images: Images, database: Database, start_migrator: Callable[..., Running]
) -> None:
    images.build(linear_history(3), 2)
    images.upgrade()
    env = {**OFF, "MIGRATOR_LOCK_TIMEOUT": "1s", "MIGRATOR_LOCK_RETRIES": "100"}
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT * FROM t3")
        running = start_migrator("downgrade", "r002", "--yes", cwd=images.older, database=database, env=env)
        running.wait_for(
            lambda: database.psql("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 't3'::regclass")
        )
        running.wait_for(
            lambda: (
                not database.psql("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 't3'::regclass")
            )
        )
        connection.rollback()
    done(running.finish())
    assert events(database)[-1] == ("reverted", "r003")
    assert len([row for row in events(database) if row == ("reverted", "r003")]) == 1
