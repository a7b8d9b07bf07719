"""A copy means what the original meant: it is filled under the settings that the dump was taken under.

Each value, check, generated column and view here reads a setting of the database or of a role.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.backups import description
from migrator.backups.restore.tables import restore_tables
from tests.support import installations
from tests.support.servers import Database, Server

from .conftest import APPLICATION, Workbench

Bench = Callable[..., Workbench]

SETTINGS = {
    "lc_monetary": "es_CO.UTF-8",
    "TimeZone": "America/Bogota",
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "array_nulls": "off",
    "bytea_output": "escape",
    "extra_float_digits": "0",
    "default_text_search_config": "pg_catalog.spanish",
    "transform_null_equals": "on",
    "timezone_abbreviations": "India",
    "standard_conforming_strings": "off",
    "app.tenant": "it's \\ one\nof two",
}
READ_UNDER = {"DateStyle": "ISO", "TimeZone": "UTC", "array_nulls": "on", "extra_float_digits": "3"}
OBJECTS = r"""
CREATE FUNCTION tenant() RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT current_setting('app.tenant')$$;
CREATE TABLE t (
  id int PRIMARY KEY, price money, words text[], at timestamptz, span interval, raw bytea, f float8,
  tenant text DEFAULT tenant() CHECK (tenant = tenant()), made text GENERATED ALWAYS AS (tenant() || id) STORED,
  CHECK (at::text LIKE '__.__.____ %'), CHECK (to_char(at, 'HH24') = '20')
);
INSERT INTO t VALUES (1, '12,50', array_append(ARRAY['NULL', 'a'], NULL), '2026-01-02 01:30+00', '-1 day -02:00:00',
  '\\x00ff', 0.1::float8 + 0.2);
INSERT INTO t VALUES (2, '1.000.000,01', NULL, NULL, '1 year', NULL, NULL);
CREATE INDEX by_tenant ON t ((tenant() || id));
CREATE MATERIALIZED VIEW seen AS
  SELECT id, at::date::text AS day, at::text AS at, span::text AS span, raw::text AS raw, f::text AS f,
         price::text AS price, to_tsvector('los gatos')::text AS words, tenant() AS tenant,
         date_trunc('day', at) AS start, extract(epoch FROM '2026-01-02 10:00 IST'::text::timestamptz) AS in_india,
         '{NULL,b}'::text::text[] AS listed
    FROM t WHERE id = 1;
"""
VALUES = """
SELECT id, price::numeric, words, words[2] IS NULL, array_position(words, NULL),
       at AT TIME ZONE 'UTC', extract(epoch FROM span), raw::text, f::text, tenant,
       made
  FROM {schema}t ORDER BY id
"""
SEEN = "SELECT * FROM seen"


@pytest.fixture(scope="module", params=["debian", "embedded"])
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has a locale where money is written otherwise."""
    if not Path("/usr/share/i18n/locales/es_CO").exists():
        installations.apt_install("locales")
    server = Server(installations.binaries(request.param))
    locales = server.folder / "locales"
    locales.mkdir()
    subprocess.run(["localedef", "-i", "es_CO", "-f", "UTF-8", str(locales / "es_CO.UTF-8")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCPATH", str(locales))
        server.start()
    server.create_role("teller", "LOGIN CREATEDB")
    server.create_role("plain", "LOGIN")
    yield server
    server.remove()


@pytest.fixture
def bank(speaker: Server) -> Iterator[Callable[..., Database]]:
    """Make a database that belongs to a role, where the settings are set for one of three."""
    made: list[str] = []

    def make(role: str, whose: str, **changed: str) -> Database:
        database = speaker.create_database()
        made.append(database.name)
        speaker.psql(f"ALTER DATABASE {database.name} OWNER TO {role}")
        place = {"database": f"DATABASE {database.name}", "role": f"ROLE {role}"}.get(
            whose, f"ROLE {role} IN DATABASE {database.name}"
        )
        connection = speaker.connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            for name, value in {**SETTINGS, **changed}.items():
                cursor.execute(f'ALTER {place} SET "{name}" TO %s', [value])
        connection.close()
        database.url = speaker.url(database.name, role)
        subprocess.run(  # psycopg2 would set DateStyle
            [str(speaker.bin / "psql"), "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--command", OBJECTS],
            env={**os.environ, **database.environment(), "PGUSER": role},
            check=True,
        )
        return database

    yield make
    for role in ("postgres", "teller", "plain"):
        speaker.psql(f"ALTER ROLE {role} RESET ALL")
    for (name,) in speaker.psql("SELECT datname FROM pg_database WHERE datname LIKE 'test%%'"):
        speaker.drop_database(name)


def values(database: Database, name: str = "", schema: str = "") -> list[list[object]]:
    """Return what is in a database, read in the same way wherever it is."""
    connection = database.server.connect(name or database.name)
    with connection.cursor() as cursor:
        for setting, value in {**SETTINGS, **READ_UNDER}.items():
            cursor.execute("SELECT set_config(%s, %s, false)", [setting, value])
        found = []
        for query in (VALUES.format(schema=schema), *([] if schema else [SEEN])):
            cursor.execute(query)
            found.append(cursor.fetchall())
    connection.close()
    return found


CASES = [("postgres", "role"), ("teller", "database"), ("plain", "role in database")]


@pytest.mark.parametrize(("role", "whose"), CASES)
def test_a_copy_means_what_the_original_meant(
    bank: Callable[..., Database], workbench: Bench, role: str, whose: str
) -> None:
    """Beside it, in its place (by a swap, or from within where the role can make no database), and a table alone."""
    database = bank(role, whose)
    before = values(database)
    bench = workbench(database, MIGRATOR_BACKUP_VERIFY="restore" if role == "teller" else "read")
    backup = bench.back_up()
    if whose != "role":  # what is set now is not what was set then
        whom = "ROLE plain IN DATABASE" if role == "plain" else "DATABASE"
        database.server.psql(f"ALTER {whom} {database.name} RESET ALL")
        database.server.psql(f"ALTER DATABASE {database.name} SET array_nulls = off")
    if role != "plain":
        bench.restore(to=f"{database.name}_look")
        assert values(database, f"{database.name}_look") == before
    database.execute("""SET "app.tenant" = ''; DELETE FROM t WHERE id = 2""")
    bench.restore(backup.id)
    assert values(database) == before
    restore_tables(
        bench.target,
        bench.settings,
        backup.id,
        ["t"],
        schema="look",
        run_id="run3",
        application_name=APPLICATION,
    )
    assert values(database, schema="look.")[0] == before[0]


@pytest.mark.parametrize("whose", ["database", "role"])
def test_by_hand_too(bank: Callable[..., Database], workbench: Bench, whose: str) -> None:
    """By a role that has none of the settings, with the commands that are shown; views know array_nulls as on."""
    database = bank("teller", whose, **{"app.tenant": "it's \\ one"})
    rows, seen = values(database)
    backup = workbench(database).back_up()
    commands = description.by_hand(backup)
    if whose == "role":  # the application's own are in no dump
        database.server.psql("ALTER ROLE postgres SET \"app.tenant\" = E'it\\'s \\\\ one'")
    subprocess.run(
        ["/bin/sh", "-ec", "\n".join(commands)],
        env={"PATH": f"{database.server.bin}:/usr/bin:/bin", **database.environment()},
        check=True,
    )
    by_hand = values(database, f"{database.name}_by_hand")
    assert (by_hand[0], [row[:-1] for row in by_hand[1]]) == (rows, [row[:-1] for row in seen])
