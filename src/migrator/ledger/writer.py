"""Write rows of the ledger.

The row of a revision is written on the migration's connection, in the revision's transaction. The rows
of a run are written on migrator's own session.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from migrator.errors import AccessDenied
from migrator.ledger import indexes, permissions
from migrator.ledger import sql as questions
from migrator.ledger import table as ledger
from migrator.ledger.table import Author
from migrator.outcome import Outcome
from migrator.postgres.errors import QueryFailed
from migrator.postgres.quoting import quote_literal
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, place_of
from migrator.runtime.logs import redact

if TYPE_CHECKING:
    from migrator.project import History, OfflineDowngrade, Plan, Revision

log = logging.getLogger("migrator.ledger")


class Connection(Protocol):
    """The required functions of the migration's connection."""

    @property
    def translates(self) -> bool:
        """Whether it replaces the schemas that revisions name."""

    def ask(self, sql: str) -> Any:
        """Return the first column of the first row."""

    def tell(self, sql: str, **values: str) -> Any:
        """Run a statement and return its first value, if any; parameters are written ``:name``."""

    def find(self, name: str) -> tuple[str, str] | None:
        """Return the schema in which the connection's search_path finds a relation, and its kind."""

    def ask_driver(self, sql: str) -> Any:
        """Return the first column of the first row, without SQLAlchemy."""

    @property
    def autocommits(self) -> bool:
        """Whether each statement is its own transaction."""

    def may_have_dropped(self) -> bool:
        """Whether a statement since the last call may have dropped a table, or granted something on it."""


class LedgerWriter:
    """Writes the rows of one run, for each connection and version table of ``env.py``.

    ``enabled`` is MIGRATOR_LEDGER; without it, every method does nothing. ``after`` is the number of
    the last row that this run has written already.
    """

    def __init__(
        self,
        author: Author,
        history: History,
        *,
        command: str,
        backup_id: str,
        enabled: bool,
        after: int = 0,
    ) -> None:
        self._author = author
        self._history = history
        self._command = command
        self._backup_id = backup_id
        self._enabled = enabled
        self._downgrades: dict[str, OfflineDowngrade] = {}
        self._connection: Connection | None = None
        self._table = VersionTable()
        self._ledger = VersionTable()
        self._search_path = ""
        self._unicode = True
        self._columns = ledger.COLUMNS
        self._sure = False  # that the ledger is there
        self._standing: set[str] = set()
        self._rows: frozenset[str] = frozenset()
        self.number = after  # 0 is the row of the run itself

    def render_downgrades(self, plan: Sequence[Revision]) -> dict[str, str]:
        """Render the SQL that reverts each pending revision; return the reasons for those without, by
        revision.

        It runs before ``env.py``, because it borrows Alembic's ``op``.
        """
        if not self._enabled:
            return {}
        self._downgrades = {item.revision: self._history.offline_downgrade(item.revision) for item in plan}
        secret = {name for name, way in self._downgrades.items() if _tells_a_secret(way.statements or ())}
        for name in secret:
            self._downgrades[name] = type(self._downgrades[name])(None, "its SQL holds a secret of this run")
        without = {name: way.reason for name, way in self._downgrades.items() if way.statements is None}
        if without:
            told = "; ".join(f"{name}: {reason}" for name, reason in list(without.items())[:3])
            more = f"; and {len(without) - 3} more" if len(without) > 3 else ""
            log.info(
                "an older image cannot revert all of it: there is no SQL for some revisions (%s%s)",
                told,
                more,
            )
        return without

    def enter(self, connection: Connection, table: VersionTable, rows: Iterable[str]) -> None:
        """Open the ledger beside ``table``, which holds ``rows``, and record changes without migrator.

        The table is created with its first row, so a first revision that looks for tables does not see
        it. Raises :class:`AccessDenied` if the role may not write or create it, or if others can write
        it.
        """
        if not self._enabled:
            return
        self._connection, self._table, self._sure = connection, table, False
        self._rows = frozenset(rows)
        self._ledger = ledger.beside(table, connection)
        self._search_path = str(connection.ask("SELECT pg_catalog.current_setting('search_path')"))
        self._unicode = bool(connection.ask(ledger.TAKES_UNICODE))
        self._standing = set()
        if ledger.exists(self._ledger, connection.ask):
            found = permissions.holes(connection.ask, self._ledger, table)
            if found:
                raise permissions.refusal(self._ledger, found)
            _refuse_unless(
                connection, _MAY_WRITE, self._ledger, "write", "GRANT SELECT, INSERT ON {ledger} TO {role}"
            )
            indexed = bool(connection.ask(indexes.question(self._ledger)))
            names = questions.STANDING_NAMES.of(indexed).format(
                table=self._ledger.quoted, version_table=quote_literal(table.name)
            )
            self._standing = set(json.loads(connection.ask(names) or "[]"))
            self._columns = ledger.written(self._ledger, connection.ask)
        else:
            _refuse_unless(
                connection, _MAY_CREATE, self._ledger, "make", "GRANT CREATE ON SCHEMA {schema} TO {role}"
            )
        self._settle(ledger.FOUND, ledger.GONE)

    def done(
        self, revision: str, *, upgrade: bool, rows: Iterable[str], seconds: float, details: Mapping[str, Any]
    ) -> int:
        """Add the row of a revision that was just applied or reverted; ``rows`` are the version rows after
        it.

        Returns the id of its transaction, 0 if nothing is written.
        """
        if not self._enabled:
            return 0
        after = frozenset(rows)
        if upgrade:
            self._standing.add(revision)
        else:
            self._standing.discard(revision)
        way = self._downgrade(revision) if upgrade else None
        row = self._row(
            ledger.APPLIED if upgrade else ledger.REVERTED,
            revision,
            rows_before=sorted(self._rows),
            rows_after=sorted(after),
            seconds=round(seconds, 6),
            backup_id=self._backup_id or None,
            search_path=self._search_path,
            way_back=None if way is None or way.statements is None else list(way.statements),
            no_way_back=None if way is None else way.reason or None,
            details=details or None,
        )
        self._rows = after
        return self._write([row])

    def partial(self, revision: str, statement: str, *, upgrade: bool, session: Session | None) -> int:
        """Record that a part of a revision is committed before its version row, and must not run twice.

        It is written on the migration's connection, in the transaction that is about to be committed;
        on ``session`` if ``statement`` is its own transaction. Returns the id of the row's transaction,
        0 if none is written.
        """
        if not self._enabled:
            return 0
        self.number += 1
        shown = " ".join(statement.split())[:300]
        # The column `revision` stays empty: for an older image, the newest row of a revision is its
        # state.
        row = self._author.row(
            ledger.PARTIAL,
            self.number,
            self._table,
            command=self._command,
            message=f"a part of {revision} leaves its transaction: {shown}",
            backup_id=self._backup_id or None,
            details={"revision": revision, "upgrade": upgrade, "statement": shown},
        )
        return self._write([row]) if session is None else ledger.append(session, self._table, [row])

    def _downgrade(self, revision: str) -> OfflineDowngrade | None:
        """Return the SQL to keep, unless it names other tables than the revision does on this connection."""
        way = self._downgrades.get(revision)
        if way is None or way.statements is None or self._connection is None:
            return way
        if self._connection.translates:
            return type(way)(None, "env.py translates schema names (schema_translate_map)")
        if not self._unicode and not "".join(way.statements).isascii():
            return type(way)(None, "its SQL has characters that the database's encoding may lack")
        return way

    def stamped(self, rows: Iterable[str]) -> None:
        """Add the rows of revisions that were stamped, or no longer are; ``rows`` are the new version rows."""
        self._rows = frozenset(rows)
        self._settle(ledger.STAMPED, ledger.UNSTAMPED)

    def _settle(self, came: str, went: str) -> None:
        """Add rows for the difference between the ledger and the version rows."""
        if not self._enabled:
            return
        events = differences(self._history, self._standing, self._rows, came, went)
        if not events:
            return
        if came == ledger.FOUND:
            log.info("%s", told(events, self._ledger, first=not self._standing))
        self._write([self._row(event, revision) for revision, event in events])
        self._standing = {name for name in self._standing if name not in dict(events)} | {
            name for name, event in events if event == came
        }

    def _row(self, event: str, revision: str, **values: Any) -> dict[str, Any]:
        self.number += 1
        return self._author.row(
            event,
            self.number,
            self._table,
            command=self._command,
            **about(self._history, revision, sums=event not in (ledger.GONE, ledger.UNSTAMPED)),
            **values,
        )

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> int:
        if self._connection is None or not self._enabled:
            return 0
        # A revision may have dropped every table that it found.
        if self._connection.may_have_dropped() or not self._sure:
            self._sure = True
            self._make_or_close(self._connection)
        statement = ledger.insertion(self._ledger, rows, self._columns, unicode=self._unicode)
        return int(self._connection.ask_driver(statement))

    def _make_or_close(self, connection: Connection) -> None:
        """Create the ledger if it does not exist; else revoke the grants of a revision on all tables.

        It runs in the transaction of those grants: no other session ever sees the ledger open.
        """
        found = ledger.is_open(self._ledger, connection.ask_driver)
        if found is not None:
            if found:
                ledger.close_to_others(self._ledger, connection.ask_driver)
            return
        alone = connection.autocommits
        if alone:
            connection.tell("BEGIN")
        ledger.create(self._ledger, connection.ask_driver)
        self._columns = ledger.COLUMNS
        if alone:
            connection.tell("COMMIT")


def differences(
    history: History, standing: Iterable[str], rows: Iterable[str], came: str, went: str
) -> list[tuple[str, str]]:
    """Return (revision, event) for revisions that the ledger lacks, oldest first, and for those that are no
    longer applied.

    Revisions that this history does not know are not changed: a run of another image recorded them.
    """
    applied = history.applied(rows)
    # The ancestors of an unknown revision are not known either.
    gone = set() if history.unknown(rows) else set(standing) - set(applied) - set(history.unknown(standing))
    return [(name, came) for name in applied if name not in set(standing)] + [
        (name, went) for name in sorted(gone)
    ]


def about(history: History, revision: str, *, sums: bool) -> dict[str, Any]:
    """Return a revision's data for the ledger's columns."""
    if history.unknown([revision]):
        return {"revision": revision}
    item = history.revision(revision)
    found = history.sums(revision) if sums else None
    return {
        "revision": revision,
        "message": item.message,
        "file": history.file_name(item),
        "parents": list(item.parents),
        "depends_on": list(history.dependencies(revision)),
        "min_compatible": history.min_compatible(revision) or None,
        "checksum": found.sha256 if found else None,
        "syntax": found.syntax if found else None,
    }


def told(events: Sequence[tuple[str, str]], place: VersionTable, *, first: bool) -> str:
    """Return one line about recorded changes without migrator."""
    came = [name for name, event in events if event == ledger.FOUND]
    went = [name for name, event in events if event == ledger.GONE]
    if first and came:
        return (
            f"the ledger {place} starts now: {len(came)} revision{'' if len(came) == 1 else 's'} were "
            "applied before"
        )
    parts = [f"applied: {_some(came)}"] * bool(came) + [f"reverted: {_some(went)}"] * bool(went)
    return (
        f"since migrator's last run, something else changed revisions ({'; '.join(parts)}); recorded in "
        f"{place}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tells_a_secret(statements: Sequence[str]) -> bool:
    return any(redact(text) != text for text in statements)


_MAY_WRITE = (
    "SELECT pg_catalog.has_table_privilege({ledger}, 'INSERT')"
    " AND pg_catalog.has_table_privilege({ledger}, 'SELECT')"
)
_MAY_CREATE = "SELECT pg_catalog.has_schema_privilege({schema}, 'CREATE')"


def _refuse_unless(connection: Connection, question: str, place: VersionTable, what: str, grant: str) -> None:
    """Raise :class:`AccessDenied` unless the migration's role may do that to the ledger."""
    names = {"ledger": quote_literal(place.quoted), "schema": quote_literal(place.schema)}
    if connection.ask(question.format(**names)):
        return
    role = connection.ask("SELECT CAST(current_user AS pg_catalog.text)")
    statement = grant.format(ledger=place, schema=place.schema, role=role)
    raise AccessDenied(
        f"{role} may not {what} the ledger {place}.", next_step=f"{statement}; or MIGRATOR_LEDGER=off"
    )


def settle(
    session: Session,
    history: History,
    table: VersionTable,
    standing: Iterable[str],
    rows: Iterable[str],
    author: Author,
) -> None:
    """Record, on migrator's own session, changes without it since its last run; raises QueryFailed."""
    events = differences(history, standing, rows, ledger.FOUND, ledger.GONE)
    if not events:
        return
    place = ledger.beside(table, session)
    log.info("%s", told(events, place, first=not ledger.exists(place, session.value)))
    ledger.append(
        session,
        table,
        [
            author.row(event, number, table, **about(history, revision, sums=event == ledger.FOUND))
            for number, (revision, event) in enumerate(events, start=1)
        ],
    )


def begin(
    session: Session,
    table: VersionTable,
    author: Author,
    *,
    command: str,
    plan: Plan,
    indexes: Collection[str],
    backup_id: str,
    rollback_backup_id: str,
) -> int:
    """Record that a run is about to apply; raises QueryFailed.

    ``indexes`` are existing ones that it is to build: if the run ends badly, the next run knows by them
    which ones it has built. ``rollback_backup_id`` is the newest backup without the leftovers of a failed run; it
    may be older than this run's ``backup_id``. Returns the id of the transaction, 0 if nothing was
    written: the first revision of an empty database must not see a table of ours.
    """
    if not plan.before and not ledger.exists(ledger.beside(table, session), session.value):
        return 0
    row = author.row(
        ledger.BEGUN,
        -1,
        table,
        command=command,
        message=f"{command}: {len(plan.revisions)} to {plan.kind}",
        rows_before=sorted(plan.before),
        backup_id=backup_id or None,
        details={
            "pending": [item.revision for item in plan.revisions],
            "indexes": sorted(indexes),
            "way_back": rollback_backup_id,
        },
    )
    # One transaction, also if the ledger is created: a restore checks whether others have written since
    # the backup.
    session.query("BEGIN")
    try:
        number = ledger.append(session, table, [row], within=True)
        session.query("COMMIT")
    except (QueryFailed, AccessDenied):
        if not session.closed:
            session.query("ROLLBACK")
        raise
    return number


def close(
    session: Session,
    table: VersionTable,
    author: Author,
    outcome: Outcome,
    digest: str,
    failed: Mapping[str, str] | None = None,
    schema: Mapping[str, Any] | None = None,
    keep: int = 0,
    visits: Iterable[VersionTable] = (),
) -> None:
    """Add the row of the run itself, with its end; raises QueryFailed.

    ``failed`` are the facts for the next run about a failure that was reverted or restored (see
    on_failure.py). ``schema`` is the packed snapshot after this run (see drift.py), ``keep`` the number
    of earlier ones that stay. ``visits`` are the version tables of an ``env.py`` with several. Without
    a version table nothing was ever applied, and a failure creates no ledger.
    """
    if place_of(session, table) is None:
        return
    row = author.row(
        ledger.RUN,
        0,
        table,
        command=outcome.command,
        code=int(outcome.code),
        outcome=outcome.code.name,
        message=outcome.message,
        rows_before=list(outcome.before or ()),
        rows_after=list(outcome.after or ()),
        seconds=round(outcome.seconds, 3),
        backup_id=(outcome.backup or {}).get("id"),
        digest=digest,
        details={
            "stages": {stage.stage: round(stage.seconds, 3) for stage in outcome.stages},
            "findings": [str(finding) for finding in outcome.findings],
            **({"failed": dict(failed)} if failed else {}),
            **({"version_tables": pairs} if (pairs := [[one.schema, one.name] for one in visits]) else {}),
        },
    )
    left = [author.row(ledger.SCHEMA, ledger.SCHEMA_ROW, table, details={"schema": schema})] if schema else []
    ledger.append(session, table, [*left, row])
    if schema:
        ledger.prune(session, table, keep)
    indexes.complete(session, ledger.beside(table, session))
