"""The Python API: everything the command line can do, as methods that return values and never exit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from migrator import quiet
from migrator.errors import MigratorError, NoSuchDatabase, SettingsError
from migrator.history import ProjectOptions
from migrator.interruption import Interruption
from migrator.logs import Logs, redact
from migrator.record import Record, new_run_id
from migrator.settings import Settings, load

# What a method needs beyond this is imported in it: a run with nothing to do pays for nothing else.
if TYPE_CHECKING:
    from migrator.backups.manifest import Backup
    from migrator.backups.restored import Restored
    from migrator.backups.retention import Pruned
    from migrator.backups.store import Store
    from migrator.books import Repair
    from migrator.drift import Drift
    from migrator.edited import Edit
    from migrator.history import History, Revision
    from migrator.history.freeze import Frozen
    from migrator.outcome import Outcome
    from migrator.past import LastRun
    from migrator.postgres import Session

log = quiet.get_logger("migrator")


class State(NamedTuple):
    """Where a database is: its revisions, what is pending, who is migrating it just now, and who did last.

    ``edited`` are applied revisions whose file has changed since, and ``ahead`` is why this image may start although
    the schema is newer.
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
        self._interruption = interruption or Interruption()
        redact.add(settings.secrets)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> MigrationService:
        """Build a service from ``MIGRATOR_*`` and the other variables; raises :class:`SettingsError`."""
        return cls(load({}, os.environ if environment is None else environment, os.getcwd()))

    # -- what changes the database ---------------------------------------------------------------------

    def upgrade(self, destination: str = "head") -> Outcome:
        """Apply what is pending up to ``destination``, through every stage."""
        return self._run("upgrade", destination)

    def downgrade(self, destination: str, *, yes: bool = False) -> Outcome:
        """Revert to ``destination`` (such as ``-1``), through every stage; to base needs ``yes``."""
        return self._run("downgrade", destination, yes=yes)

    def stamp(self, destination: str) -> Outcome:
        """Set the version rows without running a revision."""
        return self._run("stamp", destination)

    def verify(self) -> Outcome:
        """Check that the database is at the heads and as ``verify.toml`` expects; changes nothing."""
        return self._run("verify", "heads")

    def _run(self, kind: str, destination: str, *, yes: bool = False) -> Outcome:
        """Run for the target, and then for each further database of an ``env.py`` that migrates several."""
        if kind == "upgrade":
            from migrator.glance import glance

            outcome = glance(self.settings, self.project, destination, self.run_id, self._interruption)
            if outcome is not None:
                return outcome
        quiet.wake()
        first = self._run_one(kind, destination, yes=yes)
        if int(first.code) or not self._migrates_several():
            return first
        from migrator.several import run_others

        return run_others(first, self.others, lambda other: other._run_one(kind, destination, yes=yes))

    def _run_one(self, kind: str, destination: str, *, yes: bool) -> Outcome:
        from migrator import pipeline
        from migrator.run import Request, Run

        record = Record(kind, self.settings.target, self.run_id)
        request = Request(kind, destination, yes)
        return pipeline.run(Run(request, self.settings, self.project, record, self.logs, self._interruption))

    # -- several databases -----------------------------------------------------------------------------

    def others(self) -> tuple[MigrationService, ...]:
        """Return a service for each further database of an ``env.py`` that migrates several; that is loaded for it.

        Raises :class:`SettingsError`, and whatever ``env.py`` raises.
        """
        if not self._migrates_several():
            return ()
        from migrator.history.several import survey

        history, target = self.history(), self.settings.required_target
        with self._session() as session:
            addresses = survey(history, session, before_configure=self._take_back)
        project = self.project._replace(told=target)
        return tuple(
            MigrationService(
                self.settings._replace(target=address),
                project,
                logs=self.logs,
                interruption=self._interruption,
                run_id=self.run_id,
            )
            for address in addresses
        )

    def all(self) -> Iterator[MigrationService]:
        """Yield this service and then those of the other databases, which are looked for when they are asked for."""
        yield self
        yield from self.others()

    def _migrates_several(self) -> bool:
        if self.project.told is not None:
            return False
        from pathlib import Path

        from migrator import layout
        from migrator.history.several import env_file

        found, folder = layout.read(self.project, Path.cwd()), Path.cwd()
        return layout.migrates_several(
            os.path.join(found.location, "env.py") if found else env_file(self.project, folder)
        )

    def _take_back(self) -> None:
        """Take logging and signals back from whatever the application made of them."""
        self.logs.install()
        self._interruption.retake()

    # -- what only looks -------------------------------------------------------------------------------

    def history(self) -> History:
        """Read the revision graph; needs no database."""
        from migrator.history import History

        history = History(self.project, self.settings.target)
        self.logs.install()  # what a revision file imports may have set up logging of its own
        return history

    def freeze(self, *, check: bool = False) -> Frozen:
        """Write the history's manifest beside ``env.py``; with ``check``, raise where it would change."""
        from pathlib import Path

        from migrator.history.freeze import keep

        return keep(self.history(), self.project, Path.cwd(), check=check)

    def wait(self) -> tuple[Session, int]:
        """Wait for Postgres; returns a session, which the caller closes, and the number of attempts."""
        from migrator.stages.wait import wait

        return wait(self.settings.required_target, self.settings, self.application_name)

    def wait_for_current(self) -> tuple[str, ...]:
        """Wait until nothing is pending, reading only; returns the revisions that the database is at."""
        from migrator.currency import wait_for_current
        from migrator.glance import frozen_history

        found = [
            wait_for_current(
                frozen_history(one.settings, one.project), one.history, one.settings, self.application_name
            )
            for one in self.all()
        ]
        return found[0]

    def state(self) -> State:
        """Return where the database is; raises for a state that a person must decide about."""
        from migrator.stages.inspect import inspect
        from migrator.stages.lock import holder

        history = self.history()
        with self._session() as session:
            found = inspect(session, history, self.settings, "upgrade", "heads", read_only=True)
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
            )

    def current(self) -> tuple[str, ...]:
        """Return the revisions that the database is at, known to this history or not."""
        from migrator.versions import read_version

        history = self.history()
        with self._session() as session:
            return read_version(session, history, self.settings.version_table)[1]

    # -- the ledger ------------------------------------------------------------------------------------

    def ledger(self, limit: int = 20) -> list[dict[str, Any]]:
        """Return the newest rows of the ledger as they are."""
        from migrator.books import read_ledger

        history = self.history()
        with self._session() as session:
            return read_ledger(session, history, self.settings, limit)

    def repair(self, revisions: Sequence[str]) -> Repair:
        """Accept the edited files of applied revisions, under the run lock."""
        from migrator.books import accept_edits
        from migrator.stages.lock import lock

        history = self.history()
        author = Record("repair", self.settings.target, self.run_id).author(self.settings.actor)
        with self._session() as session, lock(session, self.settings):
            return accept_edits(session, history, self.settings, revisions, author)

    def accept_schema(self) -> Drift:
        """Keep the live schema as the one that is right, under the run lock; returns what had been different."""
        from migrator.drift import accept
        from migrator.stages.lock import lock
        from migrator.versions import read_version

        history = self.history()
        author = Record("repair", self.settings.target, self.run_id).author(self.settings.actor)
        with self._session() as session, lock(session, self.settings):
            table, _ = read_version(session, history, self.settings.version_table)
            return accept(session, self.settings, table, author)

    # -- backups ---------------------------------------------------------------------------------------

    def backup(self, name: str = "") -> Backup:
        """Make a verified backup now, under the run lock."""
        from migrator.glance import frozen_history
        from migrator.stages.backup import back_up
        from migrator.stages.lock import lock
        from migrator.versions import read_version

        history = frozen_history(self.settings, self.project) or self.history()
        with self._session() as session, lock(session, self.settings):
            _, current = read_version(session, history, self.settings.version_table)
            return back_up(
                session,
                self.settings,
                run_id=self.run_id,
                revisions=current,
                application_name=self.application_name,
                name=name,
            )

    def verify_backup(self, backup_id: str, how: str = "") -> Backup:
        """Prove a backup by ``read`` or ``restore`` (as MIGRATOR_BACKUP_VERIFY says), and note that beside it."""
        from migrator.backups import verify

        store, backup = self._find_backup(backup_id)
        return verify.verify(
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
        from migrator.backups.store import LATEST
        from migrator.backups.stores import open_store

        settings = self.settings
        target = settings.required_target if backup_id == LATEST else settings.target
        store = open_store(settings.backup_url, settings)
        return store, store.get(backup_id, target.database if target else "")

    def backups(self) -> list[dict[str, Any]]:
        """Return the backups in the folder, newest first."""
        from migrator.backups.manifest import summary
        from migrator.backups.stores import open_store

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
        """Restore a backup: into a new database ``to``, or (``replace``) in the place of the target.

        ``tables`` alone go into a schema of the target (``into_schema``, or one that is named after the run).  A backup
        that leaves out rows replaces it only where ``incomplete``, and never with ``drop_old``.
        """
        from migrator.backups.side_schema import refuse_together, restore_tables

        refuse_together(to, tables, into_schema, drop_old)
        if tables:
            return restore_tables(
                self.settings.required_target,
                self.settings,
                backup_id,
                tables,
                schema=into_schema,
                run_id=self.run_id,
                application_name=self.application_name,
                committed=self._interruption.shield,
            )
        if not to and not replace:
            raise SettingsError(
                ["restore without --to replaces the database: its sessions are ended"],
                next_step=f"migrator restore {backup_id} --yes, or look first: migrator restore {backup_id} --to NAME",
            )
        from migrator.backups.losses import Incomplete
        from migrator.backups.restore import Wishes, restore
        from migrator.stages.lock import lock

        if to and to == self.settings.required_target.database:
            raise SettingsError(
                [f"--to {to} names the database itself: --to is for another one beside it"],
                next_step=f"to put the backup in its place: migrator restore {backup_id} --yes",
            )
        with contextlib.ExitStack() as stack:
            try:
                session = stack.enter_context(self._session())
            except NoSuchDatabase:
                log.info("%s is not there: it will be made from the backup", self.settings.target)
            else:
                if replace and not to:
                    stack.enter_context(lock(session, self.settings, session_ends=lambda: True))
            try:
                restored = restore(
                    self.settings.required_target,
                    self.settings,
                    backup_id,
                    to=to or None,
                    run_id=self.run_id,
                    application_name=self.application_name,
                    replace=replace,
                    wishes=Wishes(
                        drop_old=drop_old, incomplete=incomplete, swapped=self._interruption.shield
                    ),
                )
            except Incomplete as error:
                raise SettingsError(
                    [f"{error}: --incomplete is needed, and does not go with --drop-old"],
                    next_step=f"look first: migrator restore {backup_id} --to NAME; "
                    f"or migrator restore {backup_id} --yes --incomplete, which keeps what is there now",
                ) from error
        if not to:
            self._note(restored)
        return restored

    def _note(self, restored: Restored) -> None:
        """Add a row about the restore to the ledger that came back; a restore does not fail for want of it."""
        from migrator.books import note_restore
        from migrator.postgres import ConnectFailed, QueryFailed

        if not self.settings.ledger:
            return
        author = Record("restore", self.settings.target, self.run_id).author(self.settings.actor)
        try:
            with self._session() as session:
                note_restore(session, author, restored)
        except (MigratorError, ConnectFailed, QueryFailed) as error:
            log.warning("the ledger does not say that this was restored: %s", error)

    @property
    def application_name(self) -> str:
        """Return the name under which sessions are seen in pg_stat_activity."""
        return Record("", self.settings.target, self.run_id).application_name

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        session, _ = self.wait()
        with session, self._interruption.calling(session.cancel):
            yield session
