"""The names and kinds of objects that a ``downgrade()`` may use when it is called without a database."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import datetime
import decimal
import enum
import itertools
import json
import logging
import os.path
import pathlib
import re
import textwrap
import uuid
from collections.abc import Iterator
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPERATIONS = _words(
    """add_column alter_column batch_alter_table bulk_insert create_check_constraint create_exclude_constraint
    create_foreign_key create_index create_primary_key create_table create_table_comment create_unique_constraint
    drop_column drop_constraint drop_index drop_table drop_table_comment execute f get_bind get_context
    inline_literal rename_table"""
)
"""Alembic's own operations; one that a package registers could do anything."""

METHODS = _words(
    # of strings and containers
    """capitalize copy count decode difference encode endswith format format_map get index intersection isoformat
    items join keys lower lstrip partition removeprefix removesuffix replace rpartition rsplit rstrip split
    splitlines startswith strip title union upper values zfill """
    # of SQLAlchemy's constructs
    """alias any_ all_ as_integer as_scalar as_string asc between bindparams bool_op cast collate columns concat
    contains correlate cte delete desc distinct exists execution_options filter filter_by from_select group_by
    has_key having ilike in_ is_ is_distinct_from is_not isnot join label like limit not_ilike not_in not_like
    notin_ notlike nulls_first nulls_last offset on_conflict_do_nothing on_conflict_do_update op order_by outerjoin
    over params returning scalar_subquery select select_from subquery union_all where with_only_columns
    with_variant within_group create create_all drop drop_all """
    # of Alembic's context, and of files
    """autocommit_block absolute joinpath read read_text readlines resolve with_name with_suffix"""
)

MUTATIONS = _words("add append clear discard extend insert pop remove reverse setdefault sort update")
"""Methods that change a container; ``insert`` and ``update`` of a table make statements."""

LOGGING = _words("debug error info warn warning")

ATTRIBUTES_REFUSED = _words(
    "engine url connection dbapi config environment_context script opts pool sync_connection"
)

BUILTINS: frozenset[Any] = frozenset(
    (
        *(
            range,
            len,
            enumerate,
            zip,
            sorted,
            reversed,
            str,
            int,
            float,
            bool,
            list,
            tuple,
            dict,
            set,
            frozenset,
        ),
        *(min, max, sum, any, all, repr, isinstance, abs, round, bytes, print, open),
        *(datetime.date, datetime.datetime, datetime.timedelta, datetime.time, decimal.Decimal, uuid.UUID),
        *(json.dumps, json.loads, textwrap.dedent, textwrap.indent, itertools.chain, itertools.product),
        *(re.sub, re.compile, re.escape, os.path.join, os.path.dirname, os.path.abspath, os.path.realpath),
        *(os.path.basename, pathlib.Path, pathlib.PurePath),
    )
)
"""Functions without a side effect; printed text is discarded, and ``open`` only reads."""

_SCALARS = (
    *(str, int, float, complex, bool, bytes, type(None), type(...), decimal.Decimal, datetime.date),
    *(datetime.time, datetime.timedelta, uuid.UUID, pathlib.PurePath, enum.Enum, re.Pattern, logging.Logger),
)
_GENERATED = ("<string>", collections.namedtuple.__code__.co_filename, dataclasses.field.__code__.co_filename)
_FIELD = type(vars(collections.namedtuple("_", "a"))["a"])
_PLAIN_DESCRIPTORS = (MemberDescriptorType, GetSetDescriptorType, _FIELD)
_ENOUGH = 10_000
_SQL = ("sqlalchemy.sql", "sqlalchemy.dialects.postgresql", "sqlalchemy.types", "sqlalchemy.util.langhelpers")


def is_constant(value: Any, depth: int = 4) -> bool:
    """Tell whether a value of the module is harmless: a literal, a construct of SQLAlchemy, or a type of it.

    Also dataclasses and named tuples of such values, if their :func:`own_code` is harmless.
    """
    if type(value) in (list, tuple, set, frozenset):
        return depth > 0 and len(value) <= _ENOUGH and all(is_constant(item, depth - 1) for item in value)
    if type(value) is dict:
        pairs = (is_constant(key, depth - 1) and is_constant(item, depth - 1) for key, item in value.items())
        return depth > 0 and len(value) <= _ENOUGH and all(pairs)
    if _is_record(value):
        parts = value if isinstance(value, tuple) else vars(value).values()
        return depth > 0 and all(is_constant(item, depth - 1) for item in parts)
    if isinstance(value, type):
        exception = issubclass(value, Exception) and value.__module__ == "builtins"
        return (
            exception
            or value in (str, int, float, bool, list, dict, bytes, tuple)
            or issubclass(value, enum.Enum)
            or _is_sql(value)
        )
    return isinstance(value, _SCALARS) or _is_sql(type(value))


def own_code(value: Any) -> Iterator[Any]:
    """Yield the methods and properties of the records in a constant, except generated ones."""
    if type(value) is dict:
        value = tuple(value.values())
    record = _is_record(value)
    if isinstance(value, (tuple, list, set, frozenset)):
        for item in value:
            if isinstance(item, (tuple, list, dict)) or _is_record(item):
                yield from own_code(item)
    for base in type(value).__mro__ if record else ():
        for member in vars(base).values() if base not in (tuple, object) else ():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                if function.__code__.co_filename not in _GENERATED:
                    yield function
            elif hasattr(type(function), "__get__") and not isinstance(function, _PLAIN_DESCRIPTORS):
                yield function


def _is_record(value: Any) -> bool:
    return not isinstance(value, type) and (
        dataclasses.is_dataclass(value) or hasattr(type(value), "_fields")
    )


def may_be_called(value: Any) -> bool:
    """Tell whether this is a constructor of SQLAlchemy's SQL constructs or types, or an exception to raise."""
    if isinstance(value, type):
        return (
            _is_sql(value)
            or (issubclass(value, Exception) and _is_exception(value))
            or value is builtins.object
        )
    return (
        callable(value)
        and not isinstance(value, type)
        and str(getattr(value, "__module__", "")).startswith(_SQL)
    )


def is_function_namespace(value: Any) -> bool:
    """Tell whether this is ``sqlalchemy.func``: each of its attributes is an SQL function."""
    return type(value).__name__ == "_FunctionGenerator" and type(value).__module__.startswith(_SQL)


def _is_exception(kind: type) -> bool:
    return kind.__module__ == "builtins" or kind.__module__.startswith("alembic.")


def _is_sql(kind: type) -> bool:
    from sqlalchemy.types import TypeEngine

    return kind.__module__.startswith(_SQL) or issubclass(kind, TypeEngine)
