"""Restore a backup into a new database, which takes the old one's name only when it is complete.

Decisions:

* The archive goes into a scratch database, so a failure costs only that. pg_restore therefore needs no
  ``--single-transaction``, in which a database with many large objects runs out of locks.
* A swap keeps the old database as ``NAME_before_RUN``. A later restore drops it after MIGRATOR_KEEP_OLD.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from migrator.backups import (
    clients,
    databases,
    event_triggers,
    exported_snapshot,
    pg_restore,
    session_settings,
)
from migrator.backups.clients import AS_SUPERUSER, Client, Login, RestoreStopped, failed
from migrator.backups.manifest import human_size
from migrator.backups.restore import in_place, write_detection
from migrator.backups.restore.result import (
    Compared,
    Restored,
    compare,
    failing,
    slots_left,
    warn_unproven,
)
from migrator.backups.storage.open import open_store
from migrator.config.database_url import Target
from migrator.config.settings import Settings
from migrator.errors import LockBusy, SettingsError
from migrator.postgres import connection_limit
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session
from migrator.runtime.subprocesses import uninterrupted

LOGGER = logging.getLogger("migrator.restore")
_LOCK_PATIENCE = 10.0
_BOUND = re.compile(
    rb"^\d+; \d+ \d+ ((EXTENSION -|COMMENT - EXTENSION) pg_cron|(TABLE DATA|SEQUENCE SET|ACL) cron|ACL - SCHEMA cron)"
    rb" .*\n",
    re.MULTILINE,
)
_BOUND_NOTE = (
    "pg_cron was not restored, because it works in only one database. As a superuser in {name}: "
    "`CREATE EXTENSION pg_cron`, then `pg_restore --data-only --schema=cron --table=job "
    "--dbname={name} {place}`."
)


@dataclass(frozen=True)
class RestoreOptions:
    """The options of a restore in place of the database.

    ``drop_old``: drop the replaced database after the new one answers under its name. ``own``: if
    given, the restore is refused if it would lose writes since the backup by other transactions than
    these (see write_detection.py). ``before_swap`` is called with a session in the database that is
    about to take the name. ``swapped`` is called directly after the swap: from then on no signal may
    report that nothing was changed. ``incomplete``: accept a backup without the rows of some tables,
    but then keep the old database.
    """

    drop_old: bool = False
    incomplete: bool = False
    own: Callable[[], frozenset[int]] | None = None
    before_swap: Callable[[Session], None] | None = None
    swapped: Callable[[], None] = lambda: None


def restore(
    session_target: Target,
    settings: Settings,
    backup_id: str,
    *,
    to: str | None,
    run_id: str,
    application_name: str,
    replace: bool,
    options: RestoreOptions | None = None,
) -> Restored:
    """Restore a backup beside the database (``to`` a new name), or in its place (``replace``).

    In its place, the swap ends every session in the database, our own included. Raises
    :class:`RestoreFailed`, and the database has its own name and its old content, or
    :class:`WouldLose`, and nothing was done.
    """
    if to is None and not replace:
        raise SettingsError(
            ["restore without --to replaces the database and ends its sessions"],
            next_step=f"migrator restore {backup_id} --yes; to look first: migrator restore {backup_id} --to "
            "NAME",
        )
    started = time.monotonic()
    database = session_target.database
    store = open_store(settings.backup_url, settings)
    backup = store.get(backup_id, database)
    if to is None and backup.database != database:
        raise failed(
            backup,
            f"Backup {backup.id} is of database {backup.database}, not of {database}.",
            f"to restore it beside: migrator restore {backup.id} --to NAME",
        )
    options = options or RestoreOptions()
    if to is None and (
        (backup.excluded_table_data and not options.incomplete)
        or (write_detection.missing(backup) and options.drop_old)
    ):
        raise write_detection.Incomplete(backup)
    warn_unproven(backup)
    if backup.target != str(session_target):
        LOGGER.warning("%s was taken from %s, and this is %s", backup.id, backup.target, session_target)
    with failing(backup), pg_restore.opened(store, backup, settings) as path:
        login = Login(session_target, application_name, settings.connect_timeout)
        work = _Restore(in_place.Job(login, settings, backup, path, run_id), options)
        with work.sessions():
            done = work.beside(to) if to is not None else work.in_place()
    restored = dataclasses.replace(done, seconds=round(time.monotonic() - started, 3))
    LOGGER.info("%s", restored.message)
    return restored


class _Restore:
    """One restore, with its sessions in the maintenance database."""

    def __init__(self, job: in_place.Job, options: RestoreOptions) -> None:
        self._job, self._options = job, options
        self._settings, self._backup, self._path = job.settings, job.backup, job.path
        missing = write_detection.missing(job.backup)
        self._missing = [f"This backup is incomplete: {missing}."] if missing else []
        self._notes: list[str] = []
        self._filling = session_settings.Filling()
        self._session: Session

    @contextlib.contextmanager
    def sessions(self) -> Iterator[None]:
        """Hold a session that keeps other restores of the same database out; remove the leftovers of killed
        ones.
        """
        with self._connect() as session:
            self._session = session
            session.require_writes()
            connection_limit.refuse_too_few(session, 4, "A restore")
            self._keep_others_out()
            for name in databases.marked(session, self._job.database):
                LOGGER.info("dropping %s, which an interrupted restore left", name)
                databases.drop(session, name)
            yield

    def _keep_others_out(self) -> None:
        """Take a lock that ends with our session; wait a little for that of a run that was just killed."""
        key = f"migrator restore {self._job.database}"
        deadline = time.monotonic() + _LOCK_PATIENCE
        while not self._session.value("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [key]):
            if time.monotonic() > deadline:
                raise LockBusy(
                    f"Another restore of {self._job.database} is running on this server.",
                    next_step="wait for it, then run again",
                )
            time.sleep(0.1)

    def beside(self, name: str) -> Restored:
        """Restore into a new database that stays."""
        if not 0 < len(name.encode()) <= databases.NAME_BYTES:
            raise failed(
                self._backup, f"{name!r} is not a name for a database: it must have 1 to 63 bytes.", ""
            )
        self._refuse_without_createdb()
        with self._scratch(name) as compared:
            notes = self._finish(name)
            databases.unmark(self._session, name, self._job.database)
        return self._restored(name, compared, notes, beside=True)

    def in_place(self) -> Restored:
        """Put the backup in the database's place: by a swap, or in place if the role may not create a
        database.
        """
        database = self._job.database
        replaced = databases.exists(self._session, database)
        if not self._may_create() and replaced:
            compared, safety, notes = self._from_within()
            return self._restored(database, compared, notes, safety=safety)
        self._refuse_without_createdb()
        scratch = databases.shorten(database, f"_restore_{self._job.run_id}")
        kept = databases.shorten(database, f"_before_{self._job.run_id}")
        if replaced and databases.exists(self._session, kept):
            raise failed(self._backup, f"There is a database {kept} already.", "rename or drop it")
        with self._nobody_writes(replaced) as holder, self._scratch(scratch) as compared:
            notes = self._finish(scratch) + slots_left(self._session, database)
            if self._options.before_swap is not None:
                with self._inside(scratch) as session:
                    self._options.before_swap(session)
            if holder is not None:
                holder.look()
            with self._connect() as helper, uninterrupted(forget=True):
                if replaced:
                    databases.swap(self._session, helper, database, scratch, kept, holder=holder)
                else:
                    databases.rename(self._session, scratch, database)
                self._options.swapped()
        dropped = replaced and self._options.drop_old and self._drop_old(kept, compared)
        return self._restored(
            database,
            compared,
            notes,
            kept=kept if replaced and not dropped else "",
            dropped=kept if dropped else "",
        )

    def _restored(self, database: str, compared: Compared, notes: list[str], **more: Any) -> Restored:
        return Restored(
            backup=self._backup,
            database=database,
            tables=compared.tables,
            counted=compared.counted,
            rows=compared.rows,
            seconds=0.0,
            notes=(*self._missing, *notes),
            **{"kept": "", **more},
        )

    def _from_within(self) -> tuple[Compared, str, list[str]]:
        LOGGER.info(
            "role %s may not create databases: %s is restored in place, in one transaction",
            self._session.facts.user,
            self._job.database,
        )
        compared, safety, notes = in_place.replace(self._job, self._options.own, self._options.swapped)
        try:
            if self._options.before_swap is not None:
                with self._inside(self._job.database) as session:
                    self._options.before_swap(session)
            self._drop_expired()
        except (QueryFailed, ConnectFailed) as error:
            LOGGER.error("it was restored, but the end of the work failed: %s", error.text)
        return compared, safety, notes

    @contextlib.contextmanager
    def _nobody_writes(self, replaced: bool) -> Iterator[write_detection.Holder | None]:
        if self._options.own is None or not replaced:
            self._drop_expired()
            yield None
            return
        with write_detection.nobody_writes(self._job.login, self._backup, self._options.own) as holder:
            self._drop_expired()  # not before: it takes transaction ids, which would look like those of others
            yield holder

    def _drop_old(self, kept: str, compared: Compared) -> bool:
        """Drop the replaced database after the new one answers under its name; return whether it was dropped."""
        try:
            with self._inside(self._job.database) as session:
                found = [item for item in exported_snapshot.relations(session) if item.kind != "S"]
            if len(found) != compared.tables:
                LOGGER.error("%s is kept: the new database does not show its tables", kept)
                return False
            databases.drop(self._session, kept)
        except (QueryFailed, ConnectFailed) as error:
            LOGGER.error("%s is kept, because it could not be dropped: %s", kept, error.text)
            return False
        return True

    def _drop_expired(self) -> None:
        keep = self._settings.keep_old
        if keep is None:
            return
        for name in databases.expired(self._session, self._job.database, keep):
            LOGGER.info("dropping %s, which an earlier restore replaced (MIGRATOR_KEEP_OLD)", name)
            try:
                databases.drop(self._session, name)
            except QueryFailed as error:
                LOGGER.warning("%s could not be dropped: %s", name, error.text)

    def _inside(self, name: str) -> Session:
        return self._job.login.to(name).connect()

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[Compared]:
        """Create a database, restore into it, and compare it; drop it if a later step fails."""
        if databases.exists(self._session, name):
            raise failed(
                self._backup, f"There is a database {name} already.", "choose another name, or drop it"
            )
        created = False
        try:
            with uninterrupted():
                databases.create(self._session, name, self._backup.properties)
                created = True
            databases.mark(self._session, name, self._job.database)
            with databases.without_event_triggers(self._session, name):
                compared = self._fill_and_compare(name)
            session_settings.reset(self._session, name)
            databases.copy_privileges(self._session, self._job.database, name)
            yield compared
        except BaseException:
            if created:
                what = "the half-restored database"
                databases.drop_surely(self._session, lambda: self._connect(patient=False), what, name)
            raise

    def _connect(self, *, patient: bool = True) -> Session:
        login, database = self._job.login, self._job.database
        return databases.maintenance(
            login.target, login.application_name, login.timeout, not_in=database, patient=patient
        )

    def _may_create(self) -> bool:
        return bool(
            self._session.value("SELECT rolsuper OR rolcreatedb FROM pg_roles WHERE rolname = current_user")
        )

    def _refuse_without_createdb(self) -> None:
        """Refuse early: no right to create databases, an owner that does not exist."""
        backup, session = self._backup, self._session
        user = quote_identifier(session.facts.user)
        if not self._may_create():
            raise failed(
                backup,
                f"Role {session.facts.user} may not create databases, and a restore needs a new database.",
                f"as a superuser: ALTER ROLE {user} CREATEDB; or restore by hand in place: "
                + pg_restore.by_hand(backup, self._job.database),
            )
        if not session.value("SELECT count(*) FROM pg_roles WHERE rolname = %s", [backup.properties.owner]):
            owner = quote_identifier(backup.properties.owner)
            raise failed(
                backup,
                f"The backup's database belongs to role {backup.properties.owner}, which this server does not have.",
                f"CREATE ROLE {owner};",
            )

    def _fill_and_compare(self, name: str) -> Compared:
        """Restore into the database, and compare it before its event triggers exist."""
        backup = self._backup
        client = clients.for_restore(self._settings, self._session.facts.major, backup.client_major)
        LOGGER.info("restoring %s (%s) into %s ...", backup.id, human_size(backup.size_bytes), name)
        with self._told(), event_triggers.apart(client, self._path, _BOUND) as (others, alone):
            self._notes = in_place.subscriptions(client, self._path)
            if _BOUND.search(pg_restore.script(client, self._path, "--list")):
                self._notes.append(_BOUND_NOTE.format(name=self._job.database, place=backup.place))
            with self._inside(name) as inside:
                self._filling = session_settings.for_copy(
                    self._session, inside, self._dumped_under(), client, self._path
                )
            self._notes += self._filling.notes
            session_settings.demand(backup, self._filling.refused, client, self._path)
            self._pg_restore(client, name, others)
            with self._inside(name) as session:
                compared = compare(session, backup)
            if alone:
                self._pg_restore(client, name, alone)
        return compared

    def _pg_restore(self, client: Client, name: str, options: tuple[str, ...]) -> None:
        pg_restore.restore_into(
            client,
            self._path,
            self._job.login.to(name),
            self._session.facts.major,
            pgoptions=self._filling.options,
            jobs=jobs(self._settings),
            options=("--no-subscriptions", *options),
            before_post_data=self._filling.before_post_data,
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Return the error with pg_restore's message and its fix."""
        backup = self._backup
        try:
            yield
        except RestoreStopped as stopped:
            next_step = "fix what pg_restore reports, and restore again"
            if stopped.of_rights:
                next_step = AS_SUPERUSER
            if stopped.of_a_role:
                next_step = (
                    "create the role that it names (CREATE ROLE ...), or restore as a role that may act for it; "
                    "without owners and grants it goes by hand into an empty database: "
                    + pg_restore.by_hand(backup, "NEW_DATABASE", "--no-owner", "--no-privileges")
                )
            message = f"pg_restore of {backup.id} failed: {stopped.said}"
            raise failed(backup, message, next_step) from stopped

    def _dumped_under(self) -> Mapping[str, str]:
        """Return the settings of the dump; those that an older manifest lacks come from the original."""
        known, original = self._backup.spelling, self._job.database
        if known.keys() >= set(pg_restore.NAMES) or not databases.exists(self._session, original):
            return known
        with self._inside(original) as session:
            return session_settings.read(session) | dict(known)

    def _finish(self, name: str) -> list[str]:
        """Copy the database-wide settings; return notes on those that could not be copied."""
        original = self._job.database
        if databases.exists(self._session, original):
            notes = databases.copy_settings(self._session, original, name)
        else:
            notes = [
                f"{original} does not exist any more, so its own settings (ALTER DATABASE ... SET, "
                "GRANT, COMMENT) are not restored: `pg_restore --create --schema-only --file=- "
                f"{self._backup.place}` shows them."
            ]
        notes += self._notes
        for note in notes:
            LOGGER.warning("%s", note)
        return notes


def jobs(settings: Settings) -> int:
    """Return how many workers pg_restore gets: MIGRATOR_RESTORE_JOBS, or one per core and at most eight."""
    return settings.restore_jobs or min(8, len(os.sched_getaffinity(0)))
