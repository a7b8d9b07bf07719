"""Names of relations, columns and types as people write them; pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r'\s*(?:"((?:[^"\0]|"")+)"|([^\s".,()\0]+))\s*')

# https://www.postgresql.org/docs/current/datatype.html, table 8.1; {} is where the modifier stands.
_ALIASES = {
    "int": "integer",
    "int4": "integer",
    "serial": "integer",
    "serial4": "integer",
    "int8": "bigint",
    "bigserial": "bigint",
    "serial8": "bigint",
    "int2": "smallint",
    "smallserial": "smallint",
    "serial2": "smallint",
    "bool": "boolean",
    "decimal": "numeric{}",
    "dec": "numeric{}",
    "float4": "real",
    "float8": "double precision",
    "float": "double precision",
    "varchar": "character varying{}",
    "char varying": "character varying{}",
    "char": "character{}",
    "varbit": "bit varying{}",
    "timestamp": "timestamp{} without time zone",
    "timestamp without time zone": "timestamp{} without time zone",
    "timestamptz": "timestamp{} with time zone",
    "timestamp with time zone": "timestamp{} with time zone",
    "time": "time{} without time zone",
    "time without time zone": "time{} without time zone",
    "timetz": "time{} with time zone",
    "time with time zone": "time{} with time zone",
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
