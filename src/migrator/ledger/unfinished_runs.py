"""The leftovers of runs that did not end well, killed or failed.

A run's first row in the ledger (``begun``, except in an empty database) is written before it builds
anything, and its row ``run`` at its end. The server knows the order of two rows, of the ledger and of
its own catalog (their xmin), without any clock. An index that appeared between these two rows appeared
during that run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from migrator.ledger import indexes
from migrator.ledger.queries import query_ledger
from migrator.ledger.table import NEWEST_FIRST, beside
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.project import Plan
from migrator.schema.catalog import Index

_MEANWHILE = "event NOT IN ('run', 'schema', 'accepted')"
# The first rows of runs that were killed, or that report a possible commit: an outcome below 40 reports
# none.
_ENDED_BADLY = f"""
ONLY {{table}} l
LEFT JOIN LATERAL (
    SELECT code, xmin FROM ONLY {{table}}
    WHERE run_id = l.run_id AND version_table = l.version_table AND coalesce(event, '') = 'run' OFFSET 0) r ON true
WHERE l.version_table = %(name)s AND l.{_MEANWHILE} AND (r.code IS NULL OR r.code >= 40)
  AND NOT EXISTS (SELECT 1 FROM ONLY {{table}} e WHERE e.run_id = l.run_id AND e.version_table = l.version_table
                  AND e.number < l.number AND e.{_MEANWHILE})
  {{earliest l}}
"""  # noqa: S608 - constants only
# A ledger with indexes is read from this row on. The rest of each query excludes the earlier rows too.
_EARLIEST = "AND {place} >= coalesce(({since}), -9223372036854775808)"
_PLACES = {"l": indexes.PLACE.replace("(id,", "(l.id,"), "g": "g.id"}
"""By alias. A run that ended well, whose row has no number, does not count: then a new backup is made."""
# The runs that matter began after the newest row about the revision. If there is none, they began with
# the run in which its parent was first applied, or later.
_SINCE_IT_LANDED = f"""
SELECT coalesce(
    (SELECT s.id FROM ONLY {{table}} s WHERE s.version_table = %(name)s AND s.revision = %(revision)s
        AND s.event <> 'accepted' ORDER BY {NEWEST_FIRST} LIMIT 1),
    (SELECT min(b.id) FROM ONLY {{table}} b WHERE b.version_table = %(name)s AND b.run_id = (
        SELECT p.run_id FROM ONLY {{table}} p WHERE p.version_table = %(name)s AND p.revision = %(parent)s
         ORDER BY p.id, p.at, p.number LIMIT 1)))
"""  # noqa: S608 - constants only
_SINCE_ONE_ENDED_WELL = f"""
SELECT g.id FROM ONLY {{table}} g WHERE g.version_table = %(name)s AND g.event = 'run' AND g.code = 0
   AND age(g.xmin) > age(%(next)s::text::xid) ORDER BY {NEWEST_FIRST} LIMIT 1
"""  # noqa: S608 - constants only
# Whether a row was written after that one; if a restore wrote them all at once, only their clock can
# tell.
_LATER = "(age({0}.xmin) < age(l.xmin) OR {0}.xmin = l.xmin AND {0}.at > l.at)"
# For each valid index without a constraint: the first such run in which it appeared, while its revision
# was pending, if the revision has not been applied since. The age of a row is how many transactions ago
# it was written.
_BUILT = f"""
SELECT DISTINCT ON (c.oid) n.nspname::text, c.relname::text, t.relname::text, i.indisunique, c.oid::bigint,
       run.run_id, run.at, run.backup_id
FROM (SELECT l.run_id, l.at, coalesce(l.details->>'way_back', l.backup_id, '') AS backup_id,
             coalesce(l.details->'indexes', '[]') AS before,
             age(l.xmin) AS began, CASE WHEN l.xmin <> r.xmin THEN age(r.xmin) ELSE 0 END AS ended
      FROM {_ENDED_BADLY} AND split_part(l.command, ' ', 1) = %(kind)s
        AND coalesce(l.details->'pending' ? %(revision)s, true)
        AND NOT EXISTS (SELECT 1 FROM ONLY {{table}} s WHERE s.version_table = l.version_table
                        AND s.revision = %(revision)s AND s.event <> 'accepted' AND {_LATER.format("s")})) run
JOIN pg_class c ON c.relkind = 'i' AND age(c.xmin) BETWEEN run.ended AND run.began
JOIN pg_index i ON i.indexrelid = c.oid AND i.indisvalid
JOIN pg_class t ON t.oid = i.indrelid
JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
WHERE NOT run.before ? (n.nspname::text || '.' || c.relname::text)
  AND NOT EXISTS (SELECT 1 FROM pg_constraint k WHERE k.conindid = c.oid)
ORDER BY c.oid, run.at
"""  # noqa: S608 - constants only
# Such a run that a snapshot may have seen begin, unless it has certainly seen a later one end well.
_MADE_OVER = f"""
SELECT 1 FROM {_ENDED_BADLY}
  AND coalesce(age(l.xmin) > age(%(unseen)s::text::xid), true)
  AND NOT EXISTS (SELECT 1 FROM ONLY {{table}} g
                  WHERE g.version_table = l.version_table AND g.event = 'run' AND g.code = 0
                    AND {_LATER.format("g")} AND age(g.xmin) > age(%(next)s::text::xid) {{earliest g}})
LIMIT 1
"""  # noqa: S608 - constants only
_UNREADABLE = ("42P01", "42501")  # not there, not allowed


@dataclass(frozen=True)
class Built:
    """A valid index that appeared during a run that did not end well.

    ``backup_id`` is the newest backup without the leftovers of failed runs, empty if there is none.
    """

    index: Index
    run_id: str
    at: datetime
    backup_id: str


def read_built(session: Session, table: VersionTable | None, plan: Plan) -> tuple[Built, ...]:
    """Return the indexes that appeared in runs in which the first revision of ``plan`` stayed pending, oldest
    first.
    """
    if not plan.revisions:
        return ()
    first = plan.revisions[0]
    wanted = {"kind": plan.kind, "revision": first.revision, "parent": next(iter(first.parents), None)}
    rows = _read(session, table, _BUILT, _SINCE_IT_LANDED, wanted)
    found = [Built(Index(*row[:5]), *row[5:]) for row in rows]
    return tuple(sorted(found, key=lambda built: built.at))


def made_over(
    session: Session, table: VersionTable | None, next_xid: int | None, unseen_xid: int | None
) -> bool:
    """Tell whether a backup may have been made after a run ended badly and before one ended well.

    The two ids are from its manifest: its snapshot has seen all transactions below the first, and none
    from the second on.
    """
    snapshot = {"next": next_xid, "unseen": next_xid if unseen_xid is None else unseen_xid}
    narrow = {name: None if xid is None else xid % 2**32 for name, xid in snapshot.items()}
    return bool(_read(session, table, _MADE_OVER, _SINCE_ONE_ENDED_WELL, narrow))


def _read(
    session: Session, table: VersionTable | None, sql: str, since: str, wanted: dict[str, Any]
) -> list[tuple[Any, ...]]:
    """Query the ledger; one that does not exist, or cannot be read, gives no rows.

    ``since`` is the query for the first row to read, if the ledger has its indexes.
    """
    if table is None:
        return []
    ledger = beside(table, session)
    try:
        indexed = bool(session.value(indexes.question(ledger)))
        for row, place in _PLACES.items():
            bound = _EARLIEST.replace("{place}", place).replace("{since}", since) if indexed else ""
            sql = sql.replace(f"{{earliest {row}}}", bound)
        return query_ledger(session, ledger, sql, {"name": table.name, **wanted}, indexed=indexed)
    except QueryFailed as error:
        if error.lost or error.sqlstate not in _UNREADABLE:
            raise
        return []


_NAME = r'((?:"[^"]+"|[\w$]+)(?:\s*\.\s*(?:"[^"]+"|[\w$]+))?)'
_ADDS_A_VALUE = re.compile(rf"\s*ALTER\s+TYPE\s+{_NAME}\s+ADD\s+VALUE\s+'((?:[^']|'')*)'", re.IGNORECASE)
_VALUE = (
    "SELECT 1 FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid WHERE t.typname = %s AND e.enumlabel = %s"
)


def never_done(session: Session, statement: str) -> bool:
    """Tell whether the database shows that a recorded statement did not run; only for ADD VALUE."""
    adds = _ADDS_A_VALUE.match(statement)
    if adds is None:
        return False
    name = adds[1].rpartition(".")[2].strip()
    name = name[1:-1] if name.startswith('"') else name.lower()
    return not session.query(_VALUE, (name, adds[2].replace("''", "'")))
