"""The meaning of a Python file, apart from its format: one digest over its syntax tree.

It distinguishes an edit of comments or formatting from a real one. It is a separate module because it
imports ast, which an up-to-date check never needs.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from typing import Any


def digest(source: bytes) -> str:
    """Return a sha256 (hexadecimal) over the syntax tree of a source text; empty if it is not Python.

    Comments, formatting, docstrings and statements without effect (``pass``, a string by itself) do not
    count. A file after a formatter, or with another Create Date, has the same digest. The canonical
    form does not depend on Python's version from 3.11 on: new fields of later versions are empty for
    older sources, and empty fields are left out. Text that this Python cannot parse has no digest.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return hashlib.sha256(_canonical(tree)).hexdigest()


_WITHOUT_MEANING = frozenset({"ctx", "kind", "type_comment", "type_ignores"})
_FIELDS: dict[type[ast.AST], tuple[str, tuple[str, ...]]] = {}


def _fields(kind: type[ast.AST]) -> tuple[str, tuple[str, ...]]:
    """Return a node class's name and its relevant fields, sorted, because versions may reorder them."""
    found = _FIELDS.get(kind)
    if found is None:
        found = kind.__name__, tuple(sorted(set(kind._fields) - _WITHOUT_MEANING))
        _FIELDS[kind] = found
    return found


def _canonical(tree: ast.AST) -> bytes:
    """Write a tree as ``Name(field=value ...)`` without recursion, because an expression can be deep.

    Strings are written with their length, so their content cannot look like the structure around it.
    """
    out: list[str] = []
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if item.__class__ is str:
            out.append(item)
        elif isinstance(item, ast.Constant):
            out.append(_constant(item.value))
        elif isinstance(item, ast.AST):
            name, fields = _fields(item.__class__)
            out.append(name)
            if fields:
                _push(item, fields, stack)
        else:  # None within a list, as for the ** of a dictionary; an identifier within one; a plain field
            out.append(_constant(item[0]))
    return "".join(out).encode("utf-8", "surrogatepass")


def _push(node: ast.AST, fields: tuple[str, ...], stack: list[Any]) -> None:
    """Put a node's fields on the stack, the last one first; skip empty ones."""
    values = node.__dict__
    todo: list[Any] = ["("]
    for field in fields:
        value = values.get(field)
        if value is None:
            continue
        if value.__class__ is not list:
            todo.append(f" {field}=")
            todo.append(value if isinstance(value, ast.AST) else (value,))
        elif kept := _kept(value, node):
            todo.append(f" {field}=[")
            todo += kept
            todo.append("]")
    todo.append(")")
    todo.reverse()
    stack += todo


def _kept(values: list[Any], node: ast.AST) -> list[Any]:
    """Return the members of a list that have a meaning."""
    if isinstance(node, ast.JoinedStr):
        return _joined(values)
    if not isinstance(values[0] if values else None, ast.stmt):
        return [value if isinstance(value, ast.AST) else (value,) for value in values]
    return [value for value in values if not _without_effect(value)]


def _without_effect(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass)


def _joined(values: Iterable[Any]) -> list[Any]:
    """Return an f-string's parts with adjacent texts joined: versions of Python split them differently."""
    parts: list[Any] = []
    for value in values:
        if not isinstance(value, ast.Constant):
            parts.append(value)
        elif parts and isinstance(parts[-1], ast.Constant):
            parts[-1] = ast.Constant(f"{parts[-1].value!s}{value.value!s}")
        elif value.value:
            parts.append(value)
    return parts


def _constant(value: Any) -> str:
    """Write a constant; not with repr() for text, which depends on the version's Unicode tables."""
    if value.__class__ is str:
        return f"s{len(value)}:{value}"
    if value.__class__ is int:
        return f"i{value:x}"  # hexadecimal: Python refuses thousands of decimal digits
    if value.__class__ is bytes:
        return f"b{value.hex()}"
    return f"{value.__class__.__name__}:{value!r}"
