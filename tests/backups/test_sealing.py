"""Dumps encrypted on their way: only the private key opens them, damage is found, and memory stays small."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyrage
import pytest

from migrator.backups.manifest import Backup
from migrator.backups.storage import encryption
from migrator.backups.storage.encryption import CannotOpen, opened, seal_all
from migrator.backups.storage.interface import checksum, new_id
from migrator.backups.storage.local import FolderStore
from migrator.backups.storage.open import open_store
from migrator.backups.storage.parts import FilePart
from migrator.config.settings import load
from migrator.errors import SettingsError
from tests.support.buckets import Bucket
from tests.support.sink import sink

from .test_manifest import BACKUP
from .test_s3 import MEGABYTE, uploaded

CONTENT = os.urandom(3 * MEGABYTE + 17)


@dataclasses.dataclass(frozen=True)
class Key:
    public: str
    file: Path


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return make_key(tmp_path, "key")


def make_key(folder: Path, name: str) -> Key:
    """Write a file as age-keygen does."""
    identity = pyrage.x25519.Identity.generate()
    file = folder / name
    file.write_text(f"# created: 2026-01-01\n# public key: {identity.to_public()}\n{identity}\n")
    return Key(str(identity.to_public()), file)


def sealed_store(place: str, folder: Path, *recipients: str, **variables: str) -> FolderStore:
    environment = {
        "MIGRATOR_BACKUP_URL": place,
        "MIGRATOR_BACKUP_RECIPIENTS": ",\n".join(recipients),
        **variables,
    }
    settings = load({}, environment, folder, needs_target=False)
    return open_store(settings.backup_url, settings)  # type: ignore[return-value]


@pytest.fixture
def store(tmp_path: Path, key: Key) -> FolderStore:
    made = sealed_store((tmp_path / "backups").as_uri(), tmp_path, key.public)
    made.prepare()
    return made


def add(store: FolderStore, content: bytes = CONTENT) -> Backup:
    backup_id = new_id("shop")
    with store.new_dump(backup_id) as part:
        for start in range(0, len(content), 300_001):
            part.write(content[start : start + 300_001])
        part.sync()
        assert checksum(part.chunks()) == part.stored
        facts = {"id": part.id, "database": "shop", "sha256": part.sha256, "size_bytes": part.size}
        facts |= {"stored_sha256": part.stored[0], "stored_bytes": part.stored[1]}
        facts |= {"encrypted_to": part.encrypted_to}
        return store.add(part, dataclasses.replace(BACKUP, **facts), {".globals.sql": b"CREATE ROLE x"})  # type: ignore[arg-type]


def test_what_is_stored_opens_with_the_private_key_only(store: FolderStore, key: Key, tmp_path: Path) -> None:
    backup = add(store)
    assert sorted(os.listdir(store.folder)) == sorted(
        f"{backup.id}.{ending}" for ending in ("dump.age", "json", "globals.sql.age")
    )
    stored = Path(backup.place).read_bytes()
    assert stored.startswith(b"age-encryption.org/v1\n")
    assert (backup.size_bytes, checksum([stored])) == (len(CONTENT), backup.stored)
    assert backup.encrypted_to == (key.public,)
    assert store.backups() == [backup]
    assert b"".join(opened(store.chunks(backup), key.file)) == CONTENT
    assert (
        b"".join(opened([(store.folder / f"{backup.id}.globals.sql.age").read_bytes()], key.file))
        == b"CREATE ROLE x"
    )
    assert CONTENT[1000:1100] not in stored
    with pytest.raises(CannotOpen, match="other keys"):
        list(opened(store.chunks(backup), make_key(tmp_path, "other").file))
    store.remove(backup)
    assert os.listdir(store.folder) == []


def test_each_of_several_keys_opens_it(tmp_path: Path, key: Key) -> None:
    other = make_key(tmp_path, "other")
    store = sealed_store((tmp_path / "b").as_uri(), tmp_path, key.public, other.public)
    store.prepare()
    backup = add(store, b"")
    for one in (key, other):
        assert b"".join(opened(store.chunks(backup), one.file)) == b""


def test_ssh_keys(tmp_path: Path) -> None:
    """Made by OpenSSH itself would need its programs: this one is a key of its documentation's kind."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    private = Ed25519PrivateKey.generate()
    file = tmp_path / "id_ed25519"
    file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    store = sealed_store((tmp_path / "b").as_uri(), tmp_path, f"{public} someone@somewhere with words")
    store.prepare()
    backup = add(store)
    assert backup.encrypted_to == (public,)
    assert b"".join(opened(store.chunks(backup), file)) == CONTENT


@pytest.mark.parametrize("place", [0, 150, 70_000, -1])
def test_a_flipped_bit_is_found(store: FolderStore, key: Key, place: int) -> None:
    backup = add(store)
    stored = bytearray(Path(backup.place).read_bytes())
    stored[place] ^= 1
    with pytest.raises(CannotOpen):
        list(opened([bytes(stored)], key.file))


@pytest.mark.parametrize("left", [0, 10, 250, 65_536 * 4, -1, -16])
def test_a_cut_off_stream_is_found(store: FolderStore, key: Key, left: int) -> None:
    backup = add(store)
    stored = Path(backup.place).read_bytes()
    with pytest.raises(CannotOpen, match="damaged or cut off"):
        list(opened([stored[:left]], key.file))


def test_a_failure_while_reading_is_told_as_it_is(store: FolderStore, key: Key) -> None:
    backup = add(store)

    def broken() -> Iterator[bytes]:
        yield Path(backup.place).read_bytes()[:100_000]
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        list(opened(broken(), key.file))


def test_who_stops_reading_leaves_no_thread(store: FolderStore, key: Key) -> None:
    backup = add(store, CONTENT * 5)
    reading = opened(store.chunks(backup), key.file)
    next(reading)
    reading.close()
    for thread in threading.enumerate():
        if thread.name == "decryption":
            thread.join(10)
            assert not thread.is_alive()


def test_a_failure_leaves_nothing(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with store.new_dump(new_id("shop")) as part:
            part.write(CONTENT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert os.listdir(store.folder) == []

    def full(part: FilePart, chunk: bytes) -> None:
        raise OSError(28, "No space left on device", str(part.path))

    monkeypatch.setattr(FilePart, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        add(store, CONTENT * 10)
    assert caught.value.errno == 28
    assert os.listdir(store.folder) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "encryption"]


def test_an_encrypted_dump_that_is_bad(store: FolderStore) -> None:
    with store.new_dump(new_id("shop")) as part:
        part.write(b"rotten")
        part.sync()
        store.mark_bad(part, "it does not parse", "shop")
    assert sorted(os.listdir(store.folder)) == [f"{part.id}.bad.json", f"{part.id}.dump.age.bad"]
    backup = add(store)
    store.mark_bad(backup, "a bit flipped")
    assert store.backups() == []
    assert {bad.why for bad in store.bad("shop")} == {"it does not parse", "a bit flipped"}
    for bad in store.bad():
        store.remove(bad)
    assert os.listdir(store.folder) == []


def test_in_a_bucket(bucket: Bucket, tmp_path: Path, key: Key) -> None:
    variables = bucket.variables()
    store = sealed_store(variables.pop("MIGRATOR_BACKUP_URL"), tmp_path, key.public, **variables)
    backup = add(store)
    assert bucket.names() == [
        f"pre/fix/{backup.id}.{name}" for name in ("dump.age", "globals.sql.age", "json")
    ]
    assert store.backups() == [backup]
    assert b"".join(opened(store.chunks(backup), key.file)) == CONTENT


def test_memory_stays_small(key: Key, tmp_path: Path) -> None:
    with sink(anything=True) as server:
        facts = uploaded(400, {**server.variables(), "MIGRATOR_BACKUP_RECIPIENTS": key.public})
        assert server.size(facts["dump"]) > 400 * MEGABYTE
    assert facts["dump"].endswith(".dump.age")
    assert 20 * 10**6 <= facts["memory"] <= 200 * 10**6, facts


def test_wrong_keys_are_settings_errors(tmp_path: Path, key: Key) -> None:
    secret = key.file.read_text().splitlines()[-1]
    for text, words in (
        (secret, "a private key"),
        ("age1short", "is not a public key"),
        ("ssh-dss AAAA", "is not a public key"),
    ):
        with pytest.raises(SettingsError, match=words) as caught:
            sealed_store("/b", tmp_path, text)
        assert secret not in str(caught.value)
    store = sealed_store((tmp_path / "b").as_uri(), tmp_path, "age1" + "q" * 58)
    store.prepare()
    with pytest.raises(SettingsError, match="is not a public key"):
        store.new_dump(new_id("shop"))
    assert os.listdir(store.folder) == []
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "torn").write_text(secret[:-4])
    for name, words in (
        ("none", "cannot read"),
        ("empty", "no usable private key"),
        ("torn", "no usable private key"),
    ):
        with pytest.raises(SettingsError, match=words) as caught:
            list(opened([b"x"], tmp_path / name))
        assert secret[:-4] not in str(caught.value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, key: Key) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(SettingsError, match="pyrage, which is not installed") as caught:
        seal_all({".globals.sql": b"x"}, (key.public,))
    assert "migrator[encryption]" in caught.value.next_step
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.setitem(sys.modules, "boto3.exceptions", None)
    monkeypatch.setenv("MIGRATOR_IMAGE_VERSION", "1.4.2")
    with pytest.raises(SettingsError, match="boto3, which is not installed") as caught:
        open_store("s3://bucket").backups()
    assert "migrator[s3]" in caught.value.next_step
    assert "migrator:1.4.2," in caught.value.next_step
    assert encryption.seal_all({".x": b"y"}, ()) == {".x": b"y"}
