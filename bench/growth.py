"""Measure how the time of migrator and of the plain tools grows with the size of the work.

    bin/setup && .venv/bin/python -m bench.growth [--runs 5] [--curve backup] [--most 20000]

Each curve has sizes that double or more; the exponent between two sizes is log(ratio of times) / log(ratio of sizes):
1 is linear.  Beside each size is the ratio to the plain tool (Alembic, or pg_dump and reading the archive
back).  The server is the embedded one, with fsync off.  Writes ``bench/results/growth.md``.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.installations import embedded
from tests.support.projects import Revision, linear_history, write_project
from tests.support.servers import Database, Server, running

from bench import measure
from bench.compare import BIN, fresh
from bench.measure import RESULTS, Program, variables

Pair = tuple[Program, Program | None]
Curve = Callable[[Server, Path, int], Pair]
HEADER = "| work | size | migrator s | plain s | ratio | exponent | exponent, plain |\n|---|---|---|---|---|---|---|"


def _applied(server: Server, folder: Path, count: int) -> Pair:
    """Revisions that make a table and then touch it, from an empty database."""
    revisions = [
        Revision(
            item.id,
            item.down,
            f"op.execute({item.upgrade!r})\nop.create_index('t{k}_note', 't{k}', ['note'])",
            f"DROP TABLE t{k}",
        )
        for k, item in enumerate(linear_history(count), start=1)
    ]
    write_project(folder, revisions=revisions, env="own_variable")
    return (
        Program([str(BIN / "migrator")], folder, fresh(server)),
        Program([str(BIN / "alembic"), "upgrade", "head"], folder, fresh(server)),
    )


def _tables(server: Server, count: int, indexes: int) -> Database:
    """Return a database with that many small tables of three rows, each with a key and further indexes."""
    database = server.create_database()
    more = "".join(f" CREATE INDEX ON %1$I (note, id, ({n}));" for n in range(indexes))
    body = "CREATE TABLE %1$I (id int PRIMARY KEY, note text);"
    body += f" INSERT INTO %1$I SELECT g, g FROM generate_series(1, 3) g;{more}"  # noqa: S608 - a number
    for start in range(1, count + 1, 500):  # the locks of one transaction are limited
        database.execute(
            f"DO $$ BEGIN FOR k IN {start}..{min(start + 499, count)} LOOP"
            f" EXECUTE format('{body}', 'big' || k); END LOOP; END $$"
        )
    return database


def _altered(server: Server, folder: Path, count: int) -> Pair:
    """One pending revision with one ALTER, in a schema of that many tables."""
    database = _tables(server, count, 0)
    first, second = linear_history(2)
    alter = Revision(second.id, first.id, "ALTER TABLE big1 ADD IF NOT EXISTS more int", "SELECT 1")
    write_project(folder, revisions=[first, alter], env="own_variable")
    environment = variables(database)
    Program([str(BIN / "migrator"), "stamp", "r001"], folder, lambda: environment).run()
    Program([str(BIN / "migrator")], folder, lambda: environment).run()

    def back() -> Mapping[str, str]:
        database.execute("UPDATE alembic_version SET version_num = 'r001'; ALTER TABLE big1 DROP more")
        return environment

    return (
        Program([str(BIN / "migrator")], folder, back),
        Program([str(BIN / "alembic"), "upgrade", "head"], folder, back),
    )


def _backed_up(server: Server, folder: Path, count: int) -> Pair:
    """A backup of that many small tables with five indexes each, against pg_dump -Fc and reading the archive back."""
    database = _tables(server, count, 4)
    folder.mkdir(parents=True)
    backups = folder / "backups"
    backups.mkdir()
    write_project(folder / "project", revisions=linear_history(1), env="own_variable")
    Program([str(BIN / "migrator"), "freeze"], folder / "project", dict).run()
    environment = {
        **variables(database),
        "MIGRATOR_BACKUP_URL": f"file://{backups}",
        "MIGRATOR_BACKUP": "auto",
        "MIGRATOR_PG_BIN": str(server.bin),
        "PATH": f"{server.bin}:{os.environ['PATH']}",
    }
    plain = f"pg_dump -Fc -Z1 -f plain.dump '{database.url}' && pg_restore -f /dev/null plain.dump"
    return (
        Program([str(BIN / "migrator"), "backup"], folder / "project", lambda: environment),
        Program(["sh", "-c", plain], folder, lambda: environment),
    )


def _with_a_long_ledger(command: tuple[str, ...]) -> Curve:
    def curve(server: Server, folder: Path, count: int) -> Pair:
        """A command on a ledger with that many rows."""
        database = server.create_database()
        write_project(folder, revisions=linear_history(10), env="own_variable")
        environment = variables(database)
        Program([str(BIN / "migrator")], folder, lambda: environment).run()
        Program([str(BIN / "migrator"), "freeze"], folder, dict).run()
        names = [row[0] for row in database.psql(_COLUMNS)]
        made = ", ".join(_MADE.get(name, f"l.{name}") for name in names)
        database.execute(
            f"INSERT INTO migrator_ledger ({', '.join(names)}) SELECT {made} FROM migrator_ledger l,"  # noqa: S608 - names of columns
            f" generate_series(1, {max(0, count // 12)}) g; ANALYZE migrator_ledger"
        )

        def back() -> Mapping[str, str]:
            if command == ("upgrade",):
                database.execute("UPDATE alembic_version SET version_num = 'r009'; DROP TABLE t10")
            return environment

        return Program([str(BIN / "migrator"), *command], folder, back), None

    return curve


_COLUMNS = (
    "SELECT attname FROM pg_attribute WHERE attrelid = 'migrator_ledger'::regclass AND attnum > 0"
    " AND NOT attisdropped ORDER BY attnum"
)
_MADE = {"run_id": "l.run_id || g", "id": "l.id + g * 12", "at": "l.at + make_interval(secs => g)"}

CURVES: dict[str, tuple[str, Curve, tuple[int, ...]]] = {
    "apply": ("revisions applied, each with a table and an index", _applied, (50, 100, 200, 400)),
    "alter": ("tables beside the one that one revision alters", _altered, (100, 1000, 5000, 20000)),
    "backup": ("small tables with five indexes backed up", _backed_up, (100, 1000, 3000, 5000)),
    "nothing": ("rows in the ledger, nothing to do", _with_a_long_ledger(()), (100, 10000, 200000)),
    "upgrade": (
        "rows in the ledger, one revision applied",
        _with_a_long_ledger(("upgrade",)),
        (100, 10000, 200000),
    ),
    "status": ("rows in the ledger, status", _with_a_long_ledger(("status",)), (100, 10000, 200000)),
    "ledger": ("rows in the ledger, ledger", _with_a_long_ledger(("ledger",)), (100, 10000, 200000)),
    "verify": ("rows in the ledger, verify", _with_a_long_ledger(("verify",)), (100, 10000, 200000)),
}


def _times(pair: Pair, runs: int) -> list[float]:
    """Return the medians of interleaved runs, after one warm-up."""
    found: list[list[float]] = [[] for program in pair if program]
    for number in range(runs + 1):
        for program, times in zip([program for program in pair if program], found, strict=True):
            seconds = program.run().seconds
            if number:
                times.append(seconds)
    return [statistics.median(times) for times in found]


def _exponent(now: float, before: float, size: int, smaller: int) -> str:
    return f"{math.log(now / before) / math.log(size / smaller):.2f}"


def main() -> None:
    """Measure the curves and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--curve", choices=list(CURVES))
    parser.add_argument("--most", type=int, default=10**9, help="the largest size")
    arguments = parser.parse_args()
    measure.compile_sources()
    lines = [HEADER]
    print(HEADER)
    for name, (work, curve, sizes) in CURVES.items():
        if arguments.curve not in (None, name):
            continue
        before: list[float] = []
        smaller = 0
        for size in (size for size in sizes if size <= arguments.most):
            with tempfile.TemporaryDirectory() as place, running(embedded()) as server:
                now = _times(curve(server, Path(place) / "project", size), arguments.runs)
            cells = [work, str(size), f"{now[0]:.3f}", *(f"{plain:.3f}" for plain in now[1:])]
            cells += [f"{now[0] / now[1]:.2f}"] if now[1:] else ["", ""]
            pairs = list(zip(now, before, strict=False))
            cells += [_exponent(new, old, size, smaller) for new, old in pairs]
            lines.append(f"| {' | '.join([*cells, *[''] * (7 - len(cells))])} |")
            print(lines[-1], flush=True)
            before, smaller = now, size
    if arguments.curve is None and arguments.most == 10**9:
        title = f"Medians of {arguments.runs} interleaved runs, after one warm-up.\n\n"
        (RESULTS / "growth.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
