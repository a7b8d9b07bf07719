"""Apply the plan: run Alembic in process through the user's own, unmodified ``env.py``.

Alembic hands the live MigrationContext to a function before any revision runs
(https://alembic.sqlalchemy.org/en/latest/api/runtime.html#alembic.runtime.environment.EnvironmentContext,
``fn``). In that function migrator checks that ``env.py`` reached the database that was locked and
backed up. It takes the apply lock, sets the timeouts on that connection, and wraps each step (see
:mod:`.revisions`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from migrator.config.settings import Settings
from migrator.errors import Internal, SettingsError
from migrator.ledger.writer import LedgerWriter
from migrator.outcome import RevisionResult
from migrator.pipeline.apply import driver_calls
from migrator.pipeline.apply.attempts import Attempts, Cause, cause_of, cut_alike, sleep, told
from migrator.pipeline.apply.blockers import Watch
from migrator.pipeline.apply.commits import watch_others
from migrator.pipeline.apply.connection import MigrationConnection
from migrator.pipeline.apply.failure import Aftermath, explain, none_committed, without_migrations
from migrator.pipeline.apply.revisions import Part, Steps
from migrator.postgres.attached_code import refuse_code
from migrator.postgres.connection_limit import refuse_too_few
from migrator.postgres.control_connection import ControlConnection, reconnect_if_lost
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, read_rows, read_version
from migrator.project import History, Plan
from migrator.runtime.deadlines import CANCEL_TIMEOUT
from migrator.runtime.logs import Logs
from migrator.runtime.output import stdio
from migrator.runtime.signals import Interrupt, Interruption

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

log = logging.getLogger("migrator.apply")


@dataclass(frozen=True)
class Passage:
    """The version rows of one table before the run, and its target rows."""

    before: frozenset[str]
    after: frozenset[str]


class MigrationExecution:
    """The passes through ``env.py``: their observations, results and failures."""

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
        ledger_writer: LedgerWriter,
        known: Mapping[VersionTable, frozenset[str]],
        about: VersionTable | None,
    ) -> None:
        self.session = session
        self.history = history
        self.settings = settings
        self.plan = plan
        self.logs = logs
        self.interruption = interruption
        self.apply_lock = apply_lock
        self.ledger_writer = ledger_writer
        self.steps = Steps(
            session,
            ledger_writer,
            len(plan.revisions),
            bar=not logs.is_json,
            check=interruption.check,
            reinstall_logging=self._keep,
            prepare=self._prepare,
            role=settings.role,
        )
        self._known, self._about = known, about
        self.visits: dict[VersionTable, Passage] = {}
        """The version tables of ``env.py``, by full name."""
        self._first: VersionTable | None = None
        self.attempts = Attempts(settings.lock_retries)
        self.unfinished: tuple[Part, ...] = ()
        """The parts that are known to be committed without their version row; see :meth:`look`."""
        looks = min(0.5, (settings.lock_timeout or 2.0) / 5)  # several while one attempt waits for its lock
        self.control = ControlConnection(session, regain, settings.wait_timeout)
        self.watch = Watch(
            self.control,
            terminate_after=settings.terminate_blockers_after,
            interval=max(0.05, looks),
            bar=self.steps.progress,
        )
        self._connection: MigrationConnection | None = None
        self._entered = self.gone = False  # in this pass: a connection, which the driver has lost
        self._place: VersionTable | None = None
        self._failures: dict[VersionTable, tuple[BaseException, str]] = {}
        """The failures of this pass by version table, each with its revision: ``env.py`` may go on."""
        self.failed_in = ""
        self._cut_after: list[float] = []
        self._passed_by = False
        self._backend_pid = 0
        self._backend_of = 0  # the start time of its server

    @property
    def version_table(self) -> VersionTable | None:
        """Return the version table of the plan after ``env.py`` has used one; the first of several unknown
        ones.
        """
        return self._about if self._about and self._first else self._first

    def run(self) -> None:
        """Run ``env.py`` as often as needed; raise its last error after the connection is gone."""
        if self.plan.kind == "upgrade":
            self.steps.no_way_back = self.ledger_writer.render_downgrades(self.plan.revisions)
        try:
            with (
                stdio.redirected(),
                self.steps.heartbeat,
                self.watch,
                watch_others(self.steps.is_elsewhere, self.steps.commits_elsewhere),
                self.steps.outside.watching(),
                self.interruption.on_signal(self.cancel),
            ):
                self.attempts.run(_EnvPyPass(self))
        finally:
            self.steps.progress.close()
            self._reinstall_logging()
        self.interruption.check()
        if self.version_table is None and self._passed_by:
            raise SettingsError(
                [f"env.py migrates several databases, but not {self.session.target}"],
                next_step="set migrator's address to a database that env.py connects to",
            )
        if self.version_table is None:
            raise without_migrations()

    def begin(self) -> None:
        """Forget the connection of the last pass."""
        self._entered = self.gone = False
        self._place, self.failed_in = None, ""
        self._failures.clear()
        self.steps.failure, self.steps.running = None, ""

    def go_through(self) -> None:
        """Load ``env.py`` and let it run the steps."""
        self.steps.heartbeat.begins("env.py")
        try:
            self.history.run(
                self.plan.kind,
                self.plan.destination,
                self._enter,
                before_configure=self._reinstall_logging,
                around=self._run_migrations,
                transaction=self.settings.transaction,
            )
        except SystemExit as ended:  # with Alembic, an env.py may end in this way after its work
            if ended.code or not self._entered or self.steps.running:
                raise
        self._keep_failure()
        if self._failures:  # env.py swallowed them
            error, self.failed_in = next(iter(self._failures.values()))
            raise error

    def cause(self, error: BaseException) -> Cause:
        """Return the cause of the pass's failure."""
        error = self.steps.failure or error  # env.py may have ended in another way
        found = cause_of(error, connected=self._entered, gone=self.gone, answers=self.session.answers)
        calls = self._connection.calls if self._connection and self._entered else None
        if found is Cause.LOST and calls and self.control.never_lost and not told(error):
            self._cut_after.append(calls.failed_after)
        else:
            self._cut_after.clear()
        return found

    @property
    def cut_after(self) -> float:
        """Return after how many seconds each attempt was cut by something in between; 0 if it was not."""
        return cut_alike(self._cut_after)

    def _run_migrations(self, run: Callable[[], None], get_context: Callable[[], MigrationContext]) -> None:
        """Run the migrations as the role that owns the new objects.

        Another database of an ``env.py`` that migrates several gets its own run.
        """
        if self.history.migrates_several and self._is_passed_by(get_context()):
            return
        if self.settings.role:
            connection = MigrationConnection(get_context())
            connection.refuse_another_database(self.session)
            connection.assume_role(self.settings.role, self.session)
        try:
            run()
        except BaseException as error:
            # Before env.py closes it: SQLAlchemy would try a rollback on a lost one, and log a traceback.
            lost = get_context().connection if self._entered else None
            self.gone = lost is not None and driver_calls.gone(lost)
            if lost is not None and self.gone and not lost.closed:
                lost.invalidate(error)
            raise

    def _is_passed_by(self, context: MigrationContext) -> bool:
        another = MigrationConnection(context).is_on_another_database(self.session)
        self._passed_by = self._passed_by or another
        return another

    def _reinstall_logging(self) -> None:
        """Take logging and signals back from the application."""
        self.logs.install()
        self.interruption.reinstall()

    def _keep(self) -> None:
        """Take logging and signals back from a revision."""
        self.logs.keep()
        self.interruption.reinstall()

    def _prepare(self, connection: MigrationConnection) -> None:
        """Set role and timeouts and take the lock again, after a revision rolled back or reset them."""
        self._take_apply_lock(connection)
        connection.assume_role(self.settings.role, self.session)
        connection.set_timeouts(self.settings)

    def cancel(self) -> None:
        """Cancel the statement that the applying connection is running; called from the signal thread."""
        if not self._backend_pid:
            return
        with contextlib.suppress(OSError):  # a closed terminal accepts no output
            log.info("cancelling the running statement (pid %d)", self._backend_pid)
        try:
            self.session.query("SELECT pg_cancel_backend(%s)", (self._backend_pid,), timeout=CANCEL_TIMEOUT)
        except QueryFailed as error:
            # The server cannot be told. This side closes the connection, which ends the wait.
            log.warning("cannot cancel the running statement: %s", error.text)
            if self._connection and self._connection.calls:
                self._connection.calls.end()

    def landed(self) -> tuple[str, ...]:
        """Return the revisions that are committed in any version table, counted from the rows as they are now.

        Raises QueryFailed.
        """
        found = {name for names in self._landed().values() for name in names}
        planned = [item.revision for item in self.plan.revisions if item.revision in found]
        return (*planned, *sorted(found - set(planned)))

    def _landed(self) -> dict[VersionTable, set[str]]:
        found = {}
        for place, passage in self.visits.items():
            was = set(self.history.applied(passage.before))
            now = set(self.history.applied(self.rows_in(place)))
            found[place] = was - now if self.plan.kind == "downgrade" else now - was
        return found

    def rows_in(self, place: VersionTable) -> frozenset[str]:
        """Return the current rows of a version table; raises QueryFailed."""
        return frozenset(read_rows(self.session, place))

    def at(self) -> str:
        """Say where each of several version tables is; raises QueryFailed."""
        if len(self.visits) < 2:
            return ""
        told = [f"{', '.join(sorted(self.rows_in(place))) or 'base'} in {place}" for place in self.visits]
        return "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if len(told) > 5 else "")

    def committed(self) -> tuple[RevisionResult, ...]:
        """Return the results that lasted, given the current version rows; raises QueryFailed."""
        landed = self._landed()
        return tuple(
            result for result, place in self.steps.placed() if result.revision in landed.get(place, ())
        )

    def look(self) -> None:
        """Ask the server which revisions are partly committed; raises QueryFailed and ConnectFailed."""
        self.steps.look_for_commits()
        applied: dict[VersionTable, frozenset[str]] = {}
        for part in self.steps.committed_parts:
            if part.table not in applied:
                rows = read_rows(self.session, part.table)
                applied[part.table] = frozenset(self.history.applied(rows))
        self.unfinished = tuple(
            part
            for part in self.steps.committed_parts
            if (part.revision in applied[part.table]) != part.upgrade
        )

    def ended(self, patience: float = 8.0) -> bool:
        """Wait until the applying connection is gone from the server; end it after half of ``patience``
        seconds.

        Only then are the version rows final. Raises QueryFailed.
        """
        deadline = time.monotonic() + patience
        terminated = False
        while self._backend_pid and self._backend_of == self.session.facts.started_at and self._alive():
            if time.monotonic() > deadline:
                return False
            if not terminated and time.monotonic() > deadline - patience / 2:
                terminated = True
                self.session.terminate(self._backend_pid)
            time.sleep(0.05)
        return True

    def _alive(self) -> bool:
        """Tell whether the applying connection may still act: a pool may keep it open and idle."""
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
        """Check and prepare the connection that ``env.py`` opened; return the steps for Alembic to run.

        An ``env.py`` that retries, or uses several schemas, calls it again.
        """
        self._reinstall_logging()
        self.interruption.check()
        self.control.ensure()  # env.py may have taken long
        connection = MigrationConnection(context)
        connection.refuse_another_database(self.session)
        table = VersionTable(context.version_table, context.version_table_schema or "")
        table = connection.locate(table, self.session)
        refuse_code(self.session, table, self.settings.role)  # only env.py may know its table
        place, rows = connection.place_of(table), frozenset(heads)
        if place in self.visits:
            self._refuse_to_repeat_a_part()
        self._keep_failure()
        self._failures.pop(place, None)
        self._place = place
        expected = self._known.get(place, rows if self.visits else self.plan.before)
        again = place in self.visits or bool(self.visits) or rows != expected
        if place not in self.visits and rows != expected and not self._moved_meanwhile(place, rows):
            raise SettingsError(
                [
                    f"env.py keeps its revisions in {table}, which is at"
                    f" {', '.join(heads) or 'base'}, but migrator read"
                    f" {', '.join(sorted(expected)) or 'base'}"
                ],
                next_step=f"set MIGRATOR_VERSION_TABLE={table}",
            )
        self.control.refuse_changed_rows(table, rows, rows if again else expected)
        again = again or rows != self.plan.before
        self._first = self._first or table
        self._entered = True
        self._take_apply_lock(connection)
        connection.set_timeouts(self.settings)
        connection.check_client_connection(self.session.facts.major)
        if self._connection is None or not self._connection.is_on(context.connection):
            connection.listen(
                self.steps.committed_here,
                executes=self.steps.executes,
                executed=self.steps.executed,
                leaving=self.steps.leaving,
            )
            self._connection = connection
            self.steps.on(connection, connection.observe(self.session, table.name), self._backend_pid)
            self.watch.follow(self._backend_pid, connection.calls)
        self.ledger_writer.enter(self._connection, table, heads)
        self.steps.at(place, upgrade=self.plan.kind != "downgrade")
        steps = self._steps(heads, again=again)
        self.visits.setdefault(place, Passage(rows, self.history.rows_after(steps, heads)))
        if self.steps.applied not in context.on_version_apply_callbacks:
            # First: a hook of env.py may commit, and the row of the ledger belongs to the version row.
            context.on_version_apply_callbacks = (self.steps.applied, *context.on_version_apply_callbacks)
        revisions = [step for step in steps if getattr(step, "revision", None) is not None]
        if again:
            self.steps.forget([step.revision.revision for step in revisions])
        self.steps.wrap(revisions)
        return steps

    def _keep_failure(self) -> None:
        """Keep the failure of the last version table."""
        if self._place is not None and self.steps.failure is not None:
            self._failures[self._place] = self.steps.failure, self.steps.running

    def _refuse_to_repeat_a_part(self) -> None:
        """Raise the last failure again if ``env.py`` itself retries, and a part is committed without its row."""
        self.look()
        if self.unfinished and self.steps.failure is not None:
            raise self.steps.failure

    def _moved_meanwhile(self, place: VersionTable, heads: frozenset[str]) -> bool:
        """Tell whether the application migrated the database by itself while it was loaded."""
        if place in self._known:
            rows: Sequence[str] = tuple(self.rows_in(place))
        else:
            _, rows = read_version(self.session, self.history, self.settings.version_table)
        if frozenset(rows) != heads:
            return False
        log.warning(
            "the application migrated the database to %s by itself while it was loaded: turn that off, "
            "so that migrator measures and records the migration",
            ", ".join(sorted(heads)) or "base",
        )
        return True

    def _steps(self, heads: tuple[str, ...], *, again: bool) -> list[Any]:
        """Return Alembic's steps from ``heads`` to the end of the plan, even if ``+2`` means something else
        by now.
        """
        plan = self.plan
        if again and frozenset(heads) != plan.before:
            there = set(self.history.applied(heads))
            if self.history.unknown(heads) or (plan.kind == "upgrade" and plan.after <= there):
                return []
            destination = next(iter(plan.after), "base") if len(plan.after) <= 1 else plan.destination
            return self.history.steps(plan.kind, destination, heads)
        return self.history.steps(plan.kind, plan.destination, heads, plan.baseline)

    def _take_apply_lock(self, connection: MigrationConnection) -> None:
        """Take the apply lock on the migration's connection, unless an earlier connection of this run holds
        it.
        """
        deadline = time.monotonic() + 2  # an earlier connection may just be closing
        while not connection.try_lock(self.apply_lock):
            if not self._backend_pid:
                raise Internal(
                    "Another connection holds the apply lock, although this run holds the run lock."
                )
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self._backend_pid, self._backend_of = connection.pid, self.session.facts.started_at


class _EnvPyPass:
    """One pass through ``env.py``, driven by :class:`migrator.pipeline.apply.attempts.Attempts`."""

    def __init__(self, execution: MigrationExecution) -> None:
        self._execution = execution
        self.begin, self.run, self.cause = execution.begin, execution.go_through, execution.cause

    def settle(self) -> tuple[Part, ...]:
        """Wait until the connection is gone; return the parts that are committed without their version row."""
        execution = self._execution
        execution.control.ensure()
        if not execution.ended():
            raise TimeoutError("the migration's connection does not end, so env.py is not run again")
        steps = execution.steps
        if execution.gone and steps.running and not steps.transactional:
            steps.committed()  # a statement may have succeeded although its answer was lost
        execution.look()
        return execution.unfinished

    def connected(self) -> bool:
        """Whether ``env.py`` had reached the database."""
        return self._execution._entered

    def stopped(self) -> bool:
        """Whether a signal came."""
        return bool(self._execution.interruption.received)

    def pause(self, seconds: float) -> None:
        """Wait; raises Interrupt."""
        sleep(seconds, self._execution.interruption.check)


def apply(
    execution: MigrationExecution, *, backup_id: str, rows_now: Callable[[], frozenset[str] | None]
) -> None:
    """Run the application; turn any error of a user's ``env.py`` or revision into migrator's error.

    ``rows_now`` returns the current version rows, or None if nothing answers. Raises Interrupted,
    Blocked, AccessDenied, HistoryError, RolledBack or Partial.
    """
    try:
        refuse_too_few(execution.session, 2, "A run")
        execution.run()
        if execution.steps.results and rows_now() == execution.plan.before != execution.plan.after:
            raise none_committed(execution.steps.findings, committed=execution.steps.landed_somewhere())
    except BaseException as error:  # a user's code may raise anything
        execution.interruption.block()
        cause = _first(error)
        if execution.interruption.received:
            # The error belongs to the cancelled statement: the signal is the cause.
            cause = Interrupt(execution.interruption.received)
        elif isinstance(error, SystemExit) and execution.steps.failure is not None:
            cause = execution.steps.failure  # env.py caught it, and ended in another way
        rows = _rows_after(execution, rows_now)
        after = Aftermath(
            plan=execution.plan,
            rows=rows,
            entered=execution.version_table is not None,
            anything_committed=execution.steps.anything_committed,
            failed_in=execution.failed_in or execution.steps.running,
            landed=() if rows is None else execution.landed(),
            at="" if rows is None else execution.at(),
            rolled_back_by=next((f.place for f in execution.steps.findings if f.rule == "rolled-back"), ""),
            alike=len({passage.before for passage in execution.visits.values()}) < 2,
            unfinished=tuple(dict.fromkeys(part.revision for part in execution.unfinished)),
            repeatable=execution.steps.unrepeatable.isdisjoint(execution.unfinished),
            certain=not execution.steps.certain.isdisjoint(execution.unfinished),
            backup_id=backup_id,
            attempts=execution.attempts.count,
            cut_after=execution.cut_after,
            blockers=tuple(str(blocker) for blocker in execution.watch.blockers),
            prepared=tuple(gid for blocker in execution.watch.blockers for gid in blocker.gids),
        )
        log.debug("apply failed", exc_info=True)
        raise explain(cause, after) from error


def _first(error: BaseException) -> BaseException:
    """Return the first error, if SQLAlchemy only reports the broken transaction that followed."""
    first = error
    while type(first).__name__ == "PendingRollbackError" and first.__context__ is not None:
        first = first.__context__
    return first


def _rows_after(
    execution: MigrationExecution, rows_now: Callable[[], frozenset[str] | None]
) -> frozenset[str] | None:
    """Return the version rows after the applying connection is gone; None if the server cannot be read."""
    try:
        reconnect_if_lost(execution.session, 0)
        if execution.version_table is None:
            return execution.plan.before
        if not execution.ended():
            return None
        execution.look()
        return rows_now()
    except (ConnectFailed, QueryFailed):
        return None
