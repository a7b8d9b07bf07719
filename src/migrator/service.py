"""The Python API: everything that the command line does, as methods that return values and never exit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from migrator.config.settings import Settings, load
from migrator.errors import MigratorError, NoSuchDatabase, SettingsError
from migrator.pipeline.record import Record, new_run_id
from migrator.postgres.errors import FREE_CONNECTION_WAIT
from migrator.project import ProjectOptions
from migrator.runtime.logs import Logs, get_logger, redact, set_up_now
from migrator.runtime.signals import Interruption

# Methods import the rest themselves: an up-to-date check pays for nothing else.
if TYPE_CHECKING:
    from migrator.backups.manifest import Backup
    from migrator.backups.restore.restore import RestoreOptions
    from migrator.backups.restore.result import Restored
    from migrator.backups.retention import Pruned
    from migrator.backups.storage.interface import Store
    from migrator.ledger.edited_files import Edit
    from migrator.ledger.queries import LastRun
    from migrator.ledger.repair import Repair
    from migrator.ledger.table import Author
    from migrator.outcome import Outcome
    from migrator.pipeline.drift import Drift
    from migrator.pipeline.fast_path.up_to_date import FrozenHistory
    from migrator.postgres.session import Session
    from migrator.project import History, Revision
    from migrator.project.freeze import Frozen

log = get_logger("migrator")


class State(NamedTuple):
    """The state of a database: its revisions, the pending ones, the running migration, and the last one.

    ``edited`` are applied revisions with an edited file. ``ahead`` is the reason why this image may
    start although the schema is newer. ``hint`` names the branches, if there are several and none is
    chosen.
    """

    target: str
    server_version: str
    version_table: str
    current: tuple[str, ...]
    heads: tuple[str, ...]
    pending: tuple[Revision, ...]
    running: str
    last_run: LastRun | None = None
    edited: tuple[Edit, ...] = ()
    ahead: str = ""
    hint: str = ""
    version_tables: Mapping[str, tuple[str, ...]] = MappingProxyType({})


class MigrationService:
    """One project and one target.

    >>> service = MigrationService.from_environment()          # doctest: +SKIP
    >>> service.upgrade("head").code                           # doctest: +SKIP
    <ExitCode.OK: 0>
    """

    def __init__(
        self,
        settings: Settings,
        project: ProjectOptions | None = None,
        *,
        logs: Logs | None = None,
        interruption: Interruption | None = None,
        run_id: str = "",
    ) -> None:
        self.settings = settings
        project = project or ProjectOptions(
            tuple(settings.config.split(os.pathsep)) if settings.config else ()
        )
        export = tuple(name.strip() for name in settings.url_variable.split(",") if name.strip())
        self.project = project._replace(bootstrap=settings.bootstrap, export=export)
        self.run_id = run_id or new_run_id()
        self.logs = logs or Logs(settings.log_format, settings.log_level, self.run_id)
        self.interruption = interruption or Interruption()
        redact.add(settings.secrets)
        FREE_CONNECTION_WAIT.seconds = settings.wait_timeout

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> MigrationService:
        """Build a service from ``MIGRATOR_*`` and the other variables; raises :class:`SettingsError`."""
        return cls(load({}, os.environ if environment is None else environment, os.getcwd()))

    # -- what changes the database ---------------------------------------------------------------------

    def upgrade(self, destination: str = "") -> Outcome:
        """Apply the pending revisions up to ``destination`` (or MIGRATOR_DESTINATION, or head), through every
        stage.
        """
        return self._run("upgrade", destination or self.settings.destination or "head")

    def downgrade(self, destination: str, *, yes: bool = False) -> Outcome:
        """Revert to ``destination`` (such as ``-1``), through every stage; to base needs ``yes``."""
        return self._run("downgrade", destination, yes=yes)

    def stamp(self, destination: str) -> Outcome:
        """Set the version rows without running a revision."""
        return self._run("stamp", destination)

    def verify(self) -> Outcome:
        """Check that the database is at MIGRATOR_DESTINATION (or the heads), and as ``verify.toml`` expects."""
        return self._run("verify", self.settings.goal)

    def _run(self, kind: str, destination: str, *, yes: bool = False) -> Outcome:
        """Run for the target, and then for each further database of an ``env.py`` that migrates several."""
        if kind == "upgrade":
            from migrator.pipeline.fast_path.up_to_date import check_up_to_date

            outcome = check_up_to_date(
                self.settings, self.project, destination, self.run_id, self.interruption
            )
            if outcome is not None:
                return outcome
        set_up_now()
        first = self._run_one(kind, destination, yes=yes)
        if int(first.code) or not self._migrates_several():
            return first
        from migrator.pipeline.multidb import run_others

        return run_others(
            first,
            lambda: self.others(read_only=kind == "verify"),
            lambda other: other._run_one(kind, destination, yes=yes),
            self.interruption,
        )

    def _run_one(self, kind: str, destination: str, *, yes: bool) -> Outcome:
        from migrator.pipeline import pipeline
        from migrator.pipeline.context import Request, Run

        record = Record(kind, self.settings.target, self.run_id)
        request = Request(kind, destination, yes)
        return pipeline.run(Run(request, self.settings, self.project, record, self.logs, self.interruption))

    # -- several databases -----------------------------------------------------------------------------

    def others(self, *, read_only: bool = True) -> tuple[MigrationService, ...]:
        """Return a service for each further database of an ``env.py`` that migrates several; this loads
        ``env.py``.

        Raises :class:`SettingsError`, and any error of ``env.py``.
        """
        if not self._migrates_several():
            return ()
        from migrator.pipeline.apply.env_targets import survey

        history, target = self.history(read_only=read_only), self.settings.required_target
        with self._session() as session:
            addresses = survey(history, session, before_configure=self._reinstall_logging)
        project = self.project._replace(env_target=target)
        return tuple(
            MigrationService(
                self.settings._replace(target=address),
                project,
                logs=self.logs,
                interruption=self.interruption,
                run_id=self.run_id,
            )
            for address in addresses
        )

    def all(self) -> Iterator[MigrationService]:
        """Yield this service and then those of the other databases, which are found only when they are
        requested.
        """
        yield self
        yield from self.others()

    def _migrates_several(self) -> bool:
        if self.project.env_target is not None:
            return False
        from pathlib import Path

        from migrator.pipeline.apply.env_targets import env_file
        from migrator.project import layout

        found, folder = layout.read(self.project, Path.cwd()), Path.cwd()
        return layout.migrates_several(
            os.path.join(found.location, "env.py") if found else env_file(self.project, folder)
        )

    def _reinstall_logging(self) -> None:
        """Take logging and signals back from the application."""
        self.logs.install()
        self.interruption.reinstall()

    # -- what only looks -------------------------------------------------------------------------------

    def history(self, *, read_only: bool = True) -> History:
        """Read the revision graph; needs no database. With ``read_only``, the loaded application code may
        only read.
        """
        from migrator.project import History

        history = History(self.project, self.settings.target, read_only=read_only)
        self._reinstall_logging()  # the imports of a revision file may have set up their own logging and signals
        return history

    def freeze(self, *, check: bool = False) -> Frozen:
        """Write the history's manifest beside ``env.py``; with ``check``, raise if it would change."""
        from pathlib import Path

        from migrator.project.freeze import write_manifest

        return write_manifest(self.history(), self.project, Path.cwd(), check=check)

    def wait(self) -> tuple[Session, int]:
        """Wait for Postgres; returns a session, which the caller closes, and the number of attempts."""
        from migrator.pipeline.stages.wait import wait

        return wait(self.settings.required_target, self.settings, self.application_name)

    def wait_for_current(self) -> tuple[str, ...]:
        """Wait until nothing is pending, reading only; return the database's revisions."""
        from migrator.pipeline.fast_path.up_to_date import frozen_history
        from migrator.pipeline.wait_for_current import wait_for_current

        found = [
            wait_for_current(
                frozen_history(one.settings, one.project),
                one.history,
                one.settings,
                self.application_name,
                reinstall_logging=self._reinstall_logging,
            )
            for one in self.all()
        ]
        return found[0]

    def state(self) -> State:
        """Return the state of the database; raises for a state that needs a decision."""
        from migrator.pipeline.stages.inspect import asking, inspect
        from migrator.pipeline.stages.lock import holder

        history = self.history()
        with self._session() as session:
            ask = asking(session, history, self.settings, self._reinstall_logging, locked=False)
            found = inspect(
                session, history, self.settings, "upgrade", self.settings.goal, read_only=True, ask=ask
            )
            running = holder(session)
            return State(
                target=str(session.target),
                server_version=session.facts.version,
                version_table=str(found.version_table or ""),
                current=found.current,
                heads=history.heads,
                pending=found.plan.revisions,
                running=running[1] if running else "",
                last_run=found.standing.last,
                edited=found.edits,
                ahead=found.ahead,
                hint=history.branch_hint(self.settings.destination),
                version_tables={
                    str(table): tuple(sorted(rows)) for table, rows in found.where.visits.items()
                },
            )

    def current(self) -> tuple[str, ...]:
        """Return the database's revisions, known to this history or not."""
        history = self.history()
        with self._session() as session:
            return self._rows(session, history)

    def _rows(self, session: Session, history: History | FrozenHistory) -> tuple[str, ...]:
        """Return the database's revisions; ask ``env.py`` if only that knows the version table."""
        from migrator.pipeline.fast_path.up_to_date import FrozenHistory
        from migrator.pipeline.stages.inspect import asking
        from migrator.postgres.version_table import find_version_table, read_version

        found = find_version_table(session, history, self.settings.version_table)
        if found.others:
            known = self.history() if isinstance(history, FrozenHistory) else history
            visits = asking(session, known, self.settings, self._reinstall_logging, locked=False)()
            if visits:
                return tuple(sorted(visits[0].rows))
        return read_version(session, history, self.settings.version_table)[1]

    # -- the ledger ------------------------------------------------------------------------------------

    def ledger(self, limit: int = 20) -> list[dict[str, Any]]:
        """Return the newest rows of the ledger unchanged."""
        from migrator.ledger.repair import read_ledger

        history = self.history()
        with self._session() as session:
            return read_ledger(session, history, self.settings, limit)

    def repair(self, revisions: Sequence[str]) -> Repair:
        """Accept the edited files of applied revisions, under the run lock."""
        from migrator.ledger.repair import accept_edits
        from migrator.pipeline.stages.lock import lock

        history = self.history()
        author = self._author("repair")
        changing = self.interruption.changing("migrator ledger")
        with self._session() as session, lock(session, self.settings), changing:
            return accept_edits(session, history, self.settings, revisions, author)

    def accept_schema(self) -> Drift:
        """Accept the live schema as the expected one, under the run lock; return the earlier differences."""
        from migrator.pipeline.drift import accept
        from migrator.pipeline.stages.lock import lock
        from migrator.postgres.version_table import read_version

        history = self.history()
        author = self._author("repair")
        with self._session() as session, lock(session, self.settings):
            table, _ = read_version(session, history, self.settings.version_table)
            with self.interruption.changing("migrator ledger"):
                return accept(session, self.settings, table, author)

    # -- backups ---------------------------------------------------------------------------------------

    def backup(self, name: str = "") -> Backup:
        """Make a verified backup now, under the run lock."""
        from migrator.pipeline.fast_path.up_to_date import frozen_history
        from migrator.pipeline.stages.backup import back_up
        from migrator.pipeline.stages.lock import lock

        history = frozen_history(self.settings, self.project) or self.history()
        with self._session() as session, lock(session, self.settings):
            current = self._rows(session, history)
            return back_up(
                session,
                self.settings,
                run_id=self.run_id,
                revisions=current,
                application_name=self.application_name,
                name=name,
            )

    def verify_backup(self, backup_id: str, how: str = "") -> Backup:
        """Verify a backup by ``read`` or ``restore`` (default: MIGRATOR_BACKUP_VERIFY), and record that
        beside it.
        """
        from migrator.backups.verification import verify_stored

        store, backup = self._find_backup(backup_id)
        return verify_stored.verify(
            store,
            backup,
            self.settings,
            how or self.settings.backup_verify,
            run_id=self.run_id,
            application_name=self.application_name,
        )

    def show_backup(self, backup_id: str) -> Backup:
        """Return a backup by id, by name, or ``latest`` of the target's database."""
        return self._find_backup(backup_id)[1]

    def _find_backup(self, backup_id: str) -> tuple[Store, Backup]:
        from migrator.backups.storage.interface import LATEST
        from migrator.backups.storage.open import open_store

        settings = self.settings
        target = settings.required_target if backup_id == LATEST else settings.target
        store = open_store(settings.backup_url, settings)
        return store, store.get(backup_id, target.database if target else "")

    def backups(self) -> list[dict[str, Any]]:
        """Return the backups in the folder, newest first."""
        from migrator.backups.manifest import summary
        from migrator.backups.storage.open import open_store

        return [summary(backup) for backup in open_store(self.settings.backup_url, self.settings).backups()]

    def prune(self, *, dry_run: bool = False) -> Pruned:
        """Remove the backups of the target's database that MIGRATOR_BACKUP_KEEP does not keep."""
        from migrator.backups import retention

        with self._session() as session:
            return retention.prune(session, self.settings, dry_run=dry_run)

    def restore(
        self,
        backup_id: str,
        *,
        to: str = "",
        replace: bool = False,
        drop_old: bool = False,
        incomplete: bool = False,
        tables: Sequence[str] = (),
        into_schema: str = "",
    ) -> Restored:
        """Restore a backup: into a new database ``to``, or (``replace``) in place of the target.

        ``tables`` are restored alone, into a schema of the target (``into_schema``, or one named after
        the run). A backup without the rows of some tables replaces the target only with ``incomplete``,
        and never with ``drop_old``.
        """
        from migrator.backups.restore.tables import refuse_together, restore_tables

        refuse_together(to, tables, into_schema, drop_old)
        target = self.settings.required_target
        if tables:
            return restore_tables(
                target,
                self.settings,
                backup_id,
                tables,
                schema=into_schema,
                run_id=self.run_id,
                application_name=self.application_name,
                committed=self.interruption.block,
            )
        from migrator.backups.restore.restore import RestoreOptions

        if not to and not replace:
            raise SettingsError(
                ["restore without --to replaces the database and ends its sessions"],
                next_step=f"migrator restore {backup_id} --yes; to look first: migrator restore {backup_id} "
                "--to NAME",
            )
        if to and to == target.database:
            raise SettingsError(
                [f"--to {to} names the database itself: --to needs another name"],
                next_step=f"to replace the database: migrator restore {backup_id} --yes",
            )
        options = RestoreOptions(drop_old=drop_old, incomplete=incomplete, swapped=self.interruption.block)
        restored = self._restore_database(backup_id, to, replace, options)
        if not to:
            self._note(restored)
        return restored

    def _restore_database(self, backup_id: str, to: str, replace: bool, options: RestoreOptions) -> Restored:
        """Restore into a database, under the run lock if it replaces the target."""
        from migrator.backups.restore.restore import restore
        from migrator.backups.restore.write_detection import Incomplete
        from migrator.pipeline.stages.lock import lock

        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self._session())
            except NoSuchDatabase:
                log.info("%s does not exist: it is created from the backup", self.settings.target)
            else:
                if replace and not to:
                    stack.enter_context(lock(session, self.settings, session_ends=lambda: True))
            try:
                return restore(
                    self.settings.required_target,
                    self.settings,
                    backup_id,
                    to=to or None,
                    run_id=self.run_id,
                    application_name=self.application_name,
                    replace=replace,
                    options=options,
                )
            except Incomplete as error:
                raise SettingsError(
                    [f"{error}: --incomplete is required, and excludes --drop-old"],
                    next_step=f"look first: migrator restore {backup_id} --to NAME; or migrator restore "
                    f"{backup_id} --yes --incomplete, which keeps the current state",
                ) from error

    def _note(self, restored: Restored) -> None:
        """Add a row about the restore to the restored ledger; a failure does not fail the restore."""
        from migrator.ledger.repair import note_restore
        from migrator.postgres.errors import ConnectFailed, QueryFailed

        if not self.settings.ledger:
            return
        author = self._author("restore")
        try:
            with self._session() as session:
                note_restore(
                    session,
                    author,
                    self.settings.role,
                    message=restored.message,
                    seconds=restored.seconds,
                    backup_id=restored.backup.id,
                )
        except (MigratorError, ConnectFailed, QueryFailed) as error:
            log.warning("the ledger does not record the restore: %s", error)

    def _author(self, kind: str) -> Author:
        """Return who writes a row of the ledger."""
        return Record(kind, self.settings.target, self.run_id).author(self.settings.actor)

    @property
    def application_name(self) -> str:
        """Return the name of the sessions in pg_stat_activity."""
        return Record("", self.settings.target, self.run_id).application_name

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        session, _ = self.wait()
        with session, self.interruption.on_signal(session.cancel):
            yield session
