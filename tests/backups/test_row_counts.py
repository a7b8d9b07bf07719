"""The rows of each table are counted in what pg_restore writes, whatever they and the names look like."""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Callable

import pytest

from migrator.backups.verification.reader import Rows
from tests.support.servers import Database, Server

from .conftest import LARGE, RICH, Workbench

Bench = Callable[..., Workbench]

STRANGE = r"""
CREATE TABLE "a
b" ("x) FROM stdin;
" text);
INSERT INTO "a
b" VALUES ('1'), ('2');
CREATE SCHEMA "COPY public.t (a) FROM stdin;
";
CREATE TABLE "COPY public.t (a) FROM stdin;
"."it's; \.
" (a int);
INSERT INTO "COPY public.t (a) FROM stdin;
"."it's; \.
" VALUES (1);
CREATE TABLE "quo""ted.x" (a text);
INSERT INTO "quo""ted.x" VALUES (E'\\.'), (E'a\nb\n\\.\n'), (NULL), (''), ('COPY public.t (a) FROM stdin;');
CREATE TABLE t (a int);
INSERT INTO t VALUES (1);
CREATE SEQUENCE "'
COPY public.t (a) FROM stdin;
1
\.
";
SELECT nextval(quote_ident(relname)::regclass) FROM pg_class WHERE relkind = 'S';
CREATE TABLE nothing (a int);
CREATE TABLE no_columns ();
INSERT INTO no_columns DEFAULT VALUES;
INSERT INTO no_columns DEFAULT VALUES;
CREATE TABLE only_made (a int GENERATED ALWAYS AS (1) STORED);
INSERT INTO only_made DEFAULT VALUES;
CREATE TABLE "naïve ☃" (a text);
INSERT INTO "naïve ☃" SELECT repeat('x', 3000) FROM generate_series(1, 700);
"""


def counted(database: Database) -> dict[tuple[str, str], int]:
    """Count the rows of all tables by asking the server."""
    tables = database.psql(
        "SELECT nspname, relname, quote_ident(nspname) || '.' || quote_ident(relname) FROM pg_class"
        " JOIN pg_namespace n ON n.oid = relnamespace"
        " WHERE relkind = 'r' AND nspname !~ '^pg_' AND nspname <> 'information_schema'"
    )
    return {
        (schema, name): database.psql(f"SELECT count(*) FROM ONLY {quoted}")[0][0]
        for schema, name, quoted in tables
    }


def data(database: Database) -> bytes:
    """Return what pg_restore writes of a dump's data."""
    program = str(database.server.bin / "pg_dump")
    dump = subprocess.run([program, "--format=custom", database.url], capture_output=True, check=True).stdout
    restore = [str(database.server.bin / "pg_restore"), "--section=data", "--file=-"]
    return subprocess.run(restore, input=dump, capture_output=True, check=True).stdout


@pytest.mark.parametrize("sql", [STRANGE, RICH, LARGE], ids=["strange", "rich", "large"])
def test_wherever_it_is_cut(sql: str, each_database: Database) -> None:
    each_database.execute(sql)
    expected = counted(each_database)
    text = data(each_database)
    for size in (1, 2, 3, 5, 1000, 65536, len(text)):
        rows = Rows()
        for start in range(0, len(text), size):
            rows.write(text[start : start + size])
        assert rows.unread == ""
        assert {name: held.rows for name, held in rows.tables.items()} == expected
    assert sum(held.size for held in rows.tables.values()) < len(text)


def test_the_size_is_that_of_the_rows_as_text(database: Database, workbench: Bench) -> None:
    database.execute(
        "CREATE TABLE t (a text); INSERT INTO t SELECT repeat('x', 9) FROM generate_series(1, 100)"
    )
    assert workbench(database).back_up().tables["public.t"].size_bytes == 1000


def test_strange_names_are_those_of_the_manifest(each_database: Database, workbench: Bench) -> None:
    each_database.execute(STRANGE)
    backup = workbench(each_database).back_up()
    assert sorted(table.rows for table in backup.tables.values() if table.rows is not None) == sorted(
        counted(each_database).values()
    )
    assert all(table.rows is not None for table in backup.tables.values())


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_names_in_other_encodings(encoding: str, server: Server, workbench: Bench) -> None:
    name = f"in_{encoding.lower()}"
    server.psql(
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        database = Database(server, name)
        table = {"LATIN1": "größe", "EUC_JP": "表", "SQL_ASCII": "größe"}[encoding]
        with contextlib.closing(database.connect()) as session, session:
            session.set_client_encoding("UTF8")
            session.cursor().execute(f'CREATE TABLE "{table}" AS SELECT generate_series(1, 3) AS a')
        assert {key: item.rows for key, item in workbench(database).back_up().tables.items()} == {
            f'public."{table}"': 3
        }
    finally:
        server.psql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def test_rows_that_are_loaded_through_the_root_are_no_partitions(
    each_database: Database, workbench: Bench
) -> None:
    """Which partition they come back to is for the server to say that they are restored on."""
    each_database.execute(
        "CREATE TYPE mood AS ENUM ('a', 'b', 'c'); CREATE TABLE p (m mood) PARTITION BY HASH (m);"
        " CREATE TABLE p0 PARTITION OF p FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        " CREATE TABLE p1 PARTITION OF p FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        " INSERT INTO p VALUES ('a'), ('b'), ('c')"
    )
    bench = workbench(each_database)
    tables = bench.back_up().tables
    assert [tables[f"public.{name}"].rows for name in ("p", "p0", "p1")] == [None, None, None]
    bench.restore()
    assert each_database.psql("SELECT count(*) FROM p") == [(3,)]


def test_what_cannot_be_read_fails_no_backup(
    database: Database, workbench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    database.execute("CREATE TABLE t AS SELECT 1 AS a")
    real = Rows.write
    monkeypatch.setattr(Rows, "write", lambda rows, chunk: real(rows, b"\\no SQL\n" + chunk))
    caplog.set_level(logging.WARNING, "migrator")
    backup = workbench(database).back_up()
    assert (backup.verified, backup.tables["public.t"].rows) == ("read", None)
    assert "the rows of the backup were not counted: no SQL of pg_restore" in caplog.text
