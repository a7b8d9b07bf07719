"""Every SQL text of ours: under the search_path of the user none resolves a name by it; none asks for a bare name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "migrator"

# What is asked on the connection that env.py opened, and by a session before it has left the user's search_path.
ON_THEIRS = {
    "pipeline/apply/connection.py": (),
    "ledger/writer.py": (),
    "pipeline/apply/metrics/relations.py": (),
    "pipeline/apply/revisions.py": ("_OPEN_SINCE",),  # on a session of ours
    "ledger/table.py": (),
    "pipeline/apply/metrics/observer.py": ("_BEFORE", "_SIZE"),  # on a session of ours
    "postgres/search_path.py": ("_FIND", "FIND_RELATION", "LIST_SCHEMAS", "only_beside"),
    "ledger/sql.py": (),
    "ledger/indexes.py": (),
    "ledger/permissions.py": (),
    "postgres/attached_code.py": ("_IS_PLAIN", "_OF_OTHERS", "_TABLE"),  # on a session of ours
    "postgres/server.py": None,
    "pipeline/fast_path/up_to_date.py": None,
}
ONLY = {"postgres/server.py": ("dead_client_settings",), "pipeline/fast_path/up_to_date.py": ("read",)}

_SQL = re.compile(r"\s*(?:(?:SELECT|INSERT|UPDATE|DELETE|WITH|CREATE)\b|pg_catalog\.|CAST\()", re.IGNORECASE)
_OPERATOR = re.compile(r"OPERATOR\(pg_catalog\.[^)\s]+\)")
_GRAMMAR = frozenset(["bigint", "integer", "int", "smallint", "boolean", "numeric", "interval"])
"""Types that the grammar itself puts into pg_catalog."""
_WORDS = frozenset(
    [
        "and",
        "any",
        "all",
        "array",
        "as",
        "by",
        "case",
        "cast",
        "coalesce",
        "desc",
        "else",
        "exists",
        "extract",
        "from",
        "in",
        "insert",
        "into",
        "join",
        "key",
        "lateral",
        "not",
        "on",
        "or",
        "over",
        "primary",
        "returning",
        "select",
        "table",
        "then",
        "values",
        "when",
        "where",
        "with",
    ]
)
"""Words before a parenthesis that call no function."""


def problems(sql: str) -> Iterator[str]:
    """Yield what in a text depends on the search_path; ``?`` stands for what is put in."""
    text = re.sub(r"--[^\n]*", " ", re.sub(r"'(?:[^']|'')*'", "''", sql))
    text = _OPERATOR.sub(" OP ", re.sub(r'"(?:[^"]|"")*"', "name", text))
    named = set(
        re.findall(r"(?:WITH(?:\s+RECURSIVE)?|\),)\s+(\w+)(?:\s*\([^)]*\))?\s+AS\s+\(", text)
    )  # a WITH query hides every table
    for found in re.finditer(r"(?<![\w.?])([a-z_]\w*)\s*\(", text, re.IGNORECASE):
        if found[1].lower() not in {*_WORDS, *named, "op"} and not re.search(
            r"\b(AS|TABLE)\s+$", text[: found.start()]
        ):
            yield f"the function {found[1]}"
    for found in re.finditer(r"::\s*([\w.?]+)", text):
        if "." not in found[1] and found[1] not in _GRAMMAR and "?" not in found[1]:
            yield f"the type {found[1]}"
    for start in (found.end() for found in re.finditer(r"\bCAST\(", text)):
        depth, end = 1, start
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        name = re.split(r"\bAS\s+", text[start : end - 1])[-1].strip()
        if not re.fullmatch(r"pg_catalog\.\w+(\[\])?|\?", name) and name not in _GRAMMAR:
            yield f"the type {name}"
    bare = re.sub(r"::|\.\*|\(\*\)|SELECT \*|%s|%\(\w+\)s", " ", text)
    yield from (f"the operator {found[0]}" for found in re.finditer(r"[=<>!~+*/|&^#@%-]+", bare))
    for found in re.finditer(
        r"\b(?:I?LIKE|SIMILAR|BETWEEN|NULLIF|USING|NATURAL|DISTINCT\s+FROM|IN\s*\(|CASE(?!\s+WHEN))", text
    ):
        yield f"{found[0]}, which looks for an operator"
    for found in re.finditer(r"\b(?:FROM|JOIN|INTO|UPDATE|TABLE)\s+(?!ONLY|LATERAL)([\w?][\w.?]*)", text):
        if (
            found[1] not in named
            and "." not in found[1]
            and "?" not in found[1]
            and "extract(" not in text[: found.start()][-20:]
        ):
            yield f"the table {found[1]}"


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a module's SQL texts, each with the name of what it is in or assigned to; "session" is a call of ours."""
    tree = ast.parse(path.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            text = _joined(node)
            if id(node) not in documents and _SQL.match(text):
                yield name, re.sub(r"(?<!\{)\{[a-z_]+\}", "?", text.replace("{{", "{").replace("}}", "}"))
            return
        if isinstance(node, ast.Call) and re.search(r"session\.(query|value)$", ast.unparse(node.func)):
            name = "session"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, name)

    yield from walk(tree, "")


def _joined(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "?" for part in node.values)


def path_proof(folder: Path) -> list[str]:
    """Return what is wrong with the texts that run under the user's search_path."""
    found = []
    for module, others in ON_THEIRS.items():
        for name, text in texts(folder / module):
            if name in ONLY[module] if others is None else name not in {"session", *others}:
                found += [f"{module}, {name}: {problem} in {text.strip()[:80]}" for problem in problems(text)]
    return found


def test_what_runs_under_the_users_search_path_does_not_depend_on_it() -> None:
    assert not path_proof(SOURCE)


def test_the_texts_are_found() -> None:
    counts = {module: len(list(texts(SOURCE / module))) for module in ON_THEIRS}
    assert counts["pipeline/apply/connection.py"] > 8
    assert {name for name, _ in texts(SOURCE / "ledger/sql.py")} >= {"STANDING_NAMES", "STANDING"}
    assert {name for name, _ in texts(SOURCE / "ledger/permissions.py")} >= {"_HOLES"}
    assert {name for name, _ in texts(SOURCE / "pipeline/apply/metrics/observer.py")} >= {
        "_CREATED",
        "_LOOK",
        "_LOCKED",
        "_UNLOCKED",
    }


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT current_setting('x')",
        "SELECT 1 WHERE 'a' = 'b'",
        "SELECT a || b FROM pg_catalog.pg_class",
        "SELECT oid FROM pg_class",
        "SELECT CAST(a AS text) FROM pg_catalog.pg_class",
        "SELECT a::regclass FROM pg_catalog.pg_class",
        "SELECT a FROM pg_catalog.pg_class WHERE b IN (1, 2)",
        "SELECT CASE a WHEN 1 THEN 2 END FROM pg_catalog.pg_class",
        "SELECT a FROM pg_catalog.pg_class WHERE b LIKE 'x'",
        "SELECT a->>'b' FROM pg_catalog.pg_class",
        "SELECT a FROM pg_catalog.pg_class JOIN pg_catalog.pg_proc USING (oid)",
        "INSERT INTO migrator_ledger SELECT 1",
    ],
)
def test_a_text_that_depends_on_it_is_found(sql: str) -> None:
    assert list(problems(sql))


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (
            "ledger/sql.py",
            "CAST(pg_catalog.json_agg(revision) AS pg_catalog.text)",
            "json_agg(revision)",
        ),
        ("ledger/table.py", "pg_catalog.aclexplode", "aclexplode"),
        ("pipeline/apply/metrics/observer.py", 'AS pg_catalog."char"[]', 'AS "char"[]'),
        (
            "postgres/search_path.py",
            "pg_catalog.current_setting('search_path')",
            "current_setting('search_path')",
        ),
        ("pipeline/apply/connection.py", "pg_catalog.pg_backend_pid()", "pg_backend_pid()"),
    ],
)
def test_a_mutant_is_found(module: str, old: str, new: str, tmp_path: Path) -> None:
    for name in ON_THEIRS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((SOURCE / name).read_text())
    assert not path_proof(tmp_path)
    whole = (SOURCE / module).read_text()
    assert old in whole
    (tmp_path / module).write_text(whole.replace(old, new))
    assert path_proof(tmp_path)


_BY_PATH = re.compile(
    r"\bcurrent_schema\b|_is_visible\(|'(?!pg_)[^'.]*'::regclass|to_regclass\('[^'.%{?]*'\)", re.IGNORECASE
)
"""Answers that depend on a search_path: ours has nothing of the user's on it."""


def test_nothing_is_looked_up_by_a_bare_name() -> None:
    everything = [(path, text) for path in SOURCE.rglob("*.py") for _, text in texts(path)]
    assert len(everything) > 150
    assert not [(path.name, text) for path, text in everything if _BY_PATH.search(text)]
