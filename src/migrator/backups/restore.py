"""The way back: a backup becomes a database of its own first, and takes the old one's name only when it is whole.

Decisions:

* The archive goes into a scratch database, so a failure costs nothing but that.  pg_restore therefore needs no
  ``--single-transaction``, in which a database with many large objects runs out of locks.
* A swap leaves the old database as ``NAME_before_RUN``; nobody but a person drops it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrator.backups import archive, clients, databases, snapshot
from migrator.backups.manifest import Backup, human_size
from migrator.backups.snapshot import LockedOut
from migrator.backups.store import open_store
from migrator.errors import LockBusy, MigratorError, RestoreFailed, SettingsError
from migrator.postgres import ConnectFailed, QueryFailed, Session, connect, quote_identifier
from migrator.process import uninterrupted
from migrator.settings import Settings
from migrator.target import Target

LOGGER = logging.getLogger("migrator.restore")
_LOCK_PATIENCE = 10.0
_Compared = tuple[int, int, int]  # tables, those of them that were counted, their rows


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    ``database`` holds the backup now; ``kept`` is the name that the database which was there before has now
    (empty where nothing was replaced).  Of its ``tables``, ``counted`` have as many rows as the manifest says,
    ``rows`` in all; the others were too big to be counted.  ``notes`` name what did not come back as it was.
    """

    backup: Backup
    database: str
    kept: str
    tables: int
    counted: int
    rows: int
    seconds: float
    notes: tuple[str, ...] = ()
    beside: bool = False

    @property
    def message(self) -> str:
        """Say in one sentence what was done."""
        text = f"Restored {self.backup.id} into database {self.database} in {self.seconds:.1f} s: "
        text += f"{self.tables} tables, and the {self.counted} that were counted have the backup's {self.rows} rows."
        if self.kept:
            text += f" The database as it was before is now {self.kept}."
        return " ".join((text, *self.notes))

    @property
    def next_step(self) -> str:
        """Return how to get rid of what is left over."""
        if self.kept:
            return f"when you no longer need it: DROP DATABASE {quote_identifier(self.kept)};"
        if self.beside:
            return f"when you no longer need it: DROP DATABASE {quote_identifier(self.database)};"
        return "`migrator status` shows where it is"


def restore(
    session_target: Target,
    settings: Settings,
    backup_id: str,
    *,
    to: str | None,
    run_id: str,
    application_name: str,
    replace: bool,
) -> Restored:
    """Restore a backup beside the database (``to`` a new name), or in its place (``replace``).

    In its place: every session in the database is ended at the moment of the swap, our own included.
    Raises :class:`RestoreFailed`, and the database is under its own name and as it was then.
    """
    if to is None and not replace:
        raise SettingsError(
            ["restore without --to replaces the database: its sessions are ended"],
            next_step=f"migrator restore {backup_id} --yes, or look first: migrator restore {backup_id} --to NAME",
        )
    started = time.monotonic()
    database = session_target.database
    backup = open_store(settings.backup_url).get(backup_id, database)
    if to is None and backup.database != database:
        raise _failed(
            backup,
            f"Backup {backup.id} is of database {backup.database}, not of {database}.",
            f"migrator restore {backup.id} --to NAME puts it beside",
        )
    if backup.target != str(session_target):
        LOGGER.warning("%s was taken from %s, and this is %s", backup.id, backup.target, session_target)
    with _failing(backup):
        work = _Restore(session_target, settings, backup, run_id, application_name)
        with work.sessions():
            name, kept, (tables, counted, rows), notes = (
                work.beside(to) if to is not None else work.in_place()
            )
    restored = Restored(
        backup=backup,
        database=name,
        kept=kept,
        tables=tables,
        counted=counted,
        rows=rows,
        seconds=round(time.monotonic() - started, 3),
        notes=tuple(notes),
        beside=to is not None,
    )
    LOGGER.info("%s", restored.message)
    return restored


class _Restore:
    """One restore, with its sessions in the maintenance database."""

    def __init__(
        self, target: Target, settings: Settings, backup: Backup, run_id: str, application_name: str
    ) -> None:
        self._target = target
        self._settings = settings
        self._backup = backup
        self._run_id = run_id
        self._application_name = application_name
        self._session: Session

    @contextlib.contextmanager
    def sessions(self) -> Iterator[None]:
        """Check the archive, then hold a session that keeps other restores of the same database out."""
        _check_file(self._backup)
        with self._connect() as session:
            self._session = session
            self._keep_others_out()
            self._check_role()
            for name in databases.marked(session, self._target.database):
                LOGGER.info("dropping %s, which an interrupted restore left", name)
                databases.drop(session, name)
            yield

    def _keep_others_out(self) -> None:
        """Take a lock that ends with our session; wait a little for that of a run that was just killed."""
        key = f"migrator restore {self._target.database}"
        deadline = time.monotonic() + _LOCK_PATIENCE
        while not self._session.value("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [key]):
            if time.monotonic() > deadline:
                raise LockBusy(
                    f"Another restore of {self._target.database} is running on this server.",
                    next_step="wait for its end, then try again",
                )
            time.sleep(0.1)

    def beside(self, name: str) -> tuple[str, str, _Compared, list[str]]:
        """Restore into a new database that stays."""
        if not 0 < len(name.encode()) <= databases.NAME_BYTES:
            raise _failed(self._backup, f"{name!r} is no name for a database: it has 1 to 63 bytes.", "")
        with self._scratch(name) as compared:
            notes = self._finish(name)
        return name, "", compared, notes

    def in_place(self) -> tuple[str, str, _Compared, list[str]]:
        """Restore into a scratch database, then give it the database's name."""
        database = self._target.database
        scratch = databases.shorten(database, f"_restore_{self._run_id}")
        kept = databases.shorten(database, f"_before_{self._run_id}")
        replaced = databases.exists(self._session, database)
        if replaced and databases.exists(self._session, kept):
            raise _failed(self._backup, f"There is a database {kept} already.", "rename or drop it")
        with self._scratch(scratch) as compared:
            notes = self._finish(scratch)
            with self._connect() as helper, uninterrupted(forget=True):
                if replaced:
                    databases.swap(self._session, helper, database, scratch, kept)
                else:
                    databases.rename(self._session, scratch, database)
        return database, kept if replaced else "", compared, notes

    @contextlib.contextmanager
    def _scratch(self, name: str) -> Iterator[_Compared]:
        """Make a database, restore into it, and compare it; dropped where anything fails from there on."""
        if databases.exists(self._session, name):
            raise _failed(
                self._backup, f"There is a database {name} already.", "choose another name, or drop it"
            )
        created = False
        try:
            with uninterrupted():
                databases.create(self._session, name, self._backup.properties)
                created = True
            databases.mark(self._session, name, self._target.database)
            if databases.exists(self._session, self._target.database):
                databases.copy_privileges(self._session, self._target.database, name)
            self._fill(name)
            yield self._compare(name)
        except BaseException:
            if created:
                self._drop(name)
            raise

    def _drop(self, name: str) -> None:
        with uninterrupted():
            try:
                if self._session.closed:
                    with self._connect() as session:
                        databases.drop(session, name)
                else:
                    databases.drop(self._session, name)
            except (QueryFailed, ConnectFailed) as error:
                LOGGER.error(
                    "the half-restored database %s could not be dropped (%s): DROP DATABASE %s;",
                    name,
                    error.text,
                    quote_identifier(name),
                )

    def _connect(self) -> Session:
        return databases.maintenance(
            self._target,
            self._application_name,
            self._settings.connect_timeout,
            not_in=self._target.database,
        )

    def _check_role(self) -> None:
        """Refuse what would fail later: no right to create databases, an owner that does not exist."""
        backup, session = self._backup, self._session
        may_create, owner_there = session.query(
            "SELECT rolsuper OR rolcreatedb, EXISTS (SELECT FROM pg_roles WHERE rolname = %s)"
            " FROM pg_roles WHERE rolname = current_user",
            [backup.properties.owner],
        )[0]
        user = quote_identifier(session.facts.user)
        if not may_create:
            raise _failed(
                backup,
                f"Role {session.facts.user} may not create databases, and a backup is restored into one of its own.",
                f"as a superuser: ALTER ROLE {user} CREATEDB; or restore by hand into the database as it is: "
                + archive.by_hand(backup, self._target.database),
            )
        if not owner_there:
            owner = quote_identifier(backup.properties.owner)
            raise _failed(
                backup,
                f"The backup's database belongs to role {backup.properties.owner}, which this server does not have.",
                f"CREATE ROLE {owner};",
            )

    def _fill(self, name: str) -> None:
        """Run pg_restore into the database."""
        backup, server = self._backup, self._session.facts
        client = clients.for_restore(self._settings, server.major, backup.client_major)
        LOGGER.info("restoring %s (%s) into %s ...", backup.id, human_size(backup.size_bytes), name)
        connect_timeout = self._settings.connect_timeout
        try:
            archive.restore_into(
                client,
                Path(backup.place),
                clients.connection_argument(self._target, name),
                clients.environment(self._target, self._application_name, connect_timeout),
                server.major,
            )
        except archive.RestoreStopped as stopped:
            next_step = "put right what pg_restore names, and restore again"
            if stopped.of_a_role:
                next_step = (
                    "create the role that it names (CREATE ROLE ...), or restore as a role that may act for it; "
                    "without owners and grants it goes by hand into an empty database: "
                    + archive.by_hand(backup, "NEW_DATABASE", "--no-owner", "--no-privileges")
                )
            message = f"pg_restore of {backup.id} failed: {stopped.said}"
            raise _failed(backup, message, next_step) from stopped

    def _compare(self, name: str) -> _Compared:
        """Compare tables and row counts with the manifest, and give the planner its statistics."""
        target = self._target.with_database(name)
        counted = {
            table: facts.rows for table, facts in self._backup.tables.items() if facts.rows is not None
        }
        with connect(target, self._application_name, self._settings.connect_timeout) as session:
            session.query("SET statement_timeout = 0")
            session.query("SET row_security = off")
            found = [relation for relation in snapshot.relations(session) if relation.kind != "S"]
            names = {relation.shown for relation in found}
            wrong = [f"{table} is missing" for table in sorted(self._backup.tables.keys() - names)]
            wrong += [
                f"{table} was not in the backup" for table in sorted(names - self._backup.tables.keys())
            ]
            rows = 0
            for relation in found:
                expected = counted.get(relation.shown)
                if expected is not None:
                    actual = snapshot.count_exactly(session, relation)
                    rows += actual
                    if actual != expected:
                        wrong.append(f"{relation.shown} has {actual} rows and not {expected}")
                if relation.kind == "r":
                    session.query(f"ANALYZE {relation.qualified}")
        if wrong:
            raise _failed(
                self._backup,
                f"What came back of {self._backup.id} is not what was backed up: {'; '.join(wrong[:5])}.",
                "keep the backup, and report this with the backup's manifest",
            )
        return len(found), len(counted), rows

    def _finish(self, name: str) -> list[str]:
        """Copy what belongs to the database as a whole; return what could not be.

        The mark goes first: were it left on a whole database, a later restore would drop that.
        """
        databases.unmark(self._session, name)
        original = self._target.database
        if databases.exists(self._session, original):
            notes = databases.copy_settings(self._session, original, name)
        else:
            notes = [
                f"{original} is gone, so what was set for it as a whole (ALTER DATABASE ... SET, GRANT, COMMENT) "
                f"is not restored: `pg_restore --create --schema-only --file=- {self._backup.place}` shows it."
            ]
        for note in notes:
            LOGGER.warning("%s", note)
        return notes


def _check_file(backup: Backup) -> None:
    """Refuse a file that is not, byte for byte, what was written."""
    difference = archive.difference(backup)
    if difference:
        raise _failed(
            backup,
            f"The dump {backup.place} is not what was written: {difference}.",
            "take another backup: see `migrator backups`",
        )


def _failed(backup: Backup, message: str, next_step: str) -> RestoreFailed:
    state = f"The database was not changed; the backup is {backup.place}."
    return RestoreFailed(message, next_step=next_step, state=state)


@contextlib.contextmanager
def _failing(backup: Backup) -> Iterator[None]:
    """Turn what the disk, the server and the programs can raise into :class:`RestoreFailed`."""
    what = f"The restore of {backup.id} failed"
    try:
        yield
    except MigratorError:
        raise
    except databases.SwapFailed as error:
        raise _failed(
            backup,
            f"{what}: the databases could not be swapped: {error}",
            "end the sessions that it names, and restore again",
        ) from error
    except LockedOut as error:
        raise _failed(backup, f"{what}: {error.table} is locked.", "restore again") from error
    except (QueryFailed, ConnectFailed) as error:
        raise _failed(backup, f"{what}: {error.text}.", "put it right and restore again") from error
    except OSError as error:
        raise _failed(backup, f"{what}: {error}.", "put it right and restore again") from error
