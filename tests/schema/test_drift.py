"""Drift: whatever was changed by hand since the last run is found and named, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from migrator.config.database_url import parse as parse_address
from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import LOCK_CLASS, RUN_LOCK
from migrator.postgres.session import connect
from migrator.schema.snapshot import Snapshot, Unreadable, differences, take, unpack
from tests.support import plain_alembic
from tests.support.env_text import env
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import Revision, linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database

Project = Callable[..., Path]
Run = Callable[..., Result]
OFF = {"MIGRATOR_BACKUP": "off"}

SCHEMA = """
CREATE SCHEMA sales;
CREATE TYPE sales.mood AS ENUM ('sad', 'happy');
CREATE DOMAIN sales.price AS numeric(10, 2) CONSTRAINT positive CHECK (VALUE > 0);
CREATE TYPE sales.pair AS (a int, b text);
CREATE SEQUENCE sales.numbers INCREMENT 2;
CREATE TABLE sales.buyers (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, "odd Name" text);
CREATE TABLE sales.orders (
    id serial PRIMARY KEY, buyer bigint CONSTRAINT orders_buyer REFERENCES sales.buyers (id),
    total sales.price DEFAULT 1, mood sales.mood, doubled numeric GENERATED ALWAYS AS (id * 2) STORED,
    CONSTRAINT big CHECK (id > 0)
);
CREATE INDEX orders_total ON sales.orders (total) WHERE total > 10;
CREATE UNIQUE INDEX orders_mood ON sales.orders (id, mood);
CREATE STATISTICS sales.orders_stats (dependencies) ON buyer, mood FROM sales.orders;
CREATE VIEW sales.rich AS SELECT id FROM sales.orders WHERE total > 100;
CREATE MATERIALIZED VIEW sales.sums AS SELECT sum(total) AS total FROM sales.orders;
CREATE FUNCTION sales.one(a int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT a';
CREATE FUNCTION sales.touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER touched BEFORE INSERT ON sales.orders FOR EACH ROW EXECUTE FUNCTION sales.touch();
CREATE POLICY mine ON sales.orders FOR SELECT USING (id > 0);
CREATE RULE quiet AS ON DELETE TO sales.orders DO INSTEAD NOTHING;
CREATE TABLE sales.days (day date NOT NULL) PARTITION BY RANGE (day);
CREATE TABLE sales.days_1 PARTITION OF sales.days FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
"""

# What is done by hand, how it is taken back, and what is said of it.
CHANGES = [
    (
        "DROP INDEX sales.orders_total",
        "CREATE INDEX orders_total ON sales.orders (total) WHERE total > 10",
        ["index sales.orders_total: it is gone; it was on sales.orders"],
    ),
    (
        "DROP INDEX sales.orders_total; CREATE INDEX orders_total ON sales.orders (total) WHERE total > 11",
        "DROP INDEX sales.orders_total; CREATE INDEX orders_total ON sales.orders (total) WHERE total > 10",
        ["index sales.orders_total: its definition changed"],
    ),
    (
        "CREATE INDEX by_hand ON sales.buyers (name)",
        "DROP INDEX sales.by_hand",
        ["index sales.by_hand: it was not there; it is on sales.buyers"],
    ),
    (
        'CREATE TABLE public."Odd t" (id serial PRIMARY KEY, x int CHECK (x > 0)); CREATE INDEX ON "Odd t" (x)',
        'DROP TABLE public."Odd t"',
        ['table public."Odd t": it was not there'],
    ),
    (
        "ALTER TABLE sales.buyers ADD extra int DEFAULT 4",
        "ALTER TABLE sales.buyers DROP extra",
        ["column sales.buyers.extra: it was not there; it is integer default"],
    ),
    (
        "ALTER TABLE sales.buyers ALTER name DROP NOT NULL",
        "ALTER TABLE sales.buyers ALTER name SET NOT NULL",
        ["column sales.buyers.name: it is text and was text not null"],
    ),
    (
        'ALTER TABLE sales.buyers ALTER "odd Name" TYPE varchar(20)',
        'ALTER TABLE sales.buyers ALTER "odd Name" TYPE text',
        ['column sales.buyers."odd Name": it is character varying(20) and was text'],
    ),
    (
        'ALTER TABLE sales.buyers RENAME "odd Name" TO even',
        'ALTER TABLE sales.buyers RENAME even TO "odd Name"',
        [
            'column sales.buyers."odd Name": it is gone; it was text',
            "column sales.buyers.even: it was not there; it is text",
        ],
    ),
    (
        "ALTER TABLE sales.orders ALTER total SET DEFAULT 2",
        "ALTER TABLE sales.orders ALTER total SET DEFAULT 1",
        ["column sales.orders.total: its definition changed"],
    ),
    (
        "ALTER TABLE sales.orders DROP CONSTRAINT orders_buyer",
        "ALTER TABLE sales.orders ADD CONSTRAINT orders_buyer FOREIGN KEY (buyer) REFERENCES sales.buyers (id)",
        ["constraint orders_buyer of sales.orders: it is gone; it was foreign key"],
    ),
    (
        "ALTER TABLE sales.orders DROP CONSTRAINT big, ADD CONSTRAINT big CHECK (id > 1) NOT VALID",
        "ALTER TABLE sales.orders DROP CONSTRAINT big, ADD CONSTRAINT big CHECK (id > 0)",
        ["constraint big of sales.orders: it is check not valid and was check"],
    ),
    (
        "ALTER TABLE sales.orders DISABLE TRIGGER touched",
        "ALTER TABLE sales.orders ENABLE TRIGGER touched",
        ["trigger touched of sales.orders: it is disabled and was enabled"],
    ),
    (
        "ALTER TABLE sales.orders ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE sales.orders DISABLE ROW LEVEL SECURITY",
        ["table sales.orders: it is row level security and was plain"],
    ),
    (
        "ALTER POLICY mine ON sales.orders USING (id > 1)",
        "ALTER POLICY mine ON sales.orders USING (id > 0)",
        ["policy mine of sales.orders: its definition changed"],
    ),
    (
        "CREATE OR REPLACE VIEW sales.rich AS SELECT id FROM sales.orders WHERE total > 200",
        "CREATE OR REPLACE VIEW sales.rich AS SELECT id FROM sales.orders WHERE total > 100",
        ["view sales.rich: its definition changed"],
    ),
    (
        "CREATE OR REPLACE FUNCTION sales.touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE OR REPLACE FUNCTION sales.touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        ["function sales.touch(): its definition changed"],
    ),
    (
        "DROP FUNCTION sales.one",
        "CREATE FUNCTION sales.one(a int DEFAULT 1) RETURNS int LANGUAGE sql AS 'SELECT a'",
        ["function sales.one(a integer): it is gone; it was returns integer"],
    ),
    (
        "DROP RULE quiet ON sales.orders",
        "CREATE RULE quiet AS ON DELETE TO sales.orders DO INSTEAD NOTHING",
        ["rule quiet of sales.orders: it is gone"],
    ),
    (
        "ALTER SEQUENCE sales.numbers INCREMENT 1",
        "ALTER SEQUENCE sales.numbers INCREMENT 2",
        [
            "sequence sales.numbers: it is bigint start 1 increment 1 from 1 to 9223372036854775807"
            " and was bigint start 1 increment 2 from 1 to 9223372036854775807"
        ],
    ),
    (
        "DROP STATISTICS sales.orders_stats",
        "CREATE STATISTICS sales.orders_stats (dependencies) ON buyer, mood FROM sales.orders",
        ["statistics sales.orders_stats: it is gone"],
    ),
    (
        "ALTER DOMAIN sales.price DROP CONSTRAINT positive",
        "ALTER DOMAIN sales.price ADD CONSTRAINT positive CHECK (VALUE > 0)",
        ["domain constraint positive of sales.price: it is gone; it was check"],
    ),
    (
        "CREATE SCHEMA extra",
        "DROP SCHEMA extra",
        ["schema extra: it was not there"],
    ),
    (
        'ALTER TABLE sales.buyers DROP "odd Name"; ALTER TABLE sales.buyers ADD "odd Name" text',
        "",
        [],  # as it was, though the server numbers it otherwise
    ),
    (
        "ALTER TYPE sales.mood ADD VALUE 'angry'",
        "",
        ["type sales.mood: it is 'sad', 'happy', 'angry' and was 'sad', 'happy'"],
    ),
    (
        "ALTER TYPE sales.pair ADD ATTRIBUTE c int",
        "ALTER TYPE sales.pair DROP ATTRIBUTE c",
        ["column sales.pair.c: it was not there; it is integer"],
    ),
    (
        "DROP VIEW sales.rich; DROP MATERIALIZED VIEW sales.sums; DROP TABLE sales.orders",
        "",
        [
            "materialized view sales.sums: it is gone",
            "table sales.orders: it is gone",
            "view sales.rich: it is gone",
        ],
    ),
]

NO_DRIFT = """
INSERT INTO sales.buyers (name) VALUES ('ann'); INSERT INTO sales.orders (buyer, mood) VALUES (1, 'sad');
SELECT nextval('sales.numbers'); REFRESH MATERIALIZED VIEW sales.sums; ANALYZE; REINDEX TABLE sales.orders;
CLUSTER sales.orders USING orders_pkey; ALTER TABLE sales.orders SET (fillfactor = 70);
COMMENT ON TABLE sales.orders IS 'hello'; GRANT SELECT ON sales.orders TO PUBLIC;
ALTER TABLE sales.orders ALTER buyer SET STATISTICS 500;
CREATE TABLE sales.days_2 PARTITION OF sales.days FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE INDEX ON sales.days_2 (day);
DROP TABLE sales.days_1;
CREATE TEMP TABLE scratch (a int);
CREATE OR REPLACE VIEW sales.rich AS SELECT id FROM sales.orders WHERE total > 100;
"""


def snapshot(database: Database) -> Snapshot:
    with connect(parse_address(database.url), "test", 60) as session:
        return take(session, "sales.buyers")


def told(before: Snapshot, after: Snapshot) -> list[str]:
    return [f"{item.item}: {item.sentence}" for item in differences(before, after)]


def test_each_change_is_named(each_database: Database) -> None:
    each_database.execute(SCHEMA)
    sound = snapshot(each_database)
    wrong = []
    for change, back, expected in CHANGES:
        each_database.execute(change)
        found = told(sound, snapshot(each_database))
        if found != expected:
            wrong.append((change, found))
        if back:
            each_database.execute(back)
            left = told(sound, snapshot(each_database))
            wrong += [(back, left)] * bool(left)
        else:
            sound = snapshot(each_database)
    assert wrong == []


def test_what_is_not_schema_is_no_drift(each_database: Database) -> None:
    each_database.execute(SCHEMA)
    before = snapshot(each_database)
    for statement in NO_DRIFT.strip().split(";\n"):
        for one in statement.split("; "):
            each_database.execute(one.rstrip(";"))
    assert told(before, snapshot(each_database)) == []


def test_what_an_extension_owns_is_not_looked_at(database: Database) -> None:
    database.execute("CREATE SCHEMA sales; CREATE TABLE sales.buyers (id int)")
    before = snapshot(database)
    database.execute("CREATE EXTENSION pg_trgm; CREATE EXTENSION hstore")
    assert told(before, snapshot(database)) == [
        "extension hstore: it was not there",
        "extension pg_trgm: it was not there",
    ]


def test_a_restored_copy_is_the_same_and_another_major_too(
    each_database: Database, database: Database
) -> None:
    """Names, types and kinds are compared there; the text of definitions comes back otherwise."""
    each_database.execute(SCHEMA + "CREATE TABLE sales.v (x varchar CHECK (x IN ('a', 'b')));")
    before = snapshot(each_database)
    subprocess.run(
        [database.server.bin / "psql", "--no-psqlrc", "--quiet", database.url],
        input=each_database.dump(),
        text=True,
        check=True,
        capture_output=True,
    )
    after = snapshot(database)
    assert before.place != after.place or before.major != after.major
    assert told(before, after) == []
    database.execute("DROP INDEX sales.orders_total")
    assert told(before, snapshot(database)) == [
        "index sales.orders_total: it is gone; it was on sales.orders"
    ]


def test_a_snapshot_is_small_and_comes_back_as_it_was(database: Database) -> None:
    database.execute(SCHEMA)
    database.execute(
        "CREATE TABLE alembic_version (version_num varchar(32)); INSERT INTO alembic_version VALUES ('r1')"
    )
    before = snapshot(database)
    packed = json.loads(json.dumps(before.pack()))
    assert unpack(packed) == before
    assert before.versions == {"public.alembic_version": ("r1",)}
    for broken in (
        {},
        {**packed, "format": 2},
        {**packed, "items": "x"},
        {**packed, "items": packed["items"][:40]},
    ):
        with pytest.raises(Unreadable):
            unpack(broken)


def test_the_order_in_which_an_older_migrator_wrote_a_snapshot_is_no_difference(database: Database) -> None:
    database.execute(SCHEMA)
    now = snapshot(database)
    older = dataclasses.replace(now, text=json.dumps([list(item) for item in reversed(now.items)]))
    assert older.text != now.text
    assert told(older, now) == []
    database.execute("DROP INDEX sales.orders_total")
    assert told(older, snapshot(database)) == ["index sales.orders_total: it is gone; it was on sales.orders"]


# -- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    """Run migrator on the test's database, without backups."""

    def call(*arguments: str, cwd: Path, **variables: str) -> Result:
        return run_migrator(*arguments, cwd=cwd, database=database, env={**OFF, **variables})

    return call


def test_verify_says_what_was_changed_by_hand(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(3))
    done(run(cwd=folder))
    assert "verified; its schema matches the snapshot of run " in done(run("verify", cwd=folder)).stdout
    database.execute("ALTER TABLE t1 ADD hand int; CREATE TABLE by_hand (id int)")
    with unchanged(database):
        result = run("verify", "--format", "json", cwd=folder)
    refusal(
        result,
        ExitCode.DRIFTED,
        "column public.t1.hand: it was not there; it is integer",
        "table public.by_hand: it was not there",
        "The database is at r003; this run changed nothing.",
        "`migrator repair --accept-schema`",
        "MIGRATOR_DRIFT_IGNORE",
    )
    found = [
        (item["rule"], item["severity"], item["place"]) for item in json.loads(result.stdout)["findings"]
    ]
    assert found == [
        ("drift-added", "error", "column public.t1.hand"),
        ("drift-added", "error", "table public.by_hand"),
    ]
    done(run("verify", cwd=folder, MIGRATOR_DRIFT="off"))
    some = {"MIGRATOR_DRIFT_IGNORE": "by_*, other.t"}
    assert "by_hand" not in refusal(run("verify", cwd=folder, **some), ExitCode.DRIFTED, "t1.hand")
    done(run("verify", cwd=folder, MIGRATOR_DRIFT_IGNORE="public.by_hand, t1"))


def test_a_run_with_nothing_to_do_neither_looks_nor_accepts(
    database: Database, project: Project, run: Run
) -> None:
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    database.execute("DROP TABLE t1")
    done(run(cwd=folder))
    refusal(run("verify", cwd=folder), ExitCode.DRIFTED, "table public.t1: it is gone")
    older, newer = linear_history(2)
    folder = project(revisions=[older, replace(newer, message="said otherwise")], name="other")
    done(
        run(cwd=folder, MIGRATOR_EDITED="warn")
    )  # another image with the same heads: its digest is another one
    refusal(
        run("verify", cwd=folder, MIGRATOR_EDITED="warn"), ExitCode.DRIFTED, "table public.t1: it is gone"
    )


def test_a_run_with_work_warns_and_goes_on_or_refuses(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    database.execute("CREATE INDEX by_hand ON t1 (id)")
    folder = project(revisions=linear_history(3))
    with unchanged(database):
        refusal(
            run(cwd=folder, MIGRATOR_DRIFT="refuse"),
            ExitCode.DRIFTED,
            "index public.by_hand: it was not there",
        )
    result = done(run("upgrade", "--format", "json", cwd=folder))
    assert "since the last run: index public.by_hand: it was not there; it is on public.t1" in result.stderr
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["rule"], finding["severity"]) == ("drift-added", "warning")
    assert (
        "matches the snapshot of run" in done(run("verify", cwd=folder)).stdout
    )  # what that run left has the index in it
    database.execute("DROP INDEX by_hand")
    done(run("downgrade", "-1", cwd=folder, MIGRATOR_DRIFT="refuse"))  # the way back is not barred


def test_a_schema_is_accepted(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(2))
    assert "no version table yet" in run("repair", "--accept-schema", cwd=folder).stderr
    done(run(cwd=folder))
    database.execute("DROP TABLE t2; CREATE TABLE by_hand (id int)")
    said = done(run("repair", "--accept-schema", cwd=folder, MIGRATOR_ACTOR="ann")).stdout
    assert "accepted table public.t2: it is gone" in said
    assert "accepted table public.by_hand: it was not there" in said
    done(run("verify", cwd=folder))
    first = " ".join(done(run("ledger", cwd=folder)).stdout.splitlines()[:2])
    assert all(
        part in first
        for part in (
            "schema",
            "ann@",
            "accepted: its schema differs from the snapshot of run",
            "2 differences",
        )
    )
    (row,) = json.loads(done(run("ledger", "--limit", "1", "--format", "json", cwd=folder)).stdout)
    assert row["details"]["differences"][0] == "table public.t2: it is gone"
    assert "items" not in row["details"]["schema"]


def test_old_snapshots_go_and_nothing_else_does(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(4))
    for number in range(1, 5):
        done(run("upgrade", f"r{number:03d}", cwd=folder, MIGRATOR_DRIFT_KEEP="1"))
    kept = "SELECT revision, event, run_id FROM migrator_ledger WHERE event <> 'schema' ORDER BY id"
    snapshots = "SELECT rows_after[1] FROM migrator_ledger r WHERE event = 'run' AND EXISTS (SELECT FROM"
    snapshots += " migrator_ledger s WHERE s.run_id = r.run_id AND s.event = 'schema') ORDER BY id"
    assert database.psql(snapshots) == [("r003",), ("r004",)]
    before = database.psql(kept)
    assert [event for _, event, _ in before].count("run") == 4
    done(
        run("repair", "--accept-schema", cwd=folder)
    )  # a person's word stays, though it is older than the next ones
    for step in ("-1", "-1", "-1"):
        done(run("downgrade", step, "--yes", cwd=folder, MIGRATOR_DRIFT_KEEP="0"))
    assert database.psql(
        "SELECT message IS NOT NULL FROM migrator_ledger WHERE event = 'schema' ORDER BY id"
    ) == [
        (True,),
        (False,),
    ]
    assert database.psql(kept)[: len(before)] == before
    assert (
        "matches the snapshot of run" in done(run("verify", cwd=folder, MIGRATOR_DESTINATION="r001")).stdout
    )


def test_nothing_is_compared_where_nobody_knows(database: Database, project: Project, run: Run) -> None:
    folder, newer = project(revisions=linear_history(2)), project(revisions=linear_history(3), name="newer")
    done(run(cwd=folder, MIGRATOR_DRIFT="off"))
    assert "not compared: no run has left a snapshot" in done(run("verify", cwd=folder)).stdout
    done(run(cwd=newer))
    plain = plain_alembic.start("downgrade", "-1", cwd=newer, database=database, env={})
    assert plain.wait(60) == 0
    said = done(run("verify", cwd=folder)).stdout
    assert "not compared: its revision has changed since the last successful run" in said
    assert "(public.alembic_version was at r003 and is at r002)" in said
    done(run(cwd=folder))  # notes what was done without it, and what there is now
    assert "matches the snapshot of run" in done(run("verify", cwd=folder)).stdout
    database.psql(
        "UPDATE migrator_ledger SET details = '{\"schema\": {\"format\": 1}}' WHERE event = 'schema'"
    )
    assert "cannot be read: it is damaged" in done(run("verify", cwd=folder)).stdout


def test_what_a_failed_run_has_left_is_seen(database: Database, project: Project, run: Run) -> None:
    """A part that was committed outside of a transaction is what verify finds when the version row has not moved."""
    broken = Revision(
        "r003",
        "r002",
        "with op.get_context().autocommit_block():\n"
        "    op.execute('CREATE INDEX half ON t1 (id)')\n"
        "raise RuntimeError('no')",
    )
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    newer = project(revisions=[*linear_history(2), broken], name="newer")
    assert run(cwd=newer).code == ExitCode.PARTIAL
    refusal(run("verify", cwd=folder), ExitCode.DRIFTED, "index public.half: it was not there")


def test_two_services_in_one_database(database: Database, project: Project, run: Run) -> None:
    one = project(revisions=linear_history(2))
    other = project(
        env(configure="version_table='other_version'"),
        revisions=[Revision("x001", None, "CREATE TABLE others (id int)", "DROP TABLE others")],
        name="other",
    )
    done(run(cwd=one))
    done(run(cwd=other, MIGRATOR_BASELINE="base"))
    assert "matches the snapshot of run" in done(run("verify", cwd=one)).stdout
    assert "matches the snapshot of run" in done(run("verify", cwd=other)).stdout
    database.execute("CREATE TABLE by_hand (id int)")
    refusal(run("verify", cwd=one), ExitCode.DRIFTED, "public.by_hand")


def test_another_applications_schema_is_its_own_affair(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Two applications with a role and a schema each: neither may read the other's version table and ledger."""
    server = database.server
    names = {side: server.create_role(f"{side}_{database.name}") for side in ("one", "two")}
    folders, envs = {}, {}
    for side, role in names.items():
        database.execute(
            f'CREATE SCHEMA {side} AUTHORIZATION "{role}"; ALTER ROLE "{role}" SET search_path = {side}'
        )
        folders[side] = project(
            env(configure=f"version_table_schema='{side}'"), revisions=linear_history(1), name=side
        )
        envs[side] = {**OFF, "MIGRATOR_DATABASE_URL": server.url(database.name, user=role)}
    database.execute(
        f'REVOKE ALL ON SCHEMA public FROM PUBLIC; REVOKE "{names["one"]}" FROM "{names["two"]}"'
    )

    def call(side: str, *words: str) -> Result:
        return run_migrator(*words, cwd=folders[side], database=database, env=envs[side])

    for side in names:
        done(call(side, "upgrade", "--baseline", "base"))
    database.execute("CREATE TABLE two.later (id int); CREATE INDEX ON two.t1 (note)")
    assert "matches the snapshot of run" in done(call("one", "verify")).stdout
    refusal(call("two", "verify"), ExitCode.DRIFTED, "table two.later", "index two.t1_note_idx")
    database.execute("DROP TABLE one.t1")
    refusal(call("one", "verify"), ExitCode.DRIFTED, "table one.t1: it is gone")
    for role in names.values():
        database.execute(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"')


def test_a_table_of_the_applications_with_a_version_number_is_no_version_table(database: Database) -> None:
    database.execute("CREATE TABLE documents (id int, version_num varchar(9)); CREATE SCHEMA sales")
    database.execute(
        "CREATE TABLE sales.buyers (version_num text); INSERT INTO sales.buyers VALUES ('b'), ('a')"
    )
    assert snapshot(database).versions == {"sales.buyers": ("a", "b")}


def test_while_a_run_is_at_work_nothing_is_said(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    database.execute("CREATE TABLE by_hand (id int)")
    with closing(database.connect(application_name="migrator/other 1")) as holder, holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
        said = done(run("verify", cwd=folder)).stdout
    assert "not compared: migrator/other 1" in said


def test_no_secret_gets_into_a_snapshot(database: Database, project: Project, run: Run) -> None:
    """Defaults, checks and bodies are hashed: whatever they say is not in the ledger."""
    database.execute(
        "CREATE TABLE plain (x text DEFAULT 's3cr3t-1' CHECK (x <> 's3cr3t-2'));"
        " CREATE FUNCTION f(a text DEFAULT 's3cr3t-3') RETURNS text LANGUAGE sql AS $$SELECT 's3cr3t-4'$$;"
        " CREATE VIEW v AS SELECT 's3cr3t-5' AS x; CREATE INDEX i ON plain (x) WHERE x = 's3cr3t-6'"
    )
    with connect(parse_address(database.url), "test", 60) as session:
        found = take(session, "plain")
    assert "s3cr3t" not in str(found)
    assert {item.name for item in found.items} >= {"public.plain", "public.v", "public.i"}


def test_a_table_that_is_locked_is_not_waited_for_long(
    database: Database, project: Project, run: Run
) -> None:
    folder = project(revisions=linear_history(2))
    done(run(cwd=folder))
    database.execute("CREATE INDEX by_hand ON t1 (note)")
    with closing(database.connect()) as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE t1 IN ACCESS EXCLUSIVE MODE")
        said = done(run("verify", cwd=folder)).stdout
    assert "not compared: it could not be read: canceling statement due to lock timeout" in said
    refusal(run("verify", cwd=folder), ExitCode.DRIFTED, "by_hand")
