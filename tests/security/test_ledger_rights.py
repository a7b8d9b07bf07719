"""A row of the ledger that somebody else has written decides nothing, and none of its SQL runs unseen."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.ledger import permissions
from migrator.ledger.permissions import Hole, holes
from migrator.ledger.table import create
from migrator.outcome import ExitCode
from migrator.postgres.version_table import VersionTable
from tests.support.env_text import AUTOCOMMIT, async_env, env
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import Revision, linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database

Project = Callable[..., Path]
Run = Callable[..., Result]
OFF = {"MIGRATOR_BACKUP": "off"}
LEDGER, TABLE = VersionTable("migrator_ledger", "public"), VersionTable("alembic_version", "public")
OPENED = "INSERT, UPDATE, DELETE"


@pytest.fixture
def app(database: Database) -> Iterator[str]:
    """A role of the application's, which can make what it likes in public, as everybody could before PostgreSQL 15."""
    name = database.server.create_role(f"app_{uuid.uuid4().hex[:8]}")
    database.execute(f"GRANT USAGE, CREATE ON SCHEMA public TO {name}")
    yield name
    database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    """Run migrator as the superuser, without backups."""
    return lambda *arguments, cwd, **variables: run_migrator(
        *arguments, cwd=cwd, database=database, env={**OFF, **variables}
    )


def by_default(database: Database, app: str) -> None:
    """Do what many do once: let the application write whatever table is made."""
    database.execute(f"ALTER DEFAULT PRIVILEGES GRANT SELECT, {OPENED} ON TABLES TO {app}")


def rights(database: Database, role: str) -> set[str]:
    """Return what a role may do with the ledger."""
    names = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"]
    asked = ", ".join(f"has_table_privilege(%(role)s, 'migrator_ledger', '{name}')" for name in names)
    answers = database.psql(f"SELECT {asked}", {"role": role})[0]
    return {name for name, may in zip(names, answers, strict=True) if may}


def is_superuser(database: Database, role: str) -> bool:
    return bool(database.psql("SELECT rolsuper FROM pg_roles WHERE rolname = %s", (role,))[0][0])


def typed(said: str) -> str:
    """Return the statements that a message says to type."""
    return said.partition("as its owner or a superuser: ")[2].partition("; migrator creates")[0]


def plant(database: Database, app: str) -> None:
    """Do what the application could do with a ledger that it may write: a row with SQL of its own, and its revision."""
    with database.connect(user=app) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO migrator_ledger (run_id, number, at, event, version_table, revision, rows_before, rows_after,"
            " way_back, role, search_path) VALUES ('planted', 1, now() + interval '1 day', 'applied',"
            " 'alembic_version', 'evil', '{r002}', '{evil}', %s, 'postgres', '\"$user\", public')",
            ([f"ALTER ROLE {app} SUPERUSER"],),
        )
        cursor.execute("UPDATE alembic_version SET version_num = 'evil'")


# -- how it is made ----------------------------------------------------------------------------------------

KINDS = {
    "one transaction": env(),
    "autocommit": env(connected=AUTOCOMMIT),
    "asyncpg": async_env(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_made_closed(kind: str, database: Database, app: str, project: Project, run: Run) -> None:
    by_default(database, app)
    database.execute("ALTER DEFAULT PRIVILEGES GRANT INSERT, TRIGGER ON TABLES TO PUBLIC")
    done(run(cwd=project(KINDS[kind], revisions=linear_history(1))))
    assert rights(database, app) == {"SELECT"}
    assert database.psql("SELECT has_table_privilege(%s, 't1', 'INSERT')", (app,)) == [(True,)]


def test_it_is_made_closed_by_a_run_with_nothing_to_do(
    database: Database, app: str, project: Project, run: Run
) -> None:
    by_default(database, app)
    folder = project(revisions=linear_history(1))
    done(run(cwd=folder, MIGRATOR_LEDGER="off"))
    done(run(cwd=folder))
    assert rights(database, app) == {"SELECT"}


def test_a_revision_that_opens_all_tables_leaves_it_closed(
    database: Database, app: str, project: Project, run: Run
) -> None:
    opens = f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {app}"
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", opens, "SELECT 1")])
    done(run("upgrade", "r001", cwd=folder))
    done(run(cwd=folder))
    assert rights(database, app) == {"SELECT"}
    done(run("status", cwd=folder))


# -- the attack --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["debian", "embedded"], indirect=True)
def test_a_planted_row_is_refused_by_every_command_until_what_is_said_is_typed(
    database: Database, app: str, project: Project, run: Run
) -> None:
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    database.execute(
        f"GRANT {OPENED} ON migrator_ledger, alembic_version TO {app}"
    )  # as an older one was made
    plant(database, app)
    for words in (["upgrade"], ["downgrade", "-1", "--yes"], ["status"], ["check"], ["verify"], ["ledger"]):
        with unchanged(database):
            said = refusal(
                run(*words, cwd=folder), ExitCode.ACCESS_DENIED, f"{app} may DELETE, INSERT, UPDATE"
            )
    refusal(
        run("repair", "--accept", "r001", cwd=folder), ExitCode.ACCESS_DENIED, "Others can write the ledger"
    )
    database.execute(typed(said))
    assert rights(database, app) == set()
    # Whoever overlooks the row is shown its SQL, and asked.
    ahead = refusal(run(cwd=folder), ExitCode.DATABASE_AHEAD, "shows the SQL")
    assert "evil" in ahead
    shown = run("downgrade", "head", cwd=folder)
    refusal(shown, ExitCode.UNSAFE, "downgrade head --yes")
    assert f"evil: ALTER ROLE {app} SUPERUSER" in [line["message"] for line in shown.logs]
    assert not is_superuser(database, app)


@pytest.mark.parametrize(
    ("trap", "says"),
    [("", "{app} owns it"), (", trap text DEFAULT canary()", "calls a function of {app}")],
    ids=["rows", "code"],
)
def test_tables_made_beforehand_vouch_for_nothing(
    trap: str, says: str, database: Database, app: str, project: Project, run: Run
) -> None:
    """The application makes the version table and the ledger before the first run: both are its own."""
    with database.connect(user=app) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE alembic_version (version_num varchar(32)); INSERT INTO alembic_version VALUES ('')"
        )
        cursor.execute(
            "CREATE FUNCTION canary() RETURNS text LANGUAGE plpgsql AS $$BEGIN"
            " IF current_setting('is_superuser') = 'on' THEN RAISE EXCEPTION 'caught'; END IF; RETURN ''; END$$"
        )
        cursor.execute(
            "CREATE TABLE migrator_ledger (run_id text, number int, at timestamptz, event text, version_table text,"
            " revision text, message text, parents text[], depends_on text[], rows_before text[], rows_after text[],"
            " way_back text[], no_way_back text, image_version text, search_path text, role text,"
            " checksum text, syntax text, file text, migrator_version text, min_compatible text, host text,"
            f" command text, code int, outcome text, digest text, actor text{trap})"
        )
    plant(database, app)
    folder = project(revisions=linear_history(2))
    said = refusal(
        run("downgrade", "base", "--yes", cwd=folder), ExitCode.ACCESS_DENIED, says.format(app=app)
    )
    assert not is_superuser(database, app)
    database.execute(typed(said))
    assert database.psql("SELECT to_regclass('migrator_ledger')") == [(None,)]


def test_a_version_table_of_others_settles_nothing(
    database: Database, app: str, project: Project, run: Run
) -> None:
    """Nor does the ledger that they made beside it: where only env.py names its table, it is asked."""
    database.execute(f"CREATE SCHEMA theirs AUTHORIZATION {app}")
    with database.connect(user=app) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE theirs.versions (version_num varchar(32) PRIMARY KEY);"
            " INSERT INTO theirs.versions VALUES ('r002')"
        )
        create(VersionTable("migrator_ledger", "theirs"), cursor.execute)
        cursor.execute(
            "INSERT INTO theirs.migrator_ledger (id, run_id, number, at, event, version_table, code, outcome, command)"
            " VALUES (1, 'x', 0, now(), 'run', 'versions', 0, 'OK', 'upgrade head')"
        )
    folder = project(env(configure="**dict(version_table='alembic_version')"), revisions=linear_history(2))
    assert run("check", cwd=folder).code == ExitCode.PENDING
    assert "Nothing to do" not in done(run(cwd=folder)).stderr
    assert database.psql("SELECT count(*) FROM t2") == [(0,)]
    assert "Nothing to do" in done(run(cwd=folder)).stderr


def test_kept_sql_runs_as_who_owns_the_version_table_whatever_a_row_says(
    database: Database, app: str, project: Project, run: Run
) -> None:
    who = "CREATE TABLE back AS SELECT current_user::text AS role"
    history = [*linear_history(1), Revision("r002", "r001", "SELECT 1", who)]
    done(run(cwd=project(revisions=history)))
    database.execute(f"UPDATE migrator_ledger SET role = '{app}'")
    older = project(revisions=history[:1], name="older")
    result = done(run("downgrade", "head", "--yes", cwd=older))
    assert database.psql("SELECT role FROM back") == [("postgres",)]
    assert f"was applied as role {app}" in result.stderr


# -- every way in ------------------------------------------------------------------------------------------

WAYS = {
    "grant": ("GRANT UPDATE ON migrator_ledger TO {app}", "{app} may UPDATE"),
    "everybody": ("GRANT INSERT ON migrator_ledger TO PUBLIC", "PUBLIC may INSERT"),
    "one column": (
        "GRANT INSERT (way_back), UPDATE (id) ON migrator_ledger TO {app}",
        "{app} may INSERT, UPDATE",
    ),
    "the right to grant": (
        "GRANT TRUNCATE ON migrator_ledger TO {app} WITH GRANT OPTION",
        "{app} may TRUNCATE",
    ),
    "by another": (
        "GRANT DELETE ON migrator_ledger TO {app} WITH GRANT OPTION; SET ROLE {app};"
        " GRANT DELETE ON migrator_ledger TO PUBLIC; RESET ROLE",
        "PUBLIC may DELETE",
    ),
    "trigger": ("GRANT TRIGGER ON migrator_ledger TO {app}", "{app} may TRIGGER"),
    "pg_write_all_data": ("GRANT pg_write_all_data TO {app}", "{app} is a member of pg_write_all_data"),
    "owner": ("ALTER TABLE migrator_ledger OWNER TO {app}", "{app} owns it"),
    "its trigger": (
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "ALTER FUNCTION f() OWNER TO {app};"
        'CREATE TRIGGER "a b" BEFORE INSERT ON migrator_ledger FOR EACH ROW EXECUTE FUNCTION f()',
        "calls a function of {app}",
    ),
    "its default": (
        "CREATE FUNCTION g() RETURNS text LANGUAGE sql AS 'SELECT 1::text'; ALTER FUNCTION g() OWNER TO {app};"
        "ALTER TABLE migrator_ledger ALTER COLUMN host SET DEFAULT g()",
        "calls a function of {app}",
    ),
    "a parent": (
        "CREATE TABLE p (LIKE migrator_ledger); ALTER TABLE migrator_ledger INHERIT p; GRANT UPDATE ON p TO {app}",
        "it is a child of p",
    ),
    "a view": (
        "ALTER TABLE migrator_ledger RENAME TO l; CREATE VIEW migrator_ledger AS SELECT * FROM l",
        "it is not a plain table",
    ),
}


@pytest.fixture
def ledger(database: Database) -> Iterator[tuple[Database, str]]:
    """A ledger as the login makes it, and a role of the application's."""
    name = database.server.create_role(f"app_{uuid.uuid4().hex[:8]}")
    create(LEDGER, lambda sql: first(database, sql))
    database.execute("CREATE TABLE alembic_version (version_num varchar(32))")
    yield database, name
    database.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def seen(database: Database, table: VersionTable | None = TABLE, role: str = "") -> tuple[Hole, ...]:
    return holes(lambda sql: first(database, sql), LEDGER, table, role=role)


def found(database: Database) -> list[str]:
    return [str(hole) for hole in seen(database)]


def first(database: Database, sql: str) -> Any:
    rows = database.psql(sql)
    return rows[0][0] if rows else None


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_is_found_and_closed_by_what_is_said(way: str, ledger: tuple[Database, str]) -> None:
    database, app = ledger
    opens, says = WAYS[way]
    assert found(database) == []
    database.execute(opens.format(app=app))
    assert any(says.format(app=app) in hole for hole in found(database)), found(database)
    said = permissions.refusal(LEDGER, seen(database))
    database.execute(typed(said.next_step))
    assert found(database) == []


def test_one_short_query_is_enough_for_a_ledger_as_it_is_made(ledger: tuple[Database, str]) -> None:
    database, app = ledger
    asked: list[str] = []
    for table in (TABLE, None):
        assert holes(lambda sql: first(database, asked.append(sql) or sql), LEDGER, table) == ()
    assert len(asked) == 2
    database.execute(f"GRANT INSERT ON migrator_ledger TO {app}")
    assert holes(lambda sql: first(database, asked.append(sql) or sql), LEDGER, TABLE)
    assert len(asked) == 4


def test_reading_and_one_role_for_everything_are_fine(ledger: tuple[Database, str]) -> None:
    database, app = ledger
    database.execute(f"GRANT SELECT ON migrator_ledger TO {app}, PUBLIC")
    assert found(database) == []
    database.execute(
        f"ALTER TABLE migrator_ledger OWNER TO {app}; ALTER TABLE alembic_version OWNER TO {app}"
    )
    assert found(database) == []
    assert seen(database, None)  # whose code would be run by a superuser
    assert not seen(database, None, app)
    database.execute(f'ALTER DATABASE "{database.name}" OWNER TO {app}')
    assert not seen(database, None)
    database.execute(f'ALTER DATABASE "{database.name}" OWNER TO postgres')


def test_a_restore_leaves_the_ledgers_of_others_alone(
    database: Database, app: str, project: Project, run: Run, tmp_path: Path
) -> None:
    """A row about the restore goes into every ledger that came back; one of the application's has a trigger on it."""
    folder = project(revisions=linear_history(1))
    done(run(cwd=folder))
    database.execute(
        f"GRANT SELECT ON migrator_ledger TO {app}; CREATE SCHEMA theirs AUTHORIZATION {app}; SET ROLE {app};"
        "CREATE TABLE theirs.migrator_ledger (LIKE public.migrator_ledger);"
        "CREATE TABLE theirs.seen (who text);"
        "INSERT INTO theirs.migrator_ledger (run_id, number, at, event, version_table)"
        " VALUES ('x', 1, now(), 'run', 'v');"
        "CREATE FUNCTION theirs.canary() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO theirs.seen VALUES (current_user); RETURN NEW; END';"
        "CREATE TRIGGER t BEFORE INSERT ON theirs.migrator_ledger FOR EACH ROW EXECUTE FUNCTION theirs.canary()"
    )
    store = {"MIGRATOR_BACKUP_URL": f"file://{tmp_path}/backups"}
    done(run("backup", cwd=folder, **store))
    restored = done(run("restore", "latest", "--yes", "--drop-old", cwd=folder, **store))
    assert "the ledger theirs.migrator_ledger does not record the restore" in restored.stderr
    assert database.psql("SELECT who FROM theirs.seen") == []
    assert database.psql("SELECT count(*) FROM migrator_ledger WHERE command = 'restore'") == [(1,)]
