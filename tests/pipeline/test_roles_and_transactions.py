"""Who owns what a migration makes, and how many transactions it takes: as env.py says, or as a setting says instead."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.env_text import AUTOCOMMIT, OWN_ENGINE, async_env, env
from tests.support.outcomes import done
from tests.support.projects import Revision, linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database

Project = Callable[..., Path]
THREE = linear_history(3)
OFF = {"MIGRATOR_BACKUP": "off"}


# -- roles -------------------------------------------------------------------------------------------------


@pytest.fixture
def owner(database: Database) -> Iterator[str]:
    """A role that may make tables in the database, and may not log in."""
    name = f'Owner of "{uuid.uuid4().hex[:8]}"'
    quoted = '"' + name.replace('"', '""') + '"'
    database.execute(f"CREATE ROLE {quoted} NOLOGIN")
    database.execute(f"GRANT CREATE ON SCHEMA public TO {quoted}")
    yield name
    database.execute(f"DROP OWNED BY {quoted} CASCADE; DROP ROLE {quoted}")


def owners(database: Database) -> set[str]:
    """Return who owns the tables of the project, its version table among them."""
    rows = database.psql(
        "SELECT rolname::text FROM pg_class JOIN pg_roles r ON r.oid = relowner"
        " WHERE relname ~ '^(t[0-9]|alembic_version|part)$'"
    )
    return {row[0] for row in rows}


@pytest.fixture
def login(database: Database) -> Iterator[tuple[str, str]]:
    """A login that acts as another role, the database's owner, and that: how Vault and Terraform make them."""
    owner, name = (f"{kind}_{uuid.uuid4().hex[:8]}" for kind in ("o", "mig"))
    database.server.create_role(name)
    database.execute(
        f"CREATE ROLE {owner} CREATEDB; GRANT {owner} TO {name}; ALTER ROLE {name} SET role = '{owner}'"
    )
    database.execute(f'ALTER DATABASE "{database.name}" OWNER TO {owner}')
    yield name, owner
    kept = database.psql(f"SELECT datname::text FROM pg_database WHERE datdba = '{owner}'::regrole")
    for (other,) in kept:
        database.server.psql(f'ALTER DATABASE "{other}" OWNER TO postgres')
        if other != database.name:
            database.server.drop_database(other)
    database.execute(f"DROP OWNED BY {owner}, {name} CASCADE; DROP ROLE {owner}, {name}")


@pytest.mark.parametrize("way", ["in place", "maintenance window"])
def test_a_login_that_acts_as_another_role(
    way: str, login: tuple[str, str], project: Project, run_migrator: Runner, database: Database
) -> None:
    name, owner = login
    env = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, name)}
    folder = project(revisions=THREE)
    done(run_migrator("upgrade", "r002", cwd=folder, env=env))
    window = {"MIGRATOR_MAINTENANCE_WINDOW": "true"} if way == "maintenance window" else {}
    done(run_migrator("upgrade", "r003", cwd=folder, env={**env, **window}))
    assert database.psql("SELECT DISTINCT role FROM migrator_ledger") == [(name,)]
    application = database.server.connect(database.name, user=name)  # and it idles
    if way == "in place":
        database.execute(f"ALTER ROLE {owner} NOCREATEDB")
    done(run_migrator("restore", "latest", "--yes", cwd=folder, env=env))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    application.close()


BLOCK = "with op.get_context().autocommit_block(): op.execute('CREATE TABLE part (id int)')"
OWNED = {
    "one transaction": (env(), THREE),
    "a transaction per migration": (env(configure="transaction_per_migration=True"), THREE),
    "a pool": (env(engine=OWN_ENGINE), THREE),
    "autocommit": (env(connected=AUTOCOMMIT), THREE),
    "an autocommit block": (env(), [*THREE, Revision("r004", "r003", BLOCK)]),
    "an async engine": (async_env(), THREE),
    "another attempt": (
        env(
            top="tries = []",
            before="def fail(step, **_):\n    tries.append(step)\n    if len(tries) < 3: raise RuntimeError(step)",
            configure="on_version_apply=fail",
            run="for attempt in range(3):\n    try:\n        run(connection)\n"
            "        break\n    except RuntimeError: connection.rollback()",
        ),
        THREE,
    ),
}


@pytest.mark.parametrize("kind", OWNED)
def test_the_role_owns_what_is_made(
    kind: str, project: Project, run_migrator: Runner, database: Database, owner: str
) -> None:
    files, revisions = OWNED[kind]
    folder = project(files, revisions=revisions)
    result = run_migrator("--role", owner, cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert owners(database) == {owner}
    back = run_migrator("downgrade", "r001", "--role", owner, cwd=folder, database=database, env=OFF)
    assert back.code == 0, back


def test_it_is_owned_by_the_role_after_a_wait_for_a_lock(
    project: Project, start_migrator: Callable[..., Running], database: Database, owner: str
) -> None:
    database.execute("CREATE TABLE busy (id int)")
    database.execute(f'ALTER TABLE busy OWNER TO "{owner.replace(chr(34), chr(34) * 2)}"')
    revisions = [
        Revision("r001", None, "CREATE TABLE t1 (id int)"),
        Revision("r002", "r001", "ALTER TABLE busy ADD x int"),
    ]
    folder = project(env(), revisions=revisions)
    variables = {**OFF, "MIGRATOR_ROLE": owner, "MIGRATOR_LOCK_TIMEOUT": "1s", "MIGRATOR_LOCK_RETRIES": "100"}
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("SELECT * FROM busy")
        run = start_migrator("--baseline", "base", cwd=folder, database=database, env=variables)
        run.wait_for("rolled back, retrying")
        connection.rollback()
    result = run.finish()
    assert result.code == 0, result
    assert owners(database) == {owner}


def test_a_role_that_env_sets_itself_stays(
    project: Project, run_migrator: Runner, database: Database, owner: str
) -> None:
    own = "connection.execute(text('SET ROLE pg_database_owner')); connection.commit()"
    folder = project(env(connected=own), revisions=THREE)
    result = run_migrator("--role", owner, cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
    assert owners(database) == {"pg_database_owner"}
    assert "env.py set the role pg_database_owner itself" in result.stderr, result


@pytest.mark.parametrize("kind", ["no such role", "no member"])
def test_a_role_that_cannot_be_had_is_refused_before_the_backup(
    kind: str, project: Project, run_migrator: Runner, database: Database, owner: str
) -> None:
    database.execute("CREATE TABLE something (id int)")
    login = f"login_{uuid.uuid4().hex[:8]}"
    url = database.server.url(database.name, user=database.server.create_role(login))
    database.execute(f"GRANT CREATE ON SCHEMA public TO {login}")
    variables = {
        "MIGRATOR_DATABASE_URL": url,
        "MIGRATOR_ROLE": owner if kind == "no member" else "nobody here",
    }
    folder = project(env(), revisions=THREE)
    result = run_migrator("--baseline", "base", cwd=folder, database=database, env=variables)
    assert result.code == 30, result
    expected = "[42501]" if kind == "no member" else "[22023]"
    assert expected in result.logs[-1]["message"], result
    assert "cannot SET ROLE to MIGRATOR_ROLE=" in result.logs[-1]["message"], result
    assert not run_migrator.backups.exists()
    assert owners(database) == set()
    database.execute(f"DROP OWNED BY {login}; DROP ROLE {login}")


# -- transactions ------------------------------------------------------------------------------------------

FAILS = [
    *THREE[:2],
    Revision("r003", "r002", "op.execute('CREATE TABLE t3 (id int)')\nraise ValueError('broken here')"),
]
MODES = {
    ("env.py", ""): (39, 0),
    ("env.py", "transaction_per_migration=True"): (40, 2),
    ("each", ""): (40, 2),
    ("all", "transaction_per_migration=True"): (39, 0),
    ("all", "transactional_ddl=False"): (39, 0),
    ("none", ""): (40, 2),
}


@pytest.mark.parametrize(("mode", "configure"), MODES)
def test_how_much_a_failure_undoes(
    mode: str, configure: str, project: Project, run_migrator: Runner, database: Database
) -> None:
    code, landed = MODES[mode, configure]
    folder = project(env(configure=configure), revisions=FAILS)
    result = run_migrator("--transaction", mode, cwd=folder, database=database, env=OFF)
    assert result.code == code, result
    tables = database.psql("SELECT relname FROM pg_class WHERE relname ~ '^t[0-9]$' ORDER BY 1")
    assert tables == [(f"t{number}",) for number in range(1, landed + 1)]
    rows = database.psql("SELECT version_num FROM alembic_version") if landed else []
    assert rows == [(f"r{landed:03d}",)] * bool(landed)


def test_a_transaction_that_env_holds_cannot_be_split(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    folder = project(env(run="with connection.begin():\n    run(connection)"), revisions=THREE)
    for mode in ("each", "none"):
        result = run_migrator("--transaction", mode, cwd=folder, database=database, env=OFF)
        assert result.code == 10, result
        assert f"MIGRATOR_TRANSACTION={mode} is not possible" in result.logs[-1]["message"], result
        assert database.psql("SELECT to_regclass('t1') IS NULL") == [(True,)]
    result = run_migrator("--transaction", "all", cwd=folder, database=database, env=OFF)
    assert result.code == 0, result
