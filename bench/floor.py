"""Measure what one INSERT per revision costs plain Alembic: no ledger with a row per revision can cost less.

    bin/setup && .venv/bin/python -m bench.floor [--runs 9]

Two histories are applied: a table and an index per revision, and no statement at all.  Each is applied by plain
Alembic, by plain Alembic with a hook ``on_version_apply`` that inserts one row of a ledger's size into a table like the
ledger, and by migrator.  Prints medians and ratios, and writes ``bench/results/floor.md``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.installations import embedded
from tests.support.projects import Revision, linear_history, write_project
from tests.support.servers import Database, Server, running

from bench import measure
from bench.compare import BIN
from bench.measure import RESULTS, Program, variables

HOOK = """
def insert_a_row(ctx, step, heads, run_args, **_):
    cursor = ctx.connection.connection.cursor()
    cursor.execute(
        "INSERT INTO migrator_ledger SELECT * FROM json_populate_record(CAST(NULL AS migrator_ledger), %s)",
        [ROW.replace("NUMBER", str(int(step.up_revision_id[1:])))],
    )
    cursor.close()
"""
ROW = (
    '{"run_id": "20261130T185217Z-d8475a", "number": NUMBER, "at": "2026-11-30T18:52:17Z", "event": "applied",'
    ' "version_table": "alembic_version", "revision": "rNUMBER", "message": "a change", "file": "rNUMBER.py",'
    ' "checksum": "%s", "syntax": "%s", "parents": ["r001"], "rows_before": ["r001"], "rows_after": ["rNUMBER"],'
    ' "seconds": 0.01, "actor": "postgres", "host": "host", "role": "postgres", "id": NUMBER, "details": {"locks": 2}}'
)


def revision(item: Revision, number: int, *, empty: bool) -> Revision:
    """Return a revision without a statement, or one with a table and an index."""
    if empty:
        return Revision(item.id, item.down, "op.get_context()", "op.get_context()")
    index = f"op.create_index('t{number}_note', 't{number}', ['note'])"
    return Revision(item.id, item.down, f"op.execute({item.upgrade!r})\n{index}", f"DROP TABLE t{number}")


def prepared(server: Server, ledger: str) -> Callable[[], Mapping[str, str]]:
    """Return a function that makes an empty database with a table like the ledger."""
    made: list[Database] = []

    def prepare() -> Mapping[str, str]:
        if made:
            server.drop_database(made.pop().name)
        made.append(server.create_database())
        if ledger:
            made[0].execute(ledger)
        return variables(made[0])

    return prepare


def main() -> None:
    """Measure both histories and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    measure.compile_sources()
    lines = [
        "| work | plain s | with one INSERT s | ratio | migrator s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for work, count, empty in (("table and index", 200, False), ("no statement", 500, True)):
        revisions = [revision(item, k, empty=empty) for k, item in enumerate(linear_history(count), start=1)]
        with tempfile.TemporaryDirectory() as place, running(embedded()) as server:
            plain, hooked = Path(place) / "plain", Path(place) / "hooked"
            for folder in (plain, hooked):
                write_project(folder, revisions=revisions, env="own_variable")
            env = hooked / "migrations" / "env.py"
            text = env.read_text().replace(
                "(connection=connection)", "(connection=connection, on_version_apply=insert_a_row)"
            )
            env.write_text(
                text.replace("\nurl =", f"\nROW = {ROW % ('a' * 64, 'b' * 64)!r}\n{HOOK}\nurl =", 1)
            )
            model = server.create_database()
            Program([str(BIN / "migrator")], plain, functools.partial(variables, model)).run()
            ledger = _copy_of_the_ledger(model)
            alembic = [str(BIN / "alembic"), "upgrade", "head"]
            programs = {
                "plain": Program(alembic, plain, prepared(server, "")),
                "hooked": Program(alembic, hooked, prepared(server, ledger)),
                "migrator": Program([str(BIN / "migrator")], plain, prepared(server, "")),
            }
            found: dict[str, list[float]] = {name: [] for name in programs}
            for number in range(arguments.runs + 1):
                for name, program in programs.items():
                    seconds = program.run().seconds
                    if number:
                        found[name].append(seconds)
        middle = {name: statistics.median(times) for name, times in found.items()}
        cells = [f"{count} revisions, {work}", f"{middle['plain']:.3f}"]
        for name in ("hooked", "migrator"):
            cells += [f"{middle[name]:.3f}", f"{middle[name] / middle['plain']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    title = f"Medians of {arguments.runs} interleaved runs, after one warm-up; the embedded server, fsync off.\n\n"
    (RESULTS / "floor.md").write_text(title + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _copy_of_the_ledger(database: Database) -> str:
    """Return the statements that make a table like the ledger, with its indexes."""
    columns = (
        "SELECT string_agg(format('%I %s', attname, format_type(atttypid, atttypmod)), ', ' ORDER BY attnum)"
    )
    columns += " FROM pg_attribute WHERE attrelid = 'migrator_ledger'::regclass AND attnum > 0"
    ((made,),) = database.psql(columns)
    indexes = database.psql("SELECT indexdef FROM pg_indexes WHERE tablename = 'migrator_ledger'")
    return f"CREATE TABLE migrator_ledger ({made}); " + "; ".join(row[0] for row in indexes)


if __name__ == "__main__":
    main()
