"""Time a run with nothing to do on real applications, whose ``env.py`` imports them: migrator against plain Alembic.

    bin/setup && .venv/bin/python -m bench.applications [--runs 10] [--only optuna]

Their histories are copied out of the installed packages and frozen.  Writes ``bench/results/applications.md``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.histories.projects import HISTORIES, Installation
from tests.support.installations import embedded
from tests.support.servers import Server, running

from bench import measure
from bench.measure import HEADER, Limit, Program, variables


def against_alembic(installation: Installation, folder: Path, server: Server, runs: int) -> list[str]:
    """Bring a database to the application's head, freeze a copy of its history, and compare."""
    database = server.create_database()
    (folder / "home").mkdir(parents=True)
    ini = installation._plain_ini(database, folder)
    location = installation._script_location()
    shutil.copytree(location, folder / "history")
    ini.write_text(
        ini.read_text().replace(f"script_location = {location}", "script_location = %(here)s/history")
    )
    environment = {**installation.variables(database, folder), **variables(database)}
    migrator = Program([str(installation.bin / "migrator")], folder, lambda: environment)
    alembic = Program([str(installation.bin / "alembic"), "upgrade", "head"], folder, lambda: environment)
    migrator.run()
    Program([*migrator.command, "freeze"], folder, lambda: environment).run()
    name = f"nothing to do, {installation.history.name}, {installation.history.revisions} revisions"
    return measure.compare(name, runs, migrator, {"alembic": (alembic, Limit(0.03))})


def main() -> None:
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    print("\n".join(HEADER))
    measure.compile_sources()
    rows = []
    with tempfile.TemporaryDirectory() as place, running(embedded()) as server:
        for history in HISTORIES:
            if arguments.only in history.name:
                folder = Path(place) / history.name
                rows += against_alembic(history.install(), folder, server, arguments.runs)
    measure.write("applications", arguments.runs, rows, "Histories frozen with `migrator freeze`.")


if __name__ == "__main__":
    main()
