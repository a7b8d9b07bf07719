"""One pg_dump: under an exported snapshot, with logged progress, ended whenever this process ends."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from migrator.backups import clients, exported_snapshot
from migrator.backups.clients import Client, Login
from migrator.backups.dump import format, progress
from migrator.backups.dump.format import Method
from migrator.backups.dump.progress import DumpProgress
from migrator.backups.exported_snapshot import LOCK_WAIT, Bounds, Relation, Sizes
from migrator.backups.storage.interface import Part
from migrator.backups.storage.parts import DirectoryPart
from migrator.config.settings import Settings
from migrator.errors import BackupFailed
from migrator.postgres import connection_limit
from migrator.postgres.errors import child_refused, no_free_connection
from migrator.postgres.quoting import quote_literal
from migrator.postgres.server import dead_client_values
from migrator.postgres.session import Session
from migrator.runtime import subprocesses
from migrator.runtime.output.progress import Progress

_CHATTER = re.compile(r"^pg_dump: (?!error|warning|fatal|detail|hint)[^\n]*(\n|$)", re.MULTILINE)
# A worker takes each table's lock again, and never waits: a session that waits for the whole table would
# wait for us.
_WORKER_LOCKED_OUT = "could not obtain lock on relation"
_LOCKED = "Query was: LOCK TABLE"
_HELD = """
SELECT relation::bigint FROM pg_locks
 WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock' AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class OneWorkerOnly(Exception):
    """A further worker got no lock, because a session waits for an ACCESS EXCLUSIVE one, or no connection."""


@dataclass(frozen=True)
class Dump:
    """One pg_dump, from its snapshot to its exit status; ``control`` is a session in the database beside it."""

    control: Session
    settings: Settings
    client: Client
    login: Login
    how: Method
    sizes: Sizes
    excluded: Collection[Relation]

    def write(
        self,
        part: Part,
        *,
        sink: Callable[[bytes], object] | None,
        in_snapshot: Callable[[Session, list[Relation]], object],
        meanwhile: Callable[[Session], object],
    ) -> Bounds:
        """Write the archive; return which transactions its snapshot has not seen.

        A single file goes through ``sink``; if that is None, pg_dump writes into the part's folder
        itself. ``in_snapshot`` is called with the session that holds the snapshot and its relations,
        before pg_dump starts; ``meanwhile`` with that session, after the start. Raises
        :class:`OneWorkerOnly`, :class:`LockedOut`, :class:`BackupFailed`, OSError.
        """
        with exported_snapshot.exported(self.login) as (session, snapshot_id):
            bounds = exported_snapshot.bounds(session)
            found = exported_snapshot.relations(session)
            in_snapshot(session, found)
            told = self._progress(found, part)
            encoding = str(session.value("SHOW server_encoding"))
            finished = self._run(snapshot_id, encoding, part, sink, told, lambda _: meanwhile(session))
        if finished.status != 0:
            if self.how.jobs > 1 and _WORKER_LOCKED_OUT in finished.stderr:
                raise OneWorkerOnly("another session waits for a table lock")
            if self.how.jobs > 1 and child_refused(finished.stderr):
                raise OneWorkerOnly("the server has no free connection for a further worker of pg_dump")
            if isinstance(part, DirectoryPart):
                _raise_disk_error(finished, part)
            if _LOCKED in finished.stderr and finished.seconds >= LOCK_WAIT:
                raise locked_out(self._locked(found))
            raise _failed(self.login.target.database, finished, self.how.jobs, self.control.facts.user)
        return bounds

    def _progress(self, found: list[Relation], part: Part) -> DumpProgress:
        left_out = {table.oid for table in self.excluded}
        tables = [item for item in found if item.kind == "r" and item.oid not in left_out]
        bar = Progress(100, sys.stderr, enabled=self.settings.log_format != "json", percent=True)
        return DumpProgress(
            self.login.target.database, tables, self.sizes, lambda: part.size, bar, jobs=self.how.jobs
        )

    def _locked(self, found: list[Relation]) -> str:
        """Name the tables that another session has locked."""
        held = {row[0] for row in self.control.query(_HELD)}
        names = [item.shown for item in found if item.oid in held]
        return ", ".join(names[:5]) or "a table"

    def _environment(self) -> dict[str, str]:
        """Return pg_dump's variables; its session ends on the server, with its locks, if this machine is cut
        off.

        A pooler may refuse settings at the start of a session.
        """
        values = {} if self.control.pooled else dead_client_values(self.control.facts.major)
        return self.login.environment(*(f"-c {name}={value}" for name, value in values.items()))

    def _run(
        self,
        snapshot_id: str,
        encoding: str,
        part: Part,
        sink: Callable[[bytes], object] | None,
        told: DumpProgress,
        on_start: Callable[[int], object],
    ) -> subprocesses.Finished:
        folder = part.temporary if isinstance(part, DirectoryPart) else None

        def dump() -> subprocesses.Finished:
            finished = subprocesses.run(
                [
                    self.client.pg_dump,
                    f"--format={self.how.dump_format}",
                    *([f"--file={folder}", f"--jobs={self.how.jobs}"] if folder else []),
                    format.compress_option(self.client, self.how.compression),
                    f"--encoding={encoding}",  # not the setting of ALTER DATABASE, which may lack a character
                    "--verbose",
                    "--no-password",
                    f"--lock-wait-timeout={LOCK_WAIT * 1000:.0f}",
                    f"--snapshot={snapshot_id}",
                    # As a pattern it matches only this table: no character is special in quotes.
                    *(f"--exclude-table-data={table.qualified}" for table in self.excluded),
                    self.login.argument,
                ],
                environment=self._environment(),
                on_start=on_start,
                on_output=sink,
                on_stderr=told.on_stderr,
                # pg_dump itself waits for ever on a cut network that acknowledges everything.
                pulse=lambda: self._pulse(told),
            )
            # Without the lines of --verbose, so that the last words are about the error.
            return replace(finished, stderr=_CHATTER.sub("", finished.stderr))

        try:
            return dump() if self.how.jobs > 1 else connection_limit.run(dump)
        finally:
            told.close()

    def _pulse(self, told: DumpProgress) -> None:
        if self.control.facts.major >= progress.VIEW_SINCE:
            rows = self.control.query(progress.VIEW, [self.login.application_name])
            told.on_server([(oid, sent) for oid, sent in rows])
        else:
            self.control.query("SELECT 1")
        told.tell()


def _raise_disk_error(finished: subprocesses.Finished, part: DirectoryPart) -> None:
    """Raise pg_dump's disk error as if this process had written."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        if os.strerror(number) in finished.stderr:
            raise OSError(number, os.strerror(number), str(part.temporary))


def _failed(database: str, finished: subprocesses.Finished, jobs: int, user: str) -> BackupFailed:
    words = clients.last_words(finished)
    next_step = "fix what pg_dump reports, and run again"
    if no_free_connection("", finished.stderr):
        needed = 3 + jobs if jobs > 1 else 3
        next_step = (
            f"a backup takes {needed} connections at once: allow as many in the pooler "
            "(default_pool_size), or set MIGRATOR_DIRECT_URL to an address that goes around it"
        )
    if "permission denied" in words:
        next_step = grant(user)
    return BackupFailed(f"pg_dump of {database} failed: {words}", next_step=next_step)


def locked_out(table: str) -> BackupFailed:
    return BackupFailed(
        f"Another session kept {table} locked for {LOCK_WAIT:.0f} s, so it could not be backed up.",
        next_step="run again after that session: SELECT pid, query FROM pg_stat_activity JOIN pg_locks USING "
        "(pid) WHERE mode = 'AccessExclusiveLock'; or a prepared transaction holds it (SELECT gid "
        "FROM pg_prepared_xacts), and ROLLBACK PREPARED ends it",
    )


def grant_large_objects(user: str) -> str:
    """Say how a role gets to read large objects, which pg_read_all_data does not give."""
    grants = f"SELECT format('GRANT SELECT ON LARGE OBJECT %s TO %I', oid, {quote_literal(user).strip()})"
    return (
        f"in psql, as a superuser: {grants} FROM pg_largeobject_metadata \\gexec; or back up as a superuser, or set "
        "MIGRATOR_BACKUP=off to go without a backup"
    )


def grant(user: str) -> str:
    """Return how a role gets the right to read everything."""
    return (
        f'as a superuser: GRANT pg_read_all_data TO "{user}" (PostgreSQL 14 and newer), or set '
        "MIGRATOR_BACKUP=off to run without a backup"
    )
