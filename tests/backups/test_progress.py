"""While a backup is made, the log and the terminal say which table, how much of it all, and how fast."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from migrator.backups.dump import progress
from migrator.backups.dump.progress import DumpProgress
from migrator.backups.exported_snapshot import Relation, Sizes
from migrator.runtime import subprocesses
from migrator.runtime.output.progress import Progress
from tests.support.proxy import Proxy
from tests.support.servers import Database

from .conftest import Workbench
from .test_backup_failures import noise

Bench = Callable[..., Workbench]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def made(terminal: Terminal, jobs: int = 1) -> DumpProgress:
    tables = [
        Relation(number, schema, name, "r", None, False, True)
        for number, (schema, name) in enumerate([("public", "a"), ("public", "b"), ("odd s", "c")])
    ]
    sizes = Sizes(9000, 8000, {0: 1000, 1: 3000, 2: 4000})
    bar = Progress(100, terminal, enabled=True, percent=True)
    return DumpProgress("shop", tables, sizes, lambda: 123, bar, jobs=jobs)


def begins(table: str) -> bytes:
    return f'pg_dump: dumping contents of table "{table}"\n'.encode()


def test_a_table_that_is_followed_by_another_is_done() -> None:
    told = made(Terminal())
    told.on_stderr(b"pg_dump: reading schemas\n" + begins("public.a"))
    assert (told.bytes_done, told.percent) == (0, 0)
    told.on_stderr(begins("public.b")[:20])
    told.on_stderr(begins("public.b")[20:])
    assert (told.bytes_done, told.percent) == (1000, 12)
    told.on_server([(1, 1500), (77, 10), (0, 10)])
    assert told.percent == 31
    told.on_server([(1, 9999)])  # rows as text may be more than the table on disk
    assert told.percent == 50
    told.on_stderr(begins("odd s.c"))
    told.on_server([(2, 4000)])
    assert told.percent == 99  # and never 100 before the end


def test_workers_have_several_tables_at_once() -> None:
    told = made(Terminal(), jobs=2)
    told.on_stderr(begins("public.a") + begins("odd s.c"))
    told.on_server([(0, 500), (2, 1000)])
    assert told.bytes_done == 1500
    told.on_stderr(b"pg_dump: finished item 3456 TABLE DATA a\n" + begins("public.b"))
    assert told.bytes_done == 2000


def test_of_a_table_that_was_never_analysed_counts_what_was_seen() -> None:
    tables = [Relation(number, "public", name, "r", None, False, True) for number, name in enumerate("ab")]
    bar = Progress(100, Terminal(), enabled=True, percent=True)
    told = DumpProgress("shop", tables, Sizes(9000, 8000, {0: 0, 1: 3000}), lambda: 123, bar)
    told.on_stderr(begins("public.a"))
    told.on_server([(0, 2000)])
    assert told.percent == 25
    told.on_stderr(begins("public.b"))
    assert told.percent == 25
    told.on_server([(1, 3000)])
    assert told.percent == 62


def test_the_terminal_and_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level(logging.INFO, "migrator")
    terminal = Terminal()
    told = made(terminal)
    told.on_stderr(begins("public.a") + begins("odd s.c"))
    told.on_server([(2, 3000)])
    told.tell()
    told.close()
    assert "[############............] 50 % " in terminal.getvalue()
    assert '/s) backing up "odd s".c' in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert 'backing up shop: 50 % of 8.0 kB, "odd s".c, ' in caplog.text
    assert "/s, 123 bytes written after 0 s" in caplog.text


@pytest.mark.parametrize("how", ["custom", "directory"])
def test_a_real_pg_dump_is_understood(
    how: str, each_database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pg_dump says of its tables is what is looked for, in every major."""
    each_database.execute(
        'CREATE TABLE a AS SELECT g FROM generate_series(1, 5000) g; CREATE SCHEMA "odd s";'
        'CREATE TABLE "odd s"."T x" AS SELECT g FROM generate_series(1, 5000) g'
    )
    each_database.execute("ANALYZE")
    seen: list[DumpProgress] = []
    real = DumpProgress.close

    def close(told: DumpProgress) -> None:
        seen.append(told)
        real(told)

    monkeypatch.setattr(DumpProgress, "close", close)
    bench = workbench(each_database, MIGRATOR_BACKUP_FORMAT=how, MIGRATOR_BACKUP_JOBS="2")
    bench.back_up()
    (told,) = seen
    running: Any = told._running
    # The last table of a single worker has no successor that would end it.
    of_one = each_database.psql("SELECT pg_relation_size('a')")[0][0]
    assert told.bytes_done == of_one * (2 - len(running))
    assert len(running) == (1 if how == "custom" else 0)


def test_the_server_tells_how_far_a_copy_is(database: Database, workbench: Bench) -> None:
    """The view is asked under the name that the dump's sessions bear."""
    database.execute("CREATE TABLE big AS SELECT repeat('x', 500) AS x FROM generate_series(1, 40000)")
    oid = database.psql("SELECT 'big'::regclass::oid::bigint")[0][0]
    copying = database.connect(application_name="migrator/h 1 backup")
    try:
        cursor = copying.cursor()
        rows: list[Any] = []

        class Slow(io.StringIO):
            """Looks at the view while the copy waits for its reader."""

            def write(self, text: Any) -> int:
                if not rows:
                    rows.extend(database.psql(progress.VIEW, ["migrator/h 1 backup"]))
                return len(text)

        cursor.copy_expert("COPY big TO STDOUT", Slow())
    finally:
        copying.close()
    assert [row[0] for row in rows] == [oid]
    assert rows[0][1] > 0


@pytest.mark.parametrize("how", ["custom", "directory"])
def test_a_long_backup_says_how_far_it_is(
    how: str,
    each_database: Database,
    workbench: Bench,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocesses, "PULSE", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level(logging.INFO, "migrator")
    noise(each_database, 14)
    with Proxy(each_database.server.port) as network:
        network.throttle(10e6)  # 28 MB as text: the copy lasts longer than a look at it, on any machine
        address = network.environment(each_database)["MIGRATOR_DATABASE_URL"]
        bench = workbench(
            each_database, MIGRATOR_BACKUP_FORMAT=how, MIGRATOR_BACKUP_JOBS="2", DATABASE_URL=address
        )
        backup = bench.back_up()
    lines = [record.getMessage() for record in caplog.records if " written after " in record.getMessage()]
    said = [re.search(r": (\d+) % of 1\d\.\d MB, public\.noise, .*/s, ", line) for line in lines]
    percents = [int(match[1]) for match in said if match]
    assert percents == sorted(percents)
    assert 0 < percents[-1] <= 99
    assert re.search(r"/s, [\d.]+ (kB|MB) written after", lines[-1])
    assert backup.tables["public.noise"].rows == 140
