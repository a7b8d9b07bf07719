"""Back up or restore in a process of its own, with the real handling of signals, for tests that kill it.

python -m tests.backups.worker back_up|restore FOLDER [BACKUP], with the settings in the environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from migrator.backups.restore.restore import restore
from migrator.config.settings import load
from migrator.pipeline.stages.backup import back_up
from migrator.postgres.session import connect
from migrator.runtime.signals import Interrupt, Interruption


def main(verb: str, folder: str, wanted: str = "latest") -> int:
    Interruption().install()
    settings = load({}, os.environ, Path(folder))
    target = settings.required_target
    run_id = f"worker{os.getpid()}"
    name = f"migrator/test-host {run_id}"
    try:
        print("ready", flush=True)
        if verb == "back_up":
            with connect(target, name, 60) as session:
                back_up(session, settings, run_id=run_id, revisions=(), application_name=name)
        else:
            restore(target, settings, wanted, to=None, run_id=run_id, application_name=name, replace=True)
    except Interrupt:
        return 23
    return 0


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # no moment in which Python has put the handlers away and a signal kills
