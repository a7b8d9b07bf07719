"""The version table of an ``env.py``, read from its syntax tree: running it would import the application."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from migrator.postgres.version_table import VersionTable


class _NotKnown(Exception):
    """Only running the file gives the value."""


def can_run_twice(place: Path) -> bool:
    """Tell whether an ``env.py`` can run twice: an import runs a module's code only once."""
    return "run_migrations" in place.read_text(encoding="utf-8", errors="replace")


def runs_once(place: Path) -> bool:
    """Tell whether an ``env.py`` certainly runs its migrations once, on one version table.

    A loop over tenants does not, and a helper of another module may hide one. Alembic's multidb
    template (``engine_name=``) does not count: each of its databases is its own run.
    """
    try:
        tree = ast.parse(place.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return False
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS)}
    try:
        # If it is not in this file, an imported module does it. Modules are imported once, so that is not
        # checked.
        return _times(tree.body, functions, ()) == 1 or "run_migrations" not in ast.unparse(tree)
    except RecursionError:
        return False


_MANY = 2
_CALLS_ONCE = frozenset({"run", "run_sync", "run_until_complete"})
"""Functions of asyncio, anyio and SQLAlchemy: each calls the passed function once."""
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _times(node: Any, functions: Mapping[str, Any], within: tuple[str, ...]) -> int:
    """Return how often ``context.run_migrations`` may be called in a node of the syntax tree; at most _MANY."""
    if isinstance(node, list):
        return min(_MANY, sum(_times(item, functions, within) for item in node))
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return 0  # every mention counts
    if isinstance(node, (ast.If, ast.IfExp)):
        return max(_times(node.body, functions, within), _times(node.orelse, functions, within))
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in {"self", "cls"}:
        name = name if name == "run_migrations" else ""  # asyncio.run is no function of this file
    if name in functions and not isinstance(getattr(node, "ctx", None), ast.Store):
        inner = _MANY if name in within else _times(functions[name].body, functions, (*within, name))
        return _MANY if inner and functions[name].decorator_list else inner
    if name == "run_migrations":
        return 1
    inside = [_times(child, functions, within) for child in ast.iter_child_nodes(node)]
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called == "run_migrations" and "engine_name" in _keywords(node):
            return 0
        handed = [*node.args, *(item.value for item in node.keywords)]
        if called not in _CALLS_ONCE and any(
            _times(item, functions, within) for item in handed if _is_name(item)
        ):
            return _MANY  # it is not known how often it calls the passed function
    return _MANY if any(inside) and isinstance(node, _LOOPS) else min(_MANY, sum(inside))


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute, ast.Lambda))


def version_table(
    place: Path,
    get_main_option: Callable[[str], str | None],
    x: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> VersionTable | None:
    """Return the version table that an ``env.py`` configures; None if only running it can tell.

    It understands literals, names with one such value (a dictionary of options, if it is only spread
    over calls), set environment variables, ``config.get_main_option`` and
    ``context.get_x_argument(as_dictionary=True)``.
    """
    try:
        text = place.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    online = [call for call in calls if _is_configure(call) and _keywords(call) & {"connection", None}]
    if not online:
        return None  # another module configures Alembic
    reader = _Reader(tree, get_main_option, x, environment)
    try:
        name = _only(reader, online, calls, "version_table") or "alembic_version"
        schema = _only(reader, online, calls, "version_table_schema")
    except (_NotKnown, RecursionError):
        return None
    if not schema and "search_path" in text:
        return None  # in the first schema of that path
    return VersionTable(name, schema)


def _only(reader: _Reader, online: list[ast.Call], calls: list[ast.Call], keyword: str) -> str:
    """Return the single value of a keyword, in ``configure`` or in a helper that receives it."""
    given = [item.value for call in online for item in call.keywords if item.arg == keyword]
    if not given:
        spread = [item.value for call in online for item in call.keywords if item.arg is None]
        given = [value for node in spread for key, value in reader.members(node) if key == keyword]
    given = given or [
        item.value
        for call in calls
        if not _is_configure(call)
        for item in call.keywords
        if item.arg == keyword
    ]
    values = {reader.value(node) or "" for node in given}
    if len(values) > 1 or not all(isinstance(value, str) for value in values):
        raise _NotKnown
    return str(values.pop()) if values else ""


def _is_configure(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name == "configure"


def _keywords(call: ast.Call) -> set[str | None]:
    return {item.arg for item in call.keywords}


_OF_SECTION = re.compile(r"(?:[\w.]+\.)?config\.get_section_option")


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _always_the_same(name: str, bound: Sequence[tuple[str, ast.expr]], stored: Sequence[str]) -> bool:
    """Tell whether a name is bound only here, or to the same value in each function, as in the online and
    offline one.
    """
    values = [ast.dump(node) for other, node in bound if other == name]
    return len(values) == stored.count(name) and len(set(values)) == 1


def _is_main_section(node: ast.expr) -> bool:
    """Tell whether this is the section of the ini that ``-n`` names."""
    return ast.unparse(node).endswith("config.config_ini_section")


class _Reader:
    """Evaluates the few kinds of expression in which projects name a version table."""

    def __init__(
        self,
        tree: ast.Module,
        get_main_option: Callable[[str], str | None],
        x: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self._get_main_option = get_main_option
        self._environment = environment
        self._x = {item.partition("=")[0]: item.partition("=")[2] for item in x}
        stored = [
            node.id if isinstance(node, ast.Name) else node.arg
            for node in ast.walk(tree)
            if isinstance(node, ast.arg)
            or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load))
        ]
        bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, _FUNCTIONS))]
        bound = [item for body in bodies for item in _assignments(body)]
        self._names = {name: node for name, node in bound if _always_the_same(name, bound, stored)}

        loads = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in self._names]
        spread = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg is None]
        spread_names = [node.id for node in spread if isinstance(node, ast.Name)]
        # Any other use of a dictionary may change it; one of the mentions binds it.
        self._options = {name for name in spread_names if loads.count(name) == spread_names.count(name) + 1}

    def members(self, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
        """Yield the members of a dictionary that is spread over a call (``**OPTIONS``); raises _NotKnown."""
        found = self._names.get(node.id) if isinstance(node, ast.Name) and node.id in self._options else None
        if not isinstance(found, ast.Dict):
            raise _NotKnown
        for key, value in zip(found.keys, found.values, strict=True):
            if not isinstance(key, ast.Constant):
                raise _NotKnown
            yield str(key.value), value

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression; raises _NotKnown."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self._names:
            return self.value(self._names[node.id])
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self.value(part)) for part in node.values)
        if isinstance(node, ast.FormattedValue) and node.format_spec is None and node.conversion == -1:
            return self.value(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.value(node.left), self.value(node.right)
            if isinstance(left, str) and isinstance(right, str):
                return left + right
        if isinstance(node, ast.Subscript):
            return self._look_up(ast.unparse(node.value), node.value, [node.slice])
        if isinstance(node, ast.Call):
            return self._call(node)
        raise _NotKnown

    def _call(self, node: ast.Call) -> Any:
        function = ast.unparse(node.func)
        if function.endswith("get_x_argument") and ast.unparse(node).endswith("(as_dictionary=True)"):
            return self._x
        if node.keywords or not node.args:
            raise _NotKnown
        if function in {"os.getenv", "getenv"}:
            return self._look_up("os.environ", node, node.args)
        if function in {"config.get_main_option", "context.config.get_main_option"}:
            found = self._get_main_option(str(self.value(node.args[0])))
            return self.value(node.args[1]) if found is None and len(node.args) > 1 else found
        if _OF_SECTION.fullmatch(function) and len(node.args) > 1 and _is_main_section(node.args[0]):
            found = self._get_main_option(str(self.value(node.args[1])))
            return self.value(node.args[2]) if found is None and len(node.args) > 2 else found
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            return self._look_up(ast.unparse(node.func.value), node.func.value, node.args)
        raise _NotKnown

    def _look_up(self, mapping: str, node: ast.expr, arguments: Sequence[ast.expr]) -> Any:
        key = self.value(arguments[0])
        if mapping in {"os.environ", "environ"}:
            if key not in self._environment:
                raise _NotKnown  # env.py may read a file of variables first
            return self._environment[key]
        values = self.value(node)
        if not isinstance(values, dict):
            raise _NotKnown
        return values.get(key, self.value(arguments[1]) if len(arguments) > 1 else None)


def _assignments(body: Iterable[ast.stmt]) -> Iterable[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value
