"""Our sessions resolve names in pg_catalog alone, and tables of others with our names call nothing.

test_hostile_objects.py has every command before everything that can be planted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.config.database_url import parse as parse_address
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import connect
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

OURS = "pg_catalog, pg_temp"


def test_a_session_keeps_to_pg_catalog_and_knows_the_users_path(database: Database) -> None:
    database.execute("CREATE SCHEMA app; CREATE TABLE app.t (); CREATE VIEW v AS SELECT 1")
    address = f"{database.url}?options=-csearch_path%3Dapp%2Cpublic%2Cnowhere"
    with connect(parse_address(address), "test", 60) as session:
        assert session.value("SHOW search_path") == OURS
        assert (session.user_path, session.user_schemas()) == ("app,public,nowhere", ("app", "public"))
        assert (session.find("t"), session.find("v"), session.find("pg_class")) == (
            ("app", "r"),
            ("public", "v"),
            None,
        )
        with session.as_user():
            assert session.value("SELECT count(*) FROM t") == 0
            assert session.value("SELECT * FROM v") == 1
        with pytest.raises(QueryFailed), session.as_user("public"):
            session.query("SELECT count(*) FROM t")
        assert session.value("SHOW search_path") == OURS
        session.query("BEGIN")
        assert session.find("t") == ("app", "r")
        assert session.value("SHOW search_path") == OURS
        session.query("ROLLBACK")
        session.reconnect(60)
        assert session.value("SHOW search_path") == OURS
        assert session.find("t") == ("app", "r")


def test_a_role_that_is_taken_does_not_change_the_path(server: Server, database: Database) -> None:
    role = server.create_role(f"mallory_{database.name}")
    database.execute(f'CREATE SCHEMA "{role}"; CREATE TABLE "{role}".alembic_version (version_num text)')
    with connect(parse_address(database.url), "test", 60) as session, session.as_role(role):
        assert session.value("SHOW search_path") == OURS


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_view_in_the_place_of_the_version_table_is_not_read(
    kind: str, server: Server, database: Database, project: Callable[..., Path], run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2), env="own_variable")
    assert run_migrator("upgrade", "r001", cwd=folder, database=database).code == 0
    role = server.create_role(f"mallory_{database.name}")
    database.execute(f"CREATE SCHEMA early; GRANT ALL ON SCHEMA early TO {role}; CREATE TABLE called ()")
    database.execute(
        f"SET ROLE {role}; CREATE FUNCTION early.called() RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        " IF current_setting('is_superuser') = 'on' THEN DROP TABLE public.called; END IF; RETURN 'r001'; END $$;"
        f" CREATE {kind} early.alembic_version AS SELECT early.called() AS version_num; RESET ROLE"
    )
    server.psql(f'ALTER DATABASE "{database.name}" SET search_path = early, public')
    for command in ("status", "check", "verify", "upgrade", "downgrade"):
        words = (command, "-1") if command == "downgrade" else (command,)
        result = run_migrator(*words, cwd=folder, database=database)
        assert result.code == 30, str(result)
        assert "is not a table, so it cannot be the version table" in result.stderr
    assert database.psql("SELECT count(*) FROM called") == [(0,)]


FOREIGN = """
CREATE FUNCTION {role}.called() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
  IF current_user <> '{role}' THEN RAISE LOG 'canary of {role}: %', current_query(); END IF; RETURN true;
END $$;
CREATE TYPE {role}.evil AS (x pg_catalog.text);
CREATE FUNCTION {role}.told({role}.evil) RETURNS pg_catalog.text LANGUAGE plpgsql AS $$ BEGIN
  PERFORM {role}.called(); RETURN 'schema'; END $$;
CREATE CAST ({role}.evil AS pg_catalog.text) WITH FUNCTION {role}.told AS IMPLICIT;
CREATE TABLE {role}.alembic_version (version_num {role}.evil);
CREATE TABLE {role}.migrator_ledger (run_id {role}.evil, at timestamptz, event {role}.evil, details jsonb,
  version_table {role}.evil, number int, code int, backup_id {role}.evil);
INSERT INTO {role}.alembic_version VALUES (ROW('r001'));
INSERT INTO {role}.migrator_ledger VALUES
  (ROW('x'), now(), ROW('schema'), '{{}}', ROW('alembic_version'), 1, 0, ROW('b'));
CREATE TABLE {role}.guarded (version_num text);
ALTER TABLE {role}.guarded ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON {role}.guarded USING ({role}.called());
INSERT INTO {role}.guarded VALUES ('r001');
GRANT USAGE ON SCHEMA {role} TO PUBLIC;
GRANT SELECT ON ALL TABLES IN SCHEMA {role} TO PUBLIC;
"""


@pytest.mark.parametrize("superuser", [True, False])
def test_tables_of_others_with_our_columns_call_nothing(
    superuser: bool, server: Server, database: Database, project: Callable[..., Path], run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2), env="own_variable")
    role = server.create_role(f"mallory_{database.name}")
    owner = server.create_role(f"owner_{database.name}", "LOGIN SUPERUSER" if superuser else "LOGIN")
    database.execute(
        f'CREATE SCHEMA {role} AUTHORIZATION {role}; ALTER DATABASE "{database.name}" OWNER TO {owner}'
    )
    database.execute(f"GRANT ALL ON SCHEMA public TO {owner}")
    env = {"MIGRATOR_DATABASE_URL": server.url(database.name, user=owner), "MIGRATOR_BACKUP_KEEP": "last=1"}
    env["DATABASE_URL"] = env["MIGRATOR_DATABASE_URL"]
    assert run_migrator("upgrade", "r001", cwd=folder, env=env).code == 0
    database.execute(f"SET ROLE {role}; {FOREIGN.format(role=role)} RESET ROLE")
    before = len(server.log.read_bytes())
    for words in (
        ["upgrade"],
        ["status"],
        ["verify"],
        ["downgrade", "-1"],
        ["prune"],
        ["ledger"],
    ):
        if words == ["upgrade"] and not superuser:
            env["MIGRATOR_BACKUP"] = "off"  # pg_dump refuses rows that a policy may hide
        result = run_migrator(*words, cwd=folder, env=env)
        assert result.code == 0, str(result)
    assert f"canary of {role}" not in server.log.read_bytes()[before:].decode("utf-8", "replace")
