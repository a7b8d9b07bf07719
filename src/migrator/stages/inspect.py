"""Inspect the target: where it is, what is pending, and whether it can be migrated at all.

Changes nothing and never loads ``env.py``.  It runs twice: first without the lock, for a run with nothing to
do should cost nothing, and again under the lock, for another run may have finished the work meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from migrator.errors import AccessDenied, DatabaseAhead, Unversioned
from migrator.history import History, Plan
from migrator.postgres import ServerFacts, Session
from migrator.settings import Settings
from migrator.versions import VersionTable, read_version

_SYSTEM = "n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'"

_OURS = """NOT EXISTS (SELECT 1 FROM pg_depend d
                   WHERE d.classid = '{0}'::regclass AND d.objid = {1}.oid AND d.deptype = 'e')"""

_CONTENTS = f"""
SELECT count(*) FILTER (WHERE c.relkind IN ('r', 'p', 'f', 'm')),
       count(*)
       + (SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
          WHERE {_SYSTEM} AND {_OURS.format("pg_proc", "p")})
       + (SELECT count(*) FROM pg_largeobject_metadata),
       pg_database_size(current_database())
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'f', 'm', 'v', 'S') AND {_SYSTEM} AND {_OURS.format("pg_class", "c")}
  AND NOT EXISTS (SELECT 1 FROM pg_attribute a JOIN pg_index i ON i.indrelid = a.attrelid
                  WHERE a.attrelid = c.oid AND a.attname = 'version_num' AND i.indisprimary AND c.relnatts = 1)
"""  # noqa: S608 - constants only
"""Tables that no extension owns, everything that could be lost, and the size; the version table counts as neither."""


@dataclass(frozen=True)
class Inspection:
    """What was found: the plan, and the version table (None where there is none yet).

    ``tables`` and ``objects`` (tables, views, sequences, functions, large objects) count what is neither the
    system's, nor an extension's, nor the version table; ``size`` is the database's, in bytes.
    """

    facts: ServerFacts
    version_table: VersionTable | None
    current: tuple[str, ...]
    plan: Plan
    tables: int
    objects: int
    size: int

    @property
    def empty(self) -> bool:
        """Whether the database holds nothing that a backup could save."""
        return self.objects == 0 and not self.current


def inspect(
    session: Session,
    history: History,
    settings: Settings,
    kind: str,
    destination: str,
    *,
    read_only: bool = False,
    settled: bool = True,
) -> Inspection:
    """Find out what ``kind`` (upgrade, downgrade, stamp) to ``destination`` would do to this database.

    Raises an error with its own code for each state that a person must decide about; with ``read_only`` a
    standby, or a database without a version table, is none.  Nor is the latter while it is not ``settled``: before
    the lock is held, another run may be about to commit tables and version table both.
    """
    if not read_only:
        _refuse_standby(session)
    # In this order: whoever made the tables that are counted has made the version table by then.
    tables, objects, size = session.query(_CONTENTS)[0]
    table, current = read_version(session, history, settings.version_table)
    baseline = settings.baseline if table is None or not current else ""
    unknown = history.unknown(current)
    if unknown and kind != "stamp":
        raise _ahead(session, history, unknown, table)
    must_know = settled and not read_only and kind == "upgrade"
    if must_know and table is None and tables and not baseline:
        raise Unversioned(
            f"{session.target} has {tables} table{'' if tables == 1 else 's'} but no version table.",
            next_step="if they are this application's, say at which revision:"
            f" `migrator upgrade --baseline REV` (the newest is {_some(history.heads)});"
            " if they are another's: `--baseline base`",
        )
    if baseline and baseline != "base":
        history.find(baseline)
    plan = history.plan(kind, destination, current, baseline)
    return Inspection(session.facts, table, current, plan, int(tables), int(objects), int(size))


def _refuse_standby(session: Session) -> None:
    target = session.target
    if session.facts.in_recovery:
        raise AccessDenied(
            f"{target} is a standby: it takes no changes.",
            next_step="point migrator to the primary (several hosts with target_session_attrs=read-write find it)",
        )
    if session.facts.read_only:
        raise AccessDenied(
            f"{target} takes read-only transactions only (default_transaction_read_only is on).",
            next_step="ALTER ROLE or ALTER DATABASE ... SET default_transaction_read_only = off",
        )


def _ahead(
    session: Session, history: History, unknown: tuple[str, ...], table: VersionTable | None
) -> DatabaseAhead:
    return DatabaseAhead(
        f"{session.target} is at revision {_some(unknown)}, which this image does not have"
        f" (its newest is {_some(history.heads)}): the image is older than the schema, or another project's.",
        next_step="deploy the image that has the revision; to go back, run its `migrator downgrade`"
        f" to {_some(history.heads)} first; if {table} is another project's, name this one's with"
        " MIGRATOR_VERSION_TABLE",
    )


def _some(revisions: tuple[str, ...]) -> str:
    return ", ".join(revisions[:5]) + (", ..." if len(revisions) > 5 else "")
