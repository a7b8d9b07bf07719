"""Know revisions that do nothing unusual by the names and opcodes of their functions, which costs next to nothing.

Of every revision it is asked whether each of its statements passes SQLAlchemy, where it is seen before it runs: then
it can end no transaction unnoticed, and what is to be written by the end of that may wait until then.  And most have
a ``downgrade()`` of nothing but calls of operations, which need not be judged by its syntax tree.
"""

from __future__ import annotations

import builtins
import dis
import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from migrator.history.harmless import BUILTINS, OPERATIONS, is_constant, may_be_called

_TO_THE_CONNECTION = frozenset({"get_bind", "get_context", "connection", "cursor", "run_async", "impl"})
_IMPORTS = frozenset({dis.opmap["IMPORT_NAME"]})
_HARMLESS = OPERATIONS - _TO_THE_CONNECTION
_STRAIGHT = frozenset(
    dis.opmap[name]
    for name in (
        *(
            "RESUME",
            "CACHE",
            "NOP",
            "EXTENDED_ARG",
            "PUSH_NULL",
            "PRECALL",
            "CALL",
            "KW_NAMES",
            "CALL_KW",
            "POP_TOP",
        ),
        *("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST", "LOAD_SMALL_INT", "NOT_TAKEN"),
        *("BUILD_LIST", "BUILD_TUPLE", "LIST_EXTEND", "RETURN_VALUE", "RETURN_CONST"),
    )
    if name in dis.opmap  # they differ from version to version
)


def is_plain(function: Any) -> bool:
    """Whether a revision's ``upgrade`` or ``downgrade`` only calls Alembic's operations and makes SQL for them.

    It has neither a connection nor a cursor, and calls no code but that of its own file.
    """
    return _is_plain(function, getattr(function, "__globals__", {}), set())


def is_straight(function: FunctionType) -> bool:
    """Whether a function is nothing but calls of Alembic's operations and SQLAlchemy's constructs, one after another.

    True says that :class:`migrator.history.judgement.Judge` admits it; False says nothing.
    """
    code, names = function.__code__, function.__globals__
    if (
        code.co_argcount
        or code.co_kwonlyargcount
        or code.co_freevars
        or not _STRAIGHT.issuperset(code.co_code[::2])
    ):
        return False
    known = _HARMLESS
    others = []
    for name in code.co_names:
        module = names.get(name)
        if module is None:
            others.append(name)
        elif not isinstance(module, ModuleType):
            return False
        elif module.__name__.startswith("sqlalchemy"):
            known |= _constructs(module)
        elif module.__name__ != "alembic.op":
            return False
    return known.issuperset(others) and not any(name in vars(builtins) for name in others)


def _is_plain(function: Any, module: Mapping[str, Any], seen: set[CodeType]) -> bool:
    if type(function) is not FunctionType or function.__globals__ is not module:
        return False
    if function.__closure__ or function.__defaults__ or function.__kwdefaults__:
        return False
    if function.__code__ in seen:
        return True
    seen.add(function.__code__)
    for code in _codes(function.__code__):
        if not _IMPORTS.isdisjoint(code.co_code[::2]) or not _refused().isdisjoint(code.co_names):
            return False
        for name in code.co_names:
            if name.startswith("_") or (name in module and not _may_use(module[name], module, seen)):
                return False
            if name not in module and name in vars(builtins) and not _is_known(vars(builtins)[name]):
                return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of what is defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _may_use(value: Any, module: Mapping[str, Any], seen: set[CodeType]) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__ == "alembic.op" or value.__name__.partition(".")[0] == "sqlalchemy"
    if type(value) is FunctionType and value.__globals__ is module:
        return _is_plain(value, module, seen)
    return is_constant(value) or _is_known(value)


def _is_known(value: Any) -> bool:
    try:
        known = value in BUILTINS and value is not open
    except TypeError:  # it cannot be hashed
        return False
    return known or may_be_called(value)


@functools.cache
def _constructs(module: ModuleType) -> frozenset[str]:
    """Return what a module of SQLAlchemy's has to make SQL of."""
    return frozenset(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (is_constant(value) or may_be_called(value))
    )


def _refused() -> frozenset[str]:
    """Return the names that lead to the connection, and the operations that are not Alembic's own."""
    from alembic.operations import BatchOperations, Operations

    return _refused_of(
        len(vars(Operations)) + len(vars(BatchOperations))
    )  # one may be registered at any time


@functools.lru_cache(maxsize=1)
def _refused_of(_: int) -> frozenset[str]:
    from alembic.operations import BatchOperations, Operations

    return _TO_THE_CONNECTION | (frozenset((*dir(Operations), *dir(BatchOperations))) - OPERATIONS)
