"""The offline SQL of a downgrade: what is rendered, what is refused, and that refusing has no side effect."""

from __future__ import annotations

import logging
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from migrator.project.downgrade.offline_sql import OfflineDowngrade, offline_downgrade
from migrator.runtime.logs import Redactor
from tests.support import plain_alembic
from tests.support.projects import ALEMBIC_INI, ENV_FILES
from tests.support.servers import Database

ROOT = Path(__file__).parents[3]
HEAD = """\
import datetime
import enum
import json
import logging
import os
import subprocess
import sqlalchemy as sa
from alembic import context, op
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from sqlalchemy import Column, Integer, String, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session
from sqlalchemy.sql import column, table

revision, down_revision = "a1", None
TABLES = ("a", "b")
LIST = ["a"]
MOOD = postgresql.ENUM("sad", "ok", name="mood")
ITEMS = table("items", column("id", Integer), column("name", String))
logger = logging.getLogger("their.revision")


class Colour(enum.Enum):
    RED = "red"


class Platform(NamedTuple):
    name: str
    columns: tuple = ()


class Clever(NamedTuple):
    name: str

    def drop(self, checkfirst):
        touch()


@dataclass(frozen=True)
class Part:
    parts: str

    @property
    def name(self):
        return self.parts.strip()

    def drop_table(self):
        op.drop_table(self.name)


PLATFORMS = (Platform("amazon", ("asin",)), Part("b "))
CLEVER = Clever("x")


class Tool:
    def drop(self, name):
        open(MARK, "w").close()


def touch():
    open(MARK, "w").close()


def drop_all(*names):
    for name in names:
        op.drop_table(name)


def recurse():
    recurse()


def upgrade():
    pass


"""


@pytest.fixture
def render(tmp_path: Path) -> Callable[[str], OfflineDowngrade]:
    """Return what becomes of a downgrade's body; fails where calling it left a mark."""
    mark = tmp_path / "side-effect"

    def of(body: str) -> OfflineDowngrade:
        folder = tmp_path / "project"
        (folder / "versions").mkdir(parents=True)
        (folder / "versions" / "x.sql").write_text("DROP VIEW from_file")
        function = (
            body if body.startswith("def downgrade") else "def downgrade():\n" + textwrap.indent(body, "    ")
        )
        text = HEAD.replace("MARK", repr(str(mark))) + function + "\n"
        (folder / "versions" / "a1.py").write_text(text.replace("MARK", repr(str(mark))))
        found = offline_downgrade(script(folder, "a1"))
        assert not mark.exists(), "rendering had a side effect"
        return found

    return of


def script(folder: Path, revision: str) -> Any:
    config = Config()
    config.set_main_option("script_location", str(folder))
    return ScriptDirectory.from_config(config).get_revision(revision)


RENDERED = {
    "nothing": ("pass", []),
    "a docstring": ('"""Nothing to undo."""', []),
    "an operation": ('op.drop_table("a")', ["DROP TABLE a"]),
    "several": (
        'op.drop_index("i", table_name="a")\nop.drop_column("a", "c")',
        ["DROP INDEX i", "ALTER TABLE a DROP COLUMN c"],
    ),
    "schema and op.f": ('op.drop_index(op.f("ix_a"), schema="s", table_name="a")', ["DROP INDEX s.ix_a"]),
    "text": ('op.execute("DELETE FROM a WHERE x LIKE \'50%\' ; ")', ["DELETE FROM a WHERE x LIKE '50%' ;"]),
    "a comment at the end": ('op.execute("DROP VIEW v -- gone")', ["DROP VIEW v -- gone"]),
    "an f-string": ('name = "a"\nop.execute(f"DROP TABLE {name}")', ["DROP TABLE a"]),
    "percent and format": (
        'op.execute("DROP TABLE %s" % "a")\nop.execute("DROP TABLE {}".format("b"))',
        ["DROP TABLE a", "DROP TABLE b"],
    ),
    "a loop over a constant": (
        "for name in reversed(TABLES):\n    op.drop_table(name)",
        ["DROP TABLE b", "DROP TABLE a"],
    ),
    "a comprehension": (
        'for sql in [f"DROP TABLE t{n}" for n in range(2)]:\n    op.execute(sql)',
        ["DROP TABLE t0", "DROP TABLE t1"],
    ),
    "a list of its own": (
        'names = []\nnames.append("z")\nnames += ["y"]\nfor n in sorted(names):\n    op.drop_table(n)',
        ["DROP TABLE y", "DROP TABLE z"],
    ),
    "records": (
        "for platform in PLATFORMS:\n    op.drop_table(platform.name)\n"
        "for part in PLATFORMS[1:]:\n    part.drop_table()",
        ["DROP TABLE amazon", "DROP TABLE b", "DROP TABLE b"],
    ),
    "a helper of the file": ("drop_all(*TABLES)", ["DROP TABLE a", "DROP TABLE b"]),
    "upgrade again": ('upgrade()\nop.drop_table("a")', ["DROP TABLE a"]),
    "a table made again": (
        'op.create_table("a", Column("id", Integer, primary_key=True), sa.Column("n", String(20), nullable=False))',
        ["CREATE TABLE a (\n    id SERIAL NOT NULL, \n    n VARCHAR(20) NOT NULL, \n    PRIMARY KEY (id)\n)"],
    ),
    "a table with a new type": (
        'op.create_table("a", sa.Column("m", postgresql.ENUM("x", name="m")))',
        ["CREATE TYPE m AS ENUM ('x')", "CREATE TABLE a (\n    m m\n)"],
    ),
    "batch": (
        'with op.batch_alter_table("a", schema="s") as batch:\n    batch.drop_column("c")\n'
        '    batch.create_index("i", ["d"])',
        ["ALTER TABLE s.a DROP COLUMN c", "CREATE INDEX i ON s.a (d)"],
    ),
    "autocommit": (
        'with op.get_context().autocommit_block():\n    op.drop_index("i", postgresql_concurrently=True)',
        ["COMMIT", "DROP INDEX CONCURRENTLY i", "BEGIN"],
    ),
    "an enum": (
        'sa.Enum(name="mood").drop(op.get_bind(), checkfirst=False)\nbind = op.get_bind()\nMOOD.drop(bind)',
        ["DROP TYPE mood", "DROP TYPE IF EXISTS mood"],
    ),
    "an enum made again": (
        "MOOD.create(op.get_bind(), checkfirst=True)",
        [
            "DO $migrator$ BEGIN\nCREATE TYPE mood AS ENUM ('sad', 'ok');\n"
            "EXCEPTION WHEN duplicate_object THEN NULL;\nEND $migrator$"
        ],
    ),
    "a Python enum": (
        "sa.Enum(Colour, name='colour').create(op.get_bind(), checkfirst=False)",
        ["CREATE TYPE colour AS ENUM ('RED')"],
    ),
    "the dialect asked": (
        'if op.get_bind().dialect.name == "postgresql":\n    op.drop_table("a")\nelse:\n    op.drop_table("b")',
        ["DROP TABLE a"],
    ),
    "an update": (
        'op.execute(ITEMS.update().where(ITEMS.c.id == 1).values(name="it\'s \\\\ 5%"))',
        ["UPDATE items SET name='it''s \\ 5%' WHERE items.id = 1"],
    ),
    "a bulk insert": (
        'op.bulk_insert(ITEMS, [{"id": 1, "name": "x"}, {"id": 2, "name": None}])',
        ["INSERT INTO items (id, name) VALUES (1, 'x')", "INSERT INTO items (id, name) VALUES (2, NULL)"],
    ),
    "the bind's execute": (
        'bind = op.get_bind()\nbind.execute(text("DELETE FROM a WHERE id = :id"), {"id": 7})\n'
        'bind.execute("DROP VIEW v")',
        ["DELETE FROM a WHERE id = 7", "DROP VIEW v"],
    ),
    "inserts by the bind": (
        'op.get_bind().execute(ITEMS.insert(), [{"id": 1}, {"id": 2}])',
        ["INSERT INTO items (id) VALUES (1)", "INSERT INTO items (id) VALUES (2)"],
    ),
    "functions": (
        "op.execute(sa.update(ITEMS).values(name=sa.func.lower(ITEMS.c.name))"
        ".where(sa.or_(ITEMS.c.id.in_([1, 2]), ITEMS.c.name.is_(None))))",
        ["UPDATE items SET name=lower(items.name) WHERE items.id IN (1, 2) OR items.name IS NULL"],
    ),
    "imports within": (
        "from sqlalchemy import text as t\nimport sqlalchemy.dialects.postgresql as pg\n"
        "op.execute(t('DROP VIEW v'))\npg.ENUM(name='m').drop(op.get_bind(), checkfirst=False)",
        ["DROP VIEW v", "DROP TYPE m"],
    ),
    "a file beside it": (
        'op.execute((Path(__file__).parent / "x.sql").read_text())\n'
        'with open(os.path.join(os.path.dirname(__file__), "x.sql")) as f:\n    op.execute(f.read())',
        ["DROP VIEW from_file", "DROP VIEW from_file"],
    ),
    "print and log": ('print("going back")\nlogger.warning("going back")\nop.drop_table("a")', ["DROP TABLE a"]),
    "default and date": (
        'op.add_column("a", sa.Column("d", sa.DateTime(), server_default=sa.func.now()))\n'
        "op.execute(ITEMS.update().values(name=str(datetime.date(2020, 1, 2))))",
        [
            "ALTER TABLE a ADD COLUMN d TIMESTAMP WITHOUT TIME ZONE DEFAULT now()",
            "UPDATE items SET name='2020-01-02'",
        ],
    ),
    "a text at the margin": (
        'def downgrade():\n    op.execute("""\nDROP VIEW v;\n\nDROP VIEW w\n""")\n    # the end',
        ["DROP VIEW v;\n\nDROP VIEW w"],
    ),
}  # fmt: skip

REFUSED = {
    "raises": (
        'raise NotImplementedError("one way only")',
        "its author excluded a downgrade (NotImplementedError: one way only)",
    ),
    "raises after a statement": (
        'op.drop_table("a")\nraise RuntimeError',
        "its author excluded a downgrade (RuntimeError)",
    ),
    "asserts": ('assert False, "never"', "its author excluded a downgrade (AssertionError: never)"),
    "another file's function": ("subprocess.run(['touch', MARK])", "it calls subprocess.run() (line "),
    "os": ("os.remove(MARK)", "it calls os.remove()"),
    "an engine": ("sa.create_engine('postgresql://')", "it calls sa.create_engine()"),
    "a helper that writes": ("touch()", "it calls open("),
    "an open for writing": ("open(MARK, 'w')", "it calls open()"),
    "an open with options": ("open(MARK, **{'mode': 'w'})", "it calls open()"),
    "a file written": ("Path(MARK).write_text('')", "it calls Path("),
    "a class of the file": ("Tool().drop(MARK)", "it calls Tool()"),
    "a record with code": ("CLEVER.drop(1)", "it calls open("),
    "reads rows": ("for row in op.get_bind().execute(text('SELECT 1')):\n    pass", "it reads from the database"),
    "reads a value": ("n = op.get_bind().scalar(text('SELECT 1'))", "it reads from the database"),
    "fetches": ("op.get_bind().execute(text('SELECT 1')).fetchall()", "it calls "),
    "inspects": ("sa.inspect(op.get_bind()).get_table_names()", "it calls "),
    "a session": ("Session(bind=op.get_bind()).query(1)", "it calls "),
    "a try": ("try:\n    op.drop_table('a')\nexcept Exception:\n    pass", "it has a `try`"),
    "a while": ("while True:\n    pass", "it has a `while`"),
    "a global": ("global LIST\nLIST = []", "it has a `global`"),
    "a change of the module": ("LIST.append('x')", "it changes LIST"),
    "a change of an item": ("LIST[0] = 'x'", "it changes LIST"),
    "a change of an object": ("MOOD.name = 'x'", "it changes MOOD.name"),
    "eval": ("eval('1')", "it calls eval()"),
    "a dunder": ("().__class__.__base__.__subclasses__()", "it "),
    "an import": ("import pkgutil_that_is_not_there", "it imports pkgutil_that_is_not_there"),
    "an import by name": ("__import__('os').system('true')", "it "),
    "the environment": ("op.drop_table(os.environ['X'])", "it uses os.environ"),
    "-x arguments": ("context.get_x_argument()", "it calls context.get_x_argument()"),
    "now": ("op.execute(ITEMS.update().values(name=datetime.datetime.now()))", "it calls datetime.datetime.now()"),
    "a nested function": ("def inner():\n    pass\ninner()", "it has a `FunctionDef`"),
    "run_async": ("op.run_async(touch)", "it "),
    "recursion": ("recurse()", "(RecursionError"),
    "an object without a text": (
        "op.execute(object())",
        "it cannot be written as SQL (",
    ),
    "an author's object": (
        "raise NotImplementedError(object())",
        "its author excluded a downgrade (NotImplementedError: <object object>)",
    ),
    "a parameter without a value": ("op.execute('SELECT :x')", "it cannot be written as SQL ("),
    "json": (
        "op.execute(sa.table('s', sa.column('v', postgresql.JSONB)).update().values(v={'a': 1}))",
        "it cannot be written as SQL (",
    ),
    "a table that is read": (
        "sa.Table('a', sa.MetaData(), autoload_with=op.get_bind())",
        "it cannot be written as SQL (",
    ),
    "batch with a copy": (
        "with op.batch_alter_table('a', recreate='always') as b:\n    b.drop_column('c')",
        "it cannot be written as SQL (",
    ),
    "a password": ("op.execute(\"ALTER ROLE a PASSWORD 'geheim'\")", "it holds a password"),
    "too much": ("for n in range(10_000):\n    op.execute('SELECT 1')", "more than 5000 statements"),
    "a lambda that does": ("sorted([1], key=lambda _: touch())", "it calls open("),
    "a callable handed over": ("list(map(touch, [1]))", "it "),
}  # fmt: skip


@pytest.mark.parametrize(("body", "statements"), RENDERED.values(), ids=RENDERED.keys())
def test_sql_of_a_downgrade(
    render: Callable[[str], OfflineDowngrade], body: str, statements: list[str]
) -> None:
    assert render(body) == OfflineDowngrade(tuple(statements))


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_offline_form_says_why(
    render: Callable[[str], OfflineDowngrade], body: str, reason: str
) -> None:
    found = render(body)
    assert found.statements is None
    assert reason in found.reason
    assert " at 0x" not in found.reason


def test_nothing_is_printed_or_logged(
    render: Callable[[str], OfflineDowngrade],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    assert render('print("back")\nlogger.error("back")').statements == ()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert not logging.getLogger("their.revision").disabled


@pytest.mark.parametrize(
    "text", ["def downgrade(x=1):\n    pass\ndowngrade = staticmethod(downgrade).__func__", ""]
)
def test_odd_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "versions").mkdir()
    text = f"revision, down_revision = 'a1', None\ndef upgrade():\n    pass\n{text}\n"
    (tmp_path / "versions" / "a1.py").write_text(text)
    found = offline_downgrade(script(tmp_path, "a1"))
    assert found == (
        OfflineDowngrade(()) if "downgrade" in text else OfflineDowngrade(None, "it has no downgrade()")
    )


def test_a_secret_is_not_kept(
    render: Callable[[str], OfflineDowngrade], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrator.project.downgrade.offline_sql.redact", Redactor(["tr0ub4dor&3"]))
    found = render("op.execute(\"SELECT dblink('password=tr0ub4dor&3')\")")
    assert found == OfflineDowngrade(None, "it holds a password, which must not be kept")


def test_the_running_migration_keeps_its_operations(tmp_path: Path) -> None:
    """A run renders between its own operations: `op` must be the live one afterwards."""
    from alembic import op
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    shutil.copytree(ROOT / "migrations" / "versions", tmp_path / "versions")
    with Operations.context(MigrationContext.configure(dialect_name="sqlite", opts={"as_sql": True})):
        assert offline_downgrade(script(tmp_path, "e47b90c2d615")).statements
        assert op.get_context().dialect.name == "sqlite"
    assert getattr(op, "_proxy", None) is None


def test_the_example_goes_back_by_sql_alone(each_database: Database, tmp_path: Path) -> None:
    example = tmp_path / "example"
    shutil.copytree(ROOT / "migrations", example / "migrations")
    logging_sections = (ENV_FILES / "file_config.ini").read_text()
    (example / "alembic.ini").write_text(ALEMBIC_INI + logging_sections)
    run = plain_alembic.start("upgrade", "head", cwd=example, database=each_database, env={})
    output, _ = run.communicate()
    assert run.returncode == 0, output
    config = Config()
    config.set_main_option("script_location", str(example / "migrations"))
    reasons = {}
    for revision in ScriptDirectory.from_config(config).walk_revisions():
        found = offline_downgrade(revision)
        reasons[revision.revision] = found.reason
        connection = each_database.connect()
        connection.autocommit = True
        for statement in ("BEGIN", *(found.statements or ()), "COMMIT"):
            connection.cursor().execute(statement)
        connection.close()
    assert set(reasons.values()) == {""}, reasons
    left = each_database.psql(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.oid >= 16384 AND n.nspname !~ '^pg_' AND c.relname !~ '^(alembic|migrator)_'"
    )
    assert left == []
