"""What servers do wrong: what passes is tried again, what does not is named, and nothing looks whole and is not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.backups.storage import s3_client
from migrator.backups.storage.interface import checksum, new_id
from migrator.backups.storage.s3 import S3Store
from migrator.backups.storage.s3_client import S3Failure
from migrator.errors import BackupFailed
from migrator.runtime.logs import redact
from tests.support.buckets import SECRET, Bucket, Fault, FaultyProxy

from .test_s3 import MEGABYTE, add, open_it

LATE = 6.0  # seconds
CONTENT = os.urandom(17 * MEGABYTE)  # two parts


@pytest.fixture
def proxy(moto: str) -> Iterator[FaultyProxy]:
    made = FaultyProxy(moto)
    yield made
    made.close()


@pytest.fixture
def store(
    bucket: Bucket,
    proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> S3Store:
    """A store that is reached through the proxy, and that makes fewer attempts; and waits less for the late answer."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and getattr(callspec.params.get("fault"), "delay", 0) == LATE:
        monkeypatch.setattr(s3_client, "READ_TIMEOUT", LATE / 2)
    monkeypatch.setattr(s3_client, "ATTEMPTS", 3)
    return open_it(bucket, tmp_path, proxy.address)


def said(store: S3Store, failure: OSError) -> str:
    """Return what a person reads: the message and the next step."""
    error = store.cannot_write(failure)
    return f"{error.message} Next: {error.next_step}"


PASSES = [
    Fault("part", 503, "SlowDown", times=2),
    Fault("part", 500, "InternalError", times=1),
    Fault("part", cut="before", times=2),
    Fault("part", 400, "RequestTimeout", times=1),
    Fault("create", 503, "ServiceUnavailable", times=1),
    Fault("complete", 200, "InternalError", times=2),
    Fault("complete", cut="before", times=1),
    Fault("complete", ask=True, cut="before", times=1),
    Fault("complete", ask=True, status=200, code="InternalError", times=1, cut="before"),
    Fault("get", cut="half", times=1, ending=".dump"),
    Fault("get", 503, "SlowDown", times=1, ending=".dump"),
    Fault("put", cut="before", times=1, ending=".json"),
    Fault("put", ask=True, cut="before", times=1, ending=".json"),
    Fault("any", delay=0.3, times=5),
    Fault("part", delay=LATE, times=1),
]


@pytest.mark.parametrize(
    "fault", PASSES, ids=lambda fault: f"{fault.kind}-{fault.code}{fault.cut}{fault.delay}"
)
def test_what_passes_is_tried_again(fault: Fault, store: S3Store, proxy: FaultyProxy, bucket: Bucket) -> None:
    proxy.faults = [fault]
    backup = add(store, CONTENT)
    assert fault.times == 0, "the fault did not happen"
    assert bucket.content(f"pre/fix/{backup.id}.dump") == CONTENT
    assert bucket.uploads() == []
    assert store.backups() == [backup]


LASTS = [
    (Fault("part", 503, "SlowDown"), "kept answering SlowDown", "run again"),
    (Fault("part", cut="before"), "connection broke", "MIGRATOR_S3_ENDPOINT"),
    (Fault("complete", 200, "InternalError"), "kept answering InternalError", "run again"),
    (Fault("complete", cut="before", ask=False), "connection broke", "run again"),
    (Fault("create", 403, "AccessDenied"), "access is denied", "s3:PutObject"),
    (Fault("part", 403, "AccessDenied"), "access is denied", "s3:PutObject"),
    (Fault("get", 403, "AccessDenied"), "access is denied", "s3:GetObject"),
    (Fault("part", 400, "ExpiredToken"), "temporary key has expired", "AWS_SESSION_TOKEN"),
    (Fault("part", 403, "RequestTimeTooSkewed"), "clocks differ", "clock"),
    (Fault("create", 403, "InvalidAccessKeyId"), "does not accept the key", "AWS_ACCESS_KEY_ID"),
    (Fault("create", 403, "SignatureDoesNotMatch"), "does not accept the key", "AWS_SECRET_ACCESS_KEY"),
    (
        Fault("any", 301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-north-1"}),
        "is in region eu-north-1",
        "set MIGRATOR_S3_REGION=eu-north-1",
    ),
    (Fault("part", 507, "XMinioStorageFull"), "the server is full", "free space there"),
    (Fault("create", 501, "NotImplemented"), "does not support a request", "multipart"),
    (Fault("get", cut="half", ending=".dump"), "connection broke", "run again"),
    (Fault("put", 503, "SlowDown", ending=".json"), "kept answering SlowDown", "run again"),
    (Fault("put", cut="before", ask=True, ending=".json"), "connection broke", "run again"),
]


@pytest.mark.parametrize(
    ("fault", "words", "step"),
    LASTS,
    ids=lambda item: f"{item.kind}-{item.code}{item.cut}" if isinstance(item, Fault) else "",
)
def test_what_lasts_is_named_and_leaves_nothing(
    fault: Fault, words: str, step: str, store: S3Store, proxy: FaultyProxy, bucket: Bucket, tmp_path: Path
) -> None:
    proxy.faults = [fault]
    with pytest.raises(S3Failure) as caught:
        add(store, CONTENT)
    message = said(store, caught.value)
    assert words in message
    assert step in message.partition("Next:")[2]
    assert str(store) in message
    assert SECRET not in message
    proxy.faults = []
    assert store.backups() == []
    assert (bucket.names(), bucket.uploads()) == ([], [])


def test_a_region_that_the_server_tells_is_gone_to(store: S3Store, proxy: FaultyProxy) -> None:
    """AWS redirects a request that was signed for another region; boto3 follows where it can."""
    elsewhere = Fault(
        "any",
        400,
        "AuthorizationHeaderMalformed",
        region="eu-north-1",
        when=lambda asked: "eu-north-1" not in asked.headers.get("authorization", ""),
    )
    proxy.faults = [elsewhere]
    backup = add(store)
    assert store.backups() == [backup]


def test_a_server_that_does_not_know_newer_checksums(
    store: S3Store, proxy: FaultyProxy, bucket: Bucket
) -> None:
    """Such a server answers 501 to every header and trailer of a checksum that it does not know."""

    def newer(asked: object) -> bool:
        headers = getattr(asked, "headers", {})
        known = {"x-amz-content-sha256", "content-md5"}
        names = {name for name in headers if "checksum" in name or "trailer" in name} - known
        return bool(names) or "aws-chunked" in headers.get("content-encoding", "")

    proxy.faults = [Fault("any", 501, "NotImplemented", when=newer)]
    backup = add(store, CONTENT)
    store.mark_bad(backup, "to copy it, too")
    assert bucket.content(f"pre/fix/{backup.id}.dump.bad") == CONTENT
    assert any(asked.is_a("part") for asked in proxy.asked)


def test_before_anything_starts(store: S3Store, proxy: FaultyProxy, bucket: Bucket, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for address, variables, words, step in (
        (nobody, {}, "cannot be reached", "MIGRATOR_S3_ENDPOINT"),
        ("", {"MIGRATOR_BACKUP_URL": "s3://not-there/x"}, "there is no bucket not-there", "create it"),
    ):
        with pytest.raises(BackupFailed, match=words) as caught:
            open_it(bucket, tmp_path, address, **variables).prepare()
        assert step in caught.value.next_step
    proxy.faults = [Fault("create", 403, "AccessDenied")]
    with pytest.raises(BackupFailed, match="access is denied") as caught:
        store.prepare()
    assert "grant the key s3:PutObject" in caught.value.next_step
    proxy.faults = [Fault("list", 403, "AccessDenied")]
    with pytest.raises(BackupFailed, match="cannot be read: access is denied") as refused:
        store.backups()
    assert "s3:ListBucket" in refused.value.next_step


def test_without_any_key(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    store = open_it(bucket, tmp_path, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    with pytest.raises(BackupFailed, match="there is no access key") as caught:
        store.prepare()
    assert "AWS_ACCESS_KEY_ID" in caught.value.next_step


def test_what_may_not_be_cleaned_up_is_warned_of_and_no_failure(
    store: S3Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = [
        Fault(
            "any", 403, "AccessDenied", when=lambda asked: "uploads" in asked.query and asked.method == "GET"
        )
    ]
    store.remove_stale("shop")
    assert "cannot be removed: access is denied" in caplog.text


def test_a_server_that_goes_away_for_good(
    store: S3Store, proxy: FaultyProxy, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be cleaned up then: it is said, and what is left is no backup."""

    def fail() -> None:
        with store.new_dump(new_id("shop")) as part:
            part.write(CONTENT)
            proxy.faults = [Fault("any", cut="before")]
            part.sync()

    with pytest.raises(S3Failure):
        fail()
    assert "could not be removed" in caplog.text
    assert "it is not a backup" in caplog.text
    proxy.faults = []
    assert store.backups() == []
    assert bucket.names() == []
    assert len(bucket.uploads()) == 1


def test_bytes_that_change_on_their_way_are_found_out(store: S3Store, bucket: Bucket) -> None:
    with store.new_dump(new_id("shop")) as part:
        part.write(CONTENT)
        part.sync()
        changed = bytearray(CONTENT)
        changed[len(changed) // 2] ^= 1
        bucket.put(f"pre/fix/{part.id}.dump", bytes(changed))
        assert checksum(part.chunks()) != part.stored
    assert bucket.names() == []


def test_the_platforms_keys_are_secrets_too(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that boto3 finds by itself are masked from the first request on."""
    file = tmp_path / "credentials"
    secret = "Zq7/platform+secret/of+the+machine/0123456789"
    file.write_text(f"[default]\naws_access_key_id = AKIA\naws_secret_access_key = {secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = open_it(bucket, tmp_path, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert secret in redact(f"before: {secret}")
    store.prepare()
    assert secret not in redact(f"after: {secret}")
