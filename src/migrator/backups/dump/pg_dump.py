"""One pg_dump: under an exported snapshot, with its progress told, ended whenever we end."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from migrator import process
from migrator.backups import clients, method, progress, snapshot
from migrator.backups.clients import Client
from migrator.backups.manifest import Table
from migrator.backups.method import Method
from migrator.backups.parts import DirectoryPart
from migrator.backups.progress import DumpProgress
from migrator.backups.snapshot import LOCK_WAIT, Relation
from migrator.backups.store import Part
from migrator.errors import BackupFailed
from migrator.postgres import Session, quote_identifier
from migrator.report.progress import Progress
from migrator.settings import Settings

_CHATTER = re.compile(r"^pg_dump: (?!error|warning|fatal|detail|hint)[^\n]*(\n|$)", re.MULTILINE)
# A worker asks for each table's lock anew, and never waits: who queues for the whole table would wait for us.
_WORKER_LOCKED_OUT = "could not obtain lock on relation"


class WorkerLockedOut(Exception):
    """Somebody waits for an ACCESS EXCLUSIVE lock, so a second session gets none: one worker alone can go on."""


@dataclass(frozen=True)
class Dumped:
    """What was seen in the dump's snapshot."""

    tables: Mapping[str, Table]
    next_xid: int


class Dump:
    """One pg_dump, from its snapshot to its exit status."""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        client: Client,
        how: Method,
        excluded: Collection[Relation] = (),
        *,
        application_name: str,
    ) -> None:
        self._control = session
        self._settings = settings
        self._client = client
        self._how = how
        self._excluded = excluded
        self._database = session.facts.database
        self._target = session.target.with_database(self._database)
        self._application_name = application_name
        self._timeout = settings.connect_timeout

    def write(
        self,
        part: Part,
        *,
        sink: Callable[[bytes], object] | None,
        in_snapshot: Callable[[Session], object] = lambda _: None,
    ) -> Dumped:
        """Write the archive; return what the tables held in its snapshot.

        A single file goes through ``sink``; where that is None, pg_dump writes into the part's folder itself.
        ``in_snapshot`` is called with the session that holds the snapshot, before pg_dump starts.
        Raises :class:`WorkerLockedOut`, :class:`LockedOut`, :class:`BackupFailed`, OSError.
        """
        holder = snapshot.exported(self._target, self._application_name, self._timeout)
        with holder as (session, snapshot_id):
            next_xid = snapshot.next_xid(session)
            found = snapshot.relations(session)
            left_out = {table.shown for table in self._excluded}
            tables = snapshot.count(session, found, left_out)
            in_snapshot(session)
            sizes = {
                name: table.size_bytes
                for name, table in tables.items()
                if table.size_bytes is not None and name not in left_out
            }
            told = self._progress(found, sizes, part)
            encoding = str(session.value("SHOW server_encoding"))
            finished = _without_chatter(self._run(snapshot_id, encoding, part, sink, told))
        if finished.status != 0:
            if self._how.jobs > 1 and _WORKER_LOCKED_OUT in finished.stderr:
                raise WorkerLockedOut
            if isinstance(part, DirectoryPart):
                _raise_disk_error(finished, part)
            raise _failed(self._database, finished)
        return Dumped(tables, next_xid)

    def _progress(self, found: list[Relation], sizes: Mapping[str, int], part: Part) -> DumpProgress:
        bar = Progress(100, sys.stderr, enabled=self._settings.log_format != "json", percent=True)
        return DumpProgress(self._database, found, sizes, lambda: part.size, bar, jobs=self._how.jobs)

    def _run(
        self,
        snapshot_id: str,
        encoding: str,
        part: Part,
        sink: Callable[[bytes], object] | None,
        told: DumpProgress,
    ) -> process.Finished:
        folder = part.temporary if isinstance(part, DirectoryPart) else None
        try:
            return process.run(
                [
                    self._client.pg_dump,
                    f"--format={self._how.dump_format}",
                    *([f"--file={folder}", f"--jobs={self._how.jobs}"] if folder else []),
                    method.compress_option(self._client, self._how.compression),
                    f"--encoding={encoding}",  # not what ALTER DATABASE has set, which may lack a letter
                    "--verbose",
                    "--no-password",
                    f"--lock-wait-timeout={LOCK_WAIT * 1000:.0f}",
                    f"--snapshot={snapshot_id}",
                    *(f"--exclude-table-data={_exactly(table)}" for table in self._excluded),
                    clients.connection_argument(self._target, self._database),
                ],
                environment=clients.environment(self._target, self._application_name, self._timeout),
                on_output=sink,
                on_stderr=told.on_stderr,
                # pg_dump itself waits for ever where a network is cut that acknowledges everything.
                pulse=lambda: self._pulse(told),
            )
        finally:
            told.close()

    def _pulse(self, told: DumpProgress) -> None:
        if self._control.facts.major >= progress.VIEW_SINCE:
            told.on_server(
                [(row[0], row[1]) for row in self._control.query(progress.VIEW, [self._application_name])]
            )
        else:
            self._control.query("SELECT 1")
        told.tell()


def _exactly(table: Relation) -> str:
    """Return a table's name as a pattern that matches nothing else: in quotes no character is special."""
    return f"{quote_identifier(table.schema)}.{quote_identifier(table.name)}"


def _without_chatter(finished: process.Finished) -> process.Finished:
    """Leave out what ``--verbose`` adds, so that the last words are about what went wrong."""
    return replace(finished, stderr=_CHATTER.sub("", finished.stderr))


def _raise_disk_error(finished: process.Finished, part: DirectoryPart) -> None:
    """Raise what pg_dump got from the disk as if we had written there ourselves."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        if os.strerror(number) in finished.stderr:
            raise OSError(number, os.strerror(number), str(part.temporary))


def _failed(database: str, finished: process.Finished) -> BackupFailed:
    words = clients.last_words(finished)
    next_step = "see what pg_dump said, put it right, and run again"
    if "Query was: LOCK TABLE" in finished.stderr and finished.seconds >= LOCK_WAIT:
        return locked_out("a table")
    if "permission denied" in words:
        next_step = grant("the role")
    return BackupFailed(f"pg_dump of {database} failed: {words}", next_step=next_step)


def locked_out(table: str) -> BackupFailed:
    """Say that a table stayed locked."""
    return BackupFailed(
        f"Another session kept {table} locked for {LOCK_WAIT:.0f} s, so it could not be backed up.",
        next_step="run again when that session is done: SELECT pid, query FROM pg_stat_activity JOIN pg_locks "
        "USING (pid) WHERE mode = 'AccessExclusiveLock'",
    )


def grant(user: str) -> str:
    """Say how a role gets to read everything."""
    return (
        f'as a superuser: GRANT pg_read_all_data TO "{user}" (PostgreSQL 14 and newer), or set '
        "MIGRATOR_BACKUP=off to go without a backup"
    )
