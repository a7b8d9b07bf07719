"""A backup is proven by restoring it: what came back is compared with what was in the dump's own snapshot."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from migrator.backups.manifest import from_json
from tests.support.servers import Database

from .conftest import RICH, Workbench

Bench = Callable[..., Workbench]


@pytest.mark.parametrize("shape", ["custom", "directory"])
def test_restored_and_compared(each_database: Database, workbench: Bench, shape: str) -> None:
    each_database.execute(RICH)
    bench = workbench(each_database, MIGRATOR_BACKUP_VERIFY="restore", MIGRATOR_BACKUP_FORMAT=shape)
    backup = bench.back_up()
    assert backup.dump_format == shape
    assert backup.verified == "restore"
    assert [(proof.how, proof.ok, proof.why) for proof in backup.proofs] == [
        ("read", True, ""),
        ("restore", True, ""),
    ]
    assert backup.proofs[1].server_version == backup.server_version
    everything = backup.tables["public.everything"]
    assert (everything.rows, bool(everything.content_hash)) == (501, True)
    assert backup.sequences["public.counter"].before == (10, True)
    assert backup.large_objects.startswith("1 ")
    assert from_json((bench.folder / f"{backup.id}.json").read_text(), place=backup.place) == backup
    assert bench.databases() == {each_database.name}
    assert bench.sessions() == []
