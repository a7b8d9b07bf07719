"""Inspect the target: its revision, the pending revisions, and whether it can be migrated at all.

It changes nothing. It runs twice: first without the lock, so that an up-to-date database costs nothing,
and again under the lock, because another run may have finished the work. It runs ``env.py`` only if its
text does not tell the version tables: it may use one for each tenant, or see another table than
migrator does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from migrator.config.settings import Settings
from migrator.errors import AccessDenied, DatabaseAhead, HistoryError, SettingsError, Unversioned
from migrator.ledger.compatibility import refuse_or_allow, refuse_unknown_floors
from migrator.ledger.downgrade_plan import choose, refuse_other_paths, rows_after
from migrator.ledger.edited_files import Edit, find_edits
from migrator.ledger.queries import Standing, led_here, read_standing, read_stored_downgrades, read_visited
from migrator.pipeline.apply.attempt import Attempt, Landed
from migrator.pipeline.apply.decide import explain, without_migrations
from migrator.pipeline.apply.env_targets import Visit, survey_tables
from migrator.postgres.attached_code import refuse_code
from migrator.postgres.errors import QueryFailed
from migrator.postgres.queries import CONTENTS
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.server import ServerFacts
from migrator.postgres.session import Session
from migrator.postgres.version_table import (
    ONLY_THAT_NAMES_IT,
    FoundVersionTable,
    KnowsRevisions,
    VersionTable,
    find_version_table,
    place_of,
    read_rows,
    refusal,
)
from migrator.project import History, Plan, Revision

log = logging.getLogger("migrator")

Ask = Callable[[], "Sequence[Visit] | None"]
"""Runs ``env.py`` without migrations, and returns its version tables; None if it cannot run."""


@dataclass(frozen=True)
class Whereabouts:
    """The version table of a command (None: not there yet), its revisions, and every other one.

    ``visits`` has the known rows of each version table of ``env.py``. ``about`` is the key of the
    command's table, if ``env.py`` was asked. ``several`` says that there may be more than one,
    ``doubt`` why only ``env.py`` could be sure, if it was not asked. ``others`` hold revisions of this
    history too.
    """

    table: VersionTable | None
    rows: tuple[str, ...]
    visits: Mapping[VersionTable, frozenset[str]] = field(default_factory=dict)
    about: VersionTable | None = None
    several: bool = False
    doubt: str = ""
    others: tuple[VersionTable, ...] = ()
    home: VersionTable | None = None
    """The table that is found without ``env.py``: its ledger records all of them."""


def find_tables(
    session: Session,
    history: KnowsRevisions,
    settings: Settings,
    pending: Callable[[frozenset[str]], int],
    ask: Ask | None,
    look: Callable[[VersionTable], None] = lambda _: None,
) -> Whereabouts:
    """Find the version tables, and of several the one with the most ``pending`` revisions.

    Without ``ask``, or if it returns None, the doubt remains. ``look`` may refuse the table that is
    found without ``env.py``, before its ledger is read.
    """
    sought = find_version_table(session, history, settings.version_table)
    if sought.table is not None:
        look(sought.table)
    if not history.env_can_run_twice:
        if sought.table is None and sought.others:
            raise refusal(sought.others)
        sought = sought._replace(doubt="", others=())
    if (
        sought.doubt == ONLY_THAT_NAMES_IT
        and settings.ledger
        and led_here(session, sought.table, settings.role)
    ):
        sought = sought._replace(doubt="")
    known = read_visited(session, sought.table, settings.role) if settings.ledger else ()
    several = sought.several or len(known) > 1
    doubt = sought.doubt or ("an earlier run of it used several version tables" if several else "")
    unsure = several or sought.others or (doubt and not pending(frozenset(sought.rows)))
    found = ask() if unsure and ask is not None and history.env_can_run_twice else None
    if found:
        _refuse_another(found, settings.version_table)
        there = {visit.table for visit in found if visit.exists}
        visits = {visit.table: visit.rows for visit in found}
    else:
        there = set(known)
        visits = {table: frozenset(read_rows(session, table)) for table in known}
    about = _furthest(session, sought, visits, pending)
    if about is None:
        remains = doubt if unsure else ""
        return Whereabouts(sought.table, sought.rows, {}, None, several, remains, sought.others, sought.table)
    same = sought.table is not None and _qualified(session, sought.table) == about
    table = (sought.table if same else about) if about in there else None
    rows = tuple(sorted(visits[about]))
    several = several or len(visits) > 1
    if found and not several and table is not None and not same:
        log.info(
            "only env.py knows its version table: set MIGRATOR_VERSION_TABLE=%s to skip this question", table
        )
    remains = "" if found else doubt
    return Whereabouts(table, rows, visits, about, several, remains, sought.others, sought.table or table)


def _refuse_another(found: Sequence[Visit], setting: str) -> None:
    """Raise :class:`SettingsError` if the setting names a version table that ``env.py`` does not use."""
    schema, _, name = setting.rpartition(".")
    if not setting or any(name == one.table.name and schema in ("", one.table.schema) for one in found):
        return
    table, at = found[0].table, ", ".join(sorted(found[0].rows)) or "base"
    raise SettingsError(
        [f"env.py keeps its revisions in {table}, which is at {at}, not in {setting}"],
        next_step=f"set MIGRATOR_VERSION_TABLE={table}",
    )


def asking(
    session: Session,
    history: History,
    settings: Settings,
    reinstall_logging: Callable[[], None],
    *,
    locked: bool,
) -> Ask:
    """Return the function that asks ``env.py``, whose code may write only under the run lock.

    ``reinstall_logging`` takes logging and signals back from the application.
    """

    def ask() -> Sequence[Visit] | None:
        try:
            found = survey_tables(
                history, session, settings.role, before_configure=reinstall_logging, read_only=not locked
            )
        except (Exception, SystemExit) as error:  # an env.py may raise anything
            if not session.answers():
                raise QueryFailed(f"env.py failed: {error}", lost=True) from error
            if not locked:
                log.info("env.py cannot report its version tables in a read-only session: %s", error)
                return None
            nothing = Plan("upgrade", "head", (), frozenset(), frozenset())
            raise explain(Attempt(nothing, error, landed=Landed(frozenset()))) from error
        if locked and not found:
            raise without_migrations()
        return found or None

    return ask


def _furthest(
    session: Session,
    sought: FoundVersionTable,
    visits: Mapping[VersionTable, frozenset[str]],
    pending: Callable[[frozenset[str]], int],
) -> VersionTable | None:
    """Return the version table with the most pending revisions; among equals, the one that was found without
    env.py.
    """
    if not visits:
        return None
    mine = _qualified(session, sought.table) if sought.table else None
    return max(visits, key=lambda table: (pending(visits[table]), table == mine))


def _qualified(session: Session, table: VersionTable) -> VersionTable:
    place = place_of(session, table)
    return VersionTable(table.name, place[0] if place else table.schema)


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection: the plan, and the version table (None if there is none yet).

    ``tables`` and ``objects`` (tables, views, sequences, functions, large objects) exclude the system,
    extensions and the version table. ``standing`` is the state in the ledger. ``edits`` are applied
    revisions with an edited file. ``ahead`` is the reason why this image may start although the schema
    is newer.
    """

    facts: ServerFacts
    version_table: VersionTable | None
    current: tuple[str, ...]
    plan: Plan
    tables: int
    objects: int
    standing: Standing = field(default_factory=Standing)
    edits: tuple[Edit, ...] = ()
    ahead: str = ""
    where: Whereabouts = field(default_factory=lambda: Whereabouts(None, ()))

    @property
    def sure(self) -> bool:
        """Tell whether every version table of ``env.py`` is known."""
        return not self.where.doubt

    @property
    def empty(self) -> bool:
        """Tell whether the database holds nothing that a backup could save."""
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
    ask: Ask | None = None,
) -> Inspection:
    """Find out what ``kind`` (upgrade, downgrade, stamp) to ``destination`` would do to this database.

    Each state that needs a decision raises an error with its own code. With ``read_only``, a standby,
    or a database without a version table, is not such a state. Before the lock is held (not
    ``settled``), a missing version table is not either: another run may be about to commit tables and
    version table. ``ask`` runs ``env.py``.
    """
    if not read_only:
        session.require_writes()
        _refuse_role(session, settings.role)
    # In this order: the creator of the counted tables has created the version table by then.
    tables, objects = session.query(CONTENTS)[0]

    def pending(rows: frozenset[str]) -> int:
        if history.unknown(rows):
            return UNKNOWN
        plan = history.plan(kind, destination, rows)
        return len(plan.revisions) or int(not plan.empty)

    looked: set[VersionTable] = set()

    def look(table: VersionTable) -> None:
        if not read_only and table not in looked:
            looked.add(table)
            refuse_code(session, table, settings.role)

    where = find_tables(session, history, settings, pending, ask, look)
    table, current = where.table, where.rows
    if read_only and where.doubt:
        if table is None and where.others:
            raise refusal(where.others)
        checked = tuple(map(str, where.visits or ((table,) if table else ())))
        log.warning(
            "env.py could not report its version tables (%s): %s",
            where.doubt,
            f"only {_some(checked)} was checked" if checked else "no version table was checked",
        )
    _refuse_copies(table, current)
    if table is not None:
        look(table)
    # It is for existing tables: without any, the history starts at its beginning.
    baseline = settings.baseline if tables and not current else ""
    standing = read_standing(session, table, settings.role) if settings.ledger else Standing()
    unknown, ahead = history.unknown(current), ""
    kept = (
        _plan_back(session, history, settings.role, table, current, destination)
        if unknown and kind == "downgrade"
        else None
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
    behind = [place for place, ids in where.visits.items() if not history.unknown(ids) and pending(ids)]
    if ahead and behind:
        raise DatabaseAhead(
            f"{where.about} is ahead of this image, and {_some(tuple(map(str, behind)))} behind it.",
            next_step="run the newer image, which brings all of them to one revision",
        )
    # It is not known until env.py has been asked, under the lock if it writes.
    unknown_yet = bool(where.doubt) and not read_only
    must_know = settled and not read_only and kind == "upgrade" and len(where.visits) < 2 and not unknown_yet
    if must_know and table is None and tables and not baseline and not _has_one(session, history.siblings()):
        raise _unversioned(session, history, int(tables), where)
    if baseline and baseline != "base":
        history.find(baseline)
    rows = frozenset(current)
    if ahead or (unknown_yet and table is None):
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
        standing=standing,
        edits=find_edits(history, standing),
        ahead=ahead,
        where=where,
    )


UNKNOWN = 1_000_000
"""The number of pending revisions if this image cannot know it: that decides first."""


def _unversioned(session: Session, history: History, tables: int, where: Whereabouts) -> Unversioned:
    newest = f"`migrator upgrade --baseline REV` (the newest is {_some(history.heads)})"
    text = f"{session.target} has {tables} table{'' if tables == 1 else 's'} but no version table"
    if not where.others:
        return Unversioned(
            f"{text}.",
            next_step=f"if the tables belong to this application, name their revision: {newest}; if they "
            "belong to another: `--baseline base`",
        )
    looked = f" where env.py looks for it ({where.about})" if where.about else ""
    names = ", ".join(map(str, where.others))
    return Unversioned(
        f"{text}{looked}; revisions of this history are in {names}.",
        next_step="if that is the right one, configure it in env.py (version_table_schema, search_path); if "
        f"not, {newest}, or `--baseline base`",
    )


def _refuse_copies(table: VersionTable | None, rows: Sequence[str]) -> None:
    """Raise :class:`HistoryError` for duplicate rows, which Alembic can neither move nor count."""
    copies = sorted({row for row in rows if rows.count(row) > 1})
    if table is None or not copies:
        return
    raise HistoryError(
        f"The version table {table} has duplicate rows: "
        f"{', '.join(f'{row} {rows.count(row)} times' for row in copies)}.",
        next_step=f"DELETE FROM {table.typed} a USING {table.typed} b"  # noqa: S608 - for the user to type
        " WHERE a.version_num = b.version_num AND a.ctid > b.ctid; then restore its primary key",
    )


def _has_one(session: Session, names: frozenset[str]) -> bool:
    """Tell whether one of these tables exists: in a shared database, all tables may belong to others."""
    found = "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relkind = 'r' AND relname = ANY(%s))"
    return bool(names) and bool(session.value(found, (list(names),)))


def _refuse_role(session: Session, role: str) -> None:
    """Raise :class:`AccessDenied` if the login cannot ``SET ROLE`` to the role that owns the new objects."""
    try:
        with session.as_role(role):
            pass
    except QueryFailed as error:
        if error.sqlstate not in ("22023", "42501"):  # invalid_parameter_value: no such role
            raise
        raise AccessDenied(
            f"{session.facts.user} cannot SET ROLE to MIGRATOR_ROLE={role}: {error.text.rstrip('.')}"
            f" [{error.sqlstate}].",
            next_step=f"GRANT {quote_identifier(role)} TO {quote_identifier(session.facts.user)}, or fix "
            "MIGRATOR_ROLE",
        ) from None


def _plan_back(
    session: Session,
    history: History,
    role: str,
    table: VersionTable | None,
    current: tuple[str, ...],
    destination: str,
) -> Plan | None:
    """Plan a downgrade with the SQL in the ledger; None if that is empty."""
    ways = read_stored_downgrades(session, table, role) if table else []
    if not ways:
        return None
    chosen = choose(ways, current, destination, history.heads)
    refuse_other_paths(chosen, session.user_path)
    steps = rows_after(ways, chosen, current)
    return Plan(
        kind="downgrade",
        destination=destination,
        revisions=tuple(Revision(way.revision, way.parents, way.message, "") for way in chosen),
        before=frozenset(current),
        after=steps[-1] if steps else frozenset(current),
        stored_downgrades=tuple(zip(chosen, steps, strict=True)),
    )


def _some(revisions: tuple[str, ...]) -> str:
    return ", ".join(revisions[:5]) + (", ..." if len(revisions) > 5 else "")
