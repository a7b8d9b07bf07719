"""The ledger: a row commits with its revision, whatever the env.py, and only ever says what is so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support import plain_alembic
from tests.support.env_text import AUTOCOMMIT, OWN_ENGINE, async_env, env
from tests.support.ledgers import agrees, events, has_ledger, runs
from tests.support.outcomes import done, left_behind, refusal
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
THREE = linear_history(3)
OFF = {"MIGRATOR_BACKUP": "off"}
ALL = ["r001", "r002", "r003"]
APPLIED = [("applied", name) for name in ALL]
PSYCOPG = "create_engine(os.environ['DATABASE_URL'].replace('postgresql://', 'postgresql+psycopg://'))"

KINDS = {
    "one transaction": env(),
    "a transaction each": env(configure="transaction_per_migration=True"),
    "no transactional DDL": env(configure="transactional_ddl=False"),
    "autocommit": env(connected=AUTOCOMMIT),
    "autocommit, psycopg": env(engine=PSYCOPG, connected=AUTOCOMMIT),
    "psycopg": env(engine=PSYCOPG),
    "an outer transaction": env(engine=OWN_ENGINE, run="with connection.begin(): run(connection)"),
    "asyncpg": async_env(),
}


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Callable[..., Result]:
    """Run migrator on the test's database, without backups."""

    def call(*arguments: str, cwd: Path, **variables: str) -> Result:
        return run_migrator(*arguments, cwd=cwd, database=database, env={**OFF, **variables})

    return call


Run = Callable[..., Result]


def plain(database: Database, folder: Path, *arguments: str) -> None:
    """Run plain Alembic to its end."""
    process = plain_alembic.start(*arguments, cwd=folder, database=database, env={})
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said


# -- a row for each revision -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_up_down_and_up_again(kind: str, project: Project, run: Run, database: Database) -> None:
    folder = project(KINDS[kind], revisions=THREE)
    done(run(cwd=folder))
    done(run("downgrade", "r001", cwd=folder))
    done(run(cwd=folder))
    back = [("reverted", "r003"), ("reverted", "r002")]
    assert events(database) == [*APPLIED, *back, ("applied", "r002"), ("applied", "r003")]
    assert runs(database) == [("upgrade", "OK"), ("downgrade", "OK"), ("upgrade", "OK")]
    assert left_behind(database) == []


def test_what_a_row_says(each_database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=THREE)
    bring_to(each_database, 2)
    variables = {
        "MIGRATOR_ACTOR": "https://ci.example/7",
        "MIGRATOR_IMAGE_VERSION": "1.4.2",
        "POD_NAME": "shop-1",
    }
    result = done(run_migrator("--format", "json", cwd=folder, database=each_database, env=variables))
    columns = (
        "run_id, version_table, message, file, checksum, parents, depends_on, rows_before, rows_after, backup_id,"
        " command, actor, role, host, image_version, way_back, no_way_back, search_path"
    )
    row = each_database.psql(f"SELECT {columns} FROM migrator_ledger WHERE event = 'applied'")[0]
    file = folder / "migrations/versions/r003.py"
    assert row == (
        result.answer["run_id"],
        "alembic_version",
        "a change",
        "versions/r003.py",
        hashlib.sha256(file.read_bytes()).hexdigest(),
        ["r002"],
        [],
        ["r002"],
        ["r003"],
        result.answer["backup"]["id"],
        "upgrade head",
        "https://ci.example/7",
        "postgres",
        "shop-1",
        "1.4.2",
        ["DROP TABLE t3"],
        None,
        '"$user", public',
    )
    code, rows, stages = each_database.psql(
        "SELECT code, rows_after, details->'stages' FROM migrator_ledger WHERE event = 'run'"
    )[0]
    assert (code, rows) == (0, ["r003"])
    assert {"wait", "lock", "inspect", "backup", "apply", "verify"} <= set(stages)


def test_a_secret_does_not_get_in(database: Database, project: Project, run: Run) -> None:
    password = database.server.password
    revisions = [
        Revision("r001", None, f"CREATE TABLE t1 (note text DEFAULT '{password}')", "DROP TABLE t1"),
        Revision(
            "r002",
            "r001",
            f"ALTER TABLE t1 ALTER note SET DEFAULT '{password}'",
            f"COMMENT ON TABLE t1 IS '{password}'",
        ),
        Revision("r003", "r002", f"raise RuntimeError('{password}')", message=f"the {password}"),
    ]
    folder = project(env(configure="transaction_per_migration=True"), revisions=revisions)
    assert run(cwd=folder, MIGRATOR_ACTOR=f"someone:{password}").code == ExitCode.PARTIAL
    text = "\n".join(row[0] for row in database.psql("SELECT l::text FROM migrator_ledger l"))
    assert "r002" in text
    assert "someone" in text
    assert password not in text
    kept = database.psql("SELECT way_back, no_way_back FROM migrator_ledger WHERE revision = 'r002'")
    assert kept[0][0] is None
    assert "must not be kept" in kept[0][1]
    # The test's own default holds it, which is the user's affair.
    database.execute("ALTER TABLE t1 ALTER note DROP DEFAULT")


def test_odd_text_is_kept_as_it_is(database: Database, project: Project, run: Run) -> None:
    odd = r"a \u0000 ' \" %s %% :rows {x} ☃"
    revisions = [Revision("r001", None, "CREATE TABLE t1 (id int)", message=odd.replace("\\", "\\\\"))]
    folder = project(revisions=revisions)
    done(run(cwd=folder))
    assert database.psql("SELECT message FROM migrator_ledger WHERE revision = 'r001'") == [(odd,)]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_does_not_have_every_character(
    encoding: str, database: Database, project: Project, run_migrator: Runner
) -> None:
    revisions = [
        Revision("r001", None, "CREATE TABLE t1 (id int)", "DROP TABLE t1", message="caf\xe9 \u2603"),
        Revision("r002", "r001", "CREATE TABLE t2 (id int)", "COMMENT ON TABLE t1 IS 'caf\xe9'"),
    ]
    folder = project(revisions=revisions)
    name = f"{database.name}_encoded"
    database.server.psql(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        encoded = Database(database.server, name)
        done(run_migrator(cwd=folder, database=encoded, env=OFF))
        kept = encoded.psql(
            "SELECT message, way_back FROM migrator_ledger WHERE event = 'applied' ORDER BY number"
        )
        assert kept == [(r"caf\xe9 \u2603", ["DROP TABLE t1"]), ("a change", None)]
    finally:
        database.server.drop_database(name)


def test_a_first_revision_sees_no_table_of_ours(database: Database, project: Project, run: Run) -> None:
    look = (
        "import sqlalchemy\nbind = op.get_bind()\n"
        "assert sqlalchemy.inspect(bind).get_table_names() == ['alembic_version']\n"
        "op.execute('CREATE TABLE t1 (id int)')"
    )
    done(run(cwd=project(revisions=[Revision("r001", None, look)])))
    agrees(database, ["r001"])


@pytest.mark.parametrize("kind", ["one transaction", "autocommit", "asyncpg"])
def test_a_revision_may_drop_whatever_tables_it_finds(
    kind: str, database: Database, project: Project, run: Run
) -> None:
    drop = (
        "DO $$ DECLARE t text; BEGIN FOR t IN SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        " AND tablename <> 'alembic_version' LOOP EXECUTE format('DROP TABLE public.%I', t); END LOOP; END $$"
    )
    folder = project(KINDS[kind], revisions=[*linear_history(2), Revision("r003", "r002", drop)])
    done(run(cwd=folder))
    assert events(database)[0] == ("applied", "r003")
    done(run(cwd=folder))  # what is missing is noted
    agrees(database, ALL)


def test_the_schema_is_dropped_with_everything_in_it(database: Database, project: Project, run: Run) -> None:
    drop = "DROP SCHEMA public CASCADE; CREATE SCHEMA public"
    folder = project(revisions=[*linear_history(2), Revision("r003", "r002", drop)])
    refusal(run(cwd=folder), ExitCode.ROLLED_BACK, "alembic_version")  # as plain Alembic fails, too
    assert not has_ledger(database)


# -- failures ----------------------------------------------------------------------------------------------

FAILING = [*linear_history(2), Revision("r003", "r002", "SELECT 1/0")]


@pytest.mark.parametrize(
    ("kind", "code", "stands"),
    [
        ("one transaction", ExitCode.ROLLED_BACK, []),
        ("asyncpg", ExitCode.ROLLED_BACK, []),
        ("a transaction each", ExitCode.PARTIAL, ["r001", "r002"]),
        ("autocommit", ExitCode.PARTIAL, ["r001", "r002"]),
        ("autocommit, psycopg", ExitCode.PARTIAL, ["r001", "r002"]),
    ],
)
def test_a_failing_revision_leaves_no_row(
    kind: str, code: ExitCode, stands: list[str], database: Database, project: Project, run: Run
) -> None:
    folder = project(KINDS[kind], revisions=FAILING)
    refusal(run(cwd=folder), code, "division by zero")
    assert has_ledger(database) is bool(stands)
    if stands:
        agrees(database, stands)
        assert runs(database) == [("upgrade", code.name)]
    project(KINDS[kind], revisions=THREE)
    done(run(cwd=folder))
    agrees(database, ALL)


def test_the_first_of_all_fails_in_autocommit(database: Database, project: Project, run: Run) -> None:
    folder = project(KINDS["autocommit"], revisions=[Revision("r001", None, "SELECT 1/0")])
    refusal(run(cwd=folder), ExitCode.ROLLED_BACK, "division by zero")
    assert (events(database), runs(database)) == ([], [("upgrade", "ROLLED_BACK")])


@pytest.mark.parametrize("kind", ["one transaction", "a transaction each"])
def test_attempts_leave_each_revision_once(
    kind: str, database: Database, project: Project, start_migrator: Callable[..., Running]
) -> None:
    database.execute("CREATE TABLE busy (id int)")
    revisions = [*linear_history(2), Revision("r003", "r002", "ALTER TABLE busy ADD x int")]
    folder = project(KINDS[kind], revisions=revisions)
    variables = {**OFF, "MIGRATOR_LOCK_TIMEOUT": "1s", "MIGRATOR_LOCK_RETRIES": "100"}
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT * FROM busy")
        running = start_migrator("--baseline", "base", cwd=folder, database=database, env=variables)
        running.wait_for("rolled back, retrying")
        connection.rollback()
    done(running.finish())
    assert events(database) == APPLIED
    assert runs(database) == [("upgrade", "OK")]


# -- what was done without migrator --------------------------------------------------------------------------


def test_a_database_of_plain_alembic_is_adopted(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=THREE)
    plain(database, folder, "upgrade", "r002")
    result = done(run(cwd=folder))
    assert "the ledger public.migrator_ledger starts now: 2 revisions were applied before" in result.stderr
    assert events(database) == [("found", "r001"), ("found", "r002"), ("applied", "r003")]


def test_adoption_where_nothing_is_pending(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=THREE)
    plain(database, folder, "upgrade", "head")
    done(run(cwd=folder))
    assert events(database) == [("found", name) for name in ALL]
    before = database.dump()
    done(run(cwd=folder))
    assert database.dump() == before


@pytest.mark.parametrize("kind", ["one transaction", "asyncpg", "autocommit"])
def test_plain_alembic_in_between_is_noted(kind: str, database: Database, project: Project, run: Run) -> None:
    folder = project(KINDS[kind], revisions=THREE)
    done(run(cwd=folder))
    database.execute("DROP TABLE t3; DROP TABLE t2; UPDATE alembic_version SET version_num = 'r001'")
    result = done(run(cwd=folder))
    assert (
        "since migrator's last run, something else changed revisions (reverted: r002, r003)" in result.stderr
    )
    assert events(database)[3:] == [
        ("gone", "r002"),
        ("gone", "r003"),
        ("applied", "r002"),
        ("applied", "r003"),
    ]
    project(KINDS[kind], revisions=linear_history(4))
    plain(database, folder, "upgrade", "head") if kind == "one transaction" else database.execute(
        "CREATE TABLE t4 (id int); UPDATE alembic_version SET version_num = 'r004'"
    )
    assert "(applied: r004)" in done(run(cwd=folder)).stderr
    agrees(database, [*ALL, "r004"])


def test_stamp_and_baseline(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=THREE)
    for table in ("t1", "t2"):
        database.execute(f"CREATE TABLE {table} (id int)")
    done(run("upgrade", "--baseline", "r002", cwd=folder))
    assert events(database) == [("stamped", "r001"), ("stamped", "r002"), ("applied", "r003")]
    done(run("stamp", "r001", cwd=folder))
    assert events(database)[3:] == [("unstamped", "r002"), ("unstamped", "r003")]
    done(run("stamp", "head", cwd=folder))
    agrees(database, ALL)
    assert [name for name, _ in runs(database)] == ["upgrade", "stamp", "stamp"]
