"""Upload in a process of its own, with the real handling of signals, for tests that kill it or measure its memory.

python -m tests.backups.upload MEGABYTES [part|read], with the settings in the environment: waits at that moment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from migrator.backups.manifest import Backup
from migrator.backups.storage.interface import checksum, new_id
from migrator.backups.storage.open import open_store
from migrator.config.settings import load
from migrator.runtime.signals import Interrupt, Interruption
from tests.backups.test_manifest import BACKUP

BLOCK = bytes(range(256)) * 4096


def upload(megabytes: int, moment: str) -> Backup:
    settings = load({}, os.environ, Path("/nowhere"), needs_target=False)
    store = open_store(settings.backup_url, settings)
    store.prepare()
    with store.new_dump(new_id("shop"), megabytes * len(BLOCK)) as part:
        for number in range(megabytes):
            part.write(BLOCK)
            if moment == "part" and number == megabytes - 2:
                wait()
        part.sync()
        if moment == "read":
            wait()
        assert checksum(part.chunks()) == part.stored
        facts = {"id": part.id, "database": "shop", "sha256": part.sha256, "size_bytes": part.size}
        facts |= {"encrypted_to": part.encrypted_to}
        facts |= {"stored_sha256": part.stored[0], "stored_bytes": part.stored[1]}
        return store.add(part, dataclasses.replace(BACKUP, **facts))


def wait() -> NoReturn:
    print("here", flush=True)
    while True:
        time.sleep(0.1)


def main(megabytes: str, moment: str = "") -> int:
    Interruption().install()
    try:
        backup = upload(int(megabytes), moment)
    except Interrupt:
        return 23
    # Not getrusage's ru_maxrss, which remembers across exec() what the process was forked from.
    status = Path("/proc/self/status").read_text().split()
    memory = int(status[status.index("VmHWM:") + 1]) * 1024
    facts = {"bytes": backup.size_bytes, "stored_sha256": backup.stored[0], "memory": memory}
    print(json.dumps({**facts, "dump": backup.place.rpartition("/")[2]}), flush=True)
    return 0


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
