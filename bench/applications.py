"""Time migrator and plain Alembic on real applications, which ``env.py`` imports.

    bin/setup && .venv/bin/python -m bench.applications [--runs 10] [--only optuna] [--work applied]

There are two kinds of work: an up-to-date check, and all revisions from an empty database without a backup.

The histories are copies from the installed packages, and are frozen.  Writes ``bench/results/applications.md``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.histories.projects import HISTORIES, Installation
from tests.support.installations import embedded
from tests.support.servers import Database, Server, running

from bench import measure
from bench.measure import HEADER, Limit, Prepare, Program, variables


def copied(installation: Installation, folder: Path, database: Database) -> Mapping[str, str]:
    """Copy the application's history, with an ini for the database; return the variables of its command."""
    (folder / "home").mkdir(parents=True, exist_ok=True)
    ini = installation._plain_ini(database, folder)
    location = installation._script_location()
    shutil.copytree(location, folder / "history", dirs_exist_ok=True)
    ini.write_text(
        ini.read_text().replace(f"script_location = {location}", "script_location = %(here)s/history")
    )
    return {**installation.variables(database, folder), **variables(database)}


def programs(installation: Installation, folder: Path, prepare: Prepare) -> tuple[Program, Program]:
    """Return migrator's command and plain Alembic's."""
    return (
        Program([str(installation.bin / "migrator")], folder, prepare),
        Program([str(installation.bin / "alembic"), "upgrade", "head"], folder, prepare),
    )


def nothing_to_do(installation: Installation, folder: Path, server: Server, runs: int) -> list[str]:
    """Bring a database to the application's head, freeze the history, and compare."""
    environment = copied(installation, folder, server.create_database())
    migrator, alembic = programs(installation, folder, lambda: environment)
    migrator.run()
    Program([*migrator.command, "freeze"], folder, lambda: environment).run()
    name = f"nothing to do, {installation.history.name}, {installation.history.revisions} revisions"
    return measure.compare(name, runs, migrator, {"alembic": (alembic, Limit(0.03))})


def applied(installation: Installation, folder: Path, server: Server, runs: int) -> list[str]:
    """Apply the whole history to an empty database, and compare."""
    made: list[Database] = []

    def prepare() -> Mapping[str, str]:
        if made:
            server.drop_database(made.pop().name)
        made.append(server.create_database())
        return copied(installation, folder, made[0])

    prepare()
    migrator, alembic = programs(installation, folder, prepare)
    name = f"applied from empty, {installation.history.name}, {installation.history.revisions} revisions"
    return measure.compare(name, runs, migrator, {"alembic": (alembic, Limit(1.10))})


WORK = {"nothing": nothing_to_do, "applied": applied}


def main() -> None:
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", default="", help="part of an application's name")
    parser.add_argument("--work", choices=list(WORK), help="only this [both]")
    arguments = parser.parse_args()
    print("\n".join(HEADER))
    measure.compile_sources()
    rows = []
    with tempfile.TemporaryDirectory() as place, running(embedded()) as server:
        for history in HISTORIES:
            if arguments.only in history.name:
                for name, work in WORK.items():
                    if arguments.work in (None, name):
                        folder = Path(place) / name / history.name
                        rows += work(history.install(), folder, server, arguments.runs)
    measure.write(
        "applications",
        arguments.runs,
        rows,
        "For nothing to do, the history is frozen with `migrator freeze`; to apply, it is not. No backup.",
    )


if __name__ == "__main__":
    main()
