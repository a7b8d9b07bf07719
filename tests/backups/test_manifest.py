"""A manifest comes back as it went; what is not one, or is from a later version, says so."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from migrator.backups.manifest import (
    Backup,
    BadManifest,
    Properties,
    Table,
    from_json,
    human_size,
    summary,
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
    assert from_json(BACKUP.to_json(), place="/b/x.dump").place == "/b/x.dump"
    assert "place" not in json.loads(dataclasses.replace(BACKUP, place="/elsewhere").to_json())
    assert BACKUP.client_major == 17


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(BACKUP.to_json()), **changes})


def test_keys_of_a_later_version_are_ignored_and_a_later_format_is_refused() -> None:
    tables = {"public.t": {"rows": 1, "hash": "x"}}
    assert from_json(changed(colour="blue", tables=tables)).tables == {"public.t": Table(1)}
    with pytest.raises(BadManifest, match=r"format is 2 .* newer image"):
        from_json(changed(format=2))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"format": 1}', '{"a": 1}'),
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
