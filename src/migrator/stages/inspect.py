"""Inspect the target: where it is, what is pending, and whether it can be migrated at all.

Changes nothing and never loads ``env.py``.  It runs twice: first without the lock, for a run with nothing to
do should cost nothing, and again under the lock, for another run may have finished the work meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from migrator.ahead import refuse_or_allow, refuse_unknown_floors
from migrator.contents import CONTENTS
from migrator.edited import Edit, find_edits
from migrator.errors import AccessDenied, Unversioned
from migrator.history import History, Plan, Revision
from migrator.kept import choose, rows_after
from migrator.past import Standing, read_standing, read_ways_back
from migrator.postgres import QueryFailed, ServerFacts, Session, quote_identifier
from migrator.settings import Settings
from migrator.versions import VersionTable, read_version


@dataclass(frozen=True)
class Inspection:
    """What was found: the plan, and the version table (None where there is none yet).

    ``tables`` and ``objects`` (tables, views, sequences, functions, large objects) count what is neither the
    system's, nor an extension's, nor the version table; ``size`` is the database's, in bytes.  ``standing`` is what
    the ledger says, ``edits`` are applied revisions whose file has changed, and ``ahead`` is why this image may
    start although the schema is newer.
    """

    facts: ServerFacts
    version_table: VersionTable | None
    current: tuple[str, ...]
    plan: Plan
    tables: int
    objects: int
    size: int
    standing: Standing = field(default_factory=Standing)
    edits: tuple[Edit, ...] = ()
    ahead: str = ""

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
        _refuse_role(session, settings.role)
    # In this order: whoever made the tables that are counted has made the version table by then.
    tables, objects, size = session.query(CONTENTS)[0]
    table, current = read_version(session, history, settings.version_table)
    # It is about tables that are there: the history of a database without any begins at its beginning.
    baseline = settings.baseline if tables and not current else ""
    standing = read_standing(session, table) if settings.ledger else Standing()
    unknown, ahead = history.unknown(current), ""
    kept = (
        _plan_back(session, history, table, current, destination) if unknown and kind == "downgrade" else None
    )
    if unknown and kind != "stamp" and kept is None:
        ahead = refuse_or_allow(
            history,
            unknown,
            standing,
            allow_ahead=settings.allow_ahead and kind == "upgrade",
            target=session.target,
            table=table,
        )
    must_know = settled and not read_only and kind == "upgrade"
    if must_know and table is None and tables and not baseline and not _has_one(session, history.siblings()):
        raise Unversioned(
            f"{session.target} has {tables} table{'' if tables == 1 else 's'} but no version table.",
            next_step="if they are this application's, say at which revision:"
            f" `migrator upgrade --baseline REV` (the newest is {_some(history.heads)});"
            " if they are another's: `--baseline base`",
        )
    if baseline and baseline != "base":
        history.find(baseline)
    rows = frozenset(current)
    if ahead:
        plan = Plan(kind, destination, (), rows, rows)
    else:
        plan = kept or history.plan(kind, destination, current, baseline)
        refuse_unknown_floors(history, plan)
    return Inspection(
        facts=session.facts,
        version_table=table,
        current=current,
        plan=plan,
        tables=int(tables),
        objects=int(objects),
        size=int(size),
        standing=standing,
        edits=find_edits(history, standing),
        ahead=ahead,
    )


def _has_one(session: Session, names: frozenset[str]) -> bool:
    """Whether one of these tables is there: the database is shared, and what is in it may all be the others'."""
    found = "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relkind = 'r' AND relname = ANY(%s))"
    return bool(names) and bool(session.value(found, (list(names),)))


def _refuse_role(session: Session, role: str) -> None:
    """Raise :class:`AccessDenied` where the login cannot do ``SET ROLE`` to the role that is to own what is made."""
    try:
        with session.as_role(role):
            pass
    except QueryFailed as error:
        if error.sqlstate not in ("22023", "42501"):  # invalid_parameter_value: no such role
            raise
        raise AccessDenied(
            f"{session.facts.user} cannot SET ROLE to MIGRATOR_ROLE={role}: {error.text.rstrip('.')}"
            f" [{error.sqlstate}].",
            next_step=f"GRANT {quote_identifier(role)} TO {quote_identifier(session.facts.user)}, or correct"
            " MIGRATOR_ROLE",
        ) from None


def _plan_back(
    session: Session,
    history: History,
    table: VersionTable | None,
    current: tuple[str, ...],
    destination: str,
) -> Plan | None:
    """Plan a downgrade by the SQL in the ledger; None where that is empty."""
    ways = read_ways_back(session, table) if table else []
    if not ways:
        return None
    chosen = choose(ways, current, destination, history.heads)
    steps = rows_after(ways, chosen, current)
    return Plan(
        kind="downgrade",
        destination=destination,
        revisions=tuple(Revision(way.revision, way.parents, way.message, "") for way in chosen),
        before=frozenset(current),
        after=steps[-1] if steps else frozenset(current),
        kept=tuple(zip(chosen, steps, strict=True)),
    )


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


def _some(revisions: tuple[str, ...]) -> str:
    return ", ".join(revisions[:5]) + (", ..." if len(revisions) > 5 else "")
