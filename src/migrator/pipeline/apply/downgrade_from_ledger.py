"""Downgrade with an older image: run the SQL from the ledger for revisions that this image does not have.

It is plain SQL text, shown before it runs, never Python. No row sets a role or a search_path: the SQL
runs as MIGRATOR_ROLE, else as the version table's owner if the login may act as it. Each revision is
one transaction with its version row and its ledger row, on its own connection with the apply lock.
"""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from migrator.config.settings import Settings
from migrator.errors import Internal, MigratorError, Partial, RolledBack
from migrator.ledger import table as ledger
from migrator.ledger.table import Author
from migrator.outcome import RevisionResult
from migrator.pipeline.apply.attempt import RETRYABLE
from migrator.postgres import connection_limit
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, locate
from migrator.project.downgrade.stored import StoredDowngrade
from migrator.runtime.signals import Interruption

if TYPE_CHECKING:
    from migrator.project import Plan

log = logging.getLogger("migrator.apply")


class Reversal:
    """Runs the SQL from the ledger for several revisions, newest first."""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        table: VersionTable,
        author: Author,
        command: str,
        *,
        apply_lock: tuple[int, int],
    ) -> None:
        self._session = session
        self._settings = settings
        self._table = table
        self._author = author
        self._command = command
        self._apply_lock = apply_lock
        self._role = settings.role or ledger.owner_to_be(session, locate(session, table) or table)
        self.results: list[RevisionResult] = []

    def run(self, plan: Plan, application_name: str, interruption: Interruption) -> None:
        """Revert the revisions of the plan; raises :class:`RolledBack`, :class:`Partial`, or a connection
        error.
        """
        before, total = plan.before, len(plan.stored_downgrades)
        with (
            connection_limit.connect(
                self._session.target, application_name, self._settings.connect_timeout
            ) as connection,
            interruption.on_signal(connection.cancel),
        ):
            self._prepare(connection)
            _say_who(plan, self._role or connection.facts.user)
            for number, (way, after) in enumerate(plan.stored_downgrades, start=1):
                interruption.check()
                started = time.monotonic()
                for statement in way.statements or ():
                    log.info("%s: %s", way.revision, statement, extra={"stage": "apply"})
                try:
                    self._retrying(way)(self._one, connection, way, before, after, number)
                except QueryFailed as error:
                    interruption.check()
                    raise self._failed(way, error, before, total) from error
                seconds = time.monotonic() - started
                self.results.append(RevisionResult(way.revision, "downgrade", way.message, seconds))
                log.info(
                    "reverted %d of %d: %s %s (%.2f s)", number, total, way.revision, way.message, seconds
                )
                before = after

    def _prepare(self, connection: Session) -> None:
        for name, seconds in (
            ("lock_timeout", self._settings.lock_timeout),
            ("statement_timeout", self._settings.statement_timeout),
        ):
            connection.query("SELECT set_config(%s, %s, false)", (name, f"{int((seconds or 0) * 1000)}ms"))
        if not connection.value("SELECT pg_try_advisory_lock(%s, %s)", self._apply_lock):
            raise Internal("Another connection holds the apply lock, although this run holds the run lock.")

    def _retrying(self, way: StoredDowngrade) -> Retrying:
        """Return what retries a revision, only if it missed a lock and nothing of it can be committed."""
        whole = not any(_ends_transaction(statement) for statement in way.statements or ())
        return Retrying(
            retry=retry_if_exception(
                lambda error: whole and isinstance(error, QueryFailed) and error.sqlstate in RETRYABLE
            ),
            stop=stop_after_attempt(self._settings.lock_retries + 1),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            reraise=True,
        )

    def _one(
        self,
        connection: Session,
        way: StoredDowngrade,
        before: frozenset[str],
        after: frozenset[str],
        number: int,
    ) -> None:
        started = time.monotonic()
        connection.query("BEGIN")
        try:
            connection.query("SELECT set_config('role', %s, false)", (self._role or "none",))
            with connection.as_user():
                for statement in way.statements or ():
                    connection.query(statement)
            table = (locate(connection, self._table) or self._table).quoted.replace("%", "%%")
            for gone in sorted(before - after):
                connection.query(f"DELETE FROM {table} WHERE version_num = %s", (gone,))  # noqa: S608 - quoted
            for back in sorted(after - before):
                connection.query(f"INSERT INTO {table} (version_num) VALUES (%s)", (back,))  # noqa: S608 - quoted
            row = self._author.row(
                ledger.REVERTED,
                number,
                self._table,
                revision=way.revision,
                message=way.message,
                parents=list(way.parents),
                rows_before=sorted(before),
                rows_after=sorted(after),
                seconds=round(time.monotonic() - started, 6),
                command=self._command,
            )
            ledger.append(connection, self._table, [row], within=True)
            connection.query("COMMIT")
        except QueryFailed:
            if not connection.closed:
                connection.query("ROLLBACK")
            raise

    def _failed(
        self, way: StoredDowngrade, error: QueryFailed, rows: frozenset[str], total: int
    ) -> MigratorError:
        what = f"The kept SQL of {way.revision} failed: {error.text}{f' [{error.sqlstate}]' if error.sqlstate else ''}."
        parts = any(_ends_transaction(statement) for statement in way.statements or ())
        at = ", ".join(sorted(rows)) or "base"
        if not self.results and not parts:
            return RolledBack(
                what,
                state="Everything was rolled back.",
                next_step="downgrade with an image that has the revision, or restore a backup: `migrator backups`",
            )
        part = f" A part of {way.revision} may be committed outside of its transaction." if parts else ""
        return Partial(
            what,
            state=f"{len(self.results)} of {total} revisions were reverted and committed; the database is at {at}."
            + part,
            next_step="downgrade with an image that has the revision, or restore a backup: `migrator backups`",
        )


def _say_who(plan: Plan, role: str) -> None:
    """Warn if other roles applied the revisions; the rows only report a role, they never set one."""
    others = sorted({way.role for way, _ in plan.stored_downgrades if way.role not in ("", role)})
    if others:
        log.warning(
            "the downgrade runs as role %s, and the revision was applied as role %s (MIGRATOR_ROLE "
            "sets the role)",
            role,
            ", ".join(others[:5]),
            extra={"stage": "apply"},
        )


def _ends_transaction(statement: str) -> bool:
    return bool(re.match(r"\s*(COMMIT|END)\b", statement, re.IGNORECASE))
