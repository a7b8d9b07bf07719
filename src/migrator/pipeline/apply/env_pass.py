"""One pass through the user's own, unmodified ``env.py``, in this process and from the top.

Alembic hands the live MigrationContext to a function before any revision runs
(https://alembic.sqlalchemy.org/en/latest/api/runtime.html#alembic.runtime.environment.EnvironmentContext,
``fn``). In that function migrator checks that ``env.py`` reached the database that was locked and
backed up. It takes the apply lock, sets the timeouts on that connection, and wraps each step (see
:mod:`.revisions`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from migrator.errors import SettingsError
from migrator.pipeline.apply import driver_calls
from migrator.pipeline.apply.attempt import Inputs, Landed
from migrator.pipeline.apply.blockers import Watch
from migrator.pipeline.apply.connection import Backend, MigrationConnection
from migrator.pipeline.apply.decide import without_migrations
from migrator.pipeline.apply.revisions import Steps
from migrator.postgres.attached_code import refuse_code
from migrator.postgres.version_table import VersionTable, read_rows, read_version

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

log = logging.getLogger("migrator.apply")


class Visits:
    """The version tables that ``env.py`` has used, by full name: their rows ``before`` the run, and to be."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.first: VersionTable | None = None
        self.before: dict[VersionTable, frozenset[str]] = {}
        self.after: dict[VersionTable, frozenset[str]] = {}

    @property
    def version_table(self) -> VersionTable | None:
        """Return the version table of the plan, once ``env.py`` has used one; the first of unknown ones."""
        return self._inputs.about if self._inputs.about and self.first else self.first

    def read(self, steps: Steps) -> Landed:
        """Count what landed from the rows as they are now; raises QueryFailed."""
        session, plan, upgrade = self._inputs.session, self._inputs.plan, self._inputs.upgrade
        if self.version_table is None:
            return Landed(plan.before)
        rows = frozenset(read_rows(session, self.version_table))
        now = {table: read_rows(session, table) for table in self.before}
        history = self._inputs.history
        applied = {table: set(history.applied(now[table])) for table in now}
        was = {table: set(history.applied(rows)) for table, rows in self.before.items()}
        landed = {
            table: applied[table] - was[table] if upgrade else was[table] - applied[table] for table in now
        }
        found: set[str] = set().union(*landed.values())
        planned = [item.revision for item in plan.revisions if item.revision in found]
        told = [f"{', '.join(sorted(now[table])) or 'base'} in {table}" for table in now]
        more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
        return Landed(
            rows,
            (*planned, *sorted(found - set(planned))),
            tuple(result for result, table in steps.results if result.revision in landed.get(table, ())),
            "; ".join(told[:5]) + more if len(told) > 1 else "",
            tuple(
                part for part in steps.committed_parts if (part.revision in applied[part.table]) != upgrade
            ),
        )


class EnvPass:
    """One pass: whether it ``started`` and ``entered`` a connection, and whether the driver's is ``gone``."""

    def __init__(self, inputs: Inputs, steps: Steps, visits: Visits, backend: Backend, watch: Watch) -> None:
        self._inputs, self._steps, self._visits = inputs, steps, visits
        self._backend, self._watch = backend, watch
        self.started = self.entered = self.gone = False
        self.failed_in = ""
        self._passed_by = False
        self._place: VersionTable | None = None
        self._failures: dict[VersionTable, tuple[BaseException, str]] = {}
        """The failures by version table, each with its revision: ``env.py`` may go on."""

    def run(self) -> None:
        """Load ``env.py`` and let it run the steps; raise its error, even if it caught it itself."""
        inputs, steps = self._inputs, self._steps
        self.started = True
        steps.failure, steps.running = None, ""
        # The frames of the last failure kept what env.py has left open: a connection and its locks. A pool
        # gets it back in the first collection, and goes in the second.
        gc.collect()
        gc.collect()
        steps.heartbeat.begins("env.py")
        try:
            inputs.history.run(
                inputs.plan.kind,
                inputs.plan.destination,
                self._enter,
                before_configure=inputs.reinstall_logging,
                around=self._run_migrations,
                transaction=inputs.settings.transaction,
            )
        except SystemExit as ended:  # with Alembic, an env.py may end in this way after its work
            if ended.code or not self.entered or steps.running:
                raise
        self._keep_failure()
        if self._failures:  # env.py swallowed them
            error, self.failed_in = next(iter(self._failures.values()))
            raise error
        inputs.reinstall_logging()
        inputs.interruption.check()
        if self._visits.version_table is None:
            if not self._passed_by:
                raise without_migrations()
            raise SettingsError(
                [f"env.py migrates several databases, but not {inputs.session.target}"],
                next_step="set migrator's address to a database that env.py connects to",
            )

    def _run_migrations(self, run: Callable[[], None], get_context: Callable[[], MigrationContext]) -> None:
        """Run the migrations as the role that owns the new objects.

        Another database of an ``env.py`` that migrates several gets its own run.
        """
        session, role = self._inputs.session, self._inputs.settings.role
        if self._inputs.history.migrates_several and MigrationConnection(
            get_context()
        ).is_on_another_database(session):
            self._passed_by = True
            return
        if role:
            connection = MigrationConnection(get_context())
            connection.refuse_another_database(session)
            connection.assume_role(role, session)
        try:
            run()
        except BaseException as error:
            # Before env.py closes it: SQLAlchemy would try a rollback on a lost one, and log a traceback.
            lost = get_context().connection if self.entered else None
            self.gone = lost is not None and driver_calls.gone(lost)
            if lost is not None and self.gone and not lost.closed:
                lost.invalidate(error)
            raise

    def _enter(self, heads: tuple[str, ...], context: MigrationContext) -> Sequence[Any]:
        """Check and prepare the connection that ``env.py`` opened; return the steps for Alembic to run.

        An ``env.py`` that retries, or uses several schemas, calls it again.
        """
        inputs, steps = self._inputs, self._steps
        inputs.reinstall_logging()
        inputs.interruption.check()
        inputs.control.ensure()  # env.py may have taken long
        connection = MigrationConnection(context)
        connection.refuse_another_database(inputs.session)
        table = VersionTable(context.version_table, context.version_table_schema or "")
        table = connection.locate(table, inputs.session)
        refuse_code(inputs.session, table, inputs.settings.role)  # only env.py may know its table
        place, rows = connection.place_of(table), frozenset(heads)
        if place in self._visits.before:
            self._refuse_to_repeat_a_part()
        self._keep_failure()
        self._failures.pop(place, None)
        self._place = place
        again = self._has_moved(place, table, rows) or bool(self._visits.before)
        inputs.control.refuse_changed_rows(table, rows)
        again = again or rows != inputs.plan.before
        self._visits.first = self._visits.first or table
        self.entered = True
        ours = self._attach(connection, context, table.name)
        inputs.ledger_writer.enter(ours, table, heads)
        steps.table = place
        planned = self._plan(heads, again=again)
        self._visits.before.setdefault(place, rows)
        self._visits.after.setdefault(place, inputs.history.rows_after(planned, heads))
        hooks = context.on_version_apply_callbacks
        if steps.applied not in hooks:
            # A hook of env.py may commit: the row of the ledger belongs to the version row. A hook may fail:
            # the log says "applied" after it.
            context.on_version_apply_callbacks = (steps.applied, *hooks, steps.report)
        revisions = [step for step in planned if getattr(step, "revision", None) is not None]
        if again:
            steps.forget([step.revision.revision for step in revisions])
        steps.wrap(revisions)
        return planned

    def _attach(
        self, connection: MigrationConnection, context: MigrationContext, table: str
    ) -> MigrationConnection:
        """Take the apply lock, set the timeouts and listen; return the connection that listens already, if
        it is the same.
        """
        inputs, steps, backend = self._inputs, self._steps, self._backend
        backend.take_lock(connection)
        connection.set_timeouts(inputs.settings)
        connection.check_client_connection(inputs.session.facts.major)
        if backend.connection is not None and backend.connection.is_on(context.connection):
            return backend.connection
        connection.listen(
            steps.committed_here, executes=steps.executes, executed=steps.executed, leaving=steps.leaving
        )
        backend.connection = connection
        steps.on(connection, connection.observe(inputs.session, table))
        self._watch.follow(backend.pid, connection.calls)
        return connection

    def _keep_failure(self) -> None:
        """Keep the failure of the last version table."""
        if self._place is not None and self._steps.failure is not None:
            self._failures[self._place] = self._steps.failure, self._steps.running

    def _refuse_to_repeat_a_part(self) -> None:
        """Raise the last failure again if ``env.py`` itself retries, and a part is committed without its row."""
        self._steps.look_for_commits()
        if self._steps.failure is not None and self._visits.read(self._steps).unfinished:
            raise self._steps.failure

    def _has_moved(self, place: VersionTable, table: VersionTable, rows: frozenset[str]) -> bool:
        """Tell whether a version table is not where migrator read it.

        Raises :class:`SettingsError` if migrator read another table than ``env.py`` uses.
        """
        plan, visited = self._inputs.plan, self._visits.before
        expected = self._inputs.known.get(place, rows if visited else plan.before)
        if place not in visited and rows != expected and not self._moved_meanwhile(place, rows):
            raise SettingsError(
                [
                    f"env.py keeps its revisions in {table}, which is at"
                    f" {', '.join(sorted(rows)) or 'base'}, but migrator read"
                    f" {', '.join(sorted(expected)) or 'base'}"
                ],
                next_step=f"set MIGRATOR_VERSION_TABLE={table}",
            )
        return rows != expected

    def _moved_meanwhile(self, place: VersionTable, heads: frozenset[str]) -> bool:
        """Tell whether the application migrated the database by itself while it was loaded."""
        session = self._inputs.session
        if place in self._inputs.known:
            rows: Sequence[str] = tuple(read_rows(session, place))
        else:
            version_table = self._inputs.settings.version_table
            _, rows = read_version(session, self._inputs.history, version_table)
        if frozenset(rows) != heads:
            return False
        log.warning(
            "the application migrated the database to %s by itself while it was loaded: turn that off, "
            "so that migrator measures and records the migration",
            ", ".join(sorted(heads)) or "base",
        )
        return True

    def _plan(self, heads: tuple[str, ...], *, again: bool) -> list[Any]:
        """Return Alembic's steps from ``heads`` to the end of the plan, even if ``+2`` means something else
        by now.
        """
        plan, history = self._inputs.plan, self._inputs.history
        if again and frozenset(heads) != plan.before:
            there = set(history.applied(heads))
            if history.unknown(heads) or (plan.kind == "upgrade" and plan.after <= there):
                return []
            destination = next(iter(plan.after), "base") if len(plan.after) <= 1 else plan.destination
            return history.steps(plan.kind, destination, heads)
        return history.steps(plan.kind, plan.destination, heads, plan.baseline)
