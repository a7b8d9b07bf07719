"""Make a backup: pg_dump streamed to disk under an exported snapshot, read back whole, then published.

Decisions, with what was measured or tried:

* ``-Fc -Z1``: level 1 took 0.4 times the time of the default level for 8 % more bytes.  Level 0 is no choice: an
  uncompressed archive has no checksums inside, and hides bit flips from pg_restore.
* Proof is ``pg_restore -f /dev/null``, which decompresses and parses everything; ``--list`` passes archives
  that were truncated to 90 % or had bits flipped.  The checksum is taken while writing and again from disk.
* Row-level security: ``--enable-row-security`` exits 0 with rows missing, so it is never used, and a role that
  cannot read every row is refused.
* Space is refused only when it is clearly too little, for nobody can know how well data compresses: less
  than 0.8 times what the last backup's ratio (dump to database size) predicts, or without one, less than a
  hundredth of the database without its indexes (they are not in a dump; pgbench's filler was seen to shrink 48
  to 1).  Below a half there is a warning.  A disk that fills up all the same ends the backup cleanly.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import migrator
from migrator import process
from migrator.backups import archive, clients, snapshot
from migrator.backups.clients import Client
from migrator.backups.manifest import Backup, Table, human_size
from migrator.backups.snapshot import LOCK_WAIT, LockedOut, Relation, Sizes
from migrator.backups.store import Part, Store, checksum, new_id, open_store
from migrator.errors import BackupFailed, MigratorError
from migrator.postgres import ConnectFailed, QueryFailed, Session
from migrator.settings import Settings

LOGGER = logging.getLogger("migrator.backup")
_PROGRESS_EVERY = 15.0
_GOODBYE = 10.0  # seconds for the server to notice that pg_dump has gone


def preflight(session: Session, settings: Settings) -> tuple[Client, Store, Sizes]:
    """Find out whether a backup can be made: a client, a folder with room, the right to read everything.

    Raises :class:`BackupFailed`.
    """
    with _failing("The backup cannot be prepared"):
        client = clients.for_dump(settings, session.facts.version, session.facts.major)
        _check_readable(session, snapshot.relations(session))
        store = open_store(settings.backup_url)
        store.prepare()
        store.remove_stale(session.facts.database)
        sizes = snapshot.sizes(session)
        _check_space(store, session.facts.database, sizes)
        return client, store, sizes


def back_up(
    session: Session,
    settings: Settings,
    *,
    run_id: str,
    revisions: tuple[str, ...],
    application_name: str,
    name: str = "",
) -> Backup:
    """Back the session's database up and return the proven backup; raises :class:`BackupFailed`.

    All connections that this makes are gone when it returns.
    """
    client, store, sizes = preflight(session, settings)
    started = time.monotonic()
    database = session.facts.database
    children_name = _children_name(application_name)
    LOGGER.info("backing up %s (%s) to %s ...", database, human_size(sizes.database), store)
    with _failing(f"The backup of {database} failed", store, sizes):
        moment = datetime.now(UTC)
        with store.new_dump(new_id(database, moment)) as part:
            dump = _Dump(session, settings, client, part, children_name)
            tables = dump.write()
            _wait_until_gone(session, children_name)
            _prove(client, part)
            backup = Backup(
                **_made_of(session, client, part),
                name=name,
                created_at=moment.isoformat(timespec="milliseconds"),
                revisions=tuple(revisions),
                database_size_bytes=sizes.database,
                run_id=run_id,
                seconds=round(time.monotonic() - started, 3),
                tables=tables,
            )
            backup = store.add(part, backup)
    LOGGER.info(
        "backed up %s: %s in %.1f s, read back whole, as %s",
        database,
        human_size(backup.size_bytes),
        backup.seconds,
        backup.id,
    )
    return backup


def _made_of(session: Session, client: Client, part: Part) -> dict[str, Any]:
    """Return what the manifest says about the dump, the server and the programs."""
    return {
        "id": part.id,
        "sha256": part.sha256,
        "size_bytes": part.size,
        "verified": "read",
        "database": session.facts.database,
        "target": str(session.target),
        "properties": snapshot.properties(session),
        "server_version": session.facts.version,
        "client_version": client.version,
        "migrator_version": migrator.__version__,
        "image_version": os.environ.get("MIGRATOR_IMAGE_VERSION", ""),
    }


def _children_name(application_name: str) -> str:
    """Return a name (63 bytes at most) that tells the dump's sessions from ours, and ends in the run id as well."""
    if len(application_name) > 56:
        application_name = application_name[:26] + application_name[-30:]
    return f"{application_name} backup"


class _Dump:
    """One pg_dump, from its snapshot to its exit status."""

    def __init__(
        self, session: Session, settings: Settings, client: Client, part: Part, application_name: str
    ) -> None:
        self._control = session
        self._database = session.facts.database
        self._target = session.target.with_database(self._database)
        self._client = client
        self._part = part
        self._application_name = application_name
        self._timeout = settings.connect_timeout
        self._began = self._told = time.monotonic()

    def write(self) -> dict[str, Table]:
        """Write the archive; return what the tables held in its snapshot."""
        holder = snapshot.exported(self._target, self._application_name, self._timeout)
        with holder as (session, snapshot_id):
            tables = snapshot.count(session, snapshot.relations(session))
            finished = process.run(
                [
                    self._client.pg_dump,
                    "--format=custom",
                    "--compress=1",
                    "--no-password",
                    f"--lock-wait-timeout={LOCK_WAIT * 1000:.0f}",
                    f"--snapshot={snapshot_id}",
                    clients.connection_argument(self._target, self._database),
                ],
                environment=clients.environment(self._target, self._application_name, self._timeout),
                on_output=self._take,
                # pg_dump itself waits for ever where a network is cut that acknowledges everything.
                pulse=lambda: self._control.query("SELECT 1"),
            )
        if finished.status != 0:
            raise _dump_failed(self._database, finished)
        return tables

    def _take(self, chunk: bytes) -> None:
        self._part.write(chunk)
        now = time.monotonic()
        if now - self._told > _PROGRESS_EVERY:
            self._told = now
            LOGGER.info(
                "backing up %s: %s written after %.0f s",
                self._database,
                human_size(self._part.size),
                now - self._began,
            )


def _prove(client: Client, part: Part) -> None:
    """Read the archive back from the disk: its checksum, then every byte decompressed and parsed."""
    part.sync()
    found, size = checksum(part.chunks())
    if (found, size) != (part.sha256, part.size):
        raise BackupFailed(
            f"The backup was written as {part.size} bytes with sha256 {part.sha256}, "
            f"but reads back as {size} bytes with {found}: the disk or the volume is faulty.",
            next_step="name another folder in MIGRATOR_BACKUP_URL and have the volume checked",
        )
    with part.local() as path:
        finished = archive.read_whole(client, path)
    if finished.status != 0:
        raise BackupFailed(
            f"The backup cannot be read back, so it was thrown away: {clients.last_words(finished)}",
            next_step="run again; if it happens again, have the volume and the memory checked",
        )


def _dump_failed(database: str, finished: process.Finished) -> BackupFailed:
    words = clients.last_words(finished)
    next_step = "see what pg_dump said, put it right, and run again"
    if "Query was: LOCK TABLE" in finished.stderr and finished.seconds >= LOCK_WAIT:
        return _locked_out("a table")
    if "permission denied" in words:
        next_step = _grant("the role")
    return BackupFailed(f"pg_dump of {database} failed: {words}", next_step=next_step)


def _locked_out(table: str) -> BackupFailed:
    return BackupFailed(
        f"Another session kept {table} locked for {LOCK_WAIT:.0f} s, so it could not be backed up.",
        next_step="run again when that session is done: SELECT pid, query FROM pg_stat_activity JOIN pg_locks "
        "USING (pid) WHERE mode = 'AccessExclusiveLock'",
    )


def _check_readable(session: Session, found: list[Relation]) -> None:
    """Refuse a role that cannot read every row: pg_dump would fail half way, or rows would be missing."""
    user = session.facts.user
    unreadable = [relation.shown for relation in found if not relation.readable]
    if unreadable:
        raise BackupFailed(
            f"Role {user} may not read {_some(unreadable)}, so a backup would not be whole.",
            next_step=_grant(user),
        )
    hidden = [relation.shown for relation in found if relation.hides_rows]
    if hidden:
        raise BackupFailed(
            f"Row-level security hides rows of {_some(hidden)} from role {user}, so a backup would not be whole.",
            next_step=f'as a superuser: ALTER ROLE "{user}" BYPASSRLS; or back up as the tables\' owner, or set '
            "MIGRATOR_BACKUP=off",
        )


def _grant(user: str) -> str:
    return (
        f'as a superuser: GRANT pg_read_all_data TO "{user}" (PostgreSQL 14 and newer), or set '
        "MIGRATOR_BACKUP=off to go without a backup"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _check_space(store: Store, database: str, sizes: Sizes) -> None:
    """Refuse a folder that is clearly too small (see the module's docstring)."""
    free = store.free_bytes()
    if free is None:
        return
    needed, how = _expected(store, database, sizes)
    if free < needed:
        raise BackupFailed(
            f"The backup of {database} needs about {human_size(needed)} in {store} ({needed} bytes: {how}), "
            f"and {human_size(free)} ({free} bytes) are free.",
            next_step="make room there, mount a bigger volume, or name another folder in MIGRATOR_BACKUP_URL",
        )
    if free < sizes.data // 2:
        LOGGER.warning(
            "%s has %s free, and %s holds %s of data: the backup fits only if that compresses well",
            store,
            human_size(free),
            database,
            human_size(sizes.data),
        )


def _expected(store: Store, database: str, sizes: Sizes) -> tuple[int, str]:
    previous = next(iter(store.backups(database)), None)
    if previous is not None and previous.database_size_bytes > 0:
        ratio = previous.size_bytes / previous.database_size_bytes
        return int(0.8 * ratio * sizes.database), f"0.8 times what {previous.id} took for its size"
    return sizes.data // 100, "a hundredth of the database's size without indexes"


def _wait_until_gone(session: Session, application_name: str) -> None:
    """Wait for the server to have ended pg_dump's and the snapshot's session, for they hold locks until then."""
    deadline = time.monotonic() + _GOODBYE
    while time.monotonic() < deadline:
        left = session.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = %s AND pid <> pg_backend_pid()",
            [application_name],
        )
        if not left:
            return
        time.sleep(0.01)
    LOGGER.warning("the backup's sessions have not left the server yet")


@contextlib.contextmanager
def _failing(what: str, store: Store | None = None, sizes: Sizes | None = None) -> Iterator[None]:
    """Turn what the disk, the server and the programs can raise into :class:`BackupFailed`."""
    try:
        yield
    except MigratorError:
        raise
    except LockedOut as error:
        raise _locked_out(error.table) from error
    except QueryFailed as error:
        raise BackupFailed(f"{what}: {error.text}.", next_step="put it right and run again") from error
    except ConnectFailed as error:
        raise BackupFailed(
            f"{what}: no connection to the server: {error.text}.", next_step="run again"
        ) from error
    except OSError as error:
        in_store = store is not None and str(error.filename or store).startswith(str(store))
        if store is None or not in_store:
            raise BackupFailed(f"{what}: {error}.", next_step="put it right and run again") from error
        needed = f"the database has {sizes.data} bytes of data before compression" if sizes else ""
        raise store.cannot_write(error, needed) from error
