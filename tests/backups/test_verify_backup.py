"""`verify-backup` finds what became of a backup since, and says so in its manifest or in its name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest

from migrator.backups import description
from migrator.backups.manifest import Backup
from migrator.backups.storage.local import FolderStore
from migrator.backups.storage.open import open_store
from migrator.backups.verification import verify_stored
from migrator.cli import formatters
from migrator.errors import BackupFailed, NoSuchBackup
from tests.support.buckets import Bucket
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

from .conftest import APPLICATION, LARGE, RICH, Workbench
from .test_manifest import BACKUP

Bench = Callable[..., Workbench]
RUN = "20260101T000000Z-abcdef"


def prove(bench: Workbench, how: str = "read", wanted: str = "latest") -> Backup:
    store = open_store(bench.settings.backup_url, bench.settings)
    backup = store.get(wanted, bench.database.name)
    return verify_stored.verify(store, backup, bench.settings, how, run_id=RUN, application_name=APPLICATION)


def manifest(bench: Workbench) -> Any:
    (path,) = bench.folder.glob("*.json")
    return json.loads(path.read_text())


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def some_file(backup: Backup) -> Path:
    """Return the dump, or the biggest file of one in directory format."""
    place = Path(backup.place)
    return max(place.iterdir(), key=lambda path: path.stat().st_size) if place.is_dir() else place


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_a_good_backup_is_proven_again_and_remembers(
    database: Database, workbench: Bench, shape: str
) -> None:
    database.execute(RICH)
    bench = workbench(database, MIGRATOR_BACKUP_FORMAT=shape)
    made = bench.back_up()
    assert made.verified == "read"
    database.execute(
        "DROP TABLE everything CASCADE; CREATE TABLE other (a int)"
    )  # what it was does not matter
    assert prove(bench).verified == "read"
    backup = prove(bench, "restore")
    assert backup.verified == "restore"
    found = manifest(bench)
    assert [proof["how"] for proof in found["proofs"]] == ["read", "read", "read", "restore"]
    assert {proof["run_id"] for proof in found["proofs"]} == {"run1", RUN}
    assert found["proofs"][-1]["server_version"] == made.server_version
    assert "contents of" in found["proofs"][-1]["why"]  # nobody hashed the rows when it was made
    assert found["verified"] == "restore"
    assert bench.databases() == {database.name}
    assert sorted(bench.files()) == sorted(
        [
            Path(made.place).name,
            f"{made.id}.json",
            *([f"{made.id}.globals.sql"] if made.globals_note == "" else []),
        ]
    )


@pytest.mark.parametrize("shape", ["custom", "directory"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "another's", "one more byte"])
def test_a_damaged_one_is_found_and_renamed(
    database: Database, workbench: Bench, shape: str, damage: str
) -> None:
    database.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 3000) g")
    bench = workbench(database, MIGRATOR_BACKUP_FORMAT=shape)
    other = bench.back_up()
    database.execute("INSERT INTO t VALUES (0, 'another')")
    backup = bench.back_up()
    path = some_file(backup)
    if damage == "flipped":
        flip(path)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size * 9 // 10)
    elif damage == "another's":
        path.write_bytes(some_file(other).read_bytes())
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(BackupFailed, match=r"is damaged.*not a backup any more.*\.bad") as caught:
        prove(bench, wanted=backup.id)
    assert caught.value.code == 36
    assert not Path(backup.place).exists()
    assert Path(backup.place + ".bad").exists()
    document = json.loads((bench.folder / f"{backup.id}.bad.json").read_text())
    assert "is damaged" in document["bad"]["why"]
    assert (
        bench.restore("latest", to=database.name + "_look").backup.id == other.id
    )  # the one before is the newest now
    with pytest.raises(NoSuchBackup, match="no backup"):
        bench.restore(backup.id)


@pytest.mark.parametrize("how", ["read", "restore"])
def test_an_archive_that_was_exchanged_together_with_its_checksum(
    database: Database, workbench: Bench, how: str
) -> None:
    """Bytes that have the manifest's checksum, and are not what was dumped: only comparing tells."""
    database.execute("CREATE TABLE t AS SELECT g AS a FROM generate_series(1, 100) g; CREATE SEQUENCE s")
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_FORMAT="custom")
    backup = bench.back_up()
    database.execute("UPDATE t SET a = -1 WHERE a = 50")  # as many rows as before
    other = bench.back_up()
    Path(backup.place).write_bytes(Path(other.place).read_bytes())
    path = bench.folder / f"{backup.id}.json"
    document = json.loads(path.read_text())
    keys = ("sha256", "size_bytes", "stored_sha256", "stored_bytes")
    path.write_text(json.dumps(document | {key: getattr(other, key) for key in keys}))
    if how == "read":
        assert prove(bench, how, backup.id).proofs[-1].ok
        return
    with pytest.raises(BackupFailed, match=r"rows of public\.t differ"):
        prove(bench, how, backup.id)
    assert bench.databases() == {database.name}
    assert f"{backup.id}.bad.json" in bench.files()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_sha256": "0" * 64}, "constraints"),
        (
            {"sequences": {"public.s": {"before": [7, True], "after": [9, True]}}},
            "sequence public.s is at 1, not at 7 to 9",
        ),
        (
            {"tables": {"public.t": {"rows": 99}, "public.u": {"rows": 0}}},
            "table public.u is missing; public.t has 100",
        ),
        ({"large_objects": "2 17"}, "large objects"),
    ],
)
def test_what_is_compared(database: Database, workbench: Bench, change: dict[str, Any], said: str) -> None:
    database.execute("CREATE TABLE t AS SELECT g AS a FROM generate_series(1, 100) g; CREATE SEQUENCE s")
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore")
    backup = bench.back_up()
    path = bench.folder / f"{backup.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BackupFailed, match=said):
        prove(bench, "restore")


def test_renamed_by_hand(database: Database, workbench: Bench) -> None:
    bench = workbench(database)
    backup = bench.back_up()
    place = Path(backup.place)
    place.rename(place.with_name("elsewhere" + place.suffix))
    with pytest.raises(BackupFailed, match=r"its dump .* is missing"):
        prove(bench, wanted=backup.id)
    place.with_name("elsewhere" + place.suffix).rename(place)
    (bench.folder / f"{backup.id}.json").rename(bench.folder / "other.json")
    with pytest.raises(BackupFailed, match="was renamed"):
        prove(bench, wanted="other")


@pytest.mark.parametrize("case", ["good", "damaged", "unproven"])
def test_where_nothing_can_be_noted(
    case: str, database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found out is said all the same."""
    database.execute("CREATE TABLE t (a int)")
    bench = workbench(database)
    backup = bench.back_up()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(FolderStore, "_small", read_only)
    monkeypatch.setattr(FolderStore, "mark_bad", read_only)
    said = f"{backup.id} is verified, but that cannot be recorded: .*Read-only"
    if case == "damaged":
        flip(Path(backup.place))
        said = "is damaged: .* but it could not be renamed: .*Read-only"
    if case == "unproven":
        monkeypatch.setattr(verify_stored.scratch_database, "check", read_only)
        said = f"The verification of {backup.id} did not finish"
    with pytest.raises(BackupFailed, match=said):
        prove(bench, "restore" if case == "unproven" else "read")


def test_a_manifest_of_a_later_version(database: Database, workbench: Bench) -> None:
    bench = workbench(database)
    backup = bench.back_up()
    path = bench.folder / f"{backup.id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(BackupFailed, match="newer image"):
        prove(bench, wanted=backup.id)
    assert Path(backup.place).exists()


def test_one_that_cannot_be_restored_here_stays_a_backup(database: Database, workbench: Bench) -> None:
    server = database.server
    server.psql("CREATE ROLE gone_soon")
    database.execute("CREATE TABLE t (a int); ALTER TABLE t OWNER TO gone_soon")
    bench = workbench(database)
    backup = bench.back_up()
    database.execute("DROP TABLE t")
    server.psql("DROP ROLE gone_soon")
    with pytest.raises(BackupFailed, match=r"could not be restored here.*gone_soon"):
        prove(bench, "restore")
    proofs = manifest(bench)["proofs"]
    assert [(proof["how"], proof["ok"]) for proof in proofs] == [
        ("read", True),
        ("read", True),
        ("restore", False),
    ]
    assert "gone_soon" in proofs[-1]["why"]
    assert prove(bench).id == backup.id
    assert bench.databases() == {database.name}


@pytest.mark.parametrize("how", ["read", "restore"])
def test_in_a_bucket(database: Database, workbench: Bench, bucket: Bucket, how: str) -> None:
    database.execute(RICH)
    bench = workbench(database, **bucket.variables())
    backup = bench.back_up()
    assert backup.proofs[0].how == "read"
    assert prove(bench, how).proofs[-1].how == how
    (key,) = [name for name in bucket.names() if name.endswith(".json")]
    assert [proof["how"] for proof in json.loads(bucket.content(key))["proofs"]][-1] == how
    (key,) = [name for name in bucket.names() if name.endswith(".dump")]
    content = bytearray(bucket.content(key))
    content[len(content) // 2] ^= 1
    bucket.put(key, bytes(content))
    with pytest.raises(BackupFailed, match="is damaged"):
        prove(bench, how, backup.id)
    assert any(name.endswith(".dump.bad") for name in bucket.names())


def test_an_encrypted_one(database: Database, workbench: Bench, tmp_path: Path) -> None:
    identity = pyrage.x25519.Identity.generate()
    database.execute(RICH)
    sealed = {"MIGRATOR_BACKUP_RECIPIENTS": str(identity.to_public())}
    bench = workbench(database, **sealed)
    backup = bench.back_up()
    assert backup.encrypted_to == (str(identity.to_public()),)
    assert backup.proofs[0].how == "read"
    assert prove(bench).proofs[-1].how == "checksum"
    with pytest.raises(BackupFailed, match="there is no private key"):
        prove(bench, "restore")
    key = tmp_path / "key"
    key.write_text(str(identity))
    bench = workbench(
        database, **sealed, MIGRATOR_BACKUP_IDENTITY_FILE=str(key), MIGRATOR_BACKUP_VERIFY="restore"
    )
    assert prove(bench).proofs[-1].how == "read"
    assert prove(bench, "restore").proofs[-1].how == "restore"
    again = bench.back_up()
    assert [proof.how for proof in again.proofs] == ["read", "restore"]
    key.write_text(str(pyrage.x25519.Identity.generate()))
    with pytest.raises(BackupFailed, match="other keys than those"):
        prove(bench, wanted=again.id)
    key.write_text(str(identity))
    flip(Path(backup.place), 0.9)
    with pytest.raises(BackupFailed, match="is damaged"):
        prove(bench, wanted=backup.id)


def test_the_command(database: Database, run_migrator: Runner, project: Callable[..., Path]) -> None:
    database.execute("CREATE TABLE t AS SELECT generate_series(1, 10) AS a")
    folder = project(revisions=linear_history(1))
    env = {"MIGRATOR_BACKUP_VERIFY": "restore"}
    made = run_migrator("backup", "--format", "json", cwd=folder, database=database, env=env)
    assert (made.code, made.answer["verified"]) == (0, "restore"), made
    done = run_migrator("verify-backup", "latest", "--how", "read", cwd=folder, database=database)
    assert done.code == 0, done
    assert f"{made.answer['id']} is verified: " in done.stdout
    assert "read whole" in done.stdout
    listed = run_migrator("backups", cwd=folder, database=database)
    assert "VERIFIED" in listed.stdout
    assert "restore 20" in listed.stdout
    answer = run_migrator("backups", "show", made.answer["id"], "--format", "json", cwd=folder).answer
    assert answer["tables"]["public.t"]["rows"] == 10
    assert len(answer["by_hand"]) == 2
    flip(
        Path(made.answer["place"])
        if Path(made.answer["place"]).is_file()
        else next(Path(made.answer["place"]).iterdir())
    )
    bad = run_migrator("verify-backup", made.answer["id"], cwd=folder)
    assert bad.code == 36, bad
    assert "is not a backup any more" in bad.stderr
    none = run_migrator("verify-backup", "latest", cwd=folder, database=database)
    assert none.code == 36, none


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_the_commands_by_hand_are_right(
    database: Database, run_migrator: Runner, project: Callable[..., Path], shape: str
) -> None:
    """They are run as they are shown, by a shell that knows libpq's variables and the client's folder."""
    database.execute(RICH + LARGE)
    before = database.dump()
    folder, server = project(revisions=linear_history(1)), database.server
    env = {"MIGRATOR_BACKUP_FORMAT": shape}
    assert run_migrator("backup", cwd=folder, database=database, env=env).code == 0
    shown = run_migrator("backups", "show", "latest", cwd=folder, database=database)
    assert shown.code == 0, shown
    assert re.search(r"^public\.everything +501 +\d+", shown.stdout, re.MULTILINE)
    commands = shown.stdout.partition("without migrator, into a new database:\n")[2]
    name = f"{database.name}_by_hand"
    try:
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", commands],
            env={"PATH": f"{server.bin}:/usr/bin:/bin", **server.environment()},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "transaction" not in done.stderr, "it was not one"
        assert server.dump(name) == before
    finally:
        server.drop_database(name)


ELSEWHERE: list[tuple[dict[str, Any], str, str]] = [
    ({"place": "s3://bucket/pre fix/a.dump"}, "aws s3 cp 's3://bucket/pre fix/a.dump' - | ", ""),
    (
        {"place": "s3://b/a.dump.age", "encrypted_to": ("age1x",)},
        "aws s3 cp s3://b/a.dump.age - | age -d -i KEY_FILE | ",
        "",
    ),
    ({"place": "/b/a.dump.age", "encrypted_to": ("age1x",)}, "age -d -i KEY_FILE /b/a.dump.age | ", ""),
    ({"place": "/b/a.dir", "database": "a=b'"}, "", " /b/a.dir"),
]
PLAIN = dataclasses.replace(BACKUP, client_version="16.2")
NEWER = {"client_version": "17.5", "server_version": "15.1"}


@pytest.mark.parametrize(("change", "feeds", "place"), ELSEWHERE)
def test_by_hand_from_elsewhere(change: dict[str, Any], feeds: str, place: str) -> None:
    backup = dataclasses.replace(PLAIN, **{"database": "shop", **change})
    create, restore = description.by_hand(backup)
    made = "--template=template0 --owner=o --encoding=UTF8 --lc-collate=C --lc-ctype=C --locale-provider=libc"
    assert create.startswith(f"createdb {made} -- ")
    name = "shop_by_hand" if "database" not in change else "dbname='a=b\\'_by_hand'"
    options = "--exit-on-error --single-transaction"
    assert restore == f"{feeds}pg_restore {options} {shlex.quote(f'--dbname={name}')}{place}"
    for longer in (NEWER, {"oddities": ("pg_attver",)}):
        long = description.by_hand(dataclasses.replace(backup, **longer))[-1]
        assert long.startswith(
            f"{{ echo 'BEGIN;' && {feeds}pg_restore --file=-{place} && echo 'COMMIT WORK;' || "
        )
        assert shlex.split(long)[-1] == f"--dbname={name}"


def test_why_the_longer_command_is_needed() -> None:
    """Only where it is, it is shown, with the reason."""
    assert "sed removes" not in formatters.of_backup(PLAIN).text
    assert (
        "PostgreSQL 15 does not know; sed" in formatters.of_backup(dataclasses.replace(PLAIN, **NEWER)).text
    )


def test_proven_by_restoring_from_a_bucket(database: Database, workbench: Bench, bucket: Bucket) -> None:
    database.execute(RICH)
    backup = workbench(database, **bucket.variables(), MIGRATOR_BACKUP_VERIFY="restore").back_up()
    assert [found.how for found in backup.proofs] == ["read", "restore"]
    assert not list(Path(tempfile.gettempdir()).glob(f"*{backup.id}*"))
