"""Compare a restored copy with the original, and with the schema in the archive.

Two facts about the original are known: its content in the snapshot that pg_dump dumped
(fingerprint.py), and the schema as pg_dump wrote it into the archive. The copy is read in the same way,
and dumped by the same pg_dump.

Postgres prints some expressions differently after a restore (``a IN ('x')`` on a varchar comes back
with moved casts, a view with other column names). Definitions that differ are therefore compared once
more without casts and parentheses. For views, whose columns were compared, a difference in the text
alone does not count. If server or pg_dump have another major than the original's, even equal things are
printed differently: the objects are then compared by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from migrator.backups.manifest import Backup, Sequence
from migrator.backups.psql import without_oddities
from migrator.backups.verification.fingerprint import Contents, Value

_HEADER = re.compile(r"^--\n-- Name: (.*); Type: (.*?); Schema: (.*?); Owner: (.*)\n--\n", re.MULTILINE)
_NOISE = re.compile(
    r"^(--.*|\\(un)?restrict .*|SET default_(tablespace|table_access_method) = .*;)\n", re.MULTILINE
)
_CAST = re.compile(
    r'::(("[^"]+"|[a-z_]\w*)\.)?("[^"]+"|[a-z_]\w*)( varying| precision| with(out)? time zone)?(\([\d, ]+\))?(\[\])*'
)
_LEFT_OUT = ("EVENT TRIGGER", "SUBSCRIPTION")
_ROWS = frozenset({"MATERIALIZED VIEW DATA", "TABLE DATA", "SEQUENCE SET", "BLOB", "BLOBS", "BLOB METADATA"})
_SPELLED_ANEW = frozenset({"VIEW", "MATERIALIZED VIEW", "RULE"})


@dataclass(frozen=True)
class Compared:
    """The extent of a comparison: the tables, those with counted rows, and those with hashed rows.

    ``wrong`` has a sentence for each difference, ``unknown`` for each part that could not be compared.
    """

    tables: int
    counted: int
    hashed: int
    rows: int
    wrong: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        counted = f"{self.counted} of them with all their {self.rows} rows counted"
        return f"{self.tables} tables, {counted}, {self.hashed} hashed"


def contents(backup: Backup, found: Contents, *, same_major: bool = True) -> Compared:
    """Compare the content of a copy with the manifest; its schema's catalogs only if both servers have the
    same major.

    Another major stores them differently: since 17, a partition has its parent's identity, for example.
    """
    wrong = [f"table {name} is missing" for name in sorted(backup.tables.keys() - found.tables.keys())]
    wrong += [
        f"table {name} was not in the original" for name in sorted(found.tables.keys() - backup.tables.keys())
    ]
    counted = hashed = rows = 0
    for name, copy in found.tables.items():
        original = backup.tables.get(name)
        if original is None or original.rows is None or name in backup.excluded_table_data:
            continue
        counted, rows = counted + 1, rows + original.rows
        if copy.rows != original.rows:
            wrong.append(f"{name} has {copy.rows} rows, not {original.rows}")
        elif original.rows_hash and copy.rows_hash:
            hashed += 1
            if copy.rows_hash != original.rows_hash:
                wrong.append(f"rows of {name} differ")
    wrong += _sequences(backup.sequences, found.sequences)
    if backup.large_objects and found.large_objects and backup.large_objects != found.large_objects:
        wrong.append("large objects differ")
    if same_major and backup.schema_sha256 and backup.schema_sha256 != found.schema_sha256:
        wrong.append("the schema's columns, constraints, indexes or functions differ")
    unknown = []
    if hashed < counted:
        unknown.append(f"the contents of {counted - hashed} tables (their rows were counted)")
    if not same_major:
        unknown.append("columns, constraints and indexes (the majors differ)")
    return Compared(len(found.tables), counted, hashed, rows, tuple(wrong), tuple(unknown))


def _sequences(original: Mapping[str, Sequence], found: Mapping[str, Value]) -> list[str]:
    wrong = [f"sequence {name} is missing" for name in sorted(original.keys() - found.keys())]
    for name, value in found.items():
        known = original.get(name)
        if known is None:
            continue
        lowest, highest = sorted((known.before[0], known.after[0]))
        same = known.before == known.after
        if same and not (value[1] or known.before[1]):
            continue  # both are unused, and the value of an unused one is not known
        if (same and value != known.before) or not lowest <= value[0] <= highest:
            expected = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
            wrong.append(f"sequence {name} is at {value[0]}, not at {expected}")
    return wrong


def difference(original: Contents, found: Contents) -> list[str]:
    """Return the lines in which two schemas differ: for people, beside the checksum that shows the
    difference.
    """
    before, after = Counter(original.schema), Counter(found.schema)
    lines = [f"missing: {line.strip()}" for line in (before - after).elements()]
    return lines + [f"not in the original: {line.strip()}" for line in (after - before).elements()]


def schemas(archived: bytes, dumped: bytes, *, by_name: bool) -> list[str]:
    """Compare the schema in an archive with that of a copy, both from pg_dump; return the differences."""
    before, after = _objects(archived), _objects(dumped)
    wrong = [f"{name} is missing" for name in sorted((_names(before) - _names(after)).elements())]
    wrong += [
        f"{name} was not in the archive" for name in sorted((_names(after) - _names(before)).elements())
    ]
    if by_name or wrong:
        return wrong
    left, right = before - after, after - before
    anew = {(name, _bare(text)) for (name, text) in right}
    for name, text in left:
        kind = name.partition(" ")[0] if not name.startswith("MATERIALIZED") else "MATERIALIZED VIEW"
        if kind not in _SPELLED_ANEW and (name, _bare(text)) not in anew:
            wrong.append(f"the definition of {name} differs")
    return sorted(wrong)


def _objects(sql: bytes) -> Counter[tuple[str, str]]:
    """Split a schema into its objects, each with its name and its statements; their order does not count."""
    pieces = _HEADER.split(without_oddities(sql).decode("utf-8", "surrogateescape"))
    found: Counter[tuple[str, str]] = Counter()
    for name, kind, schema, owner, text in zip(*(pieces[start::5] for start in range(1, 6)), strict=True):
        if (
            kind in _ROWS
            or kind in _LEFT_OUT
            or (kind in ("COMMENT", "ACL") and name.startswith((*_LEFT_OUT, "LARGE OBJECT")))
        ):
            continue
        found[f"{kind} {schema}.{name} ({owner})", _NOISE.sub("", text).strip()] += 1
    return found


def _names(objects: Counter[tuple[str, str]]) -> Counter[str]:
    names: Counter[str] = Counter()
    for (name, _), count in objects.items():
        names[name] += count
    return names


def _bare(text: str) -> str:
    return re.sub(r"[()\s]+", "", _CAST.sub("", text))
