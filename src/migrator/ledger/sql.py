"""The queries on the ledger, as SQL.

Rows of a renamed version table, or of another one in the schema, are not ours. Every query means the
same under any search path, reads no table that inherits from the ledger, and takes ``id`` from
:data:`.table.OLDER`.

If an index alone does not bound the rows that a query reads, the query has two shapes. The shape by
index jumps from name to name ("loose index scan"), and needs the indexes: without them each jump reads
the whole table. ``OFFSET 0`` keeps the planner from joining all rows, instead of those of one name.
https://wiki.postgresql.org/wiki/Loose_indexscan
"""

from __future__ import annotations

from typing import NamedTuple

from migrator.ledger.indexes import BACKUP, LEFT_BY, PLACE
from migrator.ledger.indexes import FAILED as _FAILED
from migrator.ledger.indexes import VISITED as _VISITED
from migrator.ledger.table import NEWEST_FIRST, OLDER

_OURS = "version_table OPERATOR(pg_catalog.=)"
_IS = "event OPERATOR(pg_catalog.=)"
_ENDS = "coalesce(event, '') OPERATOR(pg_catalog.=) 'run'"
"""For a run whose id is known. Written like this, the planner cannot use the index on events, which would
read the rows of all runs.
"""
_FIRST = "CAST('-9223372036854775808' AS pg_catalog.int8)"


class Shapes(NamedTuple):
    """One question in two shapes: by one scan of the table, and by its indexes."""

    scan: str
    by_index: str

    def of(self, indexed: bool) -> str:
        """Return the one for a ledger that has its indexes, or lacks some."""
        return self.by_index if indexed else self.scan


def _place(row: str) -> str:
    return PLACE.replace("(id,", f"({row}.id,")


def _after(row: str, other: str) -> str:
    """Return the condition that a row was written after another one."""
    places = [f"ROW({_place(name)}, {name}.at, {name}.number)" for name in (row, other)]
    return " OPERATOR(pg_catalog.>) ".join(places)


def _newest_first(row: str) -> str:
    return f"{row}.id DESC NULLS FIRST, {row}.at DESC, {row}.number DESC"


def _newest_of_each(columns: str, version_table: str, more: str = "") -> str:
    """Return the query, the recursive part of which is named ``newest``, for the newest row of each revision."""
    rows = f"SELECT {columns} FROM ONLY {{table}} WHERE {_OURS} {version_table} {more}"  # noqa: S608 - constants
    newest = f"ORDER BY revision DESC, {NEWEST_FIRST} LIMIT 1"
    # With a second IS NOT NULL the planner expects few rows and high costs, and compiles the query (JIT).
    before = f"{rows} AND revision OPERATOR(pg_catalog.<) p.revision {newest}"
    first = f"({rows} AND revision IS NOT NULL {newest})"
    return f"{first} UNION ALL SELECT n.* FROM newest p CROSS JOIN LATERAL ({before}) n"  # noqa: S608 - constants


_VERSION_TABLES = """
    (SELECT version_table FROM ONLY {table} ORDER BY version_table DESC LIMIT 1) UNION ALL
    SELECT n.version_table FROM version_tables p CROSS JOIN LATERAL (
        SELECT version_table FROM ONLY {table} WHERE version_table OPERATOR(pg_catalog.<) p.version_table
        ORDER BY version_table DESC LIMIT 1) n
"""
VERSION_TABLES = Shapes(
    scan="SELECT DISTINCT version_table FROM ONLY {table}",
    by_index=f"WITH RECURSIVE version_tables AS ({_VERSION_TABLES}) SELECT t.version_table FROM version_tables t",  # noqa: S608 - constants
)

_ENTRY = (
    "revision, event, checksum, syntax, file, at, run_id, image_version, migrator_version, min_compatible, role,"
    " host"
)
STANDING = Shapes(
    scan=f"""
SELECT s.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT DISTINCT ON (revision) {_ENTRY}
    FROM ONLY {{table}} WHERE {_OURS} %s AND revision IS NOT NULL ORDER BY revision, {NEWEST_FIRST}
) s
""",  # noqa: S608 - constants, and the table's quoted name
    by_index=f"""
WITH RECURSIVE newest AS ({_newest_of_each(_ENTRY, "%s")}) SELECT n.* FROM newest n
""",  # noqa: S608 - constants, and the table's quoted name
)

_STAND = "event OPERATOR(pg_catalog.<>) ALL (ARRAY['reverted', 'unstamped', 'gone'])"
STANDING_NAMES = Shapes(
    scan=f"""
SELECT CAST(pg_catalog.json_agg(revision) AS pg_catalog.text) FROM {OLDER} CROSS JOIN LATERAL (
    SELECT DISTINCT ON (revision) revision, event FROM ONLY {{table}}
    WHERE {_OURS} {{version_table}} AND revision IS NOT NULL ORDER BY revision, {NEWEST_FIRST}
) newest WHERE {_STAND}
""",  # noqa: S608 - constants, and the table's quoted name
    by_index=f"""
WITH RECURSIVE newest AS ({_newest_of_each("revision, event", "{version_table}")})
SELECT CAST(pg_catalog.json_agg(revision) AS pg_catalog.text) FROM newest WHERE {_STAND}
""",  # noqa: S608 - constants, and the table's quoted name
)
"""The applied revisions, as JSON text: one value, without parameters, for any driver."""

LAST_RUN = f"""
SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT run_id, at, command, code, outcome, digest, actor, role, host, image_version
    FROM ONLY {{table}} WHERE {_OURS} %s AND {_IS} 'run' ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name

VISITED = f"""
SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT pg_catalog.jsonb_extract_path(details, 'version_tables') FROM ONLY {{table}}
    WHERE {_OURS} %s AND {_VISITED} ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name
"""As pairs of schema and name."""

FAILED = f"""
SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT pg_catalog.jsonb_extract_path(details, 'failed'), run_id, at, code
    FROM ONLY {{table}} WHERE {_OURS} %s AND {_FAILED} ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name

# Parts outside of a revision's transaction, with no newer row about that revision: its version row was
# not committed. A run that ended with a code below 40 has found that nothing is committed.
_UPGRADE = "pg_catalog.jsonb_extract_path_text(details, 'upgrade') AS upgrade"
_STATEMENT = "pg_catalog.jsonb_extract_path_text(details, 'statement') AS statement"
_PARTIAL = f"FROM ONLY {{table}} WHERE {_OURS} %s AND {_IS} 'partial' AND {LEFT_BY}"
_PARTIAL_ROWS = (
    f"SELECT run_id, id, at, number, backup_id, {_UPGRADE}, {_STATEMENT} {_PARTIAL}"
    " OPERATOR(pg_catalog.=) l.left_by"
)
PARTIAL = Shapes(
    scan=f"""
WITH ordered AS (
    SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
        SELECT event, run_id, at, backup_id, revision, code, {LEFT_BY} AS left_by, {_UPGRADE}, {_STATEMENT},
               pg_catalog.row_number() OVER (ORDER BY id NULLS LAST, at, number) AS place
        FROM ONLY {{table}} WHERE {_OURS} %s
    ) l
)
SELECT left_by, upgrade, statement, run_id, at, backup_id FROM ordered p
WHERE {_IS} 'partial' AND left_by IS NOT NULL AND NOT EXISTS (
    SELECT FROM ordered l WHERE l.revision OPERATOR(pg_catalog.=) p.left_by AND l.place OPERATOR(pg_catalog.>) p.place
       OR l.run_id OPERATOR(pg_catalog.=) p.run_id AND l.{_IS} 'run' AND l.code OPERATOR(pg_catalog.<) 40
       -- A person has said that the part of a downgrade is dealt with: a run passes it only with --retry.
       OR p.upgrade OPERATOR(pg_catalog.=) 'false' AND l.place OPERATOR(pg_catalog.>) p.place AND l.{_IS} 'run'
          AND l.code OPERATOR(pg_catalog.=) 0)
ORDER BY place
""",  # noqa: S608 - constants, and the table's quoted name
    by_index=f"""
WITH RECURSIVE names AS (
    (SELECT {LEFT_BY} AS left_by {_PARTIAL} IS NOT NULL ORDER BY {LEFT_BY} DESC LIMIT 1) UNION ALL
    SELECT n.left_by FROM names p CROSS JOIN LATERAL (
        SELECT {LEFT_BY} AS left_by {_PARTIAL} OPERATOR(pg_catalog.<) p.left_by ORDER BY {LEFT_BY} DESC LIMIT 1) n
),
landed AS (
    SELECT n.left_by, l.id, l.at, l.number, CASE WHEN l.at IS NULL THEN {_FIRST} ELSE {_place("l")} END AS since
    FROM names n LEFT JOIN LATERAL (
        SELECT id, at, number FROM ONLY {{table}} WHERE {_OURS} %s AND revision OPERATOR(pg_catalog.=) n.left_by
        ORDER BY {NEWEST_FIRST} LIMIT 1) l ON true
)
SELECT l.left_by, p.upgrade, p.statement, p.run_id, p.at, p.backup_id FROM landed l CROSS JOIN LATERAL (
    {_PARTIAL_ROWS} AND {PLACE} OPERATOR(pg_catalog.>=) l.since OFFSET 0
) p
WHERE (l.at IS NULL OR {_after("p", "l")})
  AND (SELECT true FROM ONLY {{table}} r WHERE r.run_id OPERATOR(pg_catalog.=) p.run_id AND {_OURS} %s
          AND {_ENDS} AND r.code OPERATOR(pg_catalog.<) 40 LIMIT 1) IS NULL
  AND (p.upgrade IS NULL OR p.upgrade OPERATOR(pg_catalog.<>) 'false' OR NOT coalesce(
        (SELECT {_after("r", "p")} FROM ONLY {{table}} r WHERE {_OURS} %s AND {_IS} 'run'
            AND r.code OPERATOR(pg_catalog.=) 0 ORDER BY {_newest_first("r")} LIMIT 1), false))
ORDER BY p.id NULLS LAST, p.at, p.number
""",  # noqa: S608 - constants, and the table's quoted name
)

# For each version table: the backups of the newest run that changed the schema, and of later runs that
# did not end well (or have not ended yet). The scan reads at most {limit} rows; if it reads that many, one
# row of the answer is NULL. A text that is longer than an id can be is left out.
_CHANGED = f"SELECT run_id, id, at, number FROM ONLY {{table}} WHERE {_OURS} t.version_table AND {_IS}"  # noqa: S608 - constants
_BACKUPS_AFTER = (
    f"SELECT run_id, backup_id, id, at, number FROM ONLY {{table}} WHERE {_OURS} c.version_table AND {BACKUP}"  # noqa: S608 - constants
)
NEEDED_BACKUPS = Shapes(
    scan=f"""
WITH found AS (
    SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
        SELECT run_id, event, version_table, code, backup_id, id, at, number FROM ONLY {{table}} LIMIT {{limit}}
    ) l
),
changed AS (
    SELECT DISTINCT ON (version_table) version_table, run_id, id, at, number FROM found
    WHERE {_IS} ANY (ARRAY['applied', 'reverted']) ORDER BY version_table, {NEWEST_FIRST}
),
well AS (SELECT DISTINCT run_id, version_table FROM found WHERE {_IS} 'run' AND code OPERATOR(pg_catalog.=) 0)
SELECT l.backup_id FROM found l LEFT JOIN changed c ON c.{_OURS} l.version_table
  LEFT JOIN well w ON w.run_id OPERATOR(pg_catalog.=) l.run_id AND w.{_OURS} l.version_table
WHERE pg_catalog.octet_length(l.backup_id) OPERATOR(pg_catalog.<=) {{longest}} AND (
    l.run_id OPERATOR(pg_catalog.=) c.run_id OR w.run_id IS NULL AND (c.at IS NULL OR {_after("l", "c")}))
UNION SELECT NULL WHERE (SELECT pg_catalog.count(*) FROM found) OPERATOR(pg_catalog.=) {{limit}}
""",  # noqa: S608 - constants, the table's quoted name, and a number
    by_index=f"""
WITH RECURSIVE version_tables AS ({_VERSION_TABLES}),
changed AS (
    SELECT t.version_table, c.run_id, c.id, c.at, c.number,
           CASE WHEN c.at IS NULL THEN {_FIRST} ELSE {_place("c")} END AS since
    FROM version_tables t LEFT JOIN LATERAL (
        SELECT b.* FROM (({_CHANGED} 'applied' ORDER BY {NEWEST_FIRST} LIMIT 1) UNION ALL
                         ({_CHANGED} 'reverted' ORDER BY {NEWEST_FIRST} LIMIT 1)) b
        ORDER BY {NEWEST_FIRST} LIMIT 1) c ON true
)
SELECT l.backup_id FROM changed c CROSS JOIN LATERAL (
    SELECT backup_id FROM ONLY {{table}} WHERE {_OURS} c.version_table AND run_id OPERATOR(pg_catalog.=) c.run_id
       AND backup_id IS NOT NULL OFFSET 0) l
UNION
SELECT l.backup_id FROM changed c CROSS JOIN LATERAL (
    {_BACKUPS_AFTER} AND {PLACE} OPERATOR(pg_catalog.>=) c.since OFFSET 0
) l
WHERE (c.at IS NULL OR {_after("l", "c")})
  AND (SELECT true FROM ONLY {{table}} r WHERE r.run_id OPERATOR(pg_catalog.=) l.run_id AND {_OURS} c.version_table
          AND {_ENDS} AND r.code OPERATOR(pg_catalog.=) 0 LIMIT 1) IS NULL
""",  # noqa: S608 - constants, and the table's quoted name
)

LAST_SNAPSHOT = f"""
SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT run_id, at, pg_catalog.jsonb_extract_path(details, 'schema')
    FROM ONLY {{table}} WHERE {_IS} 'schema' ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name

_WAY_BACK = (
    "revision, event, message, parents, depends_on, rows_before, rows_after, way_back, no_way_back, image_version,"
    " search_path, role, id, at, number"
)
_NOT_ACCEPTED = "AND event OPERATOR(pg_catalog.<>) 'accepted'"
STORED_DOWNGRADES = Shapes(
    scan=f"""
SELECT w.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT p.*, pg_catalog.row_number() OVER (ORDER BY {NEWEST_FIRST}) AS nth FROM (
        SELECT DISTINCT ON (revision) {_WAY_BACK} FROM ONLY {{table}}
        WHERE {_OURS} %s AND revision IS NOT NULL {_NOT_ACCEPTED} ORDER BY revision, {NEWEST_FIRST}
    ) p
) w ORDER BY nth
""",  # noqa: S608 - constants, and the table's quoted name
    by_index=f"""
WITH RECURSIVE newest AS ({_newest_of_each(_WAY_BACK, "%s", _NOT_ACCEPTED)})
SELECT n.* FROM newest n ORDER BY {NEWEST_FIRST}
""",  # noqa: S608 - constants, and the table's quoted name
)

_SHOWN = "pg_catalog.to_jsonb(t) OPERATOR(pg_catalog.-) 'way_back' OPERATOR(pg_catalog.#-) '{{details,schema,items}}'"
_IS_SHOWN = f"{_OURS} %s AND (event OPERATOR(pg_catalog.<>) 'schema' OR message IS NOT NULL)"
NEWEST = Shapes(
    scan=f"""
SELECT l.row FROM {OLDER} CROSS JOIN LATERAL (
    SELECT {_SHOWN} AS row FROM ONLY {{table}} t WHERE {_IS_SHOWN} ORDER BY {NEWEST_FIRST} LIMIT %s
) l
""",  # noqa: S608 - constants, and the table's quoted name
    by_index=f"""
SELECT {_SHOWN} FROM ONLY {{table}} t WHERE {_IS_SHOWN} ORDER BY {PLACE} DESC, at DESC, number DESC LIMIT %s
""",  # noqa: S608 - constants, and the table's quoted name
)
"""Schema snapshots are for migrator only; that somebody accepted one is for everybody."""
