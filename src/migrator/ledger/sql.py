"""The queries on the ledger, as SQL.

Rows of a renamed version table, or of another one in the schema, are not ours. Every query means the
same under any search path, reads no table that inherits from the ledger, and takes ``id`` from
:data:`.table.OLDER`.
"""

from __future__ import annotations

from migrator.ledger.table import NEWEST_FIRST, OLDER

_OURS = "version_table OPERATOR(pg_catalog.=)"
_IS = "event OPERATOR(pg_catalog.=)"

STANDING = f"""
SELECT s.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT DISTINCT ON (revision) revision, event, checksum, syntax, file, at, run_id, image_version,
           migrator_version, min_compatible, role, host
    FROM ONLY {{table}} WHERE {_OURS} %s AND revision IS NOT NULL ORDER BY revision, {NEWEST_FIRST}
) s
"""  # noqa: S608 - constants, and the table's quoted name

STANDING_NAMES = f"""
SELECT CAST(pg_catalog.json_agg(revision) AS pg_catalog.text) FROM {OLDER} CROSS JOIN LATERAL (
    SELECT DISTINCT ON (revision) revision, event FROM ONLY {{table}}
    WHERE {_OURS} {{version_table}} AND revision IS NOT NULL ORDER BY revision, {NEWEST_FIRST}
) newest WHERE event OPERATOR(pg_catalog.<>) ALL (ARRAY['reverted', 'unstamped', 'gone'])
"""  # noqa: S608 - constants, and the table's quoted name
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
    WHERE {_OURS} %s AND {_IS} 'run' AND pg_catalog.jsonb_extract_path(details, 'version_tables') IS NOT NULL
    ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name
"""As pairs of schema and name."""

# Every row, and its place in the order of them all.
_ORDERED = f"""
WITH ordered AS (
    SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
        SELECT run_id, event, version_table, code, backup_id,
               pg_catalog.row_number() OVER (ORDER BY id NULLS LAST, at, number) AS place
        FROM ONLY {{table}}
    ) l
)"""  # noqa: S608 - constants, and the table's quoted name

FAILED = f"""
SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT pg_catalog.jsonb_extract_path(details, 'failed'), run_id, at, code
    FROM ONLY {{table}} WHERE {_OURS} %s AND {_IS} 'run'
     AND (code OPERATOR(pg_catalog.=) 0 OR pg_catalog.jsonb_extract_path(details, 'failed') IS NOT NULL)
    ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name

# Parts outside of a revision's transaction, with no newer row about that revision: its version row was
# not committed. A run that ended with a code below 40 has found that nothing is committed.
PARTIAL = f"""
WITH ordered AS (
    SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
        SELECT event, run_id, at, backup_id, revision, code,
               pg_catalog.jsonb_extract_path_text(details, 'revision') AS left_by,
               pg_catalog.jsonb_extract_path_text(details, 'upgrade') AS upgrade,
               pg_catalog.jsonb_extract_path_text(details, 'statement') AS statement,
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
"""  # noqa: S608 - constants, and the table's quoted name

# For each version table: the backups of the newest run that changed the schema, and of later runs that
# did not end well (or have not ended yet).
NEEDED_BACKUPS = f"""
{_ORDERED},
changed AS (
    SELECT DISTINCT ON (version_table) version_table, run_id, place FROM ordered
    WHERE {_IS} ANY (ARRAY['applied', 'reverted']) ORDER BY version_table, place DESC
)
SELECT DISTINCT l.backup_id FROM ordered l LEFT JOIN changed c ON c.{_OURS} l.version_table
WHERE l.backup_id IS NOT NULL AND (
    l.run_id OPERATOR(pg_catalog.=) c.run_id
    OR (c.place IS NULL OR l.place OPERATOR(pg_catalog.>) c.place) AND NOT EXISTS (
        SELECT FROM ordered r WHERE r.run_id OPERATOR(pg_catalog.=) l.run_id AND r.{_OURS} l.version_table
                                AND r.{_IS} 'run' AND r.code OPERATOR(pg_catalog.=) 0
    )
)
"""  # noqa: S608 - constants, and the table's quoted name

LAST_SNAPSHOT = f"""
SELECT l.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT run_id, at, pg_catalog.jsonb_extract_path(details, 'schema')
    FROM ONLY {{table}} WHERE {_IS} 'schema' ORDER BY {NEWEST_FIRST} LIMIT 1
) l
"""  # noqa: S608 - constants, and the table's quoted name

WAYS_BACK = f"""
SELECT w.* FROM {OLDER} CROSS JOIN LATERAL (
    SELECT p.*, pg_catalog.row_number() OVER (ORDER BY {NEWEST_FIRST}) AS nth FROM (
        SELECT DISTINCT ON (revision) revision, event, message, parents, depends_on, rows_before, rows_after, way_back,
               no_way_back, image_version, search_path, role, id, at, number
        FROM ONLY {{table}}
        WHERE {_OURS} %s AND revision IS NOT NULL AND event OPERATOR(pg_catalog.<>) 'accepted'
        ORDER BY revision, {NEWEST_FIRST}
    ) p
) w ORDER BY nth
"""  # noqa: S608 - constants, and the table's quoted name

NEWEST = f"""
SELECT l.row FROM {OLDER} CROSS JOIN LATERAL (
    SELECT pg_catalog.to_jsonb(t) OPERATOR(pg_catalog.-) 'way_back'
           OPERATOR(pg_catalog.#-) '{{{{details,schema,items}}}}' AS row
    FROM ONLY {{table}} t
    WHERE {_OURS} %s AND (event OPERATOR(pg_catalog.<>) 'schema' OR message IS NOT NULL)
    ORDER BY {NEWEST_FIRST} LIMIT %s
) l
"""  # noqa: S608 - constants, and the table's quoted name
"""Schema snapshots are for migrator only; that somebody accepted one is for everybody."""
