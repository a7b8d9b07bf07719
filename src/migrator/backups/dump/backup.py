"""Make a backup: pg_dump under an exported snapshot, read back whole, then published.

Decisions, each measured or tried:

* A dump is always compressed: an uncompressed archive has no checksums inside, and hides bit flips from
  pg_restore. ``format.py`` chooses the compression and the number of workers.
* ``pg_restore -f /dev/null`` verifies it: it decompresses and parses everything. ``--list`` accepts archives
  that were truncated to 90 % or had bits flipped. The checksum is computed while writing, and again from disk.
* ``--enable-row-security`` exits 0 with rows missing, so it is never used. A role that cannot read every row
  is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import migrator
from migrator.backups import clients, exported_snapshot
from migrator.backups.clients import Client, Login
from migrator.backups.dump import disk_space, format, globals, pg_dump
from migrator.backups.dump.format import DIRECTORY, Method
from migrator.backups.dump.pg_dump import Dump, OneWorkerOnly
from migrator.backups.exported_snapshot import LockedOut, Relation, Sizes
from migrator.backups.manifest import Backup, human_size
from migrator.backups.storage.interface import Part, Store, WritablePart, new_id
from migrator.backups.storage.local import FolderStore
from migrator.backups.storage.open import open_store
from migrator.backups.storage.parts import DirectoryPart
from migrator.backups.verification import verdict, verify_new
from migrator.backups.verification.verify_new import Proving
from migrator.config.settings import Settings
from migrator.errors import BackupFailed, MigratorError, some
from migrator.postgres import connection_limit
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refusal
from migrator.postgres.session import Session
from migrator.schema.names import parse_patterns

LOGGER = logging.getLogger("migrator.backup")
_GOODBYE = 10.0  # seconds for the server to notice that pg_dump has gone


@dataclass(frozen=True)
class Prepared:
    """The tools for a backup, and the known facts about the database before it."""

    client: Client
    store: Store
    sizes: Sizes
    how: Method
    excluded: tuple[Relation, ...]
    oddities: tuple[str, ...]
    not_dumped: tuple[str, ...]


def preflight(session: Session, settings: Settings) -> Prepared:
    """Check whether a backup is possible: a client, a place with free space, the right to read everything.

    Raises :class:`BackupFailed`.
    """
    database = session.facts.database
    with failing("The backup cannot be prepared"):
        client = clients.for_dump(settings, session.facts.version, session.facts.major)
        connection_limit.refuse_too_few(session, 3, "A backup")
        found = exported_snapshot.relations(session)
        _check_readable(session, found)
        excluded = _excluded(session, settings, found)
        store = open_store(settings.backup_url, settings)
        store.prepare()
        store.remove_stale(database)
        sizes = exported_snapshot.sizes(session)
        left_out = {table.oid for table in excluded}
        how = format.choose(
            settings,
            client,
            folder=isinstance(store, FolderStore) and not store.recipients,
            table_bytes=[size for oid, size in sizes.tables.items() if oid not in left_out],
        )
        if how.note:
            LOGGER.warning("%s", how.note)
        disk_space.check(store, database, sizes, how.compression)
        verify_new.preflight(session, settings)
        if settings.backup_verify == verify_new.RESTORE and not settings.verify_url:
            disk_space.check_scratch(session, sizes)
        hidden = exported_snapshot.not_dumped(session)
        if hidden:
            LOGGER.warning(
                "the backup is incomplete, because role %s is not a superuser: it excludes %s",
                session.facts.user,
                some(hidden),
            )
        return Prepared(
            client, store, sizes, how, tuple(excluded), exported_snapshot.oddities(session), hidden
        )


def _excluded(session: Session, settings: Settings, found: list[Relation]) -> list[Relation]:
    """Return the tables with excluded rows, and log them."""
    patterns = parse_patterns(settings.backup_exclude_table_data)
    if not patterns:
        return []
    for text in exported_snapshot.unmatched(patterns, found):
        LOGGER.warning("MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA: table %s does not exist", text)
    excluded = exported_snapshot.find(session, patterns, found)
    if excluded:
        LOGGER.warning(
            "the backup is incomplete: it excludes the rows of %s (MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA)",
            some([table.shown for table in excluded]),
        )
    return excluded


def back_up(
    session: Session,
    settings: Settings,
    *,
    run_id: str,
    revisions: tuple[str, ...],
    application_name: str,
    name: str = "",
) -> Backup:
    """Back up the session's database and return the verified backup; raises :class:`BackupFailed`.

    All connections of this function are closed when it returns.
    """
    ready = preflight(session, settings)
    started = time.monotonic()
    database = session.facts.database
    about = {"name": name, "run_id": run_id, "revisions": tuple(revisions)}
    target = session.target.with_database(database)
    login = Login(target, _children_name(application_name), settings.connect_timeout)
    work = _Work(session, settings, ready, login)
    how = format.describe(ready.how, ready.sizes.database)
    LOGGER.info("backing up %s (%s) to %s ...", database, how, ready.store)
    with failing(f"The backup of {database} failed", ready.store, ready.sizes):
        try:
            backup = work.make(ready.how, started, about)
        except OneWorkerOnly as error:
            LOGGER.warning("%s: the backup starts again, with one worker", error)
            work.wait_until_gone()
            backup = work.make(ready.how.single, started, about)
        except (MigratorError, QueryFailed, OSError):
            with contextlib.suppress(QueryFailed):  # the session itself is gone
                work.wait_until_gone()
            raise
    size = human_size(backup.size_bytes)
    proof = "restored and compared" if backup.verified == verify_new.RESTORE else "read back whole"
    LOGGER.info("backed up %s: %s in %.1f s, %s, as %s", database, size, backup.seconds, proof, backup.id)
    return backup


@dataclass(frozen=True)
class _Work:
    """One backup, from the dump to the manifest; ``login`` is that of pg_dump and of the snapshot."""

    session: Session
    settings: Settings
    ready: Prepared
    login: Login

    def make(self, how: Method, started: float, about: dict[str, Any]) -> Backup:
        """Dump, verify, publish; ``started`` is the start of the whole work (monotonic, seconds)."""
        session, settings, ready, login = self.session, self.settings, self.ready, self.login
        moment = datetime.now(UTC)
        backup_id = new_id(session.facts.database, moment)
        with _new_part(ready.store, how, backup_id, ready.sizes.data) as part:
            dump = Dump(session, settings, ready.client, login, how, ready.sizes, ready.excluded)
            proving = Proving(session, settings, ready.client, about["run_id"], login.application_name)
            left_out = tuple(table.shown for table in ready.excluded)
            with proving.reading(part) as sink:
                bounds = dump.write(
                    part,
                    sink=sink,
                    in_snapshot=lambda inside, found: proving.in_snapshot(inside, found, left_out),
                    meanwhile=proving.meanwhile,
                )
            globals_sql, globals_note = globals.read(session, ready.client, login)
            if globals_note:
                LOGGER.info("beside the backup: %s", globals_note)
            self.wait_until_gone()
            part.sync()
            backup = Backup(
                **_made_of(session, ready.client, part),
                **proving.facts(),
                **about,
                created_at=moment.isoformat(timespec="milliseconds"),
                database_size_bytes=ready.sizes.database,
                seconds=0.0,
                next_xid=bounds.next,
                unseen_xid=bounds.unseen,
                running_xids=bounds.running,
                dump_format=how.dump_format,
                jobs=how.jobs,
                compression=how.compression,
                excluded_table_data=left_out,
                not_dumped=ready.not_dumped,
                oddities=ready.oddities,
                globals_note=globals_note,
            )
            backup, unproven = proving.prove(ready.store, part, backup)
            backup = replace(backup, seconds=round(time.monotonic() - started, 3), stored_tag=part.tag)
            beside = {globals.ENDING: globals_sql} if globals_sql else {}
            backup = ready.store.add(part, backup, beside)
        if unproven is not None:
            verdict.refuse(ready.store, backup, unproven)
        return backup

    def wait_until_gone(self) -> None:
        """Wait until the server has ended pg_dump's and the snapshot's session, because they hold locks until
        then.
        """
        deadline = time.monotonic() + _GOODBYE
        while time.monotonic() < deadline:
            left = self.session.value(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = %s AND pid <> pg_backend_pid()",
                [self.login.application_name],
            )
            if not left:
                return
            time.sleep(0.01)
        LOGGER.warning("the backup's sessions have not left the server yet")


def _new_part(store: Store, how: Method, backup_id: str, data: int) -> WritablePart | DirectoryPart:
    if how.dump_format == DIRECTORY:
        assert isinstance(store, FolderStore)  # noqa: S101 - format.choose took care of it
        return store.new_directory(backup_id)
    return store.new_dump(backup_id, data // 2)  # the size after compression is rarely more


def _made_of(session: Session, client: Client, part: Part) -> dict[str, Any]:
    """Return the manifest's data about the dump, the server and the programs."""
    system_identifier, timeline = exported_snapshot.identity(session)
    stored_sha256, stored_bytes = part.stored
    return {
        "id": part.id,
        "sha256": part.sha256,
        "size_bytes": part.size,
        "stored_sha256": stored_sha256,
        "stored_bytes": stored_bytes,
        "encrypted_to": part.encrypted_to,
        "verified": "read",
        "database": session.facts.database,
        "target": str(session.target),
        "properties": exported_snapshot.properties(session),
        "system_identifier": system_identifier,
        "timeline": timeline,
        "database_oid": session.facts.database_oid,
        "server_version": session.facts.version,
        "client_version": client.version,
        "migrator_version": migrator.__version__,
        "image_version": os.environ.get("MIGRATOR_IMAGE_VERSION", ""),
    }


def _children_name(application_name: str) -> str:
    """Return a name (63 bytes at most) that distinguishes the dump's sessions from ours, and ends in the run
    id too.
    """
    if len(application_name) > 56:
        application_name = application_name[:26] + application_name[-30:]
    return f"{application_name} backup"


def _check_readable(session: Session, found: list[Relation]) -> None:
    """Refuse a role that cannot read every row: pg_dump would fail half way, or rows would be missing."""
    user = session.facts.user
    unreadable = [relation.shown for relation in found if not relation.readable]
    if unreadable:
        raise BackupFailed(
            f"Role {user} may not read {some(unreadable)}, so a backup would be incomplete.",
            next_step=pg_dump.grant(user),
        )
    number, first = exported_snapshot.unreadable_large_objects(session)
    if number:
        raise BackupFailed(
            f"Role {user} may not read {number} large object{'s' if number > 1 else ''} ({first}"
            f"{', ...' if number > 1 else ''}), so a backup would not be whole.",
            next_step=pg_dump.grant_large_objects(user),
        )
    hidden = [relation.shown for relation in found if relation.hides_rows]
    if hidden:
        raise BackupFailed(
            f"Row-level security hides rows of {some(hidden)} from role {user}, so a backup would be incomplete.",
            next_step=f'as a superuser: ALTER ROLE "{user}" BYPASSRLS; or back up as the tables\' owner, or set '
            "MIGRATOR_BACKUP=off",
        )


@contextlib.contextmanager
def failing(what: str, store: Store | None = None, sizes: Sizes | None = None) -> Iterator[None]:
    """Turn the errors of the disk, the server and the programs into :class:`BackupFailed`."""
    try:
        yield
    except MigratorError:
        raise
    except LockedOut as error:
        raise pg_dump.locked_out(error.table) from error
    except QueryFailed as error:
        raise BackupFailed(f"{what}: {error.text}.", next_step="fix the cause and run again") from error
    except ConnectFailed as error:
        if error.refusal is Refusal.TRANSIENT:
            raise
        raise BackupFailed(
            f"{what}: no connection to the server: {error.text}.",
            next_step=clients.remedy(error) or "run again",
        ) from error
    except OSError as error:
        in_store = store is not None and str(error.filename or store).startswith(str(store))
        if store is None or not in_store:
            raise BackupFailed(f"{what}: {error}.", next_step="fix the cause and run again") from error
        needed = f"the database has {sizes.data} bytes of data before compression" if sizes else ""
        raise store.cannot_write(error, needed) from error
