"""Patterns of tables' names, as people write them into settings: ``audit_log, logs.*, "Odd name"``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = r'"(?:[^"]|"")+"|[^\s",.]+'
_PATTERN = re.compile(rf"({_PART})(?:\.({_PART}))?")
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


def parse(text: str) -> tuple[Pattern, ...]:
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


def split(name: str) -> tuple[str, str]:
    """Split ``schema.name``, as written by ``format('%I.%I')``; a name without a schema is a schema itself."""
    match = _QUALIFIED.match(name)
    return (_bare(match[1]), _bare(match[2])) if match else (_bare(name), "")


def _bare(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part
