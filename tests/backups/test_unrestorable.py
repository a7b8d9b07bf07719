"""What a restore will end at is said when the backup is made; and what is only our bookkeeping fails no backup."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.backups import clients, description
from migrator.backups.verification import fingerprint
from migrator.errors import RestoreFailed
from migrator.runtime.subprocesses import Finished
from tests.support import installations
from tests.support.servers import Database, Server

from .conftest import Workbench

Bench = Callable[..., Workbench]

BODIES = """
CREATE TABLE other (id int PRIMARY KEY); INSERT INTO other VALUES (1), (2);
CREATE FUNCTION known(i int) RETURNS boolean LANGUAGE sql STABLE
  AS 'SELECT EXISTS (SELECT FROM other o WHERE o.id = i)';
CREATE FUNCTION known_too(i int) RETURNS boolean LANGUAGE plpgsql STABLE
  AS 'BEGIN RETURN EXISTS (SELECT FROM other WHERE id = i); END';
CREATE FUNCTION low(t text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower(t)';
CREATE FUNCTION norm(t text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT low(t)';
CREATE FUNCTION outer_one(t text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT public.norm(t)';
CREATE FUNCTION good(i int) RETURNS boolean LANGUAGE sql STABLE
  AS 'SELECT EXISTS (SELECT FROM public.other WHERE id = i)';
CREATE FUNCTION good_too(i int) RETURNS boolean LANGUAGE sql STABLE SET search_path = public
  AS 'SELECT EXISTS (SELECT FROM other WHERE id = i) AND known(i)';
CREATE TYPE kind AS ENUM ('a');
CREATE FUNCTION good_four(i int) RETURNS boolean LANGUAGE plpgsql STABLE
  AS 'DECLARE k public.kind; BEGIN k := ''a''::public.kind; RETURN k::text = ''a''; END';
CREATE FUNCTION good_three(i int) RETURNS boolean LANGUAGE plpgsql STABLE
  AS 'BEGIN /* FROM other */ RETURN EXISTS (WITH other AS (SELECT i) SELECT FROM other, public.other o -- JOIN other
  ); END';
"""
BROKEN = {
    "check one of public.a": "CREATE TABLE a (id int CONSTRAINT one CHECK (known(id))); INSERT INTO a VALUES (1)",
    "check two of public.a": "CREATE TABLE a (id int CONSTRAINT two CHECK (known_too(id))); INSERT INTO a VALUES (1)",
    "check late of public.a": "CREATE TABLE a (id int CONSTRAINT late CHECK (good_too(id))); INSERT INTO a VALUES (1)",
    "check odd of public.small": "CREATE DOMAIN small AS int CONSTRAINT odd CHECK (known(VALUE));"
    " CREATE TABLE a (id small); INSERT INTO a VALUES (1)",
    "generated column n of public.a": "CREATE TABLE a (t text, n text GENERATED ALWAYS AS (norm(t)) STORED);"
    " INSERT INTO a VALUES ('A')",
    "index public.x": "CREATE TABLE a (t text); INSERT INTO a VALUES ('A'); CREATE INDEX x ON a (outer_one(t))",
    "materialized view public.m": "CREATE VIEW v AS SELECT id, known(id) FROM other;"
    " CREATE MATERIALIZED VIEW m AS SELECT * FROM v",
    "check three of public.a": "CREATE TYPE mood AS ENUM ('glad'); CREATE FUNCTION feels(t text) RETURNS boolean"
    " LANGUAGE plpgsql AS 'BEGIN RETURN t::mood IS NOT NULL; END';"
    " CREATE TABLE a (t text CONSTRAINT three CHECK (feels(t))); INSERT INTO a VALUES ('glad')",
    "check four of public.a": "CREATE DOMAIN short AS text; CREATE FUNCTION fits(t text) RETURNS boolean"
    " LANGUAGE plpgsql AS 'DECLARE s short; BEGIN s := t; RETURN true; END';"
    " CREATE TABLE a (t text CONSTRAINT four CHECK (fits(t))); INSERT INTO a VALUES ('a')",
    "partition key of public.a": "CREATE FUNCTION part(t text) RETURNS text LANGUAGE plpgsql IMMUTABLE"
    " AS 'BEGIN RETURN low(t); END'; CREATE TABLE a (t text) PARTITION BY LIST (part(t));"
    " CREATE TABLE a1 PARTITION OF a FOR VALUES IN ('a'); INSERT INTO a VALUES ('A')",
    "index public.by_class": "CREATE FUNCTION compare(text, text) RETURNS int LANGUAGE plpgsql IMMUTABLE"
    " AS 'BEGIN RETURN bttextcmp(low($1), low($2)); END'; CREATE OPERATOR CLASS lowered FOR TYPE text USING btree"
    " AS OPERATOR 1 <, OPERATOR 3 =, FUNCTION 1 compare(text, text); CREATE TABLE a (t text);"
    " INSERT INTO a VALUES ('a'), ('b'); CREATE INDEX by_class ON a (t lowered)",
    "index public.by_place": "CREATE EXTENSION cube; CREATE EXTENSION earthdistance;"
    " CREATE TABLE a (x float8, y float8); INSERT INTO a VALUES (1, 2);"
    " CREATE INDEX by_place ON a USING gist (ll_to_earth(x, y))",
    "index public.by_word": "CREATE EXTENSION unaccent; CREATE FUNCTION plain(t text) RETURNS text LANGUAGE plpgsql"
    " IMMUTABLE AS 'BEGIN RETURN public.unaccent(''unaccent'', t); END'; CREATE TABLE a (t text);"
    " INSERT INTO a VALUES ('a'); CREATE INDEX by_word ON a (plain(t))",
    "range type public.span": "CREATE FUNCTION apart(float8, float8) RETURNS float8 LANGUAGE plpgsql IMMUTABLE"
    " AS 'BEGIN RETURN least_of($1 - $2); END'; CREATE FUNCTION least_of(f float8) RETURNS float8 LANGUAGE sql"
    " IMMUTABLE AS 'SELECT f'; CREATE TYPE span AS RANGE (subtype = float8, subtype_diff = apart);"
    " CREATE TABLE a (s span); INSERT INTO a SELECT span(g, g + 1) FROM generate_series(1, 500) g;"
    " CREATE INDEX by_span ON a USING gist (s)",
}


@pytest.mark.parametrize("named", BROKEN)
def test_what_needs_a_search_path_is_named(
    named: str, database: Database, workbench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """And a restore does end at it, which shows that the warning is true: with one job, which takes them by name."""
    database.execute(BODIES + BROKEN[named])
    bench = workbench(database, MIGRATOR_RESTORE_JOBS="1")
    backup = bench.back_up()
    (proof,) = backup.proofs
    assert proof.ok
    assert proof.why.startswith(f"{named} calls public.")
    assert f"may stop at this: {named} calls" in caplog.text
    assert named in description.text(backup, lambda rows: "")
    with pytest.raises(Exception, match=r"does not exist|violates check"):
        bench.restore(to=f"{database.name}_look")


def test_what_needs_none_is_not_named(database: Database, workbench: Bench) -> None:
    """Qualified, with a path of its own, in a comment, or never evaluated by a restore."""
    database.execute(
        BODIES + "CREATE TABLE a (id int CHECK (id > 0), d bool DEFAULT known(1)); INSERT INTO a VALUES (1);"
        " CREATE VIEW v AS SELECT known(id) FROM a;"
        " CREATE EXTENSION cube; CREATE EXTENSION earthdistance; CREATE FUNCTION place(float8, float8) RETURNS earth"
        " LANGUAGE sql IMMUTABLE SET search_path = public AS 'SELECT ll_to_earth($1, $2)';"
        " CREATE INDEX by_place ON a USING gist (place(id, id));"
        " CREATE MATERIALIZED VIEW m AS SELECT good(id), good_too(id), good_three(id), good_four(id) FROM a"
    )
    bench = workbench(database)
    backup = bench.back_up()
    assert [proof.why for proof in backup.proofs] == [""]
    bench.restore(to=f"{database.name}_look")


def test_a_table_that_cannot_be_counted_by_a_query(each_database: Database, workbench: Bench) -> None:
    each_database.execute(
        BODIES + "CREATE TABLE person (id int PRIMARY KEY, name text); INSERT INTO person VALUES (1, 'A');"
        " CREATE STATISTICS st ON (norm(name)), id FROM person"
    )
    for how in ("read", "restore"):
        backup = workbench(each_database, MIGRATOR_BACKUP_VERIFY=how).back_up()
        assert backup.tables["public.person"].rows == 1


@pytest.mark.parametrize("broken", ["_SCHEMA", "_SEQUENCES"])
def test_bookkeeping_fails_no_backup(
    broken: str,
    database: Database,
    workbench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The backup is made, a warning says what is not known, and its proof does without."""
    database.execute("CREATE TABLE t (id serial); INSERT INTO t DEFAULT VALUES")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(fingerprint, broken, f"SELECT no_such_thing, {broken!r}")
        backup = workbench(database, MIGRATOR_BACKUP_VERIFY="read").back_up()
    assert backup.verified == "read"
    assert "no_such_thing" in caplog.text


ONLY_SUPERUSERS = {
    "extension pg_stat_statements": "CREATE EXTENSION pg_stat_statements",
    "publication every": "CREATE PUBLICATION every FOR ALL TABLES",
    "publication whole": "CREATE PUBLICATION whole FOR TABLES IN SCHEMA public",
    "server files": "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER files FOREIGN DATA WRAPPER w",
    "function public.absolute(integer)": "CREATE FUNCTION absolute(int) RETURNS int LANGUAGE internal AS 'int4abs'",
    "function public.tight(integer)": "CREATE FUNCTION tight(int) RETURNS int LANGUAGE sql LEAKPROOF AS 'SELECT $1'",
    "operator class own": "CREATE OPERATOR CLASS own FOR TYPE int USING btree AS OPERATOR 1 <,"
    " FUNCTION 1 btint4cmp(int, int)",
    "default privileges of role postgres": "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
    "objects of role postgres": "CREATE TABLE theirs (a int); GRANT SELECT ON theirs TO maker_role",
}


@pytest.mark.parametrize("named", ONLY_SUPERUSERS)
def test_what_only_a_superuser_restores_is_named(
    named: str, database: Database, workbench: Bench, server: Server
) -> None:
    """By a role that may create databases; a superuser is told nothing, and restores it."""
    server.create_role("maker_role", "LOGIN CREATEDB")
    try:
        server.psql(f"ALTER DATABASE {database.name} OWNER TO maker_role")
        database.execute(ONLY_SUPERUSERS[named])
        backup = workbench(database, DATABASE_URL=server.url(database.name, "maker_role")).back_up()
        assert f"may not create these again: {named}" in backup.proofs[0].why
        with pytest.raises(RestoreFailed) as caught:
            workbench(database, DATABASE_URL=server.url(database.name, "maker_role")).restore()
        assert "superuser" in caught.value.next_step or "role that may act for it" in caught.value.next_step
        assert workbench(database).back_up().proofs[0].why == ""
        workbench(database).restore(backup.id, to=f"{database.name}_look")
        server.drop_database(f"{database.name}_look")
    finally:
        server.psql(f"ALTER DATABASE {database.name} OWNER TO postgres")
        database.execute("DROP OWNED BY maker_role")
        server.psql("DROP ROLE maker_role")


def test_an_extensions_tables_and_its_version_are_named(database: Database, workbench: Bench) -> None:
    """Which pg_dump leaves out: rows of a table that belongs to one, and that it is not of the newest version."""
    database.execute(
        "CREATE EXTENSION hstore VERSION '1.4'; CREATE TABLE lost AS SELECT 1 AS a; CREATE TABLE none (a int);"
        " ALTER EXTENSION hstore ADD TABLE lost; ALTER EXTENSION hstore ADD TABLE none; ANALYZE lost"
    )
    why = workbench(database).back_up().proofs[0].why
    assert "extension hstore is 1.4, and a restore installs the default of its server, which is 1." in why
    assert "the rows of public.lost are not in it" in why
    assert "public.none" not in why
    for typed in ("ALTER EXTENSION hstore UPDATE", "ALTER EXTENSION hstore DROP TABLE public.lost"):
        assert typed in why
        database.execute(typed)
    backup = workbench(database).back_up()
    assert (backup.proofs[0].why, backup.tables["public.lost"].rows) == ("", 1)


def test_why_a_worker_died() -> None:
    said = (
        "pg_restore: error: could not execute query: ERROR:  could not create unique index\nDETAIL:  Key (a)=(1)\n"
        "pg_restore: error: a worker process died unexpectedly\n"
    )
    assert "could not create unique index DETAIL: Key" in clients.last_words(
        Finished("pg_restore", 1, said, 1.0)
    )
    notices = "NOTICE:  drop cascades to function f()\n"
    context = 'LINE 1: ...\n   ^\nQUERY:  a\nCONTEXT:  SQL function "f"\n'
    psql = f'{notices}ERROR:  relation "codes" does not exist\n{context}'
    assert clients.last_words(Finished("psql", 3, psql, 1.0)).startswith('ERROR: relation "codes" does not')
    alone = "pg_restore: error: a worker process died unexpectedly\n"
    assert "worker process died" in clients.last_words(Finished("pg_restore", 1, alone, 1.0))


def test_an_extension_of_one_database(
    private_server: Callable[..., Server], workbench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """pg_cron is left out of a copy beside, which is said when the backup is made and when it is restored."""
    if not Path("/usr/lib/postgresql/15/lib/pg_cron.so").exists():
        installations.apt_install("postgresql-15-cron")
    server = private_server(settings={"shared_preload_libraries": "pg_cron", "cron.database_name": "jobs"})
    server.psql("CREATE DATABASE jobs")
    database = Database(server, "jobs")
    database.execute("CREATE EXTENSION pg_cron; CREATE TABLE t AS SELECT 1 AS a")
    database.execute("SELECT cron.schedule('nightly', '0 3 * * *', 'VACUUM')")
    bench = workbench(database)
    backup = bench.back_up()
    assert "pg_cron works in only one database" in backup.proofs[0].why
    database.execute("DELETE FROM t")
    restored = bench.restore()
    assert database.psql("SELECT a FROM t") == [(1,)]
    (note,) = [note for note in restored.notes if "pg_cron" in note]
    database.execute("CREATE EXTENSION pg_cron")
    command = note.partition("then `")[2].partition("`")[0]
    subprocess.run(
        ["/bin/sh", "-ec", command],
        env={"PATH": f"{server.bin}:/usr/bin:/bin", **server.environment()},
        check=True,
    )
    assert database.psql("SELECT jobname, schedule FROM cron.job") == [("nightly", "0 3 * * *")]
