"""A version table to which nothing is attached is recognized at little cost; each way to attach code is not one."""

from __future__ import annotations

import pytest

from migrator.config.database_url import parse
from migrator.postgres import attached_code
from migrator.postgres.session import connect
from tests.support.servers import Database

MADE = """
CREATE TABLE alembic_version (version_num varchar(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num));
CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE FUNCTION g(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1';
CREATE FUNCTION less(varchar, varchar) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 0';
CREATE DOMAIN checked AS text CHECK (g(VALUE) IS NOT NULL);
"""
WITHOUT_CODE = {
    "as Alembic makes it": "",
    "a comment and a reader": "COMMENT ON TABLE alembic_version IS 'x'; GRANT SELECT ON alembic_version TO PUBLIC",
    "a view of it": "CREATE VIEW v AS SELECT g(version_num) FROM alembic_version",
    "a column and an index": "ALTER TABLE alembic_version ADD at int; CREATE INDEX ON alembic_version (at)",
    "an index that calls the server": "CREATE INDEX ON alembic_version (lower(version_num))"
    " WHERE length(version_num) > 2",
    "a column that is gone": "ALTER TABLE alembic_version ADD c checked; ALTER TABLE alembic_version DROP c",
}
WITH_CODE = {
    "trigger": "CREATE TRIGGER t BEFORE UPDATE ON alembic_version FOR EACH ROW EXECUTE FUNCTION f()",
    "constraint trigger": "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON alembic_version DEFERRABLE FOR EACH ROW"
    " EXECUTE FUNCTION f()",
    "disabled trigger": "CREATE TRIGGER t BEFORE UPDATE ON alembic_version FOR EACH STATEMENT EXECUTE FUNCTION f();"
    " ALTER TABLE alembic_version DISABLE TRIGGER t",
    "rule": "CREATE RULE r AS ON INSERT TO alembic_version DO ALSO SELECT g('x')",
    "check": "ALTER TABLE alembic_version ADD CHECK (g(version_num) IS NOT NULL)",
    "check not valid": "ALTER TABLE alembic_version ADD CHECK (g(version_num) IS NOT NULL) NOT VALID",
    "default": "ALTER TABLE alembic_version ADD c text; ALTER TABLE alembic_version ALTER c SET DEFAULT g('x')",
    "generated": "ALTER TABLE alembic_version ADD c text GENERATED ALWAYS AS (g(version_num)) STORED",
    "index of an expression": "CREATE INDEX ON alembic_version (g(version_num))",
    "index of some rows": "CREATE INDEX ON alembic_version (version_num) WHERE g(version_num) > ''",
    "index with an operator class": "CREATE OPERATOR CLASS c FOR TYPE varchar USING btree"
    " AS FUNCTION 1 less(varchar, varchar);"
    " CREATE INDEX ON alembic_version (version_num c)",
    "exclusion": "CREATE FUNCTION same(int4range, int4range) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';"
    " ALTER TABLE alembic_version ADD r int4range, ADD EXCLUDE USING gist (r WITH &&) WHERE (g('x') > '')",
    "policy": "CREATE POLICY p ON alembic_version USING (g(version_num) > '')",
    "statistics": "CREATE STATISTICS s ON (g(version_num)), version_num FROM alembic_version",
    "domain": "ALTER TABLE alembic_version ADD c checked",
    "array of a domain": "ALTER TABLE alembic_version ADD c checked[]",
    "child": "CREATE TABLE child (CHECK (g(version_num) IS NOT NULL)) INHERITS (alembic_version)",
    "foreign key of another": "CREATE TABLE other (v varchar(32) REFERENCES alembic_version, CHECK (g(v) > ''))",
    "foreign key to another": "CREATE TABLE other (v varchar(32) PRIMARY KEY);"
    " ALTER TABLE alembic_version ADD FOREIGN KEY (version_num) REFERENCES other",
    "publication": "CREATE PUBLICATION p FOR TABLE alembic_version WHERE (version_num > '')",
}


def plain(database: Database) -> tuple[bool, int]:
    """Return the quick answer, and how many pieces of code the whole question finds, whoever they belong to."""
    with connect(parse(database.url), "test", 60) as session:
        place = {"name": "alembic_version", "schema": "public"}
        found = session.query(f"SELECT count(*) FROM {attached_code.code(attached_code._TABLE)} AS c", place)
        return session.query(attached_code._IS_PLAIN, place)[0][0], found[0][0]


@pytest.mark.parametrize("what", WITHOUT_CODE)
def test_nothing_is_attached(what: str, each_database: Database) -> None:
    each_database.execute(MADE + WITHOUT_CODE[what])
    assert plain(each_database) == (True, 0)


@pytest.mark.parametrize("what", WITH_CODE)
def test_something_is_attached(what: str, each_database: Database) -> None:
    major = each_database.server.psql("SELECT current_setting('server_version_num')::int / 10000")[0][0]
    planted = WITH_CODE[what]
    if major < 15:  # a publication had no WHERE
        planted = planted.split(" WHERE (version_num")[0]
    each_database.execute(MADE + planted)
    assert plain(each_database)[0] is False


def test_a_view_is_no_plain_table(each_database: Database) -> None:
    each_database.execute("CREATE VIEW alembic_version AS SELECT 'x' AS version_num")
    assert plain(each_database)[0] is False
