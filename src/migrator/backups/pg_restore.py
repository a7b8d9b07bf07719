"""An archive and pg_restore: open it, read all of it, restore it, and print the commands to do that by hand.

pg_restore 17 and newer starts with ``SET transaction_timeout = 0``, which servers before 17 do not
know. With ``--exit-on-error`` or ``--single-transaction`` it can restore nothing there (tried: 18 onto
15). On such a pair that one error is accepted, and any other ends pg_restore at once.

Some servers number the versions of a column in an option ``pg_attver``. Only their own pg_dump omits
it, and no other server accepts it. pg_restore sends a table's statements as one, so the table would be
lost with its option. If an archive has such options, the part before the rows goes through psql without
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from migrator.backups.clients import Client, Login, RestoreStopped, last_words
from migrator.backups.manifest import Backup
from migrator.backups.psql import lines, statements, without_oddities
from migrator.backups.storage import files
from migrator.backups.storage.interface import checksum, file_chunks
from migrator.config.settings import Settings
from migrator.errors import DamagedBackup, RestoreFailed, SettingsError
from migrator.postgres import connection_limit
from migrator.postgres.quoting import codec
from migrator.runtime import subprocesses

# What was restored is reported in English: the client's words are, under LC_ALL=C.UTF-8; the server's may
# not be.
_UNKNOWN_SETTING = re.compile(
    r"(?:pg_restore: while INITIALIZING:\n)?"
    r"pg_restore: error: could not execute query: [^\n]*\n"
    r"Command was: SET transaction_timeout = 0;\n+"
)
_IGNORED = re.compile(r"pg_restore: warning: errors ignored on restore: \d+\s*")
_EVENT_TRIGGER = "^[0-9]+; [0-9]+ [0-9]+ (EVENT TRIGGER|COMMENT - EVENT TRIGGER) "
_ONE_TRANSACTION = (
    r"/^COPY .* FROM stdin;$/,/^\\\.$/b",
    "/^-- Data for Name: .*; Type: BLOBS; /,/^COMMIT;$/{/^BEGIN;$/d;/^COMMIT;$/d}",
)
"""Edits for sed: rows stay unchanged, and the transaction around the large objects, with a COMMIT that would
end ours, is removed.
"""
_WHOLE = r"echo 'COMMIT WORK;' || printf '\n\\.\npg_restore failed: nothing was restored;\n'"
"""The shell's output after pg_restore has ended: a COMMIT that sed does not change, or the end of the current
rows and text that is not SQL. Then psql ends with 3 in any shell (``set -o pipefail`` is not everywhere).
"""
ENCODING = re.compile(rb"^SET client_encoding = '(\w+)';", re.MULTILINE)
_NOT_FOR_PSQL = re.compile(rb"^SET transaction_timeout = 0;\n", re.MULTILINE)


_SETTINGS = """
    TimeZone DateStyle IntervalStyle array_nulls bytea_output default_text_search_config extra_float_digits lc_monetary
    lc_numeric lc_time quote_all_identifiers standard_conforming_strings timezone_abbreviations
    transform_null_equals xmlbinary xmloption
"""
NAMES = tuple(_SETTINGS.split())
"""The settings for filling a copy, see session_settings.py."""
SCRIPTS_OWN = ("standard_conforming_strings", "xmloption")
"""The settings that pg_restore's script sets for itself."""


def checksum_of(path: Path) -> tuple[str, int]:
    """Return the sha256 and the size of an archive, a file or a folder; raises OSError."""
    return files.folder_checksum(path) if path.is_dir() else checksum(file_chunks(path))


@contextlib.contextmanager
def opened(store: Chunks, backup: Backup, settings: Settings) -> Iterator[Path]:
    """Yield a path on this machine with a backup as pg_dump wrote it, checked byte for byte.

    A remote or encrypted one first becomes a temporary file (in TMPDIR) without a name: it is gone with
    this process, at any end. Raises :class:`DamagedBackup`, :class:`RestoreFailed` if it cannot be
    opened here, and OSError.
    """
    place = Path(backup.place)
    if not backup.encrypted_to and place.is_absolute():
        try:
            found = checksum_of(place)
        except files.NotRegular as error:
            raise _damaged(backup, f"{Path(error.filename).name}: {error.strerror}") from error
        _refuse_other_checksum(backup, found, (backup.sha256, backup.size_bytes))
        yield place
        return
    try:
        folder = files.folder(backup.size_bytes, backup.id)
    except files.NoRoom as error:
        raise RestoreFailed(str(error), next_step=error.next_step) from error
    with tempfile.TemporaryFile(prefix="migrator-", dir=folder) as file:
        for chunk in plain_chunks(store, backup, settings):
            file.write(chunk)
        file.flush()
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def plain_chunks(store: Chunks, backup: Backup, settings: Settings) -> Iterator[bytes]:
    """Yield a backup's archive as pg_dump wrote it, decrypted if needed, in order and in bounded memory.

    Both checksums are computed on the way, and raise :class:`DamagedBackup` at the end if they differ
    from the manifest. Raises :class:`RestoreFailed` if it is encrypted and there is no key, and
    OSError.
    """
    stored, plain = HashingReader(store.chunks(backup)), HashingReader(())
    if not backup.encrypted_to:
        yield from stored
        _refuse_other_checksum(backup, stored.found, backup.stored)
        return
    from migrator.backups.storage import encryption

    if not settings.backup_identity_file:
        raise RestoreFailed(
            f"{backup.id} is encrypted to {', '.join(backup.encrypted_to)}, and there is no private key.",
            next_step="set MIGRATOR_BACKUP_IDENTITY_FILE to the file with the private key; or without "
            f"migrator, into an empty database: {by_hand(backup, 'NEW_DATABASE', clean=False)}",
        )
    try:
        plain = HashingReader(encryption.opened(stored, Path(settings.backup_identity_file)))
        yield from plain
    except encryption.CannotOpen as error:
        for _ in stored:  # the part that the decryption did not read
            pass
        _refuse_other_checksum(backup, stored.found, backup.stored)
        raise RestoreFailed(
            f"{backup.id} cannot be decrypted: {error}.",
            next_step="set MIGRATOR_BACKUP_IDENTITY_FILE to the file with the right private key",
        ) from error
    _refuse_other_checksum(backup, stored.found, backup.stored)
    _refuse_other_checksum(backup, plain.found, (backup.sha256, backup.size_bytes))


def check_stored_checksum(store: Chunks, backup: Backup) -> None:
    """Compare the stored content with its checksum; raises :class:`DamagedBackup` and OSError."""
    _refuse_other_checksum(backup, checksum(store.chunks(backup)), backup.stored)


class Chunks(Protocol):
    """Yields the stored bytes of a backup; a store, for example."""

    def chunks(self, backup: Backup) -> Iterator[bytes]:
        """Yield them; raises OSError."""


class HashingReader:
    """An iterator that hashes and counts its chunks."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._digest, self._size = hashlib.sha256(), 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._digest.update(chunk)
            self._size += len(chunk)
            yield chunk

    @property
    def found(self) -> tuple[str, int]:
        """Return the checksum and the size of the chunks so far."""
        return self._digest.hexdigest(), self._size


def _refuse_other_checksum(backup: Backup, found: tuple[str, int], written: tuple[str, int]) -> None:
    if found != written:
        sizes = (
            f"it has {found[1]} bytes with sha256 {found[0][:12]}, not {written[1]} bytes with "
            f"{written[0][:12]}"
        )
        raise _damaged(backup, sizes)


def _damaged(backup: Backup, why: str) -> DamagedBackup:
    return DamagedBackup(
        f"The dump {backup.place} is damaged: {why}.",
        next_step="use another backup: see `migrator backups`",
        state=f"The database was not changed; the backup is {backup.place}.",
    )


def archive(path: Path) -> tuple[str, Path]:
    """Return pg_restore's arguments for what it reads: the format, and the file or folder."""
    return f"--format={'directory' if path.is_dir() else 'custom'}", path


def read_whole(
    client: Client, source: Path | Iterable[bytes], on_data: Callable[[bytes], object] | None = None
) -> subprocesses.Finished:
    """Let pg_restore decompress and parse all of an archive, without restoring.

    ``source`` is a file or a folder, or the chunks of an archive in custom format. ``on_data`` gets its
    data, without the definitions, as SQL.
    """
    written = ("--section=data", "--file=-") if on_data else ("--file=/dev/null",)
    arguments: list[str | Path] = [client.pg_restore, *written]
    feed: Iterable[bytes] | None = None
    if isinstance(source, Path):
        arguments += archive(source)
    else:
        arguments, feed = [*arguments, "--format=custom"], source
    return subprocesses.run(arguments, feed=feed, on_output=on_data)


def codec_of(client: Client, path: Path) -> str:
    """Return Python's name of the encoding of an archive's names and statements; raises RestoreStopped.

    With an empty list of entries, pg_restore writes only the settings that come first.
    """
    with files.in_memory(b"") as nothing:
        found = ENCODING.search(script(client, path, f"--use-list={nothing}"))
    return codec(found[1].decode()) if found else "utf-8"


def contents(client: Client, path: Path) -> list[str]:
    """Return the lines of an archive's table of contents; raises :class:`RestoreStopped`."""
    return script(client, path, "--list").decode(codec_of(client, path), "surrogateescape").split("\n")


def script(client: Client, path: Path, *options: str) -> bytes:
    """Return pg_restore's work as SQL; raises :class:`RestoreStopped`."""
    chunks: list[bytes] = []
    arguments: list[str | Path] = [client.pg_restore, *options, "--file=-", *archive(path)]
    finished = subprocesses.run(arguments, on_output=chunks.append)
    if finished.status != 0:
        raise RestoreStopped(last_words(finished))
    return b"".join(chunks)


def restore_into(
    client: Client,
    path: Path,
    login: Login,
    server_major: int,
    *,
    jobs: int = 1,
    options: Sequence[str] = (),
    pgoptions: str = "",
    before_post_data: Callable[[], None] | None = None,
) -> None:
    """Restore an archive (a file or a folder) into an empty database; raises :class:`RestoreStopped`.

    It ends at the first error.  ``options`` are further ones of pg_restore, ``pgoptions`` those of its sessions.
    With ``before_post_data``, which is called ahead of indexes and views, each section has sessions of its own.
    """
    environment = login.environment(pgoptions)
    before = script(client, path, "--section=pre-data", *options)
    plain = without_oddities(before)
    data, post_data = ("--section=data",), ("--section=post-data",)
    sections: list[tuple[str, ...]] = [("--section=pre-data",), data, post_data] if before_post_data else [()]
    if plain != before:
        checked = b"".join(statements(lines([_NOT_FOR_PSQL.sub(b"", plain, count=1)]), bytes))
        _run_psql(client, checked, login, environment)
        sections = [data, post_data]
    tolerant = client.major >= 17 > server_major
    if not tolerant:
        options = ("--exit-on-error", *options)
        options = (
            (*options, f"--jobs={jobs}") if jobs > 1 else options
        )  # otherwise several would talk at once
    for section in sections:
        if section == post_data and before_post_data:
            before_post_data()
        run: list[str | Path] = [client.pg_restore, *options, *section, "--no-password", login.argument, path]
        _run_pg_restore(run, environment, tolerant=tolerant)


def _run_pg_restore(arguments: list[str | Path], environment: Mapping[str, str], *, tolerant: bool) -> None:
    seen = bytearray()

    def stop_at_an_error(chunk: bytes) -> None:
        seen.extend(chunk)
        lines = seen[: seen.rfind(b"\n") + 1].decode("utf-8", "replace")
        said = _UNKNOWN_SETTING.sub("", lines) if tolerant else lines
        if re.search(r"^Command was: ", said, re.MULTILINE):
            raise RestoreStopped(said)

    def restore() -> subprocesses.Finished:
        seen.clear()
        return subprocesses.run(arguments, environment=environment, on_stderr=stop_at_an_error)

    # Workers connect by themselves, after the first session has created the tables.
    several = any(str(argument).startswith("--jobs=") for argument in arguments)
    finished = restore() if several else connection_limit.run(restore)
    if finished.status == 0:
        return
    unexpected = _IGNORED.sub("", _UNKNOWN_SETTING.sub("", finished.stderr)).strip()
    if not tolerant or finished.status != 1 or unexpected:
        raise RestoreStopped(last_words(finished))


def _run_psql(client: Client, sql: bytes, login: Login, environment: Mapping[str, str]) -> None:
    try:
        finished = connection_limit.run(
            lambda: subprocesses.run(client.psql(login), environment=environment, feed=[sql])
        )
    except FileNotFoundError as error:
        problem = (
            f"there is no psql beside {client.pg_restore}, which an archive with pg_attver options needs"
        )
        raise SettingsError(
            [problem],
            next_step="install the whole PostgreSQL client, or set MIGRATOR_PG_BIN to a folder that has it",
        ) from error
    if finished.status != 0:
        raise RestoreStopped(last_words(finished))


def by_hand(backup: Backup, database: str, *options: str, clean: bool = True) -> str:
    """Return the command that restores a backup without migrator, in one transaction.

    It works in place, or (not ``clean``) into an empty database. With ``--no-owner`` it is for a role
    that may act only for itself: into an empty database, and without event triggers, which only a
    superuser may create.
    """
    as_another = "--no-owner" in options
    cleaning = ("--clean", "--if-exists") if clean and not as_another else ()
    first, place, feeds = "", backup.place, read_with(backup)
    reading = ["pg_restore", *cleaning, *options]
    if as_another:
        if feeds:  # it is read twice
            first, place, feeds = " | ".join(feeds) + " > COPY.dump && ", "COPY.dump", []
        feeds = [shlex.join(("pg_restore", "--list", place)), shlex.join(("grep", "-vE", _EVENT_TRIGGER))]
        reading += ["--use-list=/dev/stdin"]
    source = [place] if as_another or not feeds else []
    into = f"--dbname={_dbname(database)}"
    if not not_plain(backup):
        restoring = (*reading, "--exit-on-error", "--single-transaction", into, *source)
        return first + " | ".join((*feeds, _options(backup) + shlex.join(restoring)))
    edits = ["1,20{/^SET transaction_timeout = 0;$/d}", *_ONE_TRANSACTION]
    edits += ["/^ALTER .* ALTER COLUMN .* SET (pg_attver=[0-9]*);$/d"] if backup.oddities else []
    script = " | ".join((*feeds, shlex.join((*reading, "--file=-", *source))))
    return first + " | ".join(
        (
            f"{{ echo 'BEGIN;' && {script} && {_WHOLE}; }}",
            shlex.join(("sed", *(word for edit in edits for word in ("-e", edit)))),
            _options(backup) + shlex.join(("psql", "--quiet", "--set=ON_ERROR_STOP=1", into)),
        )
    )


def read_with(backup: Backup) -> list[str]:
    """Return the commands that write an archive to a pipe, if pg_restore cannot read it in its place."""
    feeds = []
    if backup.place.startswith("s3://"):
        feeds.append(shlex.join(("aws", "s3", "cp", backup.place, "-")))
    if backup.encrypted_to:
        feeds.append(shlex.join(("age", "-d", "-i", "KEY_FILE", *([] if feeds else [backup.place]))))
    return feeds


def not_plain(backup: Backup) -> str:
    """Return why pg_restore alone cannot restore it onto a server like the original; an empty text if it can.

    Its SQL then goes through sed to psql. The COMMIT is written only after pg_restore has ended well;
    ``psql --single-transaction`` would commit the part before pg_restore died.
    """
    if backup.client_major >= 17 > backup.server_major:
        return (
            f"pg_restore {backup.client_major} starts with a setting that PostgreSQL "
            f"{backup.server_major} does not know; sed removes it"
        )
    if backup.oddities:
        return (
            f"columns have options that other servers do not know ({', '.join(backup.oddities)}); sed "
            "removes them"
        )
    return ""


def _options(backup: Backup) -> str:
    """Return the settings of the dump that differed from the server's, for a shell."""
    own = {
        name: backup.spelling[name]
        for name in NAMES
        if name in backup.own_settings and name in backup.spelling
    }
    own |= {"array_nulls": "on"} if "array_nulls" in own else {}
    given = " ".join(option(name, value) for name, value in own.items() if name not in SCRIPTS_OWN)
    return f"PGOPTIONS={shlex.quote(given)} " if given else ""


def option(name: str, value: str) -> str:
    """Return a setting for PGOPTIONS."""
    return "-c " + re.sub(r"([\\\s])", r"\\\1", f"{name}={value}")


def _dbname(database: str) -> str:
    """Return a database's name in a form that psql does not read as a connection string."""
    if "=" not in database and "://" not in database:
        return database
    escaped = database.replace("\\", "\\\\").replace("'", "\\'")
    return f"dbname='{escaped}'"
