"""Names of relations, columns and types as people write them, and patterns of tables' names; pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r'\s*(?:"((?:[^"\0]|"")+)"|([^\s".,()\0]+))\s*')

# https://www.postgresql.org/docs/current/datatype.html, table 8.1; {} is where the modifier stands.
_ALIASES = {
    alias: name
    for name, aliases in {
        "integer": "int, int4, serial, serial4",
        "bigint": "int8, bigserial, serial8",
        "smallint": "int2, smallserial, serial2",
        "boolean": "bool",
        "numeric{}": "decimal, dec",
        "real": "float4",
        "double precision": "float8, float",
        "character varying{}": "varchar, char varying",
        "character{}": "char",
        "bit varying{}": "varbit",
        "timestamp{} without time zone": "timestamp, timestamp without time zone",
        "timestamp{} with time zone": "timestamptz, timestamp with time zone",
        "time{} without time zone": "time, time without time zone",
        "time{} with time zone": "timetz, time with time zone",
    }.items()
    for alias in aliases.split(", ")
}
SERIALS = frozenset({"serial", "serial4", "bigserial", "serial8", "smallserial", "serial2"})


@dataclass(frozen=True)
class ForeignKey:
    """Columns that refer to columns of another table, in the same order."""

    columns: tuple[str, ...]
    schema: str
    table: str
    references: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.columns)} -> {self.schema}.{self.table}({', '.join(self.references)})"

    def same_as(self, other: ForeignKey) -> bool:
        """Return whether both pair the same columns, in any order."""
        mine, theirs = (
            zip(self.columns, self.references, strict=True),
            zip(other.columns, other.references, strict=True),
        )
        return (self.schema, self.table) == (other.schema, other.table) and set(mine) == set(theirs)


def split_name(text: str) -> tuple[str, ...]:
    """Split ``schema.table`` into its parts; a part in double quotes may hold any character. Raises
    ValueError.

    Case counts, quoted or not: names are written as in the catalog.
    """
    parts = []
    position = 0
    while True:
        match = _PART.match(text, position)
        if match is None:
            raise ValueError(f"{text!r} is not a name")
        parts.append(match[1].replace('""', '"') if match[1] is not None else match[2])
        position = match.end()
        if position == len(text):
            return tuple(parts)
        if text[position] != ".":
            raise ValueError(f"{text!r} is not a name")
        position += 1


def relation_name(text: str) -> tuple[str, str]:
    """Read ``schema.name``, or ``name`` for one in ``public``. Raises ValueError."""
    parts = split_name(text)
    if len(parts) > 2:
        raise ValueError(f"{text!r} is not a name such as schema.name")
    return (parts[0], parts[1]) if len(parts) == 2 else ("public", parts[0])


def column_names(text: str) -> tuple[str, ...]:
    """Read ``a, b``. Raises ValueError."""
    names = [split_name(part) for part in text.split(",")]
    if any(len(name) != 1 for name in names):
        raise ValueError(f"{text!r} is not a list of column names")
    return tuple(name[0] for name in names)


def foreign_key(text: str) -> ForeignKey:
    """Read ``a, b -> schema.table(x, y)``. Raises ValueError."""
    match = re.fullmatch(r"\s*(.+?)\s*->\s*([^()]+?)\s*\(([^()]+)\)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} does not have the form 'column -> schema.table(column)'")
    columns, references = column_names(match[1]), column_names(match[3])
    if len(columns) != len(references):
        raise ValueError(
            f"{text!r} has {len(columns)} columns on the left and {len(references)} on the right"
        )
    schema, table = relation_name(match[2])
    return ForeignKey(columns, schema, table, references)


def canonical_type(text: str) -> str:
    """Return the canonical spelling of a type: ``varchar(9)`` is ``character varying(9)``.

    It is applied to the user's text and to ``format_type()``, so that the two can be compared.
    """
    text = " ".join(text.split())
    array = re.search(r"(?:(?:\s*\[\s*\d*\s*\])+|\s+array)$", text, re.IGNORECASE)
    if array is not None:
        text = text[: array.start()]
    if text == '"char"':  # the one-byte type, which differs from char
        return text + ("[]" if array else "")
    text = text.replace('"', "").lower()
    name, _, tail = text.partition("(")
    modifier, _, rest = tail.partition(")")
    name = " ".join(f"{name} {rest}".split())
    modifier = ",".join(part.strip() for part in modifier.split(",")) if modifier.strip() else ""
    return _with_modifier(name, modifier) + ("[]" if array else "")


def _with_modifier(name: str, modifier: str) -> str:
    if name == "float" and modifier.isdecimal():
        return "real" if int(modifier) <= 24 else "double precision"
    pattern = _ALIASES.get(name, name + "{}")
    if not modifier and pattern in {"character{}", "bit{}"}:
        modifier = "1"
    if pattern == "numeric{}" and modifier and "," not in modifier:
        modifier += ",0"
    shown = f"({modifier})" if modifier else ""
    return pattern.format(shown) if "{}" in pattern else pattern + shown


_PATTERN_PART = r'"(?:[^"]|"")+"|[^\s",.]+'
_PATTERN = re.compile(rf"({_PATTERN_PART})(?:\.({_PATTERN_PART}))?")
_QUALIFIED = re.compile(r'("(?:[^"]|"")+"|[^".(]+)\.("(?:[^"]|"")+"|[^"(]+)')


@dataclass(frozen=True)
class Pattern:
    """A table's name with ``*`` and ``?``, in one schema or in any; ``text`` is as it was written."""

    text: str
    schema: re.Pattern[str] | None
    table: re.Pattern[str]

    def matches(self, schema: str, name: str) -> bool:
        """Tell whether the pattern matches this name in this schema, both without quotes."""
        return (self.schema is None or bool(self.schema.fullmatch(schema))) and bool(
            self.table.fullmatch(name)
        )


def parse_patterns(text: str) -> tuple[Pattern, ...]:
    """Read ``audit_log, logs.*, "Odd".t``; raises ValueError.

    As in psql, unquoted text is lower case, and only there ``*`` and ``?`` are wildcards.
    """
    found: list[Pattern] = []
    rest = text.strip()
    while rest:
        match = _PATTERN.match(rest)
        tail = rest[match.end() :].lstrip() if match else ""
        if match is None or (tail and not tail.startswith(",")):
            raise ValueError(f'{text!r} is not a list of tables such as audit_log, logs.*, "Odd name"')
        first, second = match[1], match[2]
        schema = _expression(first) if second else None
        found.append(Pattern(match[0], schema, _expression(second or first)))
        rest = tail[1:].lstrip()
    return tuple(found)


def _expression(part: str) -> re.Pattern[str]:
    if part.startswith('"'):
        return re.compile(re.escape(_bare(part)))
    shapes = {"*": ".*", "?": "."}
    return re.compile("".join(shapes.get(char, re.escape(char)) for char in part.lower()), re.DOTALL)


def split_formatted(name: str) -> tuple[str, str]:
    """Split ``schema.name``, as written by ``format('%I.%I')``; a name without a schema is a schema itself."""
    match = _QUALIFIED.match(name)
    return (_bare(match[1]), _bare(match[2])) if match else (_bare(name), "")


def _bare(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part
