"""Apply the plan: run Alembic in process through the user's own, unmodified ``env.py``.

Alembic hands the live MigrationContext to a function before any revision runs
(https://alembic.sqlalchemy.org/en/latest/api/runtime.html#alembic.runtime.environment.EnvironmentContext,
``fn``).  There migrator makes sure that ``env.py`` reached the very database that was locked and backed up,
takes the apply lock and the timeouts on that connection, and wraps each step (see :mod:`migrator.steps`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from migrator import surroundings
from migrator.aftermath import Aftermath, explain
from migrator.attempts import Attempts
from migrator.bookkeeping import Bookkeeper
from migrator.errors import HistoryError, Internal, RolledBack, SettingsError
from migrator.history import History, Plan
from migrator.history.moves import quick_moves
from migrator.interruption import Interrupt, Interruption
from migrator.lifeline import Lifeline, revive
from migrator.logs import Logs
from migrator.migration_connection import MigrationConnection
from migrator.outcome import RevisionResult
from migrator.postgres import ConnectFailed, QueryFailed, Session
from migrator.recovery import Recovery
from migrator.settings import Settings
from migrator.silence import PROBE
from migrator.steps import Steps
from migrator.versions import VersionTable, read_version
from migrator.watch import Watch

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

log = logging.getLogger("migrator.apply")


class Application:
    """One pass through ``env.py``: what was seen, what was done, and what failed."""

    def __init__(
        self,
        session: Session,
        history: History,
        settings: Settings,
        plan: Plan,
        *,
        logs: Logs,
        interruption: Interruption,
        apply_lock: tuple[int, int],
        regain: Callable[[], bool],
        books: Bookkeeper,
    ) -> None:
        self.session = session
        self.history = history
        self.settings = settings
        self.plan = plan
        self.logs = logs
        self.interruption = interruption
        self.apply_lock = apply_lock
        self.books = books
        self.steps = Steps(
            session,
            books,
            len(plan.revisions),
            bar=not logs.is_json,
            check=interruption.check,
            take_back=self._keep,
        )
        self.version_table: VersionTable | None = None
        self.attempts = Attempts(settings.lock_retries, self._lasting)
        looks = min(0.5, (settings.lock_timeout or 2.0) / 5)  # several while one attempt waits for its lock
        self.lifeline = Lifeline(session, regain, settings.wait_timeout)
        self.recovery = Recovery(self)
        self.watch = Watch(
            self.lifeline,
            terminate_after=settings.terminate_blockers_after,
            interval=max(0.05, looks),
            bar=self.steps.progress,
        )
        self._connection: MigrationConnection | None = None
        self._passed_by = False
        self._backend_pid = 0
        self._backend_of = 0  # the start of the server that it runs on

    def run(self) -> None:
        """Load ``env.py`` and run the steps; raises whatever they raise, after the connection is gone."""
        if self.plan.kind == "upgrade":
            self.steps.no_way_back = self.books.look_back(self.plan.revisions)
        try:
            with (
                surroundings.kept(),
                self.steps.heartbeat,
                self.watch,
                self.interruption.calling(self.cancel),
            ):
                self.recovery.run(self._go_through)
        finally:
            self.steps.progress.close()
            self._take_back()
        self.interruption.check()
        if self.version_table is None and self._passed_by:
            raise SettingsError(
                [f"env.py migrates several databases, but not {self.session.target}"],
                next_step="give migrator the address of one of those that env.py connects to",
            )
        if self.version_table is None:
            raise HistoryError(
                "env.py ended without running migrations (it never called context.run_migrations() online).",
                next_step="run env.py as Alembic does: `migrator alembic upgrade head --sql` shows if it can",
            )

    def _go_through(self) -> None:
        """Load ``env.py`` and let it run the steps."""
        self.steps.heartbeat.begins("env.py")
        self.history.run(
            self.plan.kind,
            self.plan.destination,
            self._enter,
            before_configure=self._take_back,
            around=self._run_migrations,
            transaction=self.settings.transaction,
        )

    def _run_migrations(self, run: Callable[[], None], get_context: Callable[[], MigrationContext]) -> None:
        """Run the migrations, as often as it takes, as the role that is to own what they make.

        Another database of an ``env.py`` that migrates several is left to a run of its own.
        """
        if self.history.migrates_several and self._is_passed_by(get_context()):
            return

        def run_as_role() -> None:
            if self.settings.role:
                connection = MigrationConnection(get_context())
                connection.refuse_another_database(self.session)
                connection.assume_role(self.settings.role, self.session)
            with quick_moves():
                run()
            self.steps.flush()  # env.py may commit in whatever way

        self.recovery.around(lambda: self.attempts.run(run_as_role, get_context))

    def _is_passed_by(self, context: MigrationContext) -> bool:
        another = MigrationConnection(context).is_on_another_database(self.session)
        self._passed_by = self._passed_by or another
        return another

    def _take_back(self) -> None:
        """Take logging and signals back from whatever the application made of them."""
        self.logs.install()
        self.interruption.retake()

    def _keep(self) -> None:
        """Take logging and signals back from a revision."""
        self.logs.keep()
        self.interruption.retake()

    def cancel(self) -> None:
        """Cancel the statement that the applying connection is running; called from the signal thread."""
        if not self._backend_pid:
            return
        with contextlib.suppress(OSError):  # a terminal that hung up takes no word
            log.info("cancelling the running statement (pid %d)", self._backend_pid)
        try:
            self.session.query("SELECT pg_cancel_backend(%s)", (self._backend_pid,), timeout=PROBE)
        except QueryFailed as error:
            # The server cannot be told: the connection ends on this side, and with it the wait.
            log.warning("the server cannot be told to cancel: %s", error.text)
            if self._connection and self._connection.calls:
                self._connection.calls.end()

    def committed(self, rows: frozenset[str] | None) -> tuple[RevisionResult, ...]:
        """Return the results that lasted, given the version rows as they are now."""
        after = Aftermath(self.plan, rows, entered=True, failed_in=self.steps.running)
        return tuple(result for result in self.steps.results if result.revision in after.landed)

    def ended(self, patience: float = 8.0) -> bool:
        """Wait until the applying connection is gone from the server, ending it after half of ``patience`` seconds.

        Only then is what the version table says the last word.  Raises QueryFailed.
        """
        deadline = time.monotonic() + patience
        terminated = False
        while self._backend_pid and self._backend_of == self.session.facts.started_at and self._alive():
            if time.monotonic() > deadline:
                return False
            if not terminated and time.monotonic() > deadline - patience / 2:
                terminated = True
                self.session.value("SELECT pg_terminate_backend(%s)", (self._backend_pid,))
            time.sleep(0.05)
        return True

    def _alive(self) -> bool:
        """Return whether the applying connection may still do something: a pool may keep it open, idle."""
        return bool(
            self.session.value(
                "SELECT EXISTS (SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
                " WHERE l.locktype = 'advisory' AND l.classid = %s AND l.objid = %s AND l.objsubid = 2"
                " AND l.pid = %s AND a.state IS DISTINCT FROM 'idle')",
                (*self.apply_lock, self._backend_pid),
            )
        )

    # -- inside env.py ---------------------------------------------------------------------------------

    def _enter(self, heads: tuple[str, ...], context: MigrationContext) -> Sequence[Any]:
        """Check and prepare the connection that ``env.py`` opened, and return the steps for Alembic to run.

        Called again by an ``env.py`` that tries again, or that goes through several schemas.
        """
        self._take_back()
        self.interruption.check()
        self.lifeline.ensure()  # env.py may have taken long
        connection = MigrationConnection(context)
        connection.refuse_another_database(self.session)
        table = VersionTable(context.version_table, context.version_table_schema or "")
        table = connection.locate(table, self.session)
        again = self.version_table is not None or self._moved_meanwhile(heads)
        self.lifeline.refuse_strangers(
            table, frozenset(heads), frozenset(heads) if again else self.plan.before
        )
        if not again and frozenset(heads) != self.plan.before:
            raise SettingsError(
                [
                    f"env.py keeps its revisions in {table}, which is at"
                    f" {', '.join(heads) or 'base'}, but migrator read"
                    f" {', '.join(sorted(self.plan.before)) or 'base'}"
                ],
                next_step=f"set MIGRATOR_VERSION_TABLE={table}",
            )
        self.version_table = self.version_table or table
        self._take_apply_lock(connection)
        connection.set_timeouts(self.settings)
        connection.notice_a_dead_client(self.session.facts.major)
        if self._connection is None or not self._connection.is_on(context.connection):
            connection.listen(self.steps.committed, ahead=self.steps.flush, undone=self.books.forget)
            self._connection = connection
            self.steps.on(connection, connection.observe(self.session, table.name))
            self.watch.follow(self._backend_pid, connection.calls)
        self.books.enter(self._connection, table, heads)
        steps = self._steps(heads, again=again)
        self.recovery.entered(context.connection, table, heads, steps)
        if self.steps.applied not in context.on_version_apply_callbacks:
            context.on_version_apply_callbacks = (*context.on_version_apply_callbacks, self.steps.applied)
        revisions = [step for step in steps if getattr(step, "revision", None) is not None]
        if again:
            self.steps.forget(
                [step.revision.revision for step in revisions], same=table == self.version_table
            )
        self.steps.wrap(revisions)
        return steps

    def _moved_meanwhile(self, heads: tuple[str, ...]) -> bool:
        """Whether the application, as some do, has migrated the database by itself while it was loaded."""
        if frozenset(heads) == self.plan.before:
            return False
        _, rows = read_version(self.session, self.history, self.settings.version_table)
        if frozenset(rows) != frozenset(heads):
            return False
        log.warning(
            "the application migrated the database to %s by itself while it was loaded: turn that off, so that it is"
            " done by migrator, which measures and records it",
            ", ".join(heads) or "base",
        )
        return True

    def _steps(self, heads: tuple[str, ...], *, again: bool) -> list[Any]:
        """Return Alembic's steps from ``heads``: to where the plan ends, whatever ``+2`` would mean by now."""
        plan = self.plan
        if again and frozenset(heads) != plan.before:
            destination = next(iter(plan.after), "base") if len(plan.after) <= 1 else plan.destination
            return self.history.steps(plan.kind, destination, heads)
        return self.history.steps(plan.kind, plan.destination, heads, plan.baseline)

    def _take_apply_lock(self, connection: MigrationConnection) -> None:
        """Take the apply lock on the migration's connection, unless an earlier one of this run keeps it."""
        deadline = time.monotonic() + 2  # an earlier connection may just be going
        while not connection.try_lock(self.apply_lock):
            if not self._backend_pid:
                raise Internal("Another connection holds the apply lock, under our run lock.")
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self._backend_pid, self._backend_of = connection.pid, self.session.facts.started_at

    def _lasting(self) -> bool:
        """Whether a part of the failed revision is committed, or nobody wants another attempt."""
        self.steps.look_for_commits()
        return self.steps.running in self.steps.committed_parts or bool(self.interruption.received)


def apply(
    application: Application, *, backup_id: str, read_rows: Callable[[], frozenset[str] | None]
) -> None:
    """Run the application; turn whatever a user's ``env.py`` or revision raises into what it means.

    ``read_rows`` returns the version rows as they are now, or None where nobody answers.
    Raises Interrupted, Blocked, AccessDenied, HistoryError, RolledBack or Partial.
    """
    try:
        application.run()
        if application.steps.results and read_rows() == application.plan.before != application.plan.after:
            raise RolledBack(
                "env.py ran the revisions and committed none of them.",
                state="Everything was rolled back.",
                next_step="put context.run_migrations() of env.py in `with context.begin_transaction():`,"
                " as Alembic's own template has it",
            )
    except BaseException as error:  # a user's code may raise anything
        application.interruption.shield()
        cause = _first(error)
        if application.interruption.received:
            # What was raised is the cancelled statement's own error: the signal is the cause.
            cause = Interrupt(application.interruption.received)
        elif isinstance(error, SystemExit) and application.steps.failure is not None:
            cause = application.steps.failure  # env.py caught it, and ended in its own way
        after = Aftermath(
            plan=application.plan,
            rows=_rows_after(application, read_rows),
            entered=application.version_table is not None,
            anything_committed=application.steps.anything_committed,
            failed_in=application.steps.running,
            committed_parts=application.steps.committed_parts,
            backup_id=backup_id,
            attempts=application.attempts.count,
            blockers=tuple(str(blocker) for blocker in application.watch.blockers),
        )
        log.debug("apply failed", exc_info=True)
        raise explain(cause, after) from error


def _first(error: BaseException) -> BaseException:
    """Return what came first, where SQLAlchemy only says that the transaction is broken since."""
    first = error
    while type(first).__name__ == "PendingRollbackError" and first.__context__ is not None:
        first = first.__context__
    return first


def _rows_after(
    application: Application, read_rows: Callable[[], frozenset[str] | None]
) -> frozenset[str] | None:
    """Return the version rows once the applying connection is gone; None where the server cannot be asked."""
    try:
        revive(application.session, 0)
        application.steps.look_for_commits()
        if application.version_table is None:
            return application.plan.before
        return read_rows() if application.ended() else None
    except (ConnectFailed, QueryFailed):
        return None
