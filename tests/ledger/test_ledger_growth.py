"""A ledger of many rows: no question reads all of them, and one that others have written holds up nobody."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.config.database_url import parse
from migrator.errors import BackupFailed
from migrator.ledger import indexes, needed_backups, queries, sql, unfinished_runs
from migrator.ledger import table as ledger
from migrator.ledger.needed_backups import read_needed_backups
from migrator.ledger.table import Author
from migrator.outcome import ExitCode
from migrator.postgres.session import Session, connect
from migrator.postgres.version_table import VersionTable
from migrator.project import Plan, Revision
from tests.support.outcomes import done, refusal
from tests.support.projects import linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database

Project = Callable[..., Path]
Run = Callable[..., Result]
TABLE, LEDGER = VersionTable("alembic_version", "public"), VersionTable("migrator_ledger", "public")
AUTHOR = Author("run", "", "", "", "")
ROWS = 20_000
FEW = 400
"""Rows that a command may read of them: several questions, each of some names, and each look at a name a few."""

# Years of a busy project: revisions applied and reverted, runs that failed and were killed, parts left behind.
SEED = """
INSERT INTO migrator_ledger (id, run_id, number, at, event, version_table, revision, command, code, digest, backup_id,
                             details, checksum)
SELECT i - {rows} - 1000, 'seed' || i / 5, i % 5, now() - ({rows} + 60 - i) * interval '1 minute', e.event,
       'alembic_version', CASE WHEN e.event IN ('applied', 'reverted') THEN 'r00' || 1 + i / 5 % 3 END, 'upgrade head',
       CASE WHEN e.event = 'run' THEN (ARRAY[0, 36, 39])[1 + i / 5 % 3] END, '', 'backup' || i / 5,
       jsonb_build_object('revision', 'r00' || 1 + i / 5 % 3, 'upgrade', true, 'pending', '["r009"]'::jsonb), ''
FROM generate_series(1, {rows}) i CROSS JOIN LATERAL (
    SELECT (ARRAY['begun', 'partial', 'applied', 'reverted', 'run'])[1 + i % 5] AS event) e
"""
# A crash loop since the last run that ended well, as Kubernetes makes one.
LOOP = """
INSERT INTO migrator_ledger (id, run_id, number, at, event, version_table, command, code, digest, details)
SELECT i + 1000, 'loop' || i, 0, now() + i * interval '1 second', 'run', 'alembic_version', 'upgrade head', 36, '',
       '{{}}'
FROM generate_series(1, {rows}) i;
UPDATE migrator_ledger SET id = id + {rows} + 2000, at = at + interval '1 year' WHERE command = 'upgrade' AND id > 0
"""


@pytest.fixture
def run(run_migrator: Runner, database: Database) -> Run:
    return lambda *arguments, cwd, **variables: run_migrator(
        *arguments, cwd=cwd, database=database, env={"MIGRATOR_BACKUP": "off", **variables}
    )


def session(database: Database) -> Session:
    return connect(parse(database.url), "test", 30)


def make(database: Database, place: VersionTable = LEDGER) -> None:
    with session(database) as asked:
        ledger.create(place, asked.value)


def rows_read(database: Database, table: str = "public.migrator_ledger") -> int:
    """Return how many rows of a ledger were read, by scans and from indexes, by sessions that have ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and database.psql(
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    ):
        time.sleep(0.05)
    count = database.psql(
        "SELECT seq_tup_read + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes i WHERE i.relid = t.relid)"
        f" FROM pg_stat_user_tables t WHERE relid = '{table}'::regclass"
    )[0][0]
    return int(count)


# -- what a command reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [SEED, LOOP])
@pytest.mark.parametrize("analyzed", [True, False])
def test_no_command_reads_more_of_a_large_ledger(
    seed: str, analyzed: bool, database: Database, project: Project, run: Run, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(3))
    done(run(cwd=folder))
    done(run("freeze", cwd=folder))
    database.execute("ALTER TABLE migrator_ledger SET (autovacuum_enabled = false)")
    database.execute(seed.format(rows=ROWS) + ("; ANALYZE migrator_ledger" if analyzed else ""))
    more = project(revisions=linear_history(4), name="more")
    keep = {"MIGRATOR_BACKUP_URL": (tmp_path / "backups").as_uri(), "MIGRATOR_BACKUP_KEEP": "last=1"}
    (tmp_path / "backups").mkdir()
    commands: list[tuple[Path, tuple[str, ...]]] = [
        *((folder, (name,)) for name in ("status", "check", "verify", "ledger", "upgrade")),
        (folder, ("prune", "--dry-run")),
        (more, ("upgrade",)),
        (more, ("upgrade",)),
        (more, ("downgrade", "-1")),
    ]
    for cwd, arguments in commands:
        before = rows_read(database)
        done(run(*arguments, cwd=cwd, **keep))
        assert rows_read(database) - before < FEW, arguments


@pytest.mark.parametrize("analyzed", [True, False])
def test_what_is_asked_after_a_bad_end_reads_no_more(analyzed: bool, database: Database) -> None:
    make(database)
    database.execute("ALTER TABLE migrator_ledger SET (autovacuum_enabled = false)")
    database.execute(SEED.format(rows=ROWS) + ("; ANALYZE migrator_ledger" if analyzed else ""))
    database.execute(
        "INSERT INTO migrator_ledger (id, run_id, number, at, event, version_table, revision, command, code)"
        " VALUES (1, 'last', 1, now(), 'applied', 'alembic_version', 'r008', 'upgrade head', NULL),"
        " (2, 'last', 0, now(), 'run', 'alembic_version', NULL, 'upgrade head', 0),"
        " (3, 'dead', -1, now(), 'begun', 'alembic_version', NULL, 'upgrade head', NULL)"
    )
    next_xid = database.psql("SELECT txid_snapshot_xmax(txid_current_snapshot())")[0][0]
    plan = Plan("upgrade", "head", (Revision("r009", ("r008",), "", ""),), frozenset(), frozenset())
    before = rows_read(database)
    with session(database) as asked:
        unfinished_runs.read_built(asked, TABLE, plan)
        assert unfinished_runs.made_over(asked, TABLE, next_xid, None)
    assert rows_read(database) - before < FEW


# -- the two shapes of a question ------------------------------------------------------------------------------------


def random_rows(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Yield rows as no run of today's would write them, also such as have no number."""
    unnumbered = chance.choice([0, 0, 3, 40])
    count = chance.randint(0, 120)
    for number in range(count):
        event = chance.choice(
            ["applied", "reverted", "accepted", "found", "gone", "run", "run", "begun", "partial", "schema"]
        )
        about = event in {"applied", "reverted", "accepted", "found", "gone"}
        details: dict[str, Any] = {
            "revision": f"r{chance.randint(1, 5)}",
            "upgrade": chance.choice(["true", "false"]),
        }
        if event == "partial" and chance.random() < 0.1:
            details = {}
        yield {
            "id": None if number >= count - unnumbered else number,
            "run_id": f"run{number // chance.randint(2, 6)}",
            "number": number,
            "at": f"2026-01-01T00:{chance.randint(0, 59):02d}:00Z",
            "event": event,
            "version_table": chance.choice(["one", "two", "drei"]),
            "revision": f"r{chance.randint(1, 5)}" if about else None,
            "backup_id": chance.choice([None, f"b{number}", f"b{number // 9}"]),
            "code": chance.choice([0, 0, 39, 40, None]) if event == "run" else None,
            "message": chance.choice([None, "a change"]),
            "details": details,
        }


@pytest.mark.parametrize("seed", range(4))
def test_by_index_it_is_the_same_answer(seed: int, database: Database) -> None:
    make(database)
    chance = random.Random(seed)  # noqa: S311 - it makes no secret
    shapes = {name: shape for name, shape in vars(sql).items() if isinstance(shape, sql.Shapes)}
    assert len(shapes) > 5
    insert = (
        "INSERT INTO migrator_ledger SELECT r.* FROM jsonb_populate_recordset(NULL::migrator_ledger, %s) r"
    )
    with session(database) as asked:
        for _ in range(30):
            database.execute("TRUNCATE migrator_ledger")
            database.psql(f"{insert} RETURNING 1", [json.dumps([*random_rows(chance)])])
            for name, shape in shapes.items():
                assert answers(asked, name, shape.scan) == answers(asked, name, shape.by_index), name


def answers(asked: Session, name: str, text: str) -> list[Any]:
    for placeholder, value in {"{limit}": "9999", "{longest}": "255", "{version_table}": "'one'"}.items():
        text = text.replace(placeholder, value)
    text = text.replace("LIMIT %s", "LIMIT 20")
    rows = queries.query_ledger(asked, LEDGER, text, ("one",) * text.count("%s"))
    if name in {"PARTIAL", "STORED_DOWNGRADES", "NEWEST"}:
        return [row[:12] for row in rows]  # in order, and without the place in it
    return sorted(map(repr, _flat(rows)))


def _flat(rows: list[tuple[Any, ...]]) -> list[Any]:
    """Return rows, and for one JSON list what is in it."""
    if len(rows) == 1 and isinstance(rows[0][0], str) and rows[0][0].startswith("["):
        return list(json.loads(rows[0][0]))
    return list(rows)


# -- where the indexes are missing -----------------------------------------------------------------------------------


def names(database: Database, table: str = "public.migrator_ledger") -> set[str]:
    rows = database.psql(
        f"SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = '{table}'::regclass"
    )
    return {name.rpartition(".")[2] for (name,) in rows}


def drop_indexes(database: Database) -> None:
    for name in indexes.DEFINITIONS:
        database.execute(f"DROP INDEX public.{name}")


def test_an_older_ledger_gets_them_from_the_next_run(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(1))
    done(run(cwd=folder))
    assert names(database) > set(indexes.DEFINITIONS)
    drop_indexes(database)
    result = done(run(cwd=project(revisions=linear_history(2))))
    assert names(database) > set(indexes.DEFINITIONS)
    assert "has new indexes" in result.stderr
    assert "has new indexes" not in done(run(cwd=project(revisions=linear_history(3)))).stderr


def test_the_documented_statements_make_the_same_ones(database: Database) -> None:
    definitions = (
        "SELECT pg_get_indexdef(indexrelid) FROM pg_index"
        " WHERE indrelid = 'public.migrator_ledger'::regclass ORDER BY 1"
    )
    make(database)
    made = database.psql(definitions)
    drop_indexes(database)
    page = Path(__file__).resolve().parents[2] / "docs/howto/protect-the-ledger.md"
    statements = (
        page.read_text().partition("## Indexes")[2].partition("```sql")[2].partition("```")[0].split(";")
    )
    for statement in filter(str.strip, statements):
        database.execute(statement)
    assert database.psql(definitions) == made
    with session(database) as asked:
        assert queries.examine(asked, LEDGER, None, "").indexed


def test_who_holds_the_ledger_holds_up_no_run(database: Database, project: Project, run: Run) -> None:
    folder = project(revisions=linear_history(1))
    done(run(cwd=folder))
    drop_indexes(database)
    with database.connect() as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE public.migrator_ledger IN ROW EXCLUSIVE MODE")
        result = done(run(cwd=project(revisions=linear_history(2))))
        other.rollback()
    assert "lacks indexes, which could not be created" in result.stderr
    assert not names(database) & set(indexes.DEFINITIONS)


def test_a_role_that_may_only_add_rows(database: Database, project: Project, run_migrator: Runner) -> None:
    login = f"adds_{database.name}"
    database.server.create_role(login)
    folder = project(revisions=linear_history(1))
    off = {"MIGRATOR_BACKUP": "off"}
    done(run_migrator(cwd=folder, database=database, env=off))
    drop_indexes(database)
    database.execute(
        f"GRANT CREATE ON SCHEMA public TO {login}; GRANT SELECT, INSERT, UPDATE, DELETE ON alembic_version TO {login};"
        f" GRANT SELECT, INSERT ON migrator_ledger TO {login}"
    )
    more = project(revisions=linear_history(2))
    env = {**off, "MIGRATOR_DATABASE_URL": database.server.url(database.name, user=login)}
    done(run_migrator(cwd=more, database=database, env=env))
    assert not names(database) & set(indexes.DEFINITIONS)


def test_a_name_that_is_taken_fails_no_run(database: Database, project: Project, run: Run) -> None:
    """An ordinary role can take every name but the ledger's own: the ledger is read without that index then."""
    for name in indexes.DEFINITIONS:
        database.execute(f"CREATE TYPE public.{name} AS (id int)")
    for count in (1, 2, 3):
        result = done(run(cwd=project(revisions=linear_history(count))))
        assert "has new indexes" not in result.stderr
    assert "r003" in done(run("status", cwd=project(revisions=linear_history(3)))).stdout
    assert not names(database) & set(indexes.DEFINITIONS)


@pytest.mark.parametrize("name", ['odd "name"', "per%cent", "it's"])
def test_in_a_schema_of_any_name(name: str, database: Database) -> None:
    place = VersionTable("migrator_ledger", name)
    database.execute(f"CREATE SCHEMA {place.quoted.rpartition('.')[0]}")
    make(database, place)
    with session(database) as asked:
        found = queries.examine(asked, place, None, "")
        assert (found.holes, found.indexed) == ((), True)
        assert read_needed_backups(asked, "") == set()


# -- ledgers of others -----------------------------------------------------------------------------------------------


@pytest.fixture
def stranger(database: Database) -> str:
    """A role that nobody trusts, which owns a schema."""
    name = f"stranger_{database.name}"
    database.server.create_role(name)
    database.execute(f"CREATE SCHEMA planted AUTHORIZATION {name}")
    return name


def plant(database: Database, stranger: str, *, rows: int) -> None:
    make(database, VersionTable("migrator_ledger", "planted"))
    database.execute(
        "INSERT INTO planted.migrator_ledger (id, run_id, number, at, event, version_table, backup_id)"
        " SELECT i, 'run' || i, -1, now(), 'begun', 'name' || i, 'planted' || i % 10"
        f" FROM generate_series(1, {rows}) i;"
        f" ALTER TABLE planted.migrator_ledger OWNER TO {stranger}"
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_a_planted_ledger_of_many_names_is_read_once(
    indexed: bool, database: Database, stranger: str
) -> None:
    make(database)
    plant(database, stranger, rows=100_000)
    if not indexed:
        for name in indexes.DEFINITIONS:
            database.execute(f"DROP INDEX planted.{name}")
    before = rows_read(database, "planted.migrator_ledger")
    with session(database) as asked:
        assert read_needed_backups(asked, "") == {f"planted{number}" for number in range(10)}
    assert rows_read(database, "planted.migrator_ledger") - before == 100_000


def test_a_ledger_of_others_that_is_too_large_removes_nothing(
    database: Database, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(database, stranger, rows=30)
    monkeypatch.setattr(needed_backups, "MOST_ROWS", 29)
    with (
        session(database) as asked,
        pytest.raises(BackupFailed, match="more than 29 rows, and other roles can write it"),
    ):
        read_needed_backups(asked, "")
    monkeypatch.setattr(needed_backups, "MOST_ROWS", 30)
    with session(database) as asked:
        assert len(read_needed_backups(asked, "")) == 10
    # Its owner is trusted by name: then it is one of ours, and there is no bound.
    monkeypatch.setattr(needed_backups, "MOST_ROWS", 1)
    with session(database) as asked:
        assert len(read_needed_backups(asked, stranger)) == 10


def test_ids_that_are_no_ids_are_not_carried_over(database: Database, stranger: str) -> None:
    plant(database, stranger, rows=1)
    database.execute("UPDATE planted.migrator_ledger SET backup_id = repeat('x', 10000000)")
    with session(database) as asked:
        assert read_needed_backups(asked, "") == set()


def test_a_locked_ledger_of_others_holds_nobody_up_for_long(
    database: Database, stranger: str, project: Project, run: Run, tmp_path: Path
) -> None:
    """Nobody knows then which backups are needed, and none is removed."""
    folder = project(revisions=linear_history(1))
    (tmp_path / "backups").mkdir()
    keep = {"MIGRATOR_BACKUP_URL": (tmp_path / "backups").as_uri(), "MIGRATOR_BACKUP_KEEP": "last=1"}
    for _ in range(2):
        done(run("backup", cwd=folder, **keep))
    backups = sorted(path.name for path in (tmp_path / "backups").rglob("*"))
    plant(database, stranger, rows=1)
    with database.connect() as other, other.cursor() as cursor:
        cursor.execute("LOCK TABLE planted.migrator_ledger IN ACCESS EXCLUSIVE MODE")
        result = run("prune", cwd=folder, **keep)
        other.rollback()
    refusal(
        result,
        ExitCode.BACKUP_FAILED,
        "The ledger planted.migrator_ledger was not read within 5 s",
        "no backup was removed",
    )
    assert sorted(path.name for path in (tmp_path / "backups").rglob("*")) == backups
    assert "removed 1 backups" in done(run("prune", cwd=folder, **keep)).stderr


def test_many_ledgers_of_others_share_the_time(
    database: Database, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        database.execute(f"CREATE SCHEMA s{number}")
        make(database, VersionTable("migrator_ledger", f"s{number}"))
        database.execute(f"ALTER TABLE s{number}.migrator_ledger OWNER TO {stranger}")
    monkeypatch.setattr(needed_backups, "SECONDS", 0.02)
    with (
        session(database) as asked,
        pytest.raises(BackupFailed, match="so it is not known which backups are needed"),
    ):
        read_needed_backups(asked, "")
