"""Tables whose rows a backup leaves out: MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA, matched with what is there.

pg_dump has patterns of its own, and says nothing of what they match.  Ours are matched here, and pg_dump is given
each table by its full name, so the manifest names exactly those whose rows are not in the dump.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from migrator.backups.snapshot import Relation
from migrator.postgres import Session

_PART = r'"(?:[^"]|"")+"|[^\s",.]+'
_PATTERN = re.compile(rf"({_PART})(?:\.({_PART}))?")

# A partitioned table holds no rows itself: its partitions do, and theirs.
_BELOW = """
WITH RECURSIVE below AS (
  SELECT inhrelid FROM pg_inherits JOIN pg_class p ON p.oid = inhparent
   WHERE p.relkind = 'p' AND inhparent = ANY(%s::oid[])
  UNION
  SELECT i.inhrelid FROM pg_inherits i JOIN below b ON i.inhparent = b.inhrelid
) SELECT inhrelid::bigint FROM below
"""


@dataclass(frozen=True)
class Pattern:
    """A table's name with ``*`` and ``?``, in one schema or in any; ``text`` is as it was written."""

    text: str
    schema: re.Pattern[str] | None
    table: re.Pattern[str]

    def matches(self, relation: Relation) -> bool:
        """Whether the pattern names a relation."""
        return (self.schema is None or bool(self.schema.fullmatch(relation.schema))) and bool(
            self.table.fullmatch(relation.name)
        )


def parse(text: str) -> tuple[Pattern, ...]:
    """Read ``audit_log, logs.*, "Odd".t``; raises ValueError.

    As in psql, what is not quoted is lower case, and only there ``*`` and ``?`` stand for other characters.
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
        return re.compile(re.escape(part[1:-1].replace('""', '"')))
    shapes = {"*": ".*", "?": "."}
    return re.compile("".join(shapes.get(char, re.escape(char)) for char in part.lower()), re.DOTALL)


def find(session: Session, patterns: Sequence[Pattern], found: Sequence[Relation]) -> list[Relation]:
    """Return the tables whose rows are to be left out: those that patterns name, and their partitions."""
    tables = {relation.oid: relation for relation in found if relation.kind in "rp"}
    named = {oid for oid, table in tables.items() if any(item.matches(table) for item in patterns)}
    if any(tables[oid].kind == "p" for oid in named):
        named |= {row[0] for row in session.query(_BELOW, [sorted(named)])} & tables.keys()
    return [table for oid, table in tables.items() if oid in named and table.kind == "r"]


def unmatched(patterns: Sequence[Pattern], found: Sequence[Relation]) -> list[str]:
    """Return the patterns that name no table: misspelt, or of a table that is gone."""
    tables = [relation for relation in found if relation.kind in "rp"]
    return [item.text for item in patterns if not any(item.matches(table) for table in tables)]
