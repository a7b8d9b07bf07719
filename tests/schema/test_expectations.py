"""verify.toml: what it means, and every problem of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.errors import SettingsError
from migrator.outcome import ExitCode
from migrator.schema.expectations import Expectations, parse, read
from migrator.schema.names import ForeignKey, canonical_type, foreign_key, relation_name, split_name

WHOLE = """
[allow]
not_valid = ["shop.orders.orders_total_check", "shop.other_check"]
invalid_indexes = ["shop.orders_old_idx", "plain_idx"]

[tables."accounts.users"]
columns = { id = "bigint not null", email = "text  NOT  NULL", nickname = "varchar(40)", n = "serial" }
indexes = ["users_email_key"]
foreign_keys = ["org_id -> accounts.orgs(id)", "a, b -> pairs(x, y)"]
primary_key = ["id"]

[tables.plain]

[[assertions]]
name = "no orphan order lines"
sql = "SELECT count(*) FROM lines"
expect = 0

[[assertions]]
name = "open"
sql = '''SELECT 'x;' -- ]]'''
expect = "x;"
"""


def problems(text: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse(text, "migrations/verify.toml")
    assert caught.value.code is ExitCode.BAD_SETTINGS
    assert caught.value.next_step == "correct migrations/verify.toml"
    for problem in caught.value.problems:
        assert problem.startswith("migrations/verify.toml: ")
        assert problem in str(caught.value)
    return [problem.removeprefix("migrations/verify.toml: ") for problem in caught.value.problems]


def test_the_whole_format() -> None:
    found = parse(WHOLE)
    users, plain = found.tables
    assert (users.schema, users.name, str(plain)) == ("accounts", "users", "public.plain")
    assert [(column.name, column.type, column.not_null) for column in users.columns] == [
        ("id", "bigint", True),
        ("email", "text", True),
        ("nickname", "character varying(40)", False),
        ("n", "integer", True),
    ]
    assert users.indexes == ("users_email_key",)
    assert users.foreign_keys == (
        ForeignKey(("org_id",), "accounts", "orgs", ("id",)),
        ForeignKey(("a", "b"), "public", "pairs", ("x", "y")),
    )
    assert users.primary_key == ("id",)
    assert plain.primary_key is None
    assert [assertion.name for assertion in found.assertions] == ["no orphan order lines", "open"]
    assert [assertion.expect for assertion in found.assertions] == [0, "x;"]
    assert found.allowed_invalid_indexes == {("shop", "orders_old_idx"), ("public", "plain_idx")}
    assert found.allows_not_valid("shop", "orders", "orders_total_check")
    assert found.allows_not_valid("shop", "any", "other_check")
    assert not found.allows_not_valid("shop", "lines", "orders_total_check")
    assert not found.allows_not_valid("public", "any", "other_check")


def test_an_empty_file_and_an_absent_one(tmp_path: Path) -> None:
    assert parse("") == Expectations()
    assert read(tmp_path / "verify.toml") is None


def test_a_file_from_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "verify.toml"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())
    assert read(path) == parse(WHOLE)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "verify.toml"
    path.write_bytes(b"# caf\xe9\n")
    with pytest.raises(SettingsError, match=r"verify\.toml: cannot be read: it is not UTF-8 text"):
        read(path)
    with pytest.raises(SettingsError, match=r"cannot be read: Is a directory"):
        read(tmp_path)
    path.write_text("[tables\n")
    with pytest.raises(SettingsError, match=r"verify\.toml: is not TOML: .*line 1"):
        read(path)


def test_every_problem_is_in_one_error() -> None:
    found = problems(
        """
        surprise = 1
        [allow]
        not_vaild = []
        invalid_indexes = ["a.b.c", 3]
        not_valid = ["alone"]
        [tables."a.b.c"]
        [tables.users]
        colums = {}
        columns = { id = 3, a = "not null", b = "text default 'x'", c = "text nullable", d = "" }
        indexes = "users_email_key"
        foreign_keys = ["org_id", "a, b -> t(x)", "a -> t"]
        primary_key = []
        [tables."public.users"]
        [tables.accounts.orgs]
        columns = { id = "bigint" }
        [[assertions]]
        sql = ""
        expcet = 0
        [[assertions]]
        name = "twice"
        sql = "SELECT 1"
        expect = 2020-01-01
        [[assertions]]
        name = "twice"
        sql = 4
        expect = [1]
        """
    )
    assert found == [
        "surprise: is not known; known are allow, tables, assertions",
        "allow.not_vaild: is not known; did you mean not_valid?",
        "allow.not_valid: 'alone' does not have the form schema.table.constraint or schema.constraint",
        "allow.invalid_indexes: 'a.b.c' is not a name such as schema.name",
        "allow.invalid_indexes: 3 is not text",
        "tables.\"a.b.c\": 'a.b.c' is not a name such as schema.name",
        'tables."users".colums: is not known; did you mean columns?',
        'tables."users".primary_key: names no column',
        "tables.\"users\".columns.id: 3 is not text such as 'bigint not null'",
        "tables.\"users\".columns.a: 'not null' names no type, such as 'bigint not null' or 'text'",
        "tables.\"users\".columns.b: \"text default 'x'\" holds 'default': only a type and 'not null' belong here,"
        " such as 'bigint not null' or 'text'",
        "tables.\"users\".columns.c: 'text nullable' holds 'nullable': only a type and 'not null' belong here,"
        " such as 'bigint not null' or 'text'",
        "tables.\"users\".columns.d: '' names no type, such as 'bigint not null' or 'text'",
        'tables."users".indexes: \'users_email_key\' is not a list such as ["..."]',
        "tables.\"users\".foreign_keys: 'org_id' does not have the form 'column -> schema.table(column)'",
        "tables.\"users\".foreign_keys: 'a, b -> t(x)' has 2 columns on the left and 1 on the right",
        "tables.\"users\".foreign_keys: 'a -> t' does not have the form 'column -> schema.table(column)'",
        'tables."public.users": is a duplicate of tables."users"',
        'tables.accounts.orgs: write [tables."accounts.orgs"], with quotes, for a table',
        "assertions[1].expcet: is not known; did you mean expect?",
        "assertions[1]: name and expect are missing",
        "assertions[1].sql: is empty",
        "assertions[2] 'twice'.expect: datetime.date(2020, 1, 1) is not a number, a text, true or false",
        "assertions[3] 'twice'.sql: 4 is not text",
        "assertions[3] 'twice': has the same name as another assertion",
        "assertions[3] 'twice'.expect: [1] is not a number, a text, true or false",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("tables = 3", "tables: 3 is not a table of keys and values"),
        ("[tables]\nusers = 1", 'tables."users": 1 is not a table of keys and values'),
        (
            "[tables.users]\ncolumns = ['id']",
            "tables.\"users\".columns: ['id'] is not a table of keys and values",
        ),
        ("[assertions]\nname = 'x'", "assertions: write [[assertions]], with two brackets, before each one"),
        ("assertions = [1]", "assertions[1]: 1 is not a table of keys and values"),
        ("allow = []", "allow: [] is not a table of keys and values"),
        (
            "[[assertions]]\nname='n'\nsql='SELECT 1'\nexpect=nan",
            "assertions[1] 'n'.expect: nan is not a number, a text, true or false",
        ),
        (
            '[[assertions]]\nname="n"\nsql="SELECT \\u0000"\nexpect=1',
            "assertions[1] 'n'.sql: holds a NUL character, which Postgres cannot take",
        ),
        ("[[assertions]]\nname=' '\nsql='x'\nexpect=1", "assertions[1].name: is empty"),
        (
            "[[assertions]]\nname='n'\nsql='\t\n'\nexpect=1".replace("'\t\n'", "' '"),
            "assertions[1] 'n'.sql: is empty",
        ),
        ('[tables."a\\u0000b"]', "tables.\"a\x00b\": 'a\\x00b' is not a name"),
        ('[tables.t]\nindexes = ["a\\u0000"]', "tables.\"t\".indexes: 'a\\x00' is not a name"),
        ("[tables.t]\nprimary_key = ['']", "tables.\"t\".primary_key: '' is not a name"),
        ("[tables.'a..b']", "tables.\"a..b\": 'a..b' is not a name"),
        ("[tables.'']", "tables.\"\": '' is not a name"),
        (
            "[tables.t]\ncolumns = { a = 'text notnull' }",
            "tables.\"t\".columns.a: 'text notnull' holds 'notnull': only a type and 'not null' belong here,"
            " such as 'bigint not null' or 'text'",
        ),
    ],
)
def test_one_problem(text: str, problem: str) -> None:
    assert problems(text)[0] == problem


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("int", "integer"),
        ("INT4", "integer"),
        ("bigserial", "bigint"),
        ("int8", "bigint"),
        ("varchar(20)", "character varying(20)"),
        ("varchar", "character varying"),
        ("char(3)", "character(3)"),
        ("char", "character(1)"),
        ('"char"', '"char"'),
        ("timestamptz", "timestamp with time zone"),
        ("timestamptz(3)", "timestamp(3) with time zone"),
        ("timestamp (3) with time zone", "timestamp(3) with time zone"),
        ("timestamp", "timestamp without time zone"),
        ("time", "time without time zone"),
        ("bool", "boolean"),
        ("decimal(10, 2)", "numeric(10,2)"),
        ("numeric(10)", "numeric(10,0)"),
        ("numeric", "numeric"),
        ("float8", "double precision"),
        ("float(24)", "real"),
        ("float(25)", "double precision"),
        ("text[]", "text[]"),
        ("int [3][4]", "integer[]"),
        ("integer array", "integer[]"),
        ("timestamptz(3)[]", "timestamp(3) with time zone[]"),
        ("interval  day to second(3)", "interval day to second(3)"),
        ("bit", "bit(1)"),
        ("jsonb", "jsonb"),
        ('accounts."Status"', "accounts.status"),
    ],
)
def test_types_have_one_spelling(written: str, canonical: str) -> None:
    assert canonical_type(written) == canonical
    assert canonical_type(canonical) == canonical


def test_names() -> None:
    assert split_name("a.b.c") == ("a", "b", "c")
    assert split_name(' "a.b" . "c ""d""" ') == ("a.b", 'c "d"')
    assert relation_name("Users") == ("public", "Users")
    assert relation_name('shop."Order Lines"') == ("shop", "Order Lines")
    for wrong in ("", ".", "a.", ".a", "a b", 'a"b', '"', '""', "a..b"):
        with pytest.raises(ValueError, match="is not a name"):
            split_name(wrong)


def test_foreign_keys_are_the_same_in_any_order_of_pairs() -> None:
    key = foreign_key('a,"B c"->s.t (x ,y)')
    assert key == ForeignKey(("a", "B c"), "s", "t", ("x", "y"))
    assert str(key) == "a, B c -> s.t(x, y)"
    assert key.same_as(ForeignKey(("B c", "a"), "s", "t", ("y", "x")))
    assert not key.same_as(ForeignKey(("a", "B c"), "s", "t", ("y", "x")))
    assert not key.same_as(ForeignKey(("a", "B c"), "public", "t", ("x", "y")))
