"""Which revision made which table, where several that do nothing else are asked about with one question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from migrator.measured import STRENGTH, Lock, Measured, Size, Statement
from migrator.touched import COLUMNS

CREATES_A_TABLE = re.compile(
    r"\s*CREATE\s+(?:UNLOGGED\s+)?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?([^\s(]+)\s*\(", re.IGNORECASE
)
"""The name is the group; one with a space in it is not found."""
TOUCHES_ANOTHER = re.compile(r"\b(?:REFERENCES|INHERITS|LIKE|PARTITION|SELECT)\b|;\s*\S", re.IGNORECASE)

# One value, for drivers differ; few joins, for most of the time goes into planning.  A sequence is made ahead of the
# table that owns it, so it is counted as that: https://www.postgresql.org/docs/current/catalog-pg-depend.html
CREATED = f"""
SELECT pg_catalog.json_agg(pg_catalog.json_build_array(c.oid::bigint, {COLUMNS},
       CASE WHEN c.relkind = 'S' THEN (
         SELECT d.refobjid::bigint FROM pg_catalog.pg_depend d
          WHERE d.classid = 1259 AND d.objid = c.oid AND d.refclassid = 1259 AND d.deptype IN ('a', 'i') LIMIT 1) END
       ))::text FROM pg_catalog.pg_class c
 WHERE c.oid > {{highest}} AND c.relkind <> 't' AND pg_catalog.age(c.xmin) <= pg_catalog.age('{{xid}}'::xid)
"""  # noqa: S608 - nothing but numbers
_PART = re.compile(r'"(?:[^"]|"")+"|[^.]+')
_LONGEST_NAME = 63  # bytes, after which Postgres cuts


@dataclass(frozen=True)
class Relation:
    """A relation that a transaction made; ``owner`` is the table that a sequence belongs to, or None."""

    oid: int
    schema: str
    name: str
    kind: str
    file: int | None
    owner: int | None

    @property
    def full_name(self) -> str:
        """Return it as people know it."""
        return f"{self.schema.replace(chr(34), '')}.{self.name}"


@dataclass(frozen=True)
class Unasked:
    """What is known of a revision that only creates tables before the server is asked; ``names`` as it wrote them."""

    seconds: float
    count: int
    spent: float
    statements: tuple[Statement, ...]
    names: tuple[str, ...] = field(default=())

    def measured(self, made: Sequence[Relation]) -> Measured:
        """Return what the revision did, now that it is known what it made."""
        names = tuple(item.full_name for item in made)
        return Measured(
            seconds=self.seconds,
            statement_count=self.count,
            statement_seconds=self.spent,
            statements=self.statements,
            locks=tuple(
                Lock(name, STRENGTH[-1:]) for name in names
            ),  # who makes a relation has this lock on it
            created=names,
            sizes=tuple(
                Size(name, 0, 0) for name, item in zip(names, made, strict=True) if item.kind in ("r", "m")
            ),
        )


def share(made: Sequence[Relation], names: Sequence[Sequence[str]]) -> list[list[Relation]]:
    """Return for each revision what it made, by the tables that its statements name, in the order of their ids.

    Ids ascend: what stands between two tables (their indexes, what a trigger made) came with the first of them.
    """
    ordered = sorted(made, key=lambda item: (item.owner or item.oid, item.oid))
    shares: list[list[Relation]] = [[] for _ in names]
    tables = [item for item in ordered if item.kind in ("r", "p")]
    starts: list[tuple[int, int]] = []
    at = 0
    for number, wanted in enumerate(names):
        for name in map(_last_part, wanted):
            found = next((place for place in range(at, len(tables)) if _same(tables[place], name)), None)
            if found is not None:  # IF NOT EXISTS may have made none
                starts.append((tables[found].oid, number))
                at = found + 1
    place = 0
    for item in ordered:
        while place + 1 < len(starts) and starts[place + 1][0] <= (item.owner or item.oid):
            place += 1
        if shares:
            shares[starts[place][1] if starts else 0].append(item)
    for found_here in shares:
        found_here.sort(key=lambda item: item.oid)
    return shares


def _last_part(name: str) -> str:
    """Return a table's name without its schema, as the catalog has it, but for the case of letters."""
    last: str = (_PART.findall(name) or [""])[-1]
    if last.startswith('"'):
        last = last[1:-1].replace('""', '"')
    return last.encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore").casefold()


def _same(table: Relation, name: str) -> bool:
    return table.name.casefold() == name
