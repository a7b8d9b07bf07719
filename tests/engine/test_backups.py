"""Backups and the way back as the image makes them: locked down, on a read-only root, killed, full, in a bucket."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyrage
import pytest

from tests.engine.containers import Migrator, Postgres, Ran
from tests.engine.engine import Engine
from tests.support import buckets
from tests.support.projects import Revision, linear_history

pytestmark = pytest.mark.engine

LOCKED_DOWN = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
ROWS = 60_000
CONTENT = "SELECT count(*), md5(string_agg(text, '' ORDER BY id)) FROM big"
KILLED_AFTER = (0.3, 0.5, 0.7, 0.9, 1.2)
FAILING = """\
op.execute("CREATE TABLE half (a int)")
with op.get_context().autocommit_block():
    op.execute("DELETE FROM big WHERE id > 10")
raise RuntimeError("half way")"""


@pytest.fixture
def filled(migrator: Migrator, project: Callable[..., Path]) -> tuple[Migrator, tuple[str, ...]]:
    """A database with rows that do not compress, at r003, and the options that mount its project."""
    mount = ("-v", f"{project(revisions=linear_history(3))}:/app:ro", *LOCKED_DOWN)
    assert migrator.run("upgrade", options=mount).code == 0
    migrator.psql(
        "CREATE TABLE big AS SELECT id, string_agg(md5(random()::text), '') AS text"
        f" FROM generate_series(1, {ROWS}) id, generate_series(1, 16) GROUP BY id"
    )
    return migrator, mount


@pytest.fixture
def bucket(engine: Engine, postgres: Postgres) -> Iterator[buckets.Bucket]:
    """A bucket that containers on the server's network reach at the network's gateway."""
    (network,) = json.loads(engine.run("network", "inspect", postgres.network).stdout)
    with buckets.server(network["IPAM"]["Config"][0]["Gateway"]) as address:
        yield buckets.Bucket(address, "backups")


def environment(variables: dict[str, str]) -> tuple[str, ...]:
    """Return the options that set a container's environment."""
    return tuple(option for name, value in variables.items() for option in ("-e", f"{name}={value}"))


def ended(ran: Ran, code: int, *words: str) -> None:
    """Check the exit code, and words in the log."""
    assert ran.code == code, ran.output
    for word in words:
        assert word in ran.output


def whole(migrator: Migrator, names: list[str]) -> list[str]:
    """Return the ids of what looks like a backup, each of which must have its dump."""
    ids = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    assert {f"{name}.dump" for name in ids} == {name for name in names if name.endswith(".dump")}
    return ids


def test_broken_and_restored(filled: tuple[Migrator, tuple[str, ...]]) -> None:
    migrator, mount = filled
    before = migrator.psql(CONTENT)
    ended(migrator.run("backup", options=mount), 0)
    ended(
        migrator.run("verify-backup", "latest", "--how", "restore", options=mount), 0, "restored and compared"
    )
    migrator.psql("DELETE FROM big WHERE id % 2 = 0")
    ended(migrator.run("restore", "latest", "--table", "big", "--into-schema", "look", options=mount), 0)
    assert migrator.psql(CONTENT.replace("FROM big", "FROM look.big")) == before
    ended(migrator.run("restore", "latest", "--yes", "--drop-old", options=mount), 0)
    assert migrator.psql(CONTENT) == before
    assert migrator.psql("SELECT to_regnamespace('look') IS NULL") == ["t"]
    ended(migrator.run("restore", "nosuch", "--yes", options=mount), 36, "There is no backup")


def test_killed_while_it_is_made(filled: tuple[Migrator, tuple[str, ...]], engine: Engine) -> None:
    migrator, mount = filled
    for seconds in KILLED_AFTER:
        container = migrator.start("backup", options=mount)
        time.sleep(seconds)
        engine.run("kill", "--signal=KILL", container, expect=None)  # it may have ended
        engine.wait(container)
        names = (
            migrator.backup_files()
        )  # a dump comes before its manifest: it may be alone until the next run
        manifests = [name for name in names if name.endswith(".json")]
        assert {name.replace(".json", ".dump") for name in manifests} <= set(names)
    ended(migrator.run("backup", options=mount), 0)
    names = migrator.backup_files()
    assert [name for name in names if ".part" in name] == []
    for one in whole(migrator, names):
        ended(migrator.run("verify-backup", one, options=mount), 0)


def test_a_volume_that_fills_up(
    filled: tuple[Migrator, tuple[str, ...]], project: Callable[..., Path]
) -> None:
    migrator, _ = filled
    pending = ("-v", f"{project(name='pending', revisions=linear_history(4))}:/app:ro", *LOCKED_DOWN)
    small = ("--mount", "type=tmpfs,destination=/small,tmpfs-size=8m,tmpfs-mode=1777")
    there = ("-e", "MIGRATOR_BACKUP_URL=file:///small")
    ran = migrator.run("upgrade", options=(*pending, *small, *there))
    ended(ran, 36, "/small", "The database was not changed")
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r003"]


def test_a_bucket_and_a_key(
    filled: tuple[Migrator, tuple[str, ...]], bucket: buckets.Bucket, tmp_path: Path
) -> None:
    migrator, mount = filled
    identity = pyrage.x25519.Identity.generate()
    key = tmp_path / "key.txt"
    key.write_text(f"{identity}\n")
    key.chmod(0o644)
    recipient = {"MIGRATOR_BACKUP_RECIPIENTS": str(identity.to_public())}
    there = environment(bucket.variables() | recipient)
    opens = ("-v", f"{key}:/key.txt:ro", "-e", "MIGRATOR_BACKUP_IDENTITY_FILE=/key.txt")
    before = migrator.psql(CONTENT)
    ended(migrator.run("backup", options=(*mount, *there)), 0)
    assert sorted(name.partition(".")[2] for name in bucket.names()) == [
        "dump.age",
        "globals.sql.age",
        "json",
    ]
    proof = ("verify-backup", "latest", "--how", "restore")
    ended(migrator.run(*proof, options=(*mount, *there, *opens)), 36, "--tmpfs /tmp")
    ended(migrator.run(*proof, options=(*mount, *there, *opens, "--tmpfs", "/tmp")), 0)
    migrator.psql("TRUNCATE big")
    restore = ("restore", "latest", "--yes", "--drop-old")
    ended(migrator.run(*restore, options=(*mount, *there, "--tmpfs", "/tmp")), 43, "there is no private key")
    ended(migrator.run(*restore, options=(*mount, *there, *opens, "--tmpfs", "/tmp")), 0)
    assert migrator.psql(CONTENT) == before


def test_a_failure_is_taken_back_and_not_tried_again(
    filled: tuple[Migrator, tuple[str, ...]], project: Callable[..., Path]
) -> None:
    migrator, _ = filled
    before = migrator.psql(CONTENT)
    revisions = [*linear_history(3), Revision("r004", "r003", FAILING)]
    failing = ("-v", f"{project(name='failing', revisions=revisions)}:/app:ro", *LOCKED_DOWN)
    how = environment({"MIGRATOR_ON_FAILURE": "restore", "MIGRATOR_MAINTENANCE_WINDOW": "on"})
    ended(migrator.run("upgrade", options=(*failing, *how)), 42, "The database was restored")
    assert migrator.psql(CONTENT) == before
    assert migrator.psql("SELECT version_num FROM alembic_version") == ["r003"]
    assert migrator.psql("SELECT to_regclass('half') IS NULL") == ["t"]
    ended(migrator.run("upgrade", options=(*failing, *how)), 35, "--retry")
    ended(migrator.run("upgrade", "--retry", options=(*failing, *how)), 42)
    assert migrator.psql(CONTENT) == before


def test_two_prunes_at_once(filled: tuple[Migrator, tuple[str, ...]], engine: Engine) -> None:
    migrator, mount = filled
    for _ in range(3):
        ended(migrator.run("backup", options=mount), 0)
    keep = (*mount, "-e", "MIGRATOR_BACKUP_KEEP=last=1")
    both = [migrator.start("prune", options=keep) for _ in range(2)]
    for container in both:
        assert engine.wait(container) == 0, engine.logs(container)
    assert len(whole(migrator, migrator.backup_files())) == 1
    ended(migrator.run("verify-backup", "latest", options=mount), 0)
