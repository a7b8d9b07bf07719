"""Hostile objects: what an ordinary role can plant in a schema so that somebody else's SQL runs its code.

Everything planted is a canary.  It writes a line into the server's log, which no rollback takes back, and it
tries to make its owner a superuser.  Then it answers as the builtin object would.  What is planted follows the
code: every function, type and catalog that the SQL in `src/` names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.runner import ROOT
from tests.support.servers import Server

SOURCE = ROOT / "src" / "migrator"
OWNER = "app"
"""The ordinary role that plants all this."""

TYPES = """
oid regclass regrole regnamespace regtype regproc name text varchar "char" int2 int4 int8 bool xid numeric
float8 timestamptz timestamp interval json jsonb text[] name[] oid[] "char"[] int2[] int4[] int2vector oidvector
pg_lsn inet aclitem[]
"""
"""The types that queries of the catalogs meet."""

OPERATORS = "= <> < > <= >= ~ !~ ~* ~~ !~~ ~~* || -> ->> #>> @> <@ && ? + - * / % ^ & |"

SAW, CANARIES = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("saw.sql", "canaries.sql")
)


@dataclass(frozen=True)
class Names:
    """What the SQL texts of the product name."""

    called: tuple[str, ...]
    relations: tuple[str, ...]


def sql_names(source: Path = SOURCE) -> Names:
    """Return every name before a parenthesis, and every `pg_` name, in the string literals of the code."""
    called, relations = set(), set()
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                called.update(re.findall(r"\b([a-z_][a-z0-9_]*)\(", node.value))
                relations.update(re.findall(r"\b(pg_[a-z0-9_]+)\b(?!\()", node.value))
    return Names(tuple(sorted(called)), tuple(sorted(relations)))


def _array(words: Iterable[str]) -> str:
    return "ARRAY[" + ", ".join(f"'{word}'" for word in words) + "]"


def sql(text: str, schema: str) -> str:
    """Return one of the texts with the names in it."""
    names, types = sql_names(), TYPES.split()
    values = {
        "schema": schema,
        "owner": OWNER,
        "names": _array(names.called),
        "relations": _array(names.relations),
        "operators": _array(OPERATORS.split()),
        "types": _array(types),
        "domains": _array(name for name in types if "[" not in name),
    }
    return re.sub(r"@([a-z]+)@", lambda found: values[found[1]], text)


def run_as_app(server: Server, dbname: str, text: str) -> None:
    """Run statements as the ordinary role; a line of dashes ends a transaction."""
    session = server.connect(dbname, user=OWNER)
    session.autocommit = True
    try:
        with session.cursor() as cursor:
            for part in text.split("\n----\n"):
                cursor.execute(part)
    finally:
        session.close()


def plant(server: Server, dbname: str, schema: str) -> None:
    """Plant, as the ordinary role, all that shadows a builtin object; the role may make things in the schema."""
    run_as_app(server, dbname, sql(f"{SAW}\n----\n{CANARIES}", schema))
