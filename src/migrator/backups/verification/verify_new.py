"""Prove a backup: read all of it, or restore it and compare; a backup that was not proven is none.

``read``: every byte comes back from where it is stored with the checksum that was taken while writing, and pg_restore
decompresses and parses all of it.  What is encrypted on its way cannot be read back here: pg_restore reads it while
it is written, and what is stored is compared by its checksum.

``restore``: into a scratch database on the same server or the one of MIGRATOR_VERIFY_URL; then the copy is compared
with what the original held in the snapshot of the dump (contents.py, comparison.py), and dropped.  The original is
neither locked nor asked meanwhile, so writers go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from migrator import process
from migrator.backups import archive, clients, comparison, contents, databases, scratch, temporary
from migrator.backups.clients import Client
from migrator.backups.comparison import Compared
from migrator.backups.contents import Contents
from migrator.backups.manifest import Backup, Proof, Sequence, Table
from migrator.backups.parts import DirectoryPart
from migrator.backups.reader import Reader
from migrator.backups.scratch import Place
from migrator.backups.store import Part, Store, WritablePart
from migrator.backups.verdict import CannotRestore, Failed, Unproven, demand_parsed, judging
from migrator.errors import BackupFailed, SettingsError
from migrator.postgres import QueryFailed, ServerFacts, Session, connect, quote_identifier
from migrator.settings import Settings
from migrator.target import Target, parse

LOGGER = logging.getLogger("migrator.backup")
READ, RESTORE = "read", "restore"
_CONFORMING = re.compile(rb"^SET standard_conforming_strings = (on|off);", re.MULTILINE)
_ENCODING = re.compile(rb"^SET client_encoding = '(\w+)';", re.MULTILINE)
_EVENT_TRIGGER = re.compile(rb"^\d+; \d+ \d+ ((COMMENT|SECURITY LABEL) - )?EVENT TRIGGER .*\n", re.MULTILINE)


def place_of(settings: Settings, target: Target | None, application_name: str) -> Place:
    """Return where scratch databases are made: on the target's server unless another is named."""
    elsewhere = bool(settings.verify_url)
    where = parse(settings.verify_url) if elsewhere else target or settings.required_target
    return Place(where, elsewhere, application_name, settings.connect_timeout)


def preflight(session: Session, settings: Settings) -> None:
    """Find out whether the proof that is asked for can be had, and drop what killed ones left.

    Raises :class:`BackupFailed`, ConnectFailed and QueryFailed.
    """
    name = str(session.value("SELECT current_setting('application_name')"))
    place = place_of(settings, session.target, name)
    if settings.backup_verify != RESTORE:
        if not place.elsewhere and scratch.left_over(session, session.facts.database):
            with place.connect() as other:
                scratch.clear(other, session.facts.database)
        return
    if settings.backup_recipients and not settings.backup_identity_file:
        raise BackupFailed(
            "The backup is to be proven by restoring it (MIGRATOR_BACKUP_VERIFY=restore), and to be encrypted to keys "
            "that it cannot be opened with here.",
            next_step="set MIGRATOR_BACKUP_VERIFY=read, and run `migrator verify-backup latest --how restore` where "
            "the private key is; or name that in MIGRATOR_BACKUP_IDENTITY_FILE",
        )
    check_client(settings, scratch.check(place))


def check_client(settings: Settings, server: ServerFacts) -> None:
    """Refuse a pg_dump that is older than the server that copies are compared on; raises :class:`BackupFailed`."""
    clients.for_dump(
        settings,
        server.version,
        server.major,
        otherwise="or name an older server in MIGRATOR_VERIFY_URL, or prove by reading "
        "(MIGRATOR_BACKUP_VERIFY=read, verify-backup --how read)",
    )


class Proving:
    """The proof of one backup, from the snapshot that is dumped to the comparison."""

    def __init__(self, session: Session, settings: Settings, client: Client, run_id: str, name: str) -> None:
        self._session = session
        self._settings = settings
        self._client = client
        self._run_id = run_id
        self._name = name
        self._original: Contents | None = None
        self._reading: process.Finished | None = None
        self._spelling: dict[str, str] = {}

    @contextlib.contextmanager
    def reading(self, part: WritablePart | DirectoryPart) -> Iterator[Callable[[bytes], object] | None]:
        """Yield what the dump is to be written to: the part; and a pg_restore, where nobody can read it later.

        None where pg_dump writes into a folder itself.
        """
        if isinstance(part, DirectoryPart):
            yield None
            return
        if not part.encrypted_to:
            yield part.write
            return
        with Reader(self._client) as reader:

            def write(chunk: bytes) -> None:
                part.write(chunk)
                reader.write(chunk)

            yield write
            self._reading = reader.finish()

    def in_snapshot(self, session: Session, excluded: Collection[str] = ()) -> None:
        """Read, in the snapshot that will be dumped, what a copy is compared with; raises LockedOut, QueryFailed."""
        rows = self._settings.backup_verify == RESTORE
        if rows:
            LOGGER.info(
                "hashing the rows of %s, to compare them with a restored copy", session.facts.database
            )
        self._spelling = contents.spelling(session)
        self._original = contents.take(session, excluded, rows=rows)

    def facts(self, tables: Mapping[str, Table]) -> dict[str, Any]:
        """Return what the manifest says of the contents; asked once pg_dump has ended."""
        original = self._original
        assert original is not None  # noqa: S101 - in_snapshot came first
        after = contents.sequences_now(self._session)
        return {
            "tables": {
                name: dataclasses.replace(
                    table,
                    rows=original.tables[name].rows if name in original.tables else table.rows,
                    content_hash=original.tables[name].content_hash if name in original.tables else "",
                )
                for name, table in tables.items()
            },
            "sequences": {
                name: Sequence(before, after.get(name, before)) for name, before in original.sequences.items()
            },
            "large_objects": original.large_objects,
            "schema_sha256": original.schema_sha256,
            "spelling": self._spelling,
        }

    def prove(self, store: Store, part: Part, backup: Backup) -> tuple[Backup, Unproven | None]:
        """Prove what was written to a part; return the backup with its proof, or with why it could not be proven.

        One that fails keeps its bytes under a name that says so.  Raises :class:`BackupFailed`, OSError.
        """
        started, how = time.monotonic(), READ
        try:
            backup = backup.proven(self._read(part))
            if self._settings.backup_verify == RESTORE:
                started, how = time.monotonic(), RESTORE
                with judging(), _archive_of(part, backup, self._settings) as path:
                    place = place_of(self._settings, self._session.target, self._name)
                    backup = backup.proven(
                        restored(place, self._settings, backup, path, self._run_id, self._original)
                    )
        except (Unproven, SettingsError) as failure:
            unproven = (
                failure if isinstance(failure, Unproven) else Unproven(failure.message, failure.next_step)
            )
            return backup.unproven(failed_proof(how, self._run_id, started, str(unproven))), unproven
        except Failed as failure:
            kept = store.mark_bad(part, str(failure), backup.database)
            raise BackupFailed(
                f"{failure} It is no backup, and kept for a look as {kept}.", next_step=failure.next_step
            ) from failure
        return backup, None

    def _read(self, part: Part) -> Proof:
        started = time.monotonic()
        found, parsed = _read_back(self._client, part)
        if found != part.stored:
            raise Failed(
                f"The backup was written as {part.stored[1]} bytes with sha256 {part.stored[0]}, "
                f"but reads back as {found[1]} bytes with {found[0]}: the disk or the volume is faulty.",
                next_step="name another folder in MIGRATOR_BACKUP_URL and have the volume checked",
            )
        finished = self._reading or parsed
        if finished is not None:
            demand_parsed(finished)
        return proof(READ, self._run_id, started)


def _read_back(client: Client, part: Part) -> tuple[tuple[str, int], Any]:
    """Read what is stored of a part, once; return its checksum and how pg_restore's reading of it ended."""
    if isinstance(part, DirectoryPart):
        with part.local() as path:
            return archive.checksum_of(path), archive.read_whole(client, path)
    tally = archive.Tally(part.chunks())
    finished = None if part.encrypted_to else archive.read_whole(client, tally)
    for _ in tally:  # what pg_restore did not read any more
        pass
    return tally.found, finished


def proof(how: str, run_id: str, started: float, **facts: Any) -> Proof:
    """Return a proof that succeeded just now; ``started`` is when it began (monotonic, seconds)."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    seconds = round(time.monotonic() - started, 3)
    return Proof(how, at, run_id, True, seconds=seconds, **facts)


def failed_proof(how: str, run_id: str, started: float, why: str) -> Proof:
    """Return a proof that came to no good end just now."""
    return dataclasses.replace(proof(how, run_id, started), ok=False, why=why)


@contextlib.contextmanager
def _archive_of(part: Part, backup: Backup, settings: Settings) -> Iterator[Path]:
    """Yield the archive that was just written, as pg_dump wrote it."""
    if not part.encrypted_to:
        with part.local() as path:
            yield path
        return

    class Stored:
        """What archive.opened asks of a store."""

        def chunks(self, _: Backup) -> Iterator[bytes]:
            return part.chunks()

    with archive.opened(Stored(), backup, settings) as path:
        yield path


def restored(
    place: Place, settings: Settings, backup: Backup, path: Path, run_id: str, original: Contents | None
) -> Proof:
    """Restore an archive into a scratch database and compare; return the proof.

    ``original`` is what was read in the dump's snapshot, where that was just now.
    Raises :class:`Failed`, :class:`Unproven`, and what :func:`judging` tells them from.
    """
    started = time.monotonic()
    with scratch.made(place, backup, run_id) as (session, target):
        server = session.facts
        check_client(settings, server)
        LOGGER.info("restoring %s into %s, to compare it", backup.id, target.database)
        client = clients.for_restore(settings, server.major, backup.client_major)
        _fill(place, client, path, target, server.major)
        written = _schema_in(client, path, place)
        with connect(target, place.application_name, place.timeout) as inside:
            _spell_alike(inside, backup, written)
            inside.query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            found = contents.take(inside, rows=True, only=_counted(backup))
        same_major = server.major == backup.server_major
        compared = comparison.contents(backup, found, same_major=same_major)
        wrong = list(compared.wrong)
        if same_major and original is not None and original.schema != found.schema:
            wrong += comparison.difference(original, found)
        by_name = not (same_major and client.major == backup.client_major)
        dumped = _schema_of(client, place, target, _ENCODING.search(written))
        wrong += comparison.schemas(written, dumped, by_name=by_name)
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise Failed(f"What came back of {backup.id} is not what was dumped: {'; '.join(wrong[:8])}{more}.")
    _tell(backup, compared, time.monotonic() - started)
    why = "; ".join(
        (*compared.unknown, *(["definitions (by name, for the majors differ)"] if by_name else []))
    )
    return proof(
        RESTORE, run_id, started, server_version=server.version, why=f"not compared: {why}" if why else ""
    )


def _tell(backup: Backup, compared: Compared, seconds: float) -> None:
    LOGGER.info(
        "%s was restored and compared in %.1f s: %d tables, %d of them with all their %d rows counted, %d hashed",
        backup.id,
        seconds,
        compared.tables,
        compared.counted,
        compared.rows,
        compared.hashed,
    )


def _counted(backup: Backup) -> frozenset[str]:
    return frozenset(name for name, table in backup.tables.items() if table.rows is not None)


def _options(place: Place) -> tuple[str, ...]:
    """Return pg_restore's (and pg_dump's) options: no copy connects to a publisher, and roles are not everywhere."""
    elsewhere = ("--no-owner", "--no-privileges", "--no-tablespaces") if place.elsewhere else ()
    return ("--no-subscriptions", *elsewhere)


def _fill(place: Place, client: Client, path: Path, target: Target, server_major: int) -> None:
    try:
        with _without_event_triggers(client, path) as listed:
            archive.restore_into(
                client,
                path,
                clients.connection_argument(place.target, target.database),
                clients.environment(place.target, place.application_name, place.timeout),
                server_major,
                options=(*_options(place), *listed),
            )
    except archive.RestoreStopped as stopped:
        raise CannotRestore(f"The backup cannot be restored: {stopped.said}") from stopped


@contextlib.contextmanager
def _without_event_triggers(client: Client, path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the options that leave event triggers out: refreshing a view would fire them, whatever they do."""
    listed = archive.script(client, path, "--list")
    kept = _EVENT_TRIGGER.sub(b"", listed)
    if kept == listed:
        yield ()
        return
    with temporary.in_memory(kept) as path_of_list:
        yield (f"--use-list={path_of_list}",)


def _schema_in(client: Client, path: Path, place: Place) -> bytes:
    """Return the archive's schema as pg_dump wrote it."""
    try:
        return archive.script(client, path, "--schema-only", *_options(place))
    except archive.RestoreStopped as stopped:
        raise Unproven(f"The backup's schema cannot be listed: {stopped.said}.") from stopped


def _spell_alike(inside: Session, backup: Backup, written: bytes) -> None:
    """Have pg_dump write the copy's definitions under the settings that the original's were written under.

    ALTER DATABASE ... SET of the original is none of the copy.  They are set for this role in this one database, which
    no pooler can refuse, and they go with it.  Of an older manifest, the archive itself tells one of them.
    """
    told = _CONFORMING.search(written)
    wanted = {"standard_conforming_strings": told[1].decode()} if told else {}
    wanted |= backup.spelling
    for name, value in contents.spelling(inside).items():
        if wanted.get(name, value) != value:
            try:
                inside.query(
                    f"ALTER ROLE CURRENT_USER IN DATABASE {quote_identifier(inside.facts.database)}"
                    f" SET {name} = {databases.literal(wanted[name])}"
                )
            except QueryFailed as error:
                if error.lost:
                    raise
                LOGGER.warning("the copy is compared with another %s: %s", name, error.text)


def _schema_of(client: Client, place: Place, target: Target, encoding: re.Match[bytes] | None) -> bytes:
    """Return the copy's schema as pg_dump writes it, in the archive's encoding."""
    chunks: list[bytes] = []
    finished = process.run(
        [
            client.pg_dump,
            "--schema-only",
            "--no-password",
            *([f"--encoding={encoding[1].decode()}"] if encoding else []),
            *_options(place),
            clients.connection_argument(place.target, target.database),
        ],
        environment=clients.environment(place.target, place.application_name, place.timeout),
        on_output=chunks.append,
    )
    if finished.status != 0:
        raise Unproven(f"The restored copy cannot be dumped: {clients.last_words(finished)}.")
    return b"".join(chunks)
