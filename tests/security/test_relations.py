"""What is counted, hashed and read is the relation that was listed, and none of its owner's functions runs as us.

A role that owns a table can change what it is while we work: it locks the table, waits until our session queues behind
the lock, and puts a view of that name in its place.  Its functions tell whether a superuser has called them.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.backups import exported_snapshot, pg_restore
from migrator.backups.clients import Login
from migrator.backups.restore.restore import restore
from migrator.backups.verification import fingerprint, scratch_database, trust
from migrator.backups.verification.scratch_database import Place
from migrator.config.settings import load
from migrator.errors import BackupFailed
from migrator.pipeline.stages.backup import back_up
from migrator.pipeline.stages.verify import verify
from migrator.postgres.session import connect
from migrator.schema.expectations import Assertion, Expectations
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

SERVERS = ("debian", "zstd")  # 15 and 17
APPLICATION = "migrator/test-host 20260101-run"


class Hostile:
    """A role of no privilege that owns tables, and a function of its that tells who called it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.called = database.server.data / f"called-{database.name}"
        self.role = f"app_{database.name}"
        database.execute(
            f'CREATE ROLE "{self.role}" LOGIN; GRANT CREATE ON SCHEMA public TO "{self.role}";'
            f' GRANT CREATE ON DATABASE "{database.name}" TO "{self.role}"'
        )
        self.session = self.connect()
        self.execute(
            f"""
            CREATE FUNCTION public.tell() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
              COPY (SELECT 'called') TO PROGRAM 'cat >> {self.called}';
            END $$;
            CREATE FUNCTION public.canary(a anyelement) RETURNS anyelement IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN
              IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
                PERFORM public.tell();  -- which is volatile, and so may do anything
              END IF;
              RETURN a;
            END $$
            """
        )

    def connect(self) -> Any:
        """Open a session whose statements run as the role."""
        session = self.database.connect(application_name="hostile")
        session.cursor().execute(f'SET SESSION AUTHORIZATION "{self.role}"')
        session.commit()
        return session

    def execute(self, sql: str, *, commit: bool = True) -> None:
        """Run SQL as the role."""
        self.session.cursor().execute(sql)
        if commit:
            self.session.commit()

    def plant_when_somebody_waits(self, sql: str) -> None:
        """Change things under the lock that is held, as soon as a session of ours queues behind it."""
        waits = (
            "SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE NOT granted AND datname = current_database() AND application_name LIKE 'migrator/%'"
        )
        deadline = time.monotonic() + 60
        while not self.database.psql(waits):
            assert time.monotonic() < deadline, "nobody waits for the lock"
            time.sleep(0.02)
        self.execute(sql)

    def was_called(self) -> bool:
        """Whether a superuser's session has called the function."""
        return self.called.exists()

    def close(self) -> None:
        """Take the role away."""
        self.session.close()
        self.database.execute(f'DROP OWNED BY "{self.role}" CASCADE; DROP ROLE "{self.role}"')


@pytest.fixture(params=SERVERS)
def database_of(servers: Callable[[str], Server], request: pytest.FixtureRequest) -> Iterator[Database]:
    server = servers(request.param)
    database = server.create_database()
    yield database
    server.drop_database(database.name)


@pytest.fixture
def hostile(database_of: Database) -> Iterator[Hostile]:
    role = Hostile(database_of)
    yield role
    role.close()


def settings_of(database: Database, folder: Path, **more: str) -> Any:
    return load(
        {},
        {
            "DATABASE_URL": database.url,
            "MIGRATOR_BACKUP_URL": folder.as_uri(),
            "MIGRATOR_PG_BIN": str(database.server.bin),
            **more,
        },
        folder.parent,
    )


@contextlib.contextmanager
def working(work: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Do our work in a thread; what it gave, or raised, is there after the block."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = work()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            result["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield result
    finally:
        thread.join(120)
        assert not thread.is_alive()


VIEW = "ALTER TABLE {0} RENAME TO was_{0}; CREATE VIEW {0} AS SELECT canary(1) AS a FROM was_{0}"


def test_the_canary_tells_what_a_query_runs(hostile: Hostile) -> None:
    """Counting by a query would have run it, with a view and also without: the planner evaluates what is immutable."""
    hostile.execute("CREATE TABLE t (a int); CREATE INDEX ON t ((a + canary(1)))")
    assert not hostile.was_called()
    hostile.database.execute("SELECT count(*) FROM ONLY t")
    assert hostile.was_called()


def taken(hostile: Hostile) -> fingerprint.Contents:
    """Hash the rows of all tables in a snapshot."""
    target = settings_of(hostile.database, Path("/tmp")).required_target
    with exported_snapshot.exported(Login(target, APPLICATION, 60)) as (session, _):
        return fingerprint.take(session, exported_snapshot.relations(session), rows=True, lenient=True)


@pytest.mark.parametrize(
    "swap",
    [
        "ALTER TABLE t RENAME TO was_t; CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 7)",
        "ALTER SCHEMA own RENAME TO was_own; CREATE SCHEMA own; CREATE TABLE own.t (a int)",
    ],
    ids=["table", "schema"],
)
def test_another_tables_rows_are_not_hashed_as_its(hostile: Hostile, swap: str) -> None:
    hostile.execute("CREATE SCHEMA own; CREATE TABLE own.t (a int); INSERT INTO own.t VALUES (1)")
    hostile.execute("SET search_path = own, public; LOCK TABLE own.t", commit=False)
    with working(lambda: taken(hostile)) as result:
        hostile.plant_when_somebody_waits(swap)
    assert result["value"].tables["own.t"].rows is None


def test_table_becomes_a_view_while_it_is_hashed(hostile: Hostile) -> None:
    hostile.execute("CREATE TABLE s (a int); INSERT INTO s VALUES (1); CREATE TABLE t (a int)")
    hostile.execute("LOCK TABLE t", commit=False)
    with working(lambda: taken(hostile)) as result:
        hostile.plant_when_somebody_waits(VIEW.format("t"))
    assert not hostile.was_called()
    rows = {name: table.rows for name, table in result["value"].tables.items()}
    assert rows == {"public.s": 1, "public.t": None}


def test_sequence_becomes_a_view_before_it_is_read(hostile: Hostile) -> None:
    """It is read by its oid, so what bears its name now does not matter."""
    hostile.execute("CREATE SEQUENCE drawn; SELECT nextval('drawn'); CREATE SEQUENCE fresh")
    target = settings_of(hostile.database, Path("/tmp")).required_target
    with connect(target, APPLICATION, 60) as session:
        found = exported_snapshot.relations(session)
        hostile.execute(
            "ALTER SEQUENCE drawn RENAME TO was_drawn;"
            " CREATE VIEW drawn AS SELECT canary(7) AS last_value, true AS is_called"
        )
        session.query("BEGIN READ ONLY")
        assert fingerprint.sequences(session, found) == {
            "public.drawn": (1, True),
            "public.fresh": (1, False),
        }
    assert not hostile.was_called()


def test_no_function_of_others_runs_while_a_backup_is_made(hostile: Hostile, tmp_path: Path) -> None:
    """Expression indexes, extended statistics, checks, defaults, policies, generated columns, domains, views, rules."""
    hostile.execute(
        """
        CREATE DOMAIN odd AS int CHECK (canary(VALUE) IS NOT NULL);
        CREATE TABLE t (a int DEFAULT canary(1), b odd, g int GENERATED ALWAYS AS (canary(2)) STORED,
                        CHECK (canary(3) = 3));
        INSERT INTO t VALUES (1, 1), (2, 2);
        CREATE INDEX ON t ((a + canary(4))) WHERE canary(5) = 5;
        CREATE STATISTICS st ON (a + canary(6)), b FROM t; ANALYZE t;
        ALTER TABLE t ENABLE ROW LEVEL SECURITY;
        CREATE POLICY p ON t USING (canary(7) = 7);
        CREATE VIEW v AS SELECT canary(8) AS a;
        CREATE TABLE parent (a int) PARTITION BY RANGE (canary(a));
        CREATE TABLE child PARTITION OF parent FOR VALUES FROM (0) TO (10);
        CREATE TABLE rest PARTITION OF parent DEFAULT;
        INSERT INTO child VALUES (1);
        """
    )
    bench = settings_of(hostile.database, tmp_path / "backups")
    with connect(bench.required_target, APPLICATION, 60) as session:
        backup = back_up(session, bench, run_id="run1", revisions=("r1",), application_name=APPLICATION)
    assert not hostile.was_called()
    assert {name: table.rows for name, table in backup.tables.items()} == {
        "public.child": 1,
        "public.parent": None,
        "public.rest": 0,
        "public.t": 2,
    }
    assert (
        json.loads((tmp_path / "backups" / f"{backup.id}.json").read_text())["tables"]["public.t"]["rows"]
        == 2
    )


@pytest.fixture
def checked(hostile: Hostile) -> Hostile:
    """A table whose check and index call the function of its owner wherever its rows are restored."""
    hostile.execute(
        "CREATE TABLE t (a int CHECK (canary(a) > 0)); CREATE INDEX ON t (canary(a)); INSERT INTO t VALUES (1)"
    )
    return hostile


def proven(database: Database, folder: Path, **more: str) -> Any:
    settings = settings_of(database, folder, MIGRATOR_BACKUP_VERIFY="restore", **more)
    with connect(settings.required_target, APPLICATION, 60) as session:
        return back_up(session, settings, run_id="run1", revisions=("r1",), application_name=APPLICATION)


def test_a_superuser_proves_no_backup_by_running_code_of_others(checked: Hostile, tmp_path: Path) -> None:
    with pytest.raises(BackupFailed, match=f"would run code of {checked.role}") as caught:
        proven(checked.database, tmp_path / "backups")
    assert "MIGRATOR_VERIFY_URL" in caught.value.next_step
    assert "MIGRATOR_VERIFY_AS_SUPERUSER=true" in caught.value.next_step
    assert not list((tmp_path / "backups").glob("*.dump"))
    assert not checked.was_called()


def test_what_came_into_the_dump_later_is_looked_at_too(
    checked: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "owners_in", lambda _: set())
    with pytest.raises(BackupFailed, match=f"would run code of {checked.role}"):
        proven(checked.database, tmp_path / "backups")
    assert not checked.was_called()


def test_neither_a_schemas_name_nor_a_tablespace_hides_whose_code_is_in_the_dump(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "owners_in", lambda _: set())
    hostile.execute("DROP FUNCTION canary, tell CASCADE")
    name, server = hostile.database.name, hostile.database.server
    with contextlib.closing(server.connect("postgres")) as session:
        session.autocommit = True
        session.cursor().execute("SET allow_in_place_tablespaces = on")
        session.cursor().execute(f"CREATE TABLESPACE {name} LOCATION ''")
    try:
        server.psql(f'GRANT CREATE ON TABLESPACE {name} TO "{hostile.role}"')
        for place, schema in ((f"TABLESPACE {name}", "public"), ("", "public; Type: ACL; Schema: x")):
            hostile.execute(
                f'CREATE SCHEMA IF NOT EXISTS "{schema}"; CREATE TABLE "{schema}".t (a int) {place}'
            )
            with pytest.raises(BackupFailed, match=f"would run code of {hostile.role} "):
                proven(hostile.database, tmp_path / "backups")
            hostile.execute(f'DROP TABLE "{schema}".t')
    finally:
        hostile.execute("DROP TABLE IF EXISTS public.t")
        server.psql(f"DROP TABLESPACE {name}")


def test_a_login_without_privileges_proves_it_on_the_same_server(checked: Hostile, tmp_path: Path) -> None:
    server = checked.database.server
    role = server.create_role("proves")
    server.psql(f"ALTER ROLE {role} CREATEDB")
    try:
        url = server.url("postgres", role)
        backup = proven(checked.database, tmp_path / "backups", MIGRATOR_VERIFY_URL=url)
    finally:
        server.psql(f"DROP ROLE {role}")
    assert backup.verified == "restore"
    assert not checked.was_called()


def test_a_superuser_does_so_where_it_is_told_to(checked: Hostile, tmp_path: Path) -> None:
    backup = proven(checked.database, tmp_path / "backups", MIGRATOR_VERIFY_AS_SUPERUSER="true")
    assert backup.verified == "restore"
    assert checked.was_called()


def test_nobody_else_can_connect_to_a_copy_before_it_is_whole(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(hostile.database, tmp_path / "backups")
    target, server = settings.required_target, hostile.database.server
    with connect(target, APPLICATION, 60) as session:
        backup = back_up(session, settings, run_id="run1", revisions=("r1",), application_name=APPLICATION)

    def may_connect(name: str) -> bool:
        asked = f"SELECT has_database_privilege('{hostile.role}', '{name}', 'CONNECT')"
        return bool(server.psql(asked)[0][0])

    with scratch_database.made(Place(target, APPLICATION, 60, False), backup, "run1") as (_, copy):
        assert not may_connect(copy.target.database)

    seen = []
    fill = pg_restore.restore_into

    def look(*arguments: Any, **options: Any) -> None:
        seen.append(may_connect(f"{target.database}_look"))
        fill(*arguments, **options)

    monkeypatch.setattr(pg_restore, "restore_into", look)
    to = f"{target.database}_look"
    restore(target, settings, "latest", to=to, run_id="run2", application_name=APPLICATION, replace=False)
    try:
        assert (seen, may_connect(to)) == ([False], True)
    finally:
        server.drop_database(to)


def asserting(database: Database, sql: str, **options: Any) -> list[tuple[str, str]]:
    """Return the findings of an assertion whose answer is 1."""
    expectations = Expectations(assertions=(Assertion("it", sql, 1),))
    target = settings_of(database, Path("/tmp")).required_target
    with connect(target, APPLICATION, 60) as session:
        found = verify(
            session,
            expected=frozenset(),
            actual=frozenset(),
            not_valid_before=frozenset(),
            expectations=expectations,
            **options,
        )
    return [(finding.rule, finding.sentence) for finding in found]


@pytest.mark.parametrize(
    ("planted", "sql"),
    [
        ("CREATE VIEW t AS SELECT canary(1) AS a", "SELECT a FROM t"),
        ("CREATE TABLE t (a int); CREATE INDEX ON t ((a + canary(1)))", "SELECT count(*) + 1 FROM public.t"),
        (
            "CREATE TABLE p (a int) PARTITION BY RANGE (a); CREATE TABLE t PARTITION OF p DEFAULT;"
            " CREATE INDEX ON t ((a + canary(1)))",
            "SELECT count(*) + 1 FROM p",
        ),
        ("SELECT 1", "SELECT canary(1)"),
        ('CREATE FUNCTION "Odd"() RETURNS int RETURN canary(1)', 'SELECT "Odd"()'),
        (
            "CREATE FUNCTION o(a int, b int) RETURNS int RETURN canary(1);"
            " CREATE OPERATOR @@@ (LEFTARG = int, RIGHTARG = int, FUNCTION = o)",
            "SELECT 1 @@@ 1",
        ),
        (
            "CREATE FUNCTION o(a varchar, b varchar) RETURNS bool RETURN canary(1) = 1;"
            " CREATE OPERATOR ~~ (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = o);"
            " CREATE TABLE t (a varchar); INSERT INTO t VALUES ('x')",
            "SELECT count(*) FROM t WHERE a LIKE 'x'",
        ),
        (
            "CREATE TYPE e AS ENUM ('x'); CREATE TABLE t (a e); INSERT INTO t VALUES ('x');"
            " CREATE FUNCTION o(a e) RETURNS text RETURN canary('x'::text);"
            " CREATE CAST (e AS text) WITH FUNCTION o(e)",
            "SELECT count(a::text) FROM t",
        ),
        (
            "CREATE FUNCTION o(a int, b int) RETURNS float8 IMMUTABLE RETURN canary(a - b);"
            " CREATE TYPE r AS RANGE (subtype = int, subtype_diff = o); CREATE TABLE t (a r);"
            " INSERT INTO t SELECT r(g, g + 5) FROM generate_series(1, 500) g; ANALYZE t",
            "SELECT count(*) - 6 FROM t WHERE a && r(101, 104)",
        ),
    ],
    ids=["view", "index", "partition", "function", "quoted", "operator", "LIKE", "cast", "range"],
)
def test_a_superusers_assertion_runs_no_code_of_others(hostile: Hostile, planted: str, sql: str) -> None:
    hostile.execute(planted)
    ((rule, sentence),) = asserting(hostile.database, sql)
    assert rule == "assertion-refused"
    assert f"of {hostile.role}" in sentence
    assert not hostile.was_called()
    assert asserting(hostile.database, sql, trusting=True) == []
    assert hostile.was_called()


def test_a_superusers_assertion_reads_plain_tables_of_others(hostile: Hostile) -> None:
    hostile.execute(
        "CREATE TABLE t (a text CHECK (canary(1) = 1)); INSERT INTO t VALUES ('x');"
        " CREATE INDEX ON t (lower(a)) WHERE a IS NOT NULL"
    )
    assert asserting(hostile.database, "SELECT count(*) FROM t") == []
    assert asserting(hostile.database, "SELECT count(*) FROM pg_tables WHERE tablename = 't'") == []


def test_table_becomes_a_view_before_an_assertion_reads_it(hostile: Hostile) -> None:
    hostile.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)")
    hostile.execute("LOCK TABLE t", commit=False)
    with working(lambda: asserting(hostile.database, "SELECT a FROM t")) as result:
        hostile.plant_when_somebody_waits(VIEW.format("t"))
    ((rule, _),) = result["value"]
    assert rule in ("assertion-refused", "assertion-error")
    assert not hostile.was_called()


def test_no_command_plans_a_query_over_a_version_table_of_others(
    hostile: Hostile, project: Callable[..., Path], run_migrator: Runner
) -> None:
    """Whoever may create tables may have made it, and the planner evaluates what its index calls."""
    folder = project(revisions=linear_history(2))
    assert run_migrator("freeze", cwd=folder, database=hostile.database).code == 0
    hostile.execute(
        "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);"
        " CREATE INDEX ON alembic_version ((version_num || canary('x'::text)));"
        " CREATE SCHEMA own; CREATE TABLE own.other (version_num text);"
        " CREATE INDEX ON own.other ((version_num || canary('x'::text)));"
        " INSERT INTO own.other VALUES ('r1')"
    )
    for command in ("status", "check", "verify", "ledger"):
        done = run_migrator(command, cwd=folder, database=hostile.database)
        assert not hostile.was_called(), done
