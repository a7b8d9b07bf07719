"""Restored from within, where the role may create no database; and single tables into a schema of their own."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from migrator.backups import event_triggers, psql
from migrator.backups.restore import in_place
from migrator.backups.restore import tables as side_schema
from migrator.backups.restore.restore import RestoreOptions
from migrator.backups.restore.result import Restored
from migrator.backups.restore.tables import restore_tables
from migrator.backups.restore.write_detection import Incomplete
from migrator.errors import AccessDenied, BackupFailed, RestoreFailed, SettingsError
from migrator.postgres.quoting import as_typed, quote_identifier
from migrator.postgres.session import connect
from migrator.runtime.signals import Interrupt
from migrator.service import MigrationService
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

from .conftest import LARGE, RICH, Workbench
from .test_kill import POINTS, kill_after, nobody_is_left, start
from .test_proof_condemns import stand_in

Bench = Callable[..., Workbench]
MORE = """
CREATE FUNCTION twice(a int) RETURNS int LANGUAGE sql AS 'SELECT 2 * a';
CREATE AGGREGATE multiply(int) (SFUNC = int4mul, STYPE = int, INITCOND = '1');
CREATE OPERATOR ### (LEFTARG = int, RIGHTARG = int, FUNCTION = int4pl);
CREATE COLLATION odd (LOCALE = 'C');
CREATE TEXT SEARCH CONFIGURATION plain (COPY = simple);
CREATE TYPE pair AS (a int, b int);
CREATE STATISTICS odd_statistics ON small, number FROM everything;
CREATE TABLE child_of (id int REFERENCES everything (id), p pair);
CREATE TRIGGER same BEFORE UPDATE ON child_of FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger();
ALTER TABLE child_of ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON child_of USING (id > 1);
INSERT INTO child_of VALUES (1, (1, 2)), (2, NULL);
CREATE PUBLICATION news FOR TABLE child_of WITH (publish = 'insert');
ALTER DEFAULT PRIVILEGES IN SCHEMA "Odd ""schema\"\"\" GRANT SELECT ON TABLES TO PUBLIC;
"""
BREAK = """
DROP TABLE everything CASCADE;
CREATE SCHEMA newer; CREATE TABLE newer.t AS SELECT 1 AS a;
CREATE TABLE "in the way" AS SELECT 2 AS a; CREATE FUNCTION newer_function() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE TYPE newer_type AS ENUM ('a'); CREATE DOMAIN newer_domain AS int; CREATE SEQUENCE newer_sequence;
CREATE PUBLICATION newer_publication FOR TABLE "in the way";
SELECT lo_unlink(4711); SELECT lo_create(4712);
"""


@pytest.fixture
def app(each_server: Server) -> Iterator[Database]:
    """A database that belongs to a role that may log in, and no more; it connects as that."""
    server = each_server
    server.create_role("app_role")
    database = server.create_database()
    name = 'shop\'s "own" ' + database.name
    server.psql(f"ALTER DATABASE {database.name} RENAME TO {quote_identifier(name)}")
    server.psql(f"ALTER DATABASE {quote_identifier(name)} OWNER TO app_role")
    database = Database(server, name)
    if server.major < 15:
        database.execute("GRANT ALL ON SCHEMA public TO app_role")
    database.url = database.url.replace("//postgres:", "//app_role:")
    yield database
    for (found,) in server.psql("SELECT datname FROM pg_database WHERE datdba = 'app_role'::regrole"):
        server.psql(f"DROP DATABASE {quote_identifier(found)} WITH (FORCE)")
    server.psql("DROP ROLE app_role")


def as_app(database: Database, sql: str) -> None:
    database.execute(f"SET ROLE app_role; {sql}")


def test_from_within_it_is_exact(app: Database, workbench: Bench) -> None:
    as_app(app, RICH + MORE)
    before = app.dump()
    bench = workbench(app)
    backup = bench.back_up()
    as_app(app, BREAK)
    broken = app.dump()
    restored = bench.restore()
    assert app.dump() == before
    assert restored.kept == ""
    assert restored.rows == sum(table.rows or 0 for table in backup.tables.values())
    assert app.psql("SELECT n FROM totals") == [(501,)]
    assert restored.safety in restored.message
    assert restored.safety in restored.next_step
    bench.restore(restored.safety, run_id="run3")
    assert app.dump() == broken


@pytest.mark.parametrize("each_server", ["debian"], indirect=True)
def test_from_within_extensions_stay(app: Database, workbench: Bench) -> None:
    app.execute("CREATE EXTENSION pgcrypto; COMMENT ON EXTENSION pgcrypto IS 'ours'")
    as_app(app, "CREATE TABLE t AS SELECT digest('a', 'sha256') AS d")
    before = app.dump()
    bench = workbench(app)
    bench.back_up()
    as_app(app, "DROP TABLE t")
    restored = bench.restore()
    assert app.dump() == before
    assert "Extensions were not changed: pgcrypto." in restored.notes


# What an extension's script does with pg_extension_config_dump(): pg_dump then dumps the rows that are the user's.
CONFIGURED = """
CREATE EXTENSION citext SCHEMA {schema}; GRANT ALL ON SCHEMA {schema} TO app_role;
CREATE TABLE {schema}.cfg (id int{key}, own boolean); CREATE TABLE {schema}.part (id int{reference});
CREATE SEQUENCE {schema}.seq; REVOKE ALL ON FUNCTION {schema}.citext_eq FROM PUBLIC;
GRANT EXECUTE ON FUNCTION {schema}.citext_eq TO app_role;
ALTER EXTENSION citext ADD TABLE {schema}.cfg; ALTER EXTENSION citext ADD TABLE {schema}.part;
ALTER EXTENSION citext ADD SEQUENCE {schema}.seq;
UPDATE pg_extension SET extconfig = ARRAY['{schema}.cfg', '{schema}.part', '{schema}.seq']::regclass[]::oid[],
  extcondition = ARRAY['WHERE own', '', ''] WHERE extname = 'citext';
INSERT INTO {schema}.cfg VALUES (1, false), (2, true); INSERT INTO {schema}.part VALUES (2);
GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO app_role; GRANT SELECT ON {schema}.seq TO app_role;
"""


@pytest.mark.parametrize("each_server", ["debian"], indirect=True)
@pytest.mark.parametrize("may", [True, False])
@pytest.mark.parametrize(
    ("schema", "key"), [("public", True), ("public", False), ("ext", True), ('"e x"', False)]
)
def test_from_within_what_users_keep_in_an_extension(
    schema: str, key: bool, may: bool, app: Database, workbench: Bench
) -> None:
    if schema != "public":
        app.execute(f"CREATE SCHEMA {schema}")
    keys = (" PRIMARY KEY", f" REFERENCES {schema}.cfg") if key else ("", "")
    app.execute(CONFIGURED.format(schema=schema, key=keys[0], reference=keys[1]))
    if may:
        app.execute(
            f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO app_role; GRANT ALL ON {schema}.seq TO app_role"
        )
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    before = app.dump()
    bench = workbench(app)
    bench.back_up()
    app.execute(f"INSERT INTO {schema}.cfg VALUES (3, true); SELECT nextval('{schema}.seq')")
    as_app(app, "DELETE FROM t")
    restored = bench.restore()
    assert app.psql("SELECT a FROM t") == [(1,)]
    rows = app.psql(f"SELECT id FROM {schema}.cfg ORDER BY id")
    told = "Their tables keep their rows" in restored.message
    if may:
        assert (app.dump(), told) == (before, False)
    else:
        assert (rows, told) == ([(1,), (2,), (3,)], True)


# The publisher is never asked: the subscription has no slot and is off.
MAPPING = """
CREATE FOREIGN DATA WRAPPER other; CREATE SERVER "far away" FOREIGN DATA WRAPPER other;
ALTER SERVER "far away" OWNER TO app_role; GRANT USAGE ON FOREIGN DATA WRAPPER other TO app_role;
CREATE USER MAPPING FOR postgres SERVER "far away" OPTIONS (password 'of the other side');
"""
SUBSCRIPTION = """
CREATE SUBSCRIPTION news CONNECTION 'host=127.0.0.1' PUBLICATION p
WITH (connect = false, enabled = false, slot_name = NONE)
"""


@pytest.mark.parametrize(
    ("hidden", "there", "named"),
    [
        (
            MAPPING,
            "SELECT umoptions FROM pg_user_mappings",
            'options of the user mapping postgres on "far away"',
        ),
        (SUBSCRIPTION, "SELECT subname::text FROM pg_subscription", "subscription news"),
    ],
)
def test_what_only_a_superuser_can_dump_is_named_and_not_lost(
    hidden: str, there: str, named: str, app: Database, workbench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    app.execute(hidden)
    before = app.psql(there)
    bench = workbench(app)
    made = bench.back_up()
    assert made.not_dumped == (named,)
    assert f"role app_role is not a superuser: it excludes {named}" in caplog.text
    with pytest.raises(RestoreFailed, match=f"lose objects that role app_role cannot back up.*{named}"):
        bench.restore()
    assert app.psql(there) == before
    app.execute("ALTER ROLE app_role CREATEDB")
    app.execute("ALTER FOREIGN DATA WRAPPER other OWNER TO postgres" if hidden == MAPPING else "SELECT 1")
    with pytest.raises(Incomplete, match=named):
        bench.restore(options=RestoreOptions(drop_old=True))
    if hidden == MAPPING:  # which nobody but a superuser may make again
        bench = workbench(Database(app.server, app.name))
    restored = bench.restore()
    assert any(named in note for note in restored.notes)
    if hidden == SUBSCRIPTION:
        app.server.psql("DROP SUBSCRIPTION news", dbname=restored.kept)


def test_from_within_nothing_is_changed_where_it_fails(
    app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    bench = workbench(app)
    bench.back_up()
    as_app(app, "DELETE FROM t WHERE a > 5; CREATE TABLE newer (a int)")
    broken = app.dump()
    real = in_place.comparison
    with monkeypatch.context() as patch:
        patch.setattr(
            in_place, "comparison", lambda tables: "DELETE FROM public.t WHERE a = 1; " + real(tables)
        )
        with pytest.raises(RestoreFailed, match=r"public\.t has 9 rows and not 10") as caught:
            bench.restore()
    assert "was not changed" in caught.value.state
    assert app.dump() == broken
    # Not ours to drop:
    app.execute(
        "CREATE SCHEMA admins; CREATE TABLE admins.t (a int);"
        " GRANT USAGE ON SCHEMA admins TO app_role; GRANT SELECT ON admins.t TO app_role"
    )
    with pytest.raises(RestoreFailed, match="must be owner of schema admins"):
        bench.restore(run_id="run3")
    app.execute("DROP SCHEMA admins CASCADE")
    assert app.dump() == broken


def test_from_within_large_objects_do_not_end_the_transaction(
    app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_app(app, LARGE)
    before = app.dump()
    bench = workbench(app)
    backup = bench.back_up()
    as_app(app, "DELETE FROM t; DROP PROCEDURE p(); SELECT lo_unlink(17); CREATE TABLE newer (a int)")
    broken = app.dump()
    real = in_place.comparison
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "comparison", lambda tables: "DELETE FROM public.t; " + real(tables))
        with pytest.raises(RestoreFailed, match=r"public\.t has 0 rows and not 2") as caught:
            bench.restore()
    assert "was not changed" in caught.value.state
    assert app.dump() == broken
    bench.restore(backup.id, run_id="run3")
    assert app.dump() == before


def test_from_within_what_was_committed_is_not_called_unchanged(
    app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever way a COMMIT gets into the script: what the error says of the database is so."""
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(app)
    bench.back_up()
    as_app(app, "CREATE TABLE newer AS SELECT 2 AS a")
    real = in_place.comparison
    with monkeypatch.context() as patch:
        patch.setattr(in_place, "comparison", lambda tables: "COMMIT; " + real(tables))
        with pytest.raises(RestoreFailed, match="the transaction has ended before") as caught:
            bench.restore()
    assert "was changed" in caught.value.state
    assert app.psql("SELECT to_regclass('newer')") == [(None,)]
    safety = caught.value.state.rpartition(" ")[2].rstrip(".")
    assert f"`migrator restore {safety} --yes` restores the earlier content" in caught.value.next_step
    bench.restore(safety, run_id="run3")
    assert app.psql("SELECT a FROM newer") == [(2,)]


@pytest.mark.parametrize("place", ["_run", "_notes"])
def test_from_within_a_signal_after_the_commit_undoes_nothing(
    place: str, app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(app)
    bench.back_up()
    as_app(app, "DELETE FROM t")
    real = getattr(in_place, place)

    def interrupted(*given: object) -> None:
        real(*given)
        raise Interrupt("SIGTERM")

    monkeypatch.setattr(in_place, place, interrupted)
    restored = bench.restore()
    assert "The restore was committed before this error: SIGTERM." in restored.message
    assert app.psql("SELECT a FROM t") == [(1,)]


def test_from_within_a_signal_before_the_commit_undoes_all(
    app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(app)
    bench.back_up()
    as_app(app, "DELETE FROM t")
    broken = app.dump()
    monkeypatch.setattr(psql, "COMMIT", psql.COMMIT.replace("COMMIT", "SELECT pg_sleep(60); COMMIT"))
    real = psql.Ended.note

    def interrupt(self: psql.Ended, chunk: bytes) -> None:
        real(self, chunk)
        if self.whole:
            raise Interrupt("SIGTERM")

    monkeypatch.setattr(psql.Ended, "note", interrupt)
    with pytest.raises(Interrupt):
        bench.restore()
    assert app.dump() == broken
    assert app.psql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(60)%%'") == [
        (0,)
    ]


def test_from_within_what_belongs_to_another_goes_with_that(app: Database, workbench: Bench) -> None:
    """An identity's sequence cannot be dropped alone, and is found before its table."""
    as_app(app, "CREATE TABLE a (id int GENERATED ALWAYS AS IDENTITY, x int)")
    as_app(app, "CREATE TYPE spread AS RANGE (subtype = int4); CREATE TABLE b (id serial)")
    as_app(app, "INSERT INTO a (x) VALUES (1), (2); INSERT INTO b VALUES (DEFAULT)")
    before = app.dump()
    bench = workbench(app)
    bench.back_up()
    as_app(app, "DELETE FROM a; ALTER SEQUENCE a_id_seq RENAME TO z; ALTER TABLE a RENAME TO c")
    bench.restore()
    assert app.dump() == before


PRIVILEGES = """
ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO postgres WITH GRANT OPTION;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT UPDATE ON SEQUENCES TO PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM PUBLIC, app_role;
ALTER DEFAULT PRIVILEGES REVOKE USAGE ON TYPES FROM PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT CREATE ON SCHEMAS TO PUBLIC;
"""
OBJECTS = """
CREATE TABLE secret (a serial); CREATE SCHEMA closed; CREATE TYPE kind AS ENUM ('a');
CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1';
"""


@pytest.mark.parametrize("first", ["objects", "privileges"])
def test_from_within_nobody_is_given_more(first: str, app: Database, workbench: Bench) -> None:
    """Default privileges that came after the backup give nothing to what comes back; those in it come back."""
    as_app(app, OBJECTS if first == "objects" else PRIVILEGES + OBJECTS)
    before = app.dump()
    bench = workbench(app)
    if first == "privileges":  # another's are in the backup, too
        app.execute("ALTER DEFAULT PRIVILEGES FOR ROLE postgres GRANT SELECT ON TABLES TO PUBLIC")
    bench.back_up()
    as_app(
        app, PRIVILEGES if first == "objects" else "ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO postgres"
    )
    app.execute("ALTER DEFAULT PRIVILEGES FOR ROLE postgres GRANT SELECT ON TABLES TO PUBLIC")
    restored = bench.restore()
    assert "Default privileges of postgres, which belong to others, were not changed." in restored.notes
    app.execute("ALTER DEFAULT PRIVILEGES FOR ROLE postgres REVOKE SELECT ON TABLES FROM PUBLIC")
    assert app.dump() == before


def test_from_within_who_holds_a_lock_is_ended_or_named(
    app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    bench = workbench(app)
    bench.back_up()
    ours = psycopg2.connect(app.url)
    ours.cursor().execute("DELETE FROM t")
    bench.restore()
    with pytest.raises(psycopg2.Error):
        ours.commit()
    monkeypatch.setattr(in_place, "_LOCK_TIMEOUT", "300ms")
    admin = app.connect()
    admin.cursor().execute("SELECT * FROM t")
    with pytest.raises(RestoreFailed, match="lock timeout") as caught:
        bench.restore(run_id="run3")
    assert f"as a superuser: SELECT pg_terminate_backend({admin.info.backend_pid})," in caught.value.next_step
    admin.close()
    assert app.psql("SELECT count(*) FROM t") == [(10,)]


def test_from_within_a_prepared_transaction_is_named(
    private_server: Callable[..., Server], workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = private_server(settings={"max_prepared_transactions": "2"})
    server.create_role("app_role")
    database = server.create_database()
    server.psql(f"ALTER DATABASE {database.name} OWNER TO app_role")
    database.url = server.url(database.name, "app_role")
    as_app(database, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(database)
    bench.back_up()
    session = psycopg2.connect(database.url)
    session.autocommit = True
    session.cursor().execute("BEGIN; DELETE FROM t")
    session.cursor().execute("PREPARE TRANSACTION 'it''s one'")
    session.close()
    monkeypatch.setattr(in_place, "_LOCK_TIMEOUT", "300ms")
    with pytest.raises(RestoreFailed, match="lock timeout") as caught:
        bench.restore()
    assert caught.value.next_step.startswith("ROLLBACK PREPARED 'it''s one';")


def test_from_within_who_may_not_is_told_who_may(app: Database, workbench: Bench) -> None:
    """A right to create databases would not help: what a superuser has made, only a superuser makes again."""
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    app.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    bench = workbench(app)
    bench.back_up()
    for role in ("NOCREATEDB", "CREATEDB"):
        app.execute(f"ALTER ROLE app_role {role}")
        with pytest.raises(RestoreFailed, match="must be") as caught:
            bench.restore()
        assert caught.value.next_step.startswith("restore as a superuser")
    app.url = app.url.replace("//app_role:", "//postgres:")
    workbench(app).restore()
    assert app.psql("SELECT pubname FROM pg_publication") == [("everything",)]


def test_from_within_where_transactions_are_read_only(app: Database, workbench: Bench) -> None:
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(app)
    bench.back_up()
    app.execute("ALTER ROLE app_role SET default_transaction_read_only = on")
    with pytest.raises(AccessDenied, match="default_transaction_read_only is on"):
        bench.restore()


EVENT_TRIGGER = (
    "CREATE FUNCTION audit() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$;"
    ' CREATE EVENT TRIGGER "an audit" ON ddl_command_start EXECUTE FUNCTION audit();'
)


@pytest.mark.parametrize("owner", ["postgres", "app_role"])
def test_from_within_event_triggers_are_named_before_anything_is_done(
    owner: str, app: Database, workbench: Bench
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(app)
    without = bench.back_up()
    app.execute(f"{EVENT_TRIGGER} ALTER FUNCTION audit() OWNER TO {owner}")
    bench.back_up()
    as_app(app, "DELETE FROM t")
    before, files = app.dump(), bench.files()
    with pytest.raises(
        RestoreFailed, match=r"has event triggers \(an audit\).*app_role is not a superuser"
    ) as caught:
        bench.restore()
    assert "restore as a superuser" in caught.value.next_step
    with pytest.raises(
        RestoreFailed, match=r"There are event triggers \(an audit\) that .* does not have"
    ) as caught:
        bench.restore(without.id)
    assert (app.dump(), bench.files()) == (before, files)
    app.execute(caught.value.next_step.partition("as a superuser: ")[2].partition(" then")[0])
    bench.restore(without.id)
    assert app.psql("SELECT a FROM t") == [(1,)]


def test_from_within_who_may_make_event_triggers_is_not_refused(database: Database, workbench: Bench) -> None:
    database.execute(EVENT_TRIGGER)
    bench = workbench(database)
    backup = bench.back_up()
    lines = ["1; 3466 2 EVENT TRIGGER - an audit postgres"]
    with connect(bench.target, "migrator/t", 60) as session:
        event_triggers.refuse(session, backup, lines)
    assert database.psql("SELECT evtname::text FROM pg_event_trigger") == [("an audit",)]


def test_from_within_no_backup_no_restore(
    app: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_app(app, "CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(app)
    bench.back_up()
    app.execute("CREATE TABLE secret AS SELECT 1 AS a")  # app_role may not read it
    with pytest.raises(BackupFailed):
        bench.restore()
    assert app.psql("SELECT count(*) FROM secret") == [(1,)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_from_within_killed(number: int, app: Database, workbench: Bench) -> None:
    as_app(app, "CREATE TABLE t AS SELECT g, md5(g::text) AS x FROM generate_series(1, 30000) g")
    as_app(app, "CREATE INDEX ON t (x); SELECT lo_from_bytea(7, 'large')")
    before = app.dump()
    bench = workbench(app)
    backup = bench.back_up()
    as_app(app, "DELETE FROM t WHERE g % 2 = 0; CREATE TABLE newer (a int)")
    broken = app.dump()
    codes = set()
    for seconds in POINTS[::2]:
        worker: subprocess.Popen[bytes] = start(bench, "restore", backup.id)
        code = kill_after(worker, number, seconds * 1.5)
        codes.add(code)
        nobody_is_left(bench)
        now = app.dump()
        assert now in (before, broken)
        assert now == {0: before, 23: broken}.get(code, now), "it says what is not so"
        if now == before:
            break
    bench.restore(backup.id)
    assert app.dump() == before
    assert codes & {23, -9}, "no kill came in time"


# -- single tables ----------------------------------------------------------------------------------------


def tables(
    bench: Workbench,
    *names: str,
    schema: str = "",
    run_id: str = "20260101T000000Z-abcdef",
    committed: Callable[[], None] = lambda: None,
) -> Restored:
    """Restore tables in this process."""
    return restore_tables(
        bench.target,
        bench.settings,
        "latest",
        names,
        schema=schema,
        run_id=run_id,
        application_name="migrator/t",
        committed=committed,
    )


def test_a_table_comes_back_beside(each_database: Database, workbench: Bench) -> None:
    each_database.execute(RICH + MORE)
    bench = workbench(each_database)
    bench.back_up()
    each_database.execute("DELETE FROM child_of; DELETE FROM everything WHERE id > 3")
    before = each_database.dump("--schema=public", '--schema="Odd ""schema"""')
    restored = tables(bench, "everything", '"Odd ""schema"""."T a,b"', "child_of")
    assert each_database.dump("--schema=public", '--schema="Odd ""schema"""') == before
    where = "restored_20260101t000000z_abcdef"
    assert each_database.psql(f"SELECT count(*), min(feeling::text) FROM {where}.everything") == [
        (501, "happy")
    ]
    assert each_database.psql(f"SELECT id, (p).b FROM {where}.child_of ORDER BY id") == [(1, 2), (2, None)]
    assert each_database.psql(f'SELECT "Ü" FROM {where}."T a,b" WHERE "select" = 2') == [("",)]
    keys = (
        "SELECT conname FROM pg_constraint WHERE connamespace = %s::regnamespace AND contype IN ('p', 'u', 'f')"
        " ORDER BY 1"
    )
    assert each_database.psql(keys, [where]) == [("T a,b_pkey",), ("T a,b_Ü_key",), ("everything_pkey",)]
    assert where in restored.message
    assert "DROP SCHEMA" in restored.next_step
    with pytest.raises(RestoreFailed, match="already exists"):
        tables(bench, "child_of", schema=where)
    tables(bench, "parent", "measured", schema="look")
    assert each_database.psql("SELECT a FROM look.parent") == [(1,)]


def test_a_table_whose_rows_were_left_out_comes_back_empty_and_it_says_so(
    database: Database, workbench: Bench
) -> None:
    database.execute("CREATE TABLE t AS SELECT 1 AS a; CREATE TABLE audit AS SELECT 1 AS a")
    bench = workbench(database, MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA="audit")
    bench.back_up()
    restored = tables(bench, "t", "audit", schema="side")
    assert (
        "This backup does not have the rows of public.audit (MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA)."
        in restored.notes
    )
    assert "This backup does not have" not in tables(bench, "t", schema="other").message
    assert database.psql("SELECT (SELECT count(*) FROM side.t), (SELECT count(*) FROM side.audit)") == [
        (1, 0)
    ]


@pytest.mark.parametrize("place", ["psql", "notes"])
def test_tables_a_signal_after_the_commit_undoes_nothing(
    place: str, database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(database)
    bench.back_up()
    module, name = (psql, "run") if place == "psql" else (side_schema, "_partitioned")
    real = getattr(module, name)

    def interrupted(*given: object, **named: object) -> None:
        real(*given, **named)
        raise Interrupt("SIGTERM")

    monkeypatch.setattr(module, name, interrupted)
    told: list[str] = []
    restored = tables(bench, "t", schema="side", committed=lambda: told.append("committed"))
    assert "The restore was committed before this error: SIGTERM." in restored.message
    assert told
    assert database.psql("SELECT a FROM side.t") == [(1,)]


def test_tables_a_signal_before_the_commit_undoes_all(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(database)
    bench.back_up()
    monkeypatch.setattr(psql, "COMMIT", psql.COMMIT.replace("COMMIT", "SELECT pg_sleep(60); COMMIT"))
    real = psql.Ended.note

    def interrupt(self: psql.Ended, chunk: bytes) -> None:
        real(self, chunk)
        if self.whole:
            raise Interrupt("SIGTERM")

    monkeypatch.setattr(psql.Ended, "note", interrupt)
    with pytest.raises(Interrupt):
        tables(bench, "t", schema="side", committed=lambda: pytest.fail("it was not"))
    assert database.psql("SELECT to_regnamespace('side')") == [(None,)]


def test_tables_that_were_committed_are_not_called_unchanged(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE t AS SELECT 1 AS a")
    bench = workbench(database)
    bench.back_up()
    real = side_schema.comparison
    monkeypatch.setattr(side_schema, "comparison", lambda tables: "COMMIT; " + real(tables))
    with pytest.raises(
        RestoreFailed, match=r"did not end well: .*the transaction has ended before"
    ) as caught:
        tables(bench, "t", schema="side")
    assert caught.value.state == "The tables are in schema side; nothing else was changed."


def test_the_command_says_what_is_there_when_a_signal_comes_late(
    database: Database, run_migrator: Runner, project: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGTERM when psql has committed, and before anybody knows."""
    database.execute("CREATE TABLE t AS SELECT 1 AS a")
    folder = project(revisions=linear_history(1))
    assert run_migrator("backup", cwd=folder, database=database).code == 0
    late = 'case "$*" in *--version*) exec $real "$@";; esac\n$real "$@"\nkill -TERM $PPID\nsleep 60\n'
    programs = stand_in(tmp_path / "bin", database.server, psql=late)
    arguments = ("restore", "latest", "--table", "t", "--into-schema", "side")
    result = run_migrator(*arguments, cwd=folder, database=database, env={"MIGRATOR_PG_BIN": str(programs)})
    assert result.code == 0, result
    assert "The restore was committed before" in result.stdout + result.stderr
    assert database.psql("SELECT a FROM side.t") == [(1,)]


@pytest.mark.parametrize(
    ("encoding", "table", "schema"),
    [
        ("LATIN1", "größe", "neuß"),
        ("SQL_ASCII", "größe", "neuß"),
        ("EUC_JP", "注文", "復元"),
        ("UTF8", "注文", "neuß"),
    ],
)
def test_names_in_the_encoding_of_the_database(
    encoding: str, table: str, schema: str, server: Server, workbench: Bench
) -> None:
    name = f"encoded_{encoding.lower()}"
    server.psql(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    server.create_role("app_role")
    server.psql(f"ALTER DATABASE {name} OWNER TO app_role")
    database = Database(server, name)
    database.url = database.url.replace("//postgres:", "//app_role:")
    try:
        bench = workbench(database)
        with connect(bench.target, "migrator/t", 60) as session:  # as UTF-8
            session.query(f'CREATE TABLE public."{table}" AS SELECT \'{table}\'::text AS "{table}"')
        made = bench.back_up()
        with connect(bench.target, "migrator/t", 60) as session:
            session.query(f'DELETE FROM public."{table}"')
        bench.restore()
        wanted = [f'"{table}"']
        common = {"run_id": "run3", "application_name": "migrator/t"}
        restore_tables(bench.target, bench.settings, made.id, wanted, schema=schema, **common)
        with connect(bench.target, "migrator/t", 60) as session:
            for place in ("public", schema):
                found = session.query(f'SELECT "{table}" FROM {quote_identifier(place)}."{table}"')
                assert found == [(table,)]
        if encoding == "LATIN1":
            with pytest.raises(RestoreFailed, match="Schema 復 cannot be named"):
                restore_tables(bench.target, bench.settings, made.id, wanted, schema="復", **common)
    finally:
        server.psql(f"DROP DATABASE {name} WITH (FORCE)")
        server.psql("DROP ROLE app_role")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "has no single table nothing"),
        ("Orders", 'it could be public."Orders"'),
        ("public.orders", "--table 'public.\"Orders\"'"),
        ("child", "inherits from another table"),
    ],
)
def test_a_table_that_cannot_come_back_alone(
    database: Database, workbench: Bench, name: str, words: str
) -> None:
    database.execute(f'{RICH}; CREATE TABLE "Orders" (id int)')
    bench = workbench(database)
    bench.back_up()
    with pytest.raises(RestoreFailed) as caught:
        tables(bench, name, schema="side")
    assert words in f"{caught.value} {caught.value.next_step}"
    assert database.psql("SELECT to_regnamespace('side')") == [(None,)]


@pytest.mark.parametrize("name", ["audit", "audit x", "two\nlines", "two lines"])
def test_a_table_whose_name_begins_as_anothers(each_database: Database, workbench: Bench, name: str) -> None:
    for number, other in enumerate(("audit", "audit x", "two\nlines", "two lines")):
        key = quote_identifier(f"{other}_key")
        each_database.execute(
            f"CREATE TABLE {quote_identifier(other)} (a int CONSTRAINT {key} PRIMARY KEY);"
            f" INSERT INTO {quote_identifier(other)} VALUES ({number})"
        )
    bench = workbench(each_database)
    bench.back_up()
    if name.startswith("two"):
        # The table of contents shows both in the same way.
        each_database.execute('DROP TABLE "two lines"' if name == "two\nlines" else 'DROP TABLE "two\nlines"')
        bench.back_up()
    tables(bench, as_typed(name), schema="side")
    assert each_database.psql(
        "SELECT relname FROM pg_class WHERE relnamespace = 'side'::regnamespace AND relkind = 'r'"
    ) == [(name,)]
    assert each_database.psql(f"TABLE side.{quote_identifier(name)}") == each_database.psql(
        f"TABLE {quote_identifier(name)}"
    )
    keys = "SELECT conname FROM pg_constraint WHERE connamespace = 'side'::regnamespace"
    assert each_database.psql(keys) == [(f"{name}_key",)]


def test_texts_in_a_table_that_look_like_statements(database: Database, workbench: Bench) -> None:
    text = "'x\nALTER TABLE public.t OWNER TO me;\nINHERITS (public.t)\nCOPY public.t (a) FROM stdin;\n'"
    database.execute(f"CREATE TABLE t (a text DEFAULT {text} CHECK (a <> {text[:-1]}y'))")
    database.execute("INSERT INTO t DEFAULT VALUES")
    bench = workbench(database)
    bench.back_up()
    database.execute(f"ALTER DATABASE {database.name} SET idle_in_transaction_session_timeout = '1ms'")
    tables(bench, "t", schema="side")
    database.execute("INSERT INTO side.t DEFAULT VALUES")
    assert database.psql("SELECT count(*) FROM side.t JOIN public.t USING (a)") == [(2,)]


def test_rows_that_look_like_statements_are_rows(database: Database, workbench: Bench) -> None:
    database.execute("CREATE TABLE t (a text)")
    rows = [
        "CREATE TABLE public.t (",
        "COPY public.t (a) FROM stdin;",
        "DROP TABLE public.t;",
        "\\.",
        "x" * 3_000_000,
    ]
    for row in rows:
        database.psql("INSERT INTO t VALUES (%s)", [row])
    bench = workbench(database)
    bench.back_up()
    tables(bench, "t", schema="side")
    assert sorted(row[0] for row in database.psql("SELECT a FROM side.t")) == sorted(rows)


def test_what_does_not_go_together(database: Database, workbench: Bench, tmp_path: Path) -> None:
    service = MigrationService(workbench(database).settings)
    with pytest.raises(SettingsError, match="--to is for a whole database"):
        service.restore("latest", to="a", tables=("t",))
    with pytest.raises(SettingsError, match="name them with --table"):
        service.restore("latest", into_schema="a")
    with pytest.raises(SettingsError, match="--drop-old is for"):
        service.restore("latest", to="a", drop_old=True)
