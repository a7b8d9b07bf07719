"""Postgres' client programs that stop where a test wants them to: for what is to happen in the middle of their work.

held = Held(tmp_path / "bin", database.server.bin, "pg_restore", when="--dbname=")
run = start_migrator("restore", ..., env={"MIGRATOR_PG_BIN": str(held.folder)})
run.wait_for(held.reached)
...
held.go()
"""

from __future__ import annotations

from pathlib import Path

PROGRAMS = ("pg_dump", "pg_restore", "psql")


class Held:
    """A folder of the real programs, one of which, where an argument begins with `when`, waits for `go` first."""

    def __init__(self, folder: Path, real: Path, program: str, when: str) -> None:
        self.folder = folder
        folder.mkdir()
        for name in PROGRAMS:
            script = folder / name
            wait = ""
            if name == program:
                wait = (
                    f'case " $*" in *" {when}"*)\n    touch "{folder}/reached"\n'
                    f'    while [ ! -e "{folder}/go" ]; do sleep 0.05; done\nesac\n'
                )
            script.write_text(f'#!/bin/sh\n{wait}exec "{real}/{name}" "$@"\n')
            script.chmod(0o755)

    def reached(self) -> bool:
        """Whether the program has begun, and waits."""
        return (self.folder / "reached").exists()

    def go(self) -> None:
        """Let it work, now and whenever it is started again."""
        (self.folder / "go").touch()
