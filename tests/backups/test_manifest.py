"""A manifest comes back as it went; what is not one, or is from a later version, says so."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from migrator.backups.manifest import (
    Backup,
    BadManifest,
    Proof,
    Properties,
    Sequence,
    Table,
    from_json,
    human_size,
    summary,
    verified_at,
)

BACKUP = Backup(
    id="shop-20260101T120000Z-abcdef",
    created_at="2026-01-01T12:00:00.000+00:00",
    database='sh"op ü',
    target="postgresql://u@h/shop",
    revisions=("a1", "b2"),
    sha256="0" * 64,
    size_bytes=12,
    database_size_bytes=120,
    server_version="16.2",
    client_version="17beta1",
    run_id="run",
    migrator_version="0.1.0",
    image_version="",
    seconds=1.5,
    verified="read",
    properties=Properties("o", "UTF8", "C", "C"),
    name="before",
    tables={"public.t": Table(12), "public.big": Table(None, 5000000)},
)


def test_round_trip() -> None:
    assert from_json(BACKUP.to_json()) == BACKUP
    assert from_json(dataclasses.replace(BACKUP, place="/b/x.dump").to_json()).place == ""
    assert "place" not in json.loads(dataclasses.replace(BACKUP, place="/elsewhere").to_json())
    assert BACKUP.client_major == 17


def test_what_proved_it_and_what_it_is_compared_with_come_back() -> None:
    good = Proof("restore", "2026-01-02T00:00:00+00:00", "run2", True, 2.5, "18.1", "")
    bad = Proof("read", "2026-01-03T00:00:00+00:00", "run3", False, why="flipped")
    backup = dataclasses.replace(
        BACKUP,
        sequences={"public.s": Sequence((1, False), (7, True))},
        tables={"public.t": Table(12, rows_hash="-77")},
        excluded_table_data=("public.log",),
        encrypted_to=("age1x",),
        stored_sha256="1" * 64,
        stored_bytes=13,
        next_xid=77,
        unseen_xid=79,
        running_xids=(77, 78),
    )
    proven = backup.proven(good).proven(bad)
    assert (proven.verified, verified_at(proven)) == ("restore", good.at)
    assert (backup.verified, verified_at(backup)) == ("read", BACKUP.created_at)
    assert backup.proven(dataclasses.replace(good, ok=False)).verified == "read"
    assert from_json(proven.to_json()) == proven
    unproven = backup.unproven(bad)
    assert (unproven.verified, verified_at(unproven), summary(unproven)["verified"]) == ("", "", "")
    assert from_json(unproven.to_json()) == unproven
    # An image that knows no such thing refuses it, and reads all others.
    assert (json.loads(unproven.to_json())["format"], json.loads(proven.to_json())["format"]) == (2, 1)
    assert unproven.proven(dataclasses.replace(good, how="checksum")).verified == ""
    assert unproven.proven(dataclasses.replace(good, how="read")).verified == "read"
    assert unproven.proven(good).proven(dataclasses.replace(good, how="read")).verified == "restore"
    assert (proven.stored, BACKUP.stored) == (("1" * 64, 13), ("0" * 64, 12))


def test_manifests_of_the_first_version_are_read() -> None:
    document = json.loads(BACKUP.to_json())
    first = {item.name for item in dataclasses.fields(Backup)} - {
        *(
            "sequences",
            "large_objects",
            "schema_sha256",
            "proofs",
            "encrypted_to",
            "stored_sha256",
            "stored_bytes",
        ),
        *(
            "compression",
            "jobs",
            "excluded_table_data",
            "not_dumped",
            "globals_note",
            "oddities",
            "next_xid",
            "unseen_xid",
        ),
        *("system_identifier", "timeline", "database_oid"),
    }
    old = {key: value for key, value in document.items() if key in first | {"format"}}
    old["tables"] = {"public.t": {"rows": 12, "estimated_rows": None}}
    assert from_json(json.dumps(old)) == dataclasses.replace(BACKUP, tables={"public.t": Table(12)})


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(BACKUP.to_json()), **changes})


def test_keys_of_a_later_version_are_ignored_and_a_later_format_is_refused() -> None:
    tables = {"public.t": {"rows": 1, "hash": "x"}}
    assert from_json(changed(colour="blue", tables=tables)).tables == {"public.t": Table(1)}
    with pytest.raises(BadManifest, match=r"format is 3, .* newer image"):
        from_json(changed(format=3))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"format": 1}', '{"a": 1}'),
        *(changed(proofs=[{}]), changed(sequences={"s": 1}), changed(proofs=7)),
        *(changed(tables=None), changed(properties={}), changed(sha256=None), changed(size_bytes="12")),
    ],
)
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(BadManifest):
        from_json(text)


def test_summary() -> None:
    row = summary(dataclasses.replace(BACKUP, place="/b/x.dump"))
    assert row["revision"] == "a1, b2"
    assert row["size"] == 12
    assert row["place"] == "/b/x.dump"
    assert row["verified"] == "read"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234, "1.2 kB"),
        (123456, "123 kB"),
        (1.2e9, "1.2 GB"),
        (4e15, "4000.0 TB"),
    ],
)
def test_human_size(size: float, text: str) -> None:
    assert human_size(size) == text
