"""What stays and what goes: a policy, what nothing may remove, and several at once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from migrator.backups import retention
from migrator.backups.manifest import Backup
from migrator.backups.retention import judge, prune, too_old
from migrator.backups.storage.interface import BadDump
from migrator.backups.storage.local import FolderStore
from migrator.config.database_url import parse
from migrator.config.value_parsers import keep
from migrator.errors import BackupFailed, SettingsError
from migrator.ledger import table as ledger
from migrator.ledger.needed_backups import read_needed_backups
from migrator.postgres.session import connect
from migrator.postgres.version_table import VersionTable
from tests.support.buckets import Bucket
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

from .conftest import APPLICATION, Workbench
from .test_manifest import BACKUP

Bench = Callable[..., Workbench]
NOW = datetime(2026, 3, 31, 12, tzinfo=UTC)


def made(age: timedelta, name: str = "") -> Backup:
    moment = NOW - age
    return dataclasses.replace(BACKUP, id=f"b{moment:%m%d%H}", created_at=moment.isoformat(), name=name)


def kept(backups: list[Backup], policy: str, needed: frozenset[str] = frozenset()) -> list[str]:
    return [verdict.backup.id for verdict in judge(backups, policy, needed) if verdict.reasons]


EVERY_SIX_HOURS = [made(timedelta(hours=6 * number)) for number in range(4 * 120)]


def test_the_policy() -> None:
    assert kept(EVERY_SIX_HOURS, "last=3") == ["b033112", "b033106", "b033100"]
    daily = kept(EVERY_SIX_HOURS, "daily=4")
    assert daily == ["b033112", "b033018", "b032918", "b032818"]  # the newest of each day
    weekly = kept(EVERY_SIX_HOURS, "weekly=3")
    assert weekly == ["b033112", "b032918", "b032218"]  # weeks end on Sunday
    assert kept(EVERY_SIX_HOURS, "monthly=3") == ["b033112", "b022818", "b013118"]
    assert kept(EVERY_SIX_HOURS, "yearly=5") == ["b033112", "b123118"]
    both = kept(EVERY_SIX_HOURS, "last=2,daily=2,monthly=2")
    assert both == ["b033112", "b033106", "b033018", "b022818"]


def test_periods_without_a_backup_do_not_count() -> None:
    """A database that nobody migrates for a year keeps its last seven days' backups."""
    old = [made(timedelta(days=365 + 30 * number)) for number in range(10)]
    assert len(kept(old, "daily=7")) == 7


def test_what_no_policy_removes() -> None:
    newest, named, needed, other = (
        made(timedelta(days=1)),
        made(timedelta(days=2), name="before-sale"),
        made(timedelta(days=3)),
        made(timedelta(days=4)),
    )
    unknown = dataclasses.replace(made(timedelta(days=5)), created_at="long ago")
    verdicts = judge([newest, named, needed, other, unknown], "yearly=0", frozenset({needed.id}))
    assert [verdict.reasons for verdict in verdicts] == [
        ("the newest",),
        ("named before-sale",),
        ("the ledger needs it",),
        (),
        ("its age is not known",),
    ]
    assert judge([], "last=1", frozenset()) == []


def test_what_was_not_proven_stands_for_nothing_and_goes_when_a_newer_one_is() -> None:
    backups = [made(timedelta(days=number), name="named" if number == 3 else "") for number in range(6)]
    for number in (0, 1, 3, 4):
        backups[number] = dataclasses.replace(backups[number], verified="")
    verdicts = judge(backups, "last=1", frozenset({backups[4].id}))
    waiting = ("not verified, and there is no newer verified one",)
    newest = ("the newest", "last")
    assert [verdict.reasons for verdict in verdicts] == [
        waiting,
        waiting,
        newest,
        (),
        ("the ledger needs it",),
        (),
    ]


def test_bad_dumps_stay_as_long_as_daily_ones() -> None:
    def bad(days: float) -> BadDump:
        return BadDump("b", "shop", (NOW - timedelta(days=days)).isoformat(), "rotten", "/b")

    ages = [bad(days) for days in (1, 6.9, 7.1, 29, 31)]
    assert too_old(ages, "last=1,daily=7", NOW) == ages[2:]
    assert too_old(ages, "last=1", NOW) == ages[4:]
    assert too_old([dataclasses.replace(bad(99), at="")], "last=1", NOW) == []


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("last=5,daily=7", "last=5,daily=7"),
        (" Weekly=4 last=2 ", "last=2,weekly=4"),
        ("last=3,daily=0", "last=3"),
        ("all", ""),
    ],
)
def test_how_a_policy_is_written(text: str, read: str) -> None:
    assert keep(text) == read


@pytest.mark.parametrize(
    "text", ["5", "last", "last=0", "last=-1", "last=1,last=2", "fortnightly=2", "last=1;daily=2"]
)
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not say which backups to keep|would keep nothing"):
        keep(text)


def backups_of(bench: Workbench, count: int, **facts: object) -> list[Backup]:
    """Make one real backup, and copies of it as if they were older, the newest first."""
    real = bench.back_up()
    store = FolderStore(bench.folder)
    copies = [real]
    for number in range(1, count):
        moment = datetime.now(UTC) - timedelta(days=number)
        with store.new_dump(f"{real.id[:-6]}{number:06x}") as part:
            part.write(b"x")
            part.sync()
            older = dataclasses.replace(real, id=part.id, created_at=moment.isoformat(), **facts)  # type: ignore[arg-type]
            copies.append(store.add(part, dataclasses.replace(older, sha256=part.sha256, size_bytes=1)))
    return copies


def pruned(bench: Workbench, policy: str, *, dry_run: bool = False) -> retention.Pruned:
    settings = bench.settings._replace(backup_keep=policy)
    with connect(bench.target, APPLICATION, 60) as session:
        return prune(session, settings, dry_run=dry_run)


def test_only_this_database(database: Database, workbench: Bench) -> None:
    """Not those of another database, nor of one of the same name on another server."""
    bench = workbench(database)
    copies = backups_of(bench, 6)
    store = FolderStore(bench.folder)
    others = {
        copies[2].id: {"database": "crm"},
        copies[3].id: {"system_identifier": "1"},
        copies[4].id: {"system_identifier": "", "target": "postgresql://elsewhere/shop"},
    }
    for copy in copies:
        if copy.id in others:
            path = bench.folder / f"{copy.id}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **others[copy.id]}))
    assert [backup.id for backup in pruned(bench, "last=1", dry_run=True).removed] == [
        copies[1].id,
        copies[5].id,
    ]
    assert len(store.backups()) == 6
    assert [backup.id for backup in pruned(bench, "last=1").removed] == [copies[1].id, copies[5].id]
    assert {backup.id for backup in store.backups()} == {copies[0].id, *others}


def test_two_at_once(database: Database, workbench: Bench) -> None:
    """Each in a process of its own, at the same moment: both succeed, and what must stay is there."""
    bench = workbench(database)
    copies = backups_of(bench, 40)
    command = [sys.executable, "-m", "migrator", "prune", "--keep", "last=3"]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(retention.__file__).parents[2]),
        "DATABASE_URL": database.url,
        "MIGRATOR_BACKUP_URL": bench.folder.as_uri(),
    }
    running = [
        subprocess.Popen(command, cwd=bench.folder, env=environment, stdout=-1, stderr=-1) for _ in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
    assert {name.partition(".")[0] for name in bench.files()} == {copy.id for copy in copies[:3]}
    assert len(FolderStore(bench.folder).backups()) == 3


def test_what_cannot_be_removed_is_said(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = workbench(database)
    copies = backups_of(bench, 4)
    real = FolderStore.remove

    def remove(store: FolderStore, found: Backup) -> None:
        if found.id == copies[1].id:
            raise OSError(30, "Read-only file system", "x")
        real(store, found)

    monkeypatch.setattr(FolderStore, "remove", remove)
    with pytest.raises(BackupFailed, match=r"1 backups could not be removed.*Read-only"):
        pruned(bench, "last=1")
    assert {backup.id for backup in FolderStore(bench.folder).backups()} == {copies[0].id, copies[1].id}
    with pytest.raises(SettingsError, match="does not know which backups to keep"):
        pruned(bench, "")


def test_after_a_run_and_by_command(
    database: Database, project: Callable[..., Path], run_migrator: Runner, bucket: Bucket
) -> None:
    """In a bucket; what the ledger needs stays, although the policy would let it go."""
    env = {**bucket.variables(), "MIGRATOR_BACKUP_KEEP": "last=1"}
    tree = project(revisions=linear_history(3))

    def run(*arguments: str) -> Any:
        done = run_migrator(*arguments, "--format", "json", cwd=tree, database=database, env=env)
        assert done.code == 0, done
        return done.answer

    run("upgrade", "+1")  # from nothing: no backup
    run("upgrade", "+1")
    first = [item["id"] for item in run("backups")]
    assert len(first) == 1
    run("upgrade", "+1")
    second = [item["id"] for item in run("backups")]
    assert len(second) == 1
    assert first != second  # the run's own is the newest, and the one before was pruned
    for _ in range(3):
        run("backup")
    before = {item["id"] for item in run("backups")}
    answer = run("prune", "--dry-run")
    assert {item["id"] for item in run("backups")} == before
    reasons = {item["id"]: item["reasons"] for item in answer["kept"]}
    assert reasons[second[0]] == ["the ledger needs it"]
    assert len(answer["removed"]) == 2
    run("prune")
    left = {item["id"] for item in run("backups")}
    assert left == set(reasons)
    assert {Path(name).name.partition(".")[0] for name in bucket.names()} == left


def test_what_the_ledger_needs(database: Database) -> None:
    """The backups of the newest run that changed the schema, and of runs after it that did not end well."""
    with connect(parse(database.url), APPLICATION, 60) as session:
        ledger.create(VersionTable(ledger.NAME, "public"), session.value)
    runs = [
        ("old", ("begun", "applied", "run"), 0),
        ("failed-before", ("begun", "run"), 39),
        ("changed", ("begun", "applied", "run"), 0),
        ("nothing-to-do", ("run",), 0),
        ("failed", ("begun", "run"), 39),
        ("killed", ("begun",), None),
    ]
    rows = [
        (run_id, number, event, f"backup-{run_id}", code if event == "run" else None)
        for run_id, events, code in runs
        for number, event in enumerate(events)
    ]
    for minute, (run_id, number, event, backup_id, code) in enumerate(rows):
        database.execute(
            f"INSERT INTO {ledger.NAME} (run_id, number, at, event, version_table, backup_id, code) VALUES"
            f" ('{run_id}', {number}, now() + interval '{minute} min', '{event}', 'alembic_version', '{backup_id}',"
            f" {'NULL' if code is None else code})"
        )
    with connect(parse(database.url), APPLICATION, 60) as session:
        assert read_needed_backups(session, "") == {"backup-changed", "backup-failed", "backup-killed"}
        session.query("CREATE SCHEMA other")
        session.query(
            f"CREATE TABLE other.{ledger.NAME} AS SELECT * FROM public.{ledger.NAME} WHERE run_id = 'old'"
        )
        needed = {"backup-changed", "backup-failed", "backup-killed", "backup-old"}
        assert read_needed_backups(session, "") == needed


def test_a_ledger_that_cannot_be_read_keeps_everything(database: Database, workbench: Bench) -> None:
    bench = workbench(database)
    copies = backups_of(bench, 3)
    # One with other columns is another project's table.
    database.execute(f"CREATE TABLE {ledger.NAME} (version_table text, details jsonb, backup_id text)")
    with pytest.raises(BackupFailed, match="it is not known which backups it needs"):
        pruned(bench, "last=1")
    assert len(FolderStore(bench.folder).backups()) == len(copies)
