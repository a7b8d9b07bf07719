"""Expectations: ``verify.toml`` read into frozen values, with every problem of the file in one error.

The format is documented in docs/; only listed things are checked.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from migrator.errors import SettingsError
from migrator.schema.names import SERIALS, ForeignKey, canonical_type, foreign_key, relation_name, split_name

FILE_NAME = "verify.toml"
Scalar = str | int | float | bool
T = TypeVar("T")


@dataclass(frozen=True)
class ExpectedColumn:
    """A column: its type in the one spelling of :func:`canonical_type`, and as the file has it."""

    name: str
    type: str
    not_null: bool
    written: str


@dataclass(frozen=True)
class ExpectedTable:
    """The expected content of a table; ``primary_key`` is None if the file does not name one."""

    schema: str
    name: str
    columns: tuple[ExpectedColumn, ...] = ()
    indexes: tuple[str, ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    primary_key: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class Assertion:
    """A query with an expected value in the first column of its first row."""

    name: str
    sql: str
    expect: Scalar


@dataclass(frozen=True)
class Expectations:
    """The whole file."""

    tables: tuple[ExpectedTable, ...] = ()
    assertions: tuple[Assertion, ...] = ()
    allowed_not_valid: frozenset[tuple[str, ...]] = frozenset()
    allowed_invalid_indexes: frozenset[tuple[str, str]] = frozenset()

    def allows_not_valid(self, schema: str, table: str, name: str) -> bool:
        """Return whether the file allows this constraint to be NOT VALID."""
        return bool(self.allowed_not_valid & {(schema, table, name), (schema, name)})


def read(path: Path) -> Expectations | None:
    """Read the file; None if there is none. Raises :class:`SettingsError`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(
            [f"{path}: cannot be read: {reason}"], next_step=f"make {path} readable"
        ) from None
    return parse(text, str(path))


def parse(text: str, file_name: str = FILE_NAME) -> Expectations:
    """Read the text of the file. Raises :class:`SettingsError` with every problem, each naming file and key."""
    next_step = f"correct {file_name}"
    try:
        document = tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError([f"{file_name}: is not TOML: {error}"], next_step=next_step) from None
    reader = _Reader(file_name)
    expectations = reader.file(document)
    if reader.problems:
        raise SettingsError(reader.problems, next_step=next_step)
    return expectations


class _Reader:
    """Reads each part of the file, and collects problems instead of raising."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name
        self.problems: list[str] = []

    def problem(self, key: str, what: object) -> None:
        self.problems.append(f"{self.file_name}: {key}: {what}" if key else f"{self.file_name}: {what}")

    def file(self, document: Mapping[str, Any]) -> Expectations:
        self._known("", document, ("allow", "tables", "assertions"))
        allow = self._mapping("allow", document.get("allow", {}))
        self._known("allow", allow, ("not_valid", "invalid_indexes"))
        not_valid = self._each("allow.not_valid", allow.get("not_valid", []), _constraint_name)
        indexes = self._each("allow.invalid_indexes", allow.get("invalid_indexes", []), relation_name)
        return Expectations(
            tuple(self._tables(self._mapping("tables", document.get("tables", {})))),
            tuple(self._assertions(document.get("assertions", []))),
            frozenset(not_valid),
            frozenset(indexes),
        )

    def _tables(self, tables: Mapping[str, Any]) -> Iterator[ExpectedTable]:
        seen: dict[tuple[str, str], str] = {}
        for written, content in tables.items():
            key = f'tables."{written}"'
            try:
                name = relation_name(written)
            except ValueError as error:
                self.problem(key, error)
                continue
            if name in seen:
                self.problem(key, f'is a duplicate of tables."{seen[name]}"')
            seen[name] = written
            yield self._table(key, written, name, self._mapping(key, content))

    def _table(
        self, key: str, written: str, name: tuple[str, str], content: Mapping[str, Any]
    ) -> ExpectedTable:
        known = ("columns", "indexes", "foreign_keys", "primary_key")
        nested = {
            inner
            for inner, value in content.items()
            if isinstance(value, dict) and inner not in known and set(value) & set(known)
        }
        for inner in sorted(nested):
            self.problem(
                f"tables.{written}.{inner}",
                f'write [tables."{written}.{inner}"], with quotes, for a table',
            )
        self._known(key, [inner for inner in content if inner not in nested], known)
        primary_key = None
        if "primary_key" in content:
            primary_key = self._each(f"{key}.primary_key", content["primary_key"], _plain_name)
            if content["primary_key"] == []:
                self.problem(f"{key}.primary_key", "names no column")
        return ExpectedTable(
            *name,
            tuple(self._columns(f"{key}.columns", content.get("columns", {}))),
            self._each(f"{key}.indexes", content.get("indexes", []), _plain_name),
            self._each(f"{key}.foreign_keys", content.get("foreign_keys", []), foreign_key),
            primary_key,
        )

    def _columns(self, key: str, columns: object) -> Iterator[ExpectedColumn]:
        for name, written in self._mapping(key, columns).items():
            if not isinstance(written, str):
                self.problem(f"{key}.{name}", f"{_shown(written)} is not text such as 'bigint not null'")
                continue
            try:
                yield _column(_plain_name(name), written)
            except ValueError as error:
                self.problem(f"{key}.{name}", error)

    def _assertions(self, assertions: object) -> Iterator[Assertion]:
        if not isinstance(assertions, list):
            self.problem("assertions", "write [[assertions]], with two brackets, before each one")
            return
        seen: set[str] = set()
        for number, content in enumerate(assertions, start=1):
            key = f"assertions[{number}]"
            content = self._mapping(key, content)
            if isinstance(content.get("name"), str) and content["name"].strip():
                key = f"assertions[{number}] {content['name']!r}"
            self._known(key, content, ("name", "sql", "expect"))
            missing = [inner for inner in ("name", "sql", "expect") if inner not in content]
            if missing:
                self.problem(key, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
            name, sql = (
                self._text(f"{key}.{inner}", content[inner]) if inner in content else ""
                for inner in ("name", "sql")
            )
            if name and name in seen:
                self.problem(key, "has the same name as another assertion")
            seen.add(name)
            expect = content.get("expect", 0)
            if not isinstance(expect, (str, int, float)) or (
                isinstance(expect, float) and math.isnan(expect)
            ):
                self.problem(f"{key}.expect", f"{_shown(expect)} is not a number, a text, true or false")
                continue
            yield Assertion(name, sql, expect)

    def _text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            self.problem(key, f"{_shown(value)} is not text")
        elif not value.strip():
            self.problem(key, "is empty")
        elif "\0" in value:
            self.problem(key, "holds a NUL character, which Postgres cannot take")
        else:
            return value
        return ""

    def _each(self, key: str, values: object, convert: Callable[[str], T]) -> tuple[T, ...]:
        if not isinstance(values, list):
            self.problem(key, f'{_shown(values)} is not a list such as ["..."]')
            return ()
        found = []
        for value in values:
            if not isinstance(value, str):
                self.problem(key, f"{_shown(value)} is not text")
                continue
            try:
                found.append(convert(value))
            except ValueError as error:
                self.problem(key, error)
        return tuple(found)

    def _mapping(self, key: str, value: object) -> Mapping[str, Any]:
        if isinstance(value, dict):
            return value
        self.problem(key, f"{_shown(value)} is not a table of keys and values")
        return {}

    def _known(self, key: str, names: Iterable[str], known: tuple[str, ...]) -> None:
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name.lower(), known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
                self.problem(f"{key}.{name}" if key else name, f"is not known{hint}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain_name(text: str) -> str:
    """Read the name of a column or an index: one part, with any character that Postgres allows."""
    name = text[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")+"', text) else text
    if not name.strip() or "\0" in name:
        raise ValueError(f"{text!r} is not a name")
    return name


def _constraint_name(text: str) -> tuple[str, ...]:
    parts = split_name(text)
    if len(parts) not in (2, 3):
        raise ValueError(f"{text!r} does not have the form schema.table.constraint or schema.constraint")
    return parts


def _column(name: str, written: str) -> ExpectedColumn:
    """Read ``bigint not null``; a serial type is NOT NULL by itself, as in CREATE TABLE. Raises ValueError."""
    match = re.fullmatch(r"\s*(.*?)\s*(?:\b(not\s+null|null))?\s*", written, re.IGNORECASE | re.DOTALL)
    type_name, ending = (match[1], match[2] or "") if match else ("", "")
    odd = [word for word in re.sub(r'"[^"]*"', "", type_name).lower().split() if word in _NOT_OF_A_TYPE]
    if not type_name or "\0" in written or odd:
        what = f"holds {odd[0]!r}: only a type and 'not null' belong here" if odd else "names no type"
        raise ValueError(f"{written!r} {what}, such as 'bigint not null' or 'text'")
    not_null = ending.lower().startswith("not") or type_name.lower() in SERIALS
    return ExpectedColumn(name, canonical_type(type_name), not_null, written)


_NOT_OF_A_TYPE = frozenset(
    {"not", "null", "notnull", "not_null", "nullable", "default", "primary", "references", "unique"}
)
