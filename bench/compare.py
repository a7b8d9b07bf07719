"""Time migrator against plain Alembic and native tools, on a history of 500 revisions with a bare ``env.py``.

    bin/setup && .venv/bin/python -m bench.compare [--runs 10] [--revisions 500] [--without-peers]

The server is the embedded one, with fsync off, so that the disk does not count.  dbmate is the binary inside
npm's package, without its wrapper, which starts node first.  Go builds goose, tern and golang-migrate, if Go is
installed.  The tools are in ``.cache/``.  Writes ``bench/results/compare.md``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.installations import embedded
from tests.support.projects import linear_history, write_project
from tests.support.servers import Database, Server, running

from bench import measure
from bench.measure import HEADER, Limit, Prepare, Program, variables

DBMATE = "dbmate@2.36.0"
GO = {
    "goose": (
        "github.com/pressly/goose/v3/cmd/goose@v3.30.1",
        "no_clickhouse no_libsql no_mssql no_mysql no_sqlite3 no_vertica no_ydb",
    ),
    "tern": ("github.com/jackc/tern/v2@v2.3.4", ""),
    "golang-migrate": ("github.com/golang-migrate/migrate/v4/cmd/migrate@v4.20.1", "postgres"),
}
"""Each module, and its tags for Postgres alone."""
BIN = Path(sys.executable).parent


def fresh(server: Server) -> Prepare:
    """Return a function that makes an empty database for each run, and drops the previous one."""
    made: list[Database] = []

    def prepare() -> Mapping[str, str]:
        if made:
            server.drop_database(made.pop().name)
        made.append(server.create_database())
        return variables(made[0])

    return prepare


UP = "CREATE TABLE t{k} (id int PRIMARY KEY, note text);"
DOWN = "DROP TABLE t{k};"


@dataclass(frozen=True)
class Peer:
    """A native tool: how its files are named and written, and its command for a folder and an address."""

    files: Mapping[str, str]
    command: Callable[[str, str], Sequence[str]]


PEERS = {
    "dbmate": Peer(
        {"2024{k:010d}_t{k}.sql": f"-- migrate:up\n{UP}\n\n-- migrate:down\n{DOWN}\n"},
        lambda folder, url: ["--url", url, "--migrations-dir", folder, "--no-dump-schema", "up"],
    ),
    "goose": Peer(
        {"{k:05d}_t{k}.sql": f"-- +goose Up\n{UP}\n-- +goose Down\n{DOWN}\n"},
        lambda folder, url: ["-dir", folder, "postgres", url, "up"],
    ),
    "tern": Peer(
        {"{k:03d}_t{k}.sql": f"{UP}\n---- create above / drop below ----\n{DOWN}\n"},
        lambda folder, url: ["migrate", "--migrations", folder, "--conn-string", url],
    ),
    "golang-migrate": Peer(
        {"{k:06d}_t{k}.up.sql": f"{UP}\n", "{k:06d}_t{k}.down.sql": f"{DOWN}\n"},
        lambda folder, url: ["-path", folder, "-database", url, "up"],
    ),
}


def native(home: Path) -> dict[str, str]:
    """Install the native tools; return the program of each."""
    home.mkdir(parents=True, exist_ok=True)
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), DBMATE]
    subprocess.run(npm, check=True)
    (binary,) = home.glob("node_modules/@dbmate/*/bin/dbmate")
    found = {"dbmate": str(binary)}
    if shutil.which("go") is None:
        print("no Go here: goose, tern and golang-migrate are left out", file=sys.stderr)
        return found
    for name, (module, tags) in GO.items():
        place = home / name
        environment = {**os.environ, "GOBIN": str(place)}
        subprocess.run(["go", "install", "-tags", tags, module], check=True, env=environment)
        (binary,) = place.iterdir()
        found[name] = str(binary)
    return found


def peer(name: str, program: str, folder: Path, server: Server, count: int) -> Program:
    """Give a tool as many migrations, and apply them to a database of its own."""
    folder.mkdir(parents=True)
    for k in range(1, count + 1):
        for file, text in PEERS[name].files.items():
            (folder / file.format(k=k)).write_text(text.format(k=k))
    url = server.create_database().url + "?sslmode=disable"
    applied = Program([program, *PEERS[name].command(str(folder), url)], folder, dict)
    applied.run()
    return applied


def main() -> None:
    """Run every comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--revisions", type=int, default=500)
    parser.add_argument("--without-peers", action="store_true", help="plain Alembic alone")
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
        others = {"alembic": (Program(alembic, folder, lambda: variables(done)), Limit(0.125, 0.5))}
        tools = {} if arguments.without_peers else native(measure.ROOT / ".cache" / "bench")
        for name, program in tools.items():
            limit = Limit(2.2) if name == "dbmate" else Limit()
            others[name] = (peer(name, program, Path(place) / name, server, count), limit)
        ours = Program(migrator, folder, lambda: variables(done))
        rows = measure.compare(f"nothing to do, {count} revisions", arguments.runs, ours, others)
        ours = Program(migrator, folder, fresh(server))
        plain = {"alembic": (Program(alembic, folder, fresh(server)), Limit(1.35))}
        applied = arguments.apply_runs or arguments.runs
        work = f"{count} revisions applied, backup off"
        work += f" ({applied} runs)" if applied != arguments.runs else ""
        rows += measure.compare(work, applied, ours, plain)
    measure.write(
        "compare",
        arguments.runs,
        rows,
        "A history frozen with `migrator freeze`, a bare `env.py`; migrator keeps its ledger.",
    )


if __name__ == "__main__":
    main()
