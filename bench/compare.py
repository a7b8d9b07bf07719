"""Time migrator against plain Alembic, and dbmate, on a history of 500 revisions with a bare ``env.py``.

    bin/setup && .venv/bin/python -m bench.compare [--runs 10] [--revisions 500] [--without-dbmate]

The server is the embedded one, with fsync off: what is compared is the clients, not the disk.  dbmate is npm's, put
into ``.cache/`` for this alone.  Writes ``bench/results/compare.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.installations import embedded
from tests.support.projects import linear_history, write_project
from tests.support.servers import Database, Server, running

from bench import measure
from bench.measure import HEADER, Limit, Prepare, Program, variables

DBMATE = "dbmate@2.36.0"
BIN = Path(sys.executable).parent


def fresh(server: Server) -> Prepare:
    """Return what makes an empty database for each run, and drops the one before."""
    made: list[Database] = []

    def prepare() -> Mapping[str, str]:
        if made:
            server.drop_database(made.pop().name)
        made.append(server.create_database())
        return variables(made[0])

    return prepare


def dbmate(folder: Path, server: Server, count: int) -> Program:
    """Install dbmate, give it as many migrations, and apply them to a database of its own."""
    home = measure.ROOT / ".cache" / "bench"
    home.mkdir(parents=True, exist_ok=True)
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), DBMATE]
    subprocess.run(npm, check=True)
    migrations = folder / "db" / "migrations"
    migrations.mkdir(parents=True)
    for number in range(1, count + 1):
        table = f"t{number}"
        text = f"-- migrate:up\nCREATE TABLE {table} (id int PRIMARY KEY, note text);\n\n"
        text += f"-- migrate:down\nDROP TABLE {table};\n"
        (migrations / f"2024{number:010d}_t{number}.sql").write_text(text)
    address = {"DATABASE_URL": server.create_database().url + "?sslmode=disable"}
    command = [str(home / "node_modules" / ".bin" / "dbmate"), "--no-dump-schema", "up"]
    program = Program(command, folder, lambda: address)
    program.run()
    return program


def main() -> None:
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--revisions", type=int, default=500)
    parser.add_argument("--without-dbmate", action="store_true")
    parser.add_argument(
        "--apply-runs", type=int, help="runs that apply all revisions, which take long [--runs]"
    )
    arguments = parser.parse_args()
    count = arguments.revisions
    print("\n".join(HEADER))
    measure.compile_sources()
    with tempfile.TemporaryDirectory() as place, running(embedded()) as server:
        folder = Path(place) / "project"
        write_project(folder, revisions=linear_history(count), env="own_variable")
        migrator, alembic = [str(BIN / "migrator")], [str(BIN / "alembic"), "upgrade", "head"]
        done = server.create_database()
        Program(migrator, folder, lambda: variables(done)).run()
        Program([*migrator, "freeze"], folder, dict).run()
        others = {"alembic": (Program(alembic, folder, lambda: variables(done)), Limit(0.12, 0.5))}
        if not arguments.without_dbmate:
            others["dbmate"] = (dbmate(Path(place) / "dbmate", server, count), Limit(2.5))
        ours = Program(migrator, folder, lambda: variables(done))
        rows = measure.compare(f"nothing to do, {count} revisions", arguments.runs, ours, others)
        ours = Program(migrator, folder, fresh(server))
        peer = {"alembic": (Program(alembic, folder, fresh(server)), Limit(1.10))}
        applied = arguments.apply_runs or arguments.runs
        work = f"{count} revisions applied, backup off"
        work += f" ({applied} runs)" if applied != arguments.runs else ""
        rows += measure.compare(work, applied, ours, peer)
    measure.write(
        "compare",
        arguments.runs,
        rows,
        "A history frozen with `migrator freeze`, a bare `env.py`; migrator keeps its ledger.",
    )


if __name__ == "__main__":
    main()
