"""Whether a backup is made, reused, or left out; and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.backups.clients import Client
from migrator.backups.dump import format
from migrator.backups.exported_snapshot import Relation
from migrator.backups.restore.restore import RestoreOptions
from migrator.backups.restore.write_detection import Incomplete
from migrator.config.settings import Settings, load
from migrator.errors import BackupFailed, SettingsError
from migrator.outcome import ExitCode
from migrator.schema.names import parse_patterns
from tests.support import installations
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import bring_to, linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server

from .conftest import Workbench

Bench = Callable[..., Workbench]
Project = Callable[..., Path]


@pytest.fixture
def at_first(database: Database, project: Project) -> Path:
    """A project of three revisions whose database is at the first, with something to lose."""
    bring_to(database, 1)
    database.execute("INSERT INTO t1 SELECT n, 'x' FROM generate_series(1, 100) n")
    return project(revisions=linear_history(3))


@pytest.fixture
def upgrade(database: Database, at_first: Path, run_migrator: Runner) -> Callable[..., Result]:
    """Upgrade where a backup of the last hour may be reused."""

    def run(*arguments: str) -> Result:
        given = ("--format", "json", "upgrade", *arguments)
        return done(
            run_migrator(*given, cwd=at_first, database=database, env={"MIGRATOR_BACKUP_MAX_AGE": "1h"})
        )

    return run


def backed_up(result: Result) -> str:
    return str(result.answer["backup"]["id"])


def test_a_recent_backup_is_reused_only_where_told(
    database: Database, at_first: Path, run_migrator: Runner, upgrade: Callable[..., Result]
) -> None:
    made = run_migrator("--format", "json", "backup", cwd=at_first, database=database)
    assert made.code == 0, made
    identifier = made.answer["id"]
    result = upgrade("r002")
    assert backed_up(result) == identifier
    stage = next(stage for stage in result.answer["stages"] if stage["stage"] == "backup")
    assert stage["status"] == "skipped"
    assert stage["reason"].startswith(f"reuses {identifier}, made ")
    rows = database.psql("SELECT DISTINCT backup_id FROM migrator_ledger WHERE backup_id IS NOT NULL")
    assert rows == [(identifier,)]
    # The next run starts from another revision, of which there is no backup.
    result = upgrade()
    assert backed_up(result) != identifier


@pytest.mark.parametrize(
    "spoil",
    [
        {"created_at": "2026-01-01T00:00:00.000+00:00"},
        {"created_at": "2999-01-01T00:00:00.000+00:00"},
        {"created_at": "yesterday"},
        {"revisions": ["r000"]},
        {"system_identifier": "1"},
        {"system_identifier": ""},
        {"database_oid": 1},
        {"timeline": 7},
        {"verified": ""},
        {"excluded_table_data": ["public.t1"]},
        {"size_bytes": 1, "stored_bytes": 1},
    ],
    ids=str,
)
def test_what_is_not_reused(
    spoil: dict[str, Any],
    database: Database,
    at_first: Path,
    run_migrator: Runner,
    upgrade: Callable[..., Result],
) -> None:
    made = run_migrator("--format", "json", "backup", cwd=at_first, database=database)
    manifest = run_migrator.backups / f"{made.answer['id']}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | spoil))
    result = upgrade()
    assert backed_up(result) != made.answer["id"]


def test_a_damaged_backup_is_not_reused(
    database: Database, at_first: Path, run_migrator: Runner, upgrade: Callable[..., Result]
) -> None:
    made = run_migrator("--format", "json", "backup", cwd=at_first, database=database).answer["id"]
    dump = run_migrator.backups / f"{made}.dump"
    data = bytearray(dump.read_bytes())
    data[len(data) // 2] ^= 0x10
    dump.chmod(0o600)
    dump.write_bytes(data)
    result = upgrade()
    assert backed_up(result) != made
    assert "its content was changed" in result.stderr


def test_a_backup_of_a_database_of_the_same_name_is_not_reused(
    database: Database, server: Server, at_first: Path, run_migrator: Runner, upgrade: Callable[..., Result]
) -> None:
    made = run_migrator("--format", "json", "backup", cwd=at_first, database=database)
    server.drop_database(database.name)
    server.create_database(database.name)
    bring_to(database, 1)
    database.execute("INSERT INTO t1 VALUES (1, 'mine')")
    result = upgrade()
    assert backed_up(result) != made.answer["id"]


def test_a_client_that_is_too_old_is_refused_before_the_lock(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server("embedded18")
    database = server.create_database()
    bring_to(database, 1)
    database.execute("INSERT INTO t1 VALUES (1, 'x')")
    folder = project(revisions=linear_history(2))
    environment = {"MIGRATOR_PG_BIN": str(installations.debian())}
    with unchanged(database):
        result = run_migrator("upgrade", "--format", "json", cwd=folder, database=database, env=environment)
    refusal(result, ExitCode.BACKUP_FAILED, "18.", "pg_dump is 15.", "MIGRATOR_PG_BIN")
    assert [stage["stage"] for stage in result.answer["stages"]] == ["wait", "inspect"]
    assert not run_migrator.backups.exists() or list(run_migrator.backups.iterdir()) == []


# -- how it is written ---------------------------------------------------------------------------------------------

ZSTD = Client(installations.binaries("zstd"), "17.10", 17)
OLD = Client(Path("/opt/15"), "15.1", 15)
BIG = 10**9


@pytest.mark.parametrize(
    ("settings", "folder", "sizes", "expected"),
    [
        ({}, True, [BIG, BIG, BIG], ("directory", 2, "zstd:1")),
        ({}, True, [BIG], ("custom", 1, "zstd:1")),  # nobody can help with one table
        ({}, True, [BIG, BIG // 100], ("custom", 1, "zstd:1")),
        ({}, True, [1000, 1000, 1000], ("custom", 1, "zstd:1")),
        ({}, True, [], ("custom", 1, "zstd:1")),
        ({}, False, [BIG, BIG, BIG], ("custom", 1, "zstd:1")),
        ({"backup_jobs": 1}, True, [BIG, BIG], ("custom", 1, "zstd:1")),
        ({"backup_jobs": 3}, True, [1], ("directory", 3, "zstd:1")),
        ({"backup_format": "custom"}, True, [BIG, BIG], ("custom", 1, "zstd:1")),
        ({"backup_format": "directory"}, True, [1], ("directory", 1, "zstd:1")),
        ({"backup_compression": "lz4:3"}, True, [1], ("custom", 1, "lz4:3")),
    ],
)
def test_the_method(
    settings: dict[str, Any],
    folder: bool,
    sizes: list[int],
    expected: tuple[str, int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(format, "cores", lambda: 2)
    found = format.choose(Settings(**settings), ZSTD, folder=folder, table_bytes=sizes)
    assert (found.dump_format, found.jobs, found.compression, found.note) == (*expected, "")


def test_a_directory_where_none_can_be_is_one_file_and_that_is_said() -> None:
    found = format.choose(Settings(backup_format="directory"), ZSTD, folder=False, table_bytes=[BIG])
    assert (found.dump_format, found.jobs) == ("custom", 1)
    assert "needs a folder" in found.note


def test_each_client_compresses_as_well_as_it_can() -> None:
    embedded = Client(installations.binaries("embedded"), "16.14", 16)
    assert format.supports(ZSTD, "zstd")
    assert format.supports(ZSTD, "lz4")
    assert not format.supports(embedded, "zstd")  # new enough, and built without
    assert not format.supports(OLD, "zstd")
    assert format.choose(Settings(), embedded, folder=True, table_bytes=[]).compression == "gzip:1"
    assert format.compress_option(embedded, "gzip:1") == "--compress=gzip:1"
    assert format.compress_option(OLD, "gzip:1") == "--compress=1"
    with pytest.raises(BackupFailed, match=r"pg_dump 15\.1 cannot compress with zstd") as caught:
        format.choose(Settings(backup_compression="zstd:3"), OLD, folder=True, table_bytes=[])
    assert "MIGRATOR_PG_BIN" in caught.value.next_step


@pytest.mark.parametrize("text", ["0", "none", "gzip:0", "zstd:0"])
def test_no_compression_is_refused_with_the_reason(text: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot reveal a flipped bit"):
        load({}, {"DATABASE_URL": "postgresql://u@h/d", "MIGRATOR_BACKUP_COMPRESSION": text}, tmp_path)


# -- rows that are left out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("audit_log", ["public.audit_log"]),
        ("logs.*", ["logs.a", "logs.B"]),
        ("LOGS.*", ["logs.a", "logs.B"]),
        ('logs."B"', ["logs.B"]),
        ("logs.b", []),
        ('"logs.*"', []),
        ("audit_?og, logs.a", ["public.audit_log", "logs.a"]),
        ("*", ["public.audit_log", "logs.a", "logs.B", 'odd "s.t, u']),
        ('"odd ""s"."t, u"', ['odd "s.t, u']),
        ("audit", []),
        ("", []),
    ],
)
def test_patterns(text: str, names: list[str]) -> None:
    tables = [
        Relation(number, schema, name, "r", None, False, True)
        for number, (schema, name) in enumerate(
            [("public", "audit_log"), ("logs", "a"), ("logs", "B"), ('odd "s', "t, u")]
        )
    ]
    patterns = parse_patterns(text)
    found = [
        f"{table.schema}.{table.name}"
        for table in tables
        if any(pattern.matches(table.schema, table.name) for pattern in patterns)
    ]
    assert found == names


def test_rows_are_left_out_and_everyone_is_told(
    database: Database, workbench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    database.execute(
        'CREATE TABLE kept AS SELECT 1 AS a; CREATE SCHEMA logs; CREATE TABLE logs."Old, x" AS SELECT 2 AS a;'
        "CREATE TABLE measured (day int) PARTITION BY RANGE (day);"
        "CREATE TABLE measured_1 PARTITION OF measured FOR VALUES FROM (1) TO (10);"
        "INSERT INTO measured VALUES (1), (2)"
    )
    patterns = "logs.*, measured, nowhere.at_all"
    bench = workbench(database, MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA=patterns)
    backup = bench.back_up()
    assert set(backup.excluded_table_data) == {'logs."Old, x"', "public.measured_1"}
    assert backup.tables["public.kept"].rows == 1
    assert backup.tables["public.measured_1"].rows is None
    assert "the backup is incomplete: it excludes the rows of" in caplog.text
    assert "table nowhere.at_all does not exist" in caplog.text
    with pytest.raises(Incomplete, match="measured_1"):
        bench.restore()
    bench.restore(options=RestoreOptions(incomplete=True))
    assert database.psql("SELECT a FROM kept") == [(1,)]
    assert database.psql('SELECT count(*) FROM logs."Old, x"') == [(0,)]
    assert database.psql("SELECT count(*) FROM measured") == [(0,)]
