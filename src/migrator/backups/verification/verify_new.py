"""Verify a new backup: read all of it, or restore it and compare; an unverified dump is not a backup.

``read``: every stored byte comes back with the checksum from its writing, and pg_restore decompresses
and parses all of it. A dump that is encrypted on its way cannot be read back here: pg_restore reads it
while it is written, and the checksum covers the stored content.

``restore``: into a scratch database on the same server or that of MIGRATOR_VERIFY_URL. The copy is
compared with the content of the original in the dump's snapshot (fingerprint.py, comparison.py), and
dropped. The original is neither locked nor read meanwhile, so writers continue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from migrator.backups import (
    clients,
    event_triggers,
    exported_snapshot,
    manifest,
    pg_restore,
    session_settings,
)
from migrator.backups.clients import Client, Login, RestoreStopped
from migrator.backups.exported_snapshot import LockedOut, Relation
from migrator.backups.manifest import Backup, Proof, Table
from migrator.backups.storage.interface import Part, Store, WritablePart
from migrator.backups.storage.parts import DirectoryPart
from migrator.backups.verification import comparison, fingerprint, scratch_database, trust, unrestorable
from migrator.backups.verification.fingerprint import Contents
from migrator.backups.verification.reader import Held, Reader, Rows
from migrator.backups.verification.scratch_database import Place
from migrator.backups.verification.verdict import CannotRestore, Failed, Unproven, demand_parsed, judging
from migrator.config.database_url import Target, parse
from migrator.config.settings import Settings
from migrator.errors import BackupFailed, SettingsError, some
from migrator.postgres import connection_limit
from migrator.postgres.errors import QueryFailed
from migrator.postgres.server import ServerFacts
from migrator.postgres.session import Session
from migrator.runtime import subprocesses

LOGGER = logging.getLogger("migrator.backup")
READ, RESTORE = "read", "restore"
_NOT_THE_DISK = (
    "the dump is byte for byte as it was written, so the disk is not at fault: compare what it names "
    "with the original"
)
_CONFORMING = re.compile(rb"^SET standard_conforming_strings = (on|off);", re.MULTILINE)


def place_of(settings: Settings, target: Target | None, application_name: str) -> Place:
    """Return the place of scratch databases: the target's server unless another is set."""
    elsewhere = bool(settings.verify_url)
    where = parse(settings.verify_url) if elsewhere else target or settings.required_target
    return Place(where, application_name, settings.connect_timeout, elsewhere)


def preflight(session: Session, settings: Settings) -> None:
    """Check whether the requested verification is possible, and drop the leftovers of killed ones.

    Raises :class:`BackupFailed`, ConnectFailed and QueryFailed.
    """
    name = str(session.value("SELECT current_setting('application_name')"))
    place = place_of(settings, session.target, name)
    if settings.backup_verify != RESTORE:
        if not place.elsewhere and scratch_database.left_over(session, session.facts.database):
            with place.beside() as other:
                scratch_database.clear(other, session.facts.database)
        return
    if settings.backup_recipients and not settings.backup_identity_file:
        raise BackupFailed(
            "MIGRATOR_BACKUP_VERIFY=restore needs the private key, because the backup is to be "
            "encrypted, and there is no private key here.",
            next_step="set MIGRATOR_BACKUP_VERIFY=read, and run `migrator verify-backup latest --how "
            "restore` on a machine with the private key; or set MIGRATOR_BACKUP_IDENTITY_FILE to it",
        )
    check_client(settings, scratch_database.check(place))
    with place.beside() as other:
        objection = trust.objection(
            settings, other, exported_snapshot.identity(session)[0], trust.owners_in(session)
        )
    if objection:
        raise BackupFailed(objection, next_step=trust.NEXT_STEP)


def check_client(settings: Settings, server: ServerFacts) -> None:
    """Refuse a pg_dump that is older than the server for restored copies; raises :class:`BackupFailed`."""
    clients.for_dump(
        settings,
        server.version,
        server.major,
        otherwise="or set MIGRATOR_VERIFY_URL to an older server, or verify by reading "
        "(MIGRATOR_BACKUP_VERIFY=read, verify-backup --how read)",
    )


@dataclasses.dataclass
class Proving:
    """The verification of one backup, from the dumped snapshot to the comparison."""

    session: Session
    settings: Settings
    client: Client
    run_id: str
    name: str
    _found: Sequence[Relation] = ()
    _original: Contents | None = None
    _unrestorable: tuple[str, ...] = ()
    _reading: subprocesses.Finished | None = None
    _rows: Rows = dataclasses.field(default_factory=Rows)
    _settings_facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def reading(self, part: WritablePart | DirectoryPart) -> Iterator[Callable[[bytes], object] | None]:
        """Yield the target of the dump: the part; and a pg_restore, if it cannot be read later.

        None if pg_dump writes into a folder itself.
        """
        if isinstance(part, DirectoryPart):
            yield None
            return
        if not part.encrypted_to:
            yield part.write
            return
        with Reader(self.client, self._rows.write) as reader:

            def write(chunk: bytes) -> None:
                part.write(chunk)
                reader.write(chunk)

            yield write
            self._reading = reader.finish()

    def in_snapshot(
        self, session: Session, found: Sequence[Relation], excluded: Collection[str] = ()
    ) -> None:
        """Read, in the snapshot to be dumped, the parts that others can change before that; raises LockedOut,
        QueryFailed.

        ``found`` are its tables and sequences.
        """
        self._found = found
        rows = self.settings.backup_verify == RESTORE
        if rows:
            LOGGER.info(
                "hashing the rows of %s, to compare them with a restored copy", session.facts.database
            )
        self._settings_facts = {
            "spelling": session_settings.read(session),
            "own_settings": session_settings.own(session),
        }
        self._original = fingerprint.take(session, found, excluded, rows=rows, lenient=True)

    def meanwhile(self, session: Session) -> None:
        """Read the rest, in the same snapshot, while pg_dump reads the catalogs itself; raises QueryFailed."""
        assert self._original is not None  # noqa: S101 - in_snapshot came first
        nothing: tuple[str, ...] = ()
        schema = exported_snapshot.leniently(
            session, "the schema", lambda: fingerprint.schema(session), nothing
        )
        self._original = dataclasses.replace(self._original, schema=schema)
        self._unrestorable = tuple(
            exported_snapshot.leniently(
                session,
                "the list of objects that a restore would stop at",
                lambda: unrestorable.find(session),
                [],
            )
        )
        for sentence in self._unrestorable:
            LOGGER.warning("a restore of this backup may stop at this: %s", sentence)

    def facts(self) -> dict[str, Any]:
        """Return the manifest's data about the content, after pg_dump has ended."""
        original = self._original
        assert original is not None  # noqa: S101 - in_snapshot came first
        try:
            after = fingerprint.sequences_now(self.session, self._found)
        except (LockedOut, QueryFailed) as error:
            if self.session.closed:
                raise
            LOGGER.warning("the position of the sequences after the dump is not known: %s", error)
            after = {}
        return {
            "tables": {
                table.shown: original.tables.get(table.shown, Table(None, table.estimated_rows))
                for table in self._found
                if table.kind != "S"
            },
            "sequences": {
                name: manifest.Sequence(before, after.get(name, before))
                for name, before in original.sequences.items()
            },
            "large_objects": original.large_objects,
            "schema_sha256": original.schema_sha256,
            **self._settings_facts,
        }

    def prove(self, store: Store, part: Part, backup: Backup) -> tuple[Backup, Unproven | None]:
        """Verify a part's content; return the backup with its verification, or with the reason why it did not
        finish.

        A failed one keeps its bytes under a name that shows it. Raises :class:`BackupFailed`, OSError.
        """
        started, how = time.monotonic(), READ
        try:
            proven = self._read(part)
            backup = dataclasses.replace(backup, tables=self._counted(backup.tables)).proven(proven)
            if self.settings.backup_verify == RESTORE:
                started, how = time.monotonic(), RESTORE
                with judging(), _archive_of(part, backup, self.settings) as path:
                    place = place_of(self.settings, self.session.target, self.name)
                    backup = backup.proven(
                        restored(place, self.settings, backup, path, self.run_id, self._original)
                    )
        except (Unproven, SettingsError) as failure:
            unproven = (
                failure if isinstance(failure, Unproven) else Unproven(failure.message, failure.next_step)
            )
            return backup.unproven(failed_proof(how, self.run_id, started, str(unproven))), unproven
        except Failed as failure:
            kept = store.mark_bad(part, str(failure), backup.database)
            raise BackupFailed(
                f"{failure} It is not a backup; it is kept for inspection as {kept}.",
                next_step=failure.next_step,
            ) from failure
        return backup, None

    def _read(self, part: Part) -> Proof:
        started = time.monotonic()
        found, parsed = _read_back(self.client, part, self._rows)
        if found != part.stored:
            raise Failed(
                f"The backup was written as {part.stored[1]} bytes with sha256 {part.stored[0][:12]}, "
                f"but it reads back as {found[1]} bytes with {found[0][:12]}: the disk or the volume is "
                "faulty.",
                next_step="set MIGRATOR_BACKUP_URL to another folder, and check the volume",
            )
        finished = self._reading or parsed
        if finished is not None:
            demand_parsed(finished)
        return proof(READ, self.run_id, started, why="; ".join(self._unrestorable))

    def _counted(self, tables: Mapping[str, Table]) -> dict[str, Table]:
        """Return the tables with the row counts of the archive, unless they were counted otherwise."""
        if self._rows.unread:
            LOGGER.warning("the rows of the backup were not counted: %s", self._rows.unread)
            return dict(tables)
        found = self._rows.tables
        held = {item.shown: found.get((item.schema, item.name)) for item in self._found if item.kind == "r"}

        def counted(table: Table, held: Held | None) -> Table:
            if held is None:
                return table
            rows = held.rows if table.rows is None else table.rows
            return Table(rows, table.estimated_rows, table.rows_hash, held.size)

        return {name: counted(table, held.get(name)) for name, table in tables.items()}


def _read_back(client: Client, part: Part, rows: Rows) -> tuple[tuple[str, int], Any]:
    """Read a part's stored content once; return its checksum and how pg_restore ended."""
    if isinstance(part, DirectoryPart):
        with part.local() as path:
            return pg_restore.checksum_of(path), pg_restore.read_whole(client, path, rows.write)
    tally = pg_restore.HashingReader(part.chunks())
    finished = None if part.encrypted_to else pg_restore.read_whole(client, tally, rows.write)
    for _ in tally:  # the part that pg_restore did not read
        pass
    return tally.found, finished


def proof(how: str, run_id: str, started: float, **facts: Any) -> Proof:
    """Return a successful verification; ``started`` is its start (monotonic, seconds)."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    seconds = round(time.monotonic() - started, 3)
    return Proof(how, at, run_id, True, seconds=seconds, **facts)


def failed_proof(how: str, run_id: str, started: float, why: str) -> Proof:
    """Return an unsuccessful verification."""
    return dataclasses.replace(proof(how, run_id, started), ok=False, why=why)


@contextlib.contextmanager
def _archive_of(part: Part, backup: Backup, settings: Settings) -> Iterator[Path]:
    """Yield the new archive, as pg_dump wrote it."""
    if not part.encrypted_to:
        with part.local() as path:
            yield path
        return

    class Stored:
        """The part of a store that pg_restore.opened needs."""

        def chunks(self, _: Backup) -> Iterator[bytes]:
            return part.chunks()

    with pg_restore.opened(Stored(), backup, settings) as path:
        yield path


def restored(
    place: Place, settings: Settings, backup: Backup, path: Path, run_id: str, original: Contents | None
) -> Proof:
    """Restore an archive into a scratch database and compare; return the verification.

    ``original`` is the content in the dump's snapshot, if it was read just now. Raises :class:`Failed`,
    :class:`Unproven`, and the errors that :func:`judging` separates.
    """
    started = time.monotonic()
    with scratch_database.made(place, backup, run_id) as (session, copy):
        server = session.facts
        check_client(settings, server)
        LOGGER.info("restoring %s into %s, to compare it", backup.id, copy.target.database)
        client = clients.for_restore(settings, server.major, backup.client_major)
        _refuse_code_of_others(settings, session, backup, client, path)
        written = _schema_in(client, path, place)
        refused = _fill(place, client, path, session, copy, backup, written)
        with copy.connect() as inside:
            inside.query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            found = dataclasses.replace(
                fingerprint.take(
                    inside, exported_snapshot.relations(inside), rows=True, only=_counted(backup)
                ),
                schema=fingerprint.schema(inside),
            )
        same_major = server.major == backup.server_major
        compared = comparison.contents(backup, found, same_major=same_major)
        wrong = list(compared.wrong)
        if same_major and original is not None and original.schema and original.schema != found.schema:
            wrong += comparison.difference(original, found)
        by_name = not (same_major and client.major == backup.client_major)
        dumped = _schema_of(client, place, copy, pg_restore.ENCODING.search(written))
        wrong += comparison.schemas(written, dumped, by_name=by_name)
    if wrong:
        told = f"The restored copy of {backup.id} differs from the original: {some(wrong, 8, '; ')}."
        if refused:
            raise Unproven(f"{told} The server refused settings of the original: {', '.join(refused)}.")
        raise Failed(told, next_step=_NOT_THE_DISK)
    LOGGER.info("%s was restored and compared in %.1f s: %s", backup.id, time.monotonic() - started, compared)
    why = "; ".join(
        (*compared.unknown, *(["definitions (only by name, because the majors differ)"] if by_name else []))
    )
    return proof(
        RESTORE, run_id, started, server_version=server.version, why=f"not compared: {why}" if why else ""
    )


def _counted(backup: Backup) -> frozenset[str]:
    return frozenset(name for name, table in backup.tables.items() if table.rows is not None)


def _options(place: Place) -> tuple[str, ...]:
    """Return the options of pg_restore (and pg_dump): no copy connects to a publisher, and roles are not
    everywhere.
    """
    elsewhere = ("--no-owner", "--no-privileges", "--no-tablespaces") if place.elsewhere else ()
    return ("--no-subscriptions", *elsewhere)


def _refuse_code_of_others(
    settings: Settings, session: Session, backup: Backup, client: Client, path: Path
) -> None:
    """Check the content of the archive, because objects may have been added before the dump."""
    try:
        owners = trust.owners_of(client, path)
    except RestoreStopped as stopped:
        raise Unproven(f"The backup's schema cannot be listed: {stopped.said}.") from stopped
    objection = trust.objection(settings, session, backup.system_identifier, owners)
    if objection:
        raise Unproven(objection, trust.NEXT_STEP)


def _fill(
    place: Place, client: Client, path: Path, session: Session, copy: Login, backup: Backup, written: bytes
) -> tuple[str, ...]:
    """Fill the copy under the dump's settings; return the names of those that the server refused."""
    told = _CONFORMING.search(written)  # an older manifest has none
    wanted = {"standard_conforming_strings": told[1].decode()} if told else {}
    with copy.connect() as inside:
        filling = session_settings.for_copy(session, inside, wanted | dict(backup.spelling), client, path)
    if why := session_settings.misread(backup, filling.refused, written):
        raise Unproven(why, session_settings.NEXT_STEP)
    try:
        with event_triggers.apart(client, path) as (listed, _):
            pg_restore.restore_into(
                client,
                path,
                copy,
                session.facts.major,
                options=(*_options(place), *listed),
                pgoptions=filling.options,
                before_post_data=filling.before_post_data,
            )
    except RestoreStopped as stopped:
        raise CannotRestore(f"The backup cannot be restored: {stopped.said}") from stopped
    return filling.refused


def _schema_in(client: Client, path: Path, place: Place) -> bytes:
    """Return the archive's schema as pg_dump wrote it."""
    try:
        return pg_restore.script(client, path, "--schema-only", *_options(place))
    except RestoreStopped as stopped:
        raise Unproven(f"The backup's schema cannot be listed: {stopped.said}.") from stopped


def _schema_of(client: Client, place: Place, copy: Login, encoding: re.Match[bytes] | None) -> bytes:
    """Return the copy's schema as pg_dump writes it, in the archive's encoding."""
    chunks: list[bytes] = []
    finished = connection_limit.run(
        lambda: subprocesses.run(
            [
                client.pg_dump,
                "--schema-only",
                "--no-password",
                *([f"--encoding={encoding[1].decode()}"] if encoding else []),
                *_options(place),
                copy.argument,
            ],
            environment=copy.environment(),
            on_output=chunks.append,
        )
    )
    if finished.status != 0:
        raise Unproven(f"The restored copy cannot be dumped: {clients.last_words(finished)}.")
    return b"".join(chunks)
