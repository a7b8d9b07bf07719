"""An archive and pg_restore: check its bytes, read all of it, restore it, and say how to do that by hand.

pg_restore 17 and newer begin with ``SET transaction_timeout = 0``, which servers before 17 do not know; with
``--exit-on-error`` or ``--single-transaction`` they can restore nothing there (tried: 18 onto 15).  On such a
pair that one error is let pass, and any other ends pg_restore at once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from migrator import process
from migrator.backups.clients import Client, last_words
from migrator.backups.manifest import Backup
from migrator.backups.store import checksum, file_chunks
from migrator.logs import redact

# What was restored is said in English: the client's words are, under LC_ALL=C.UTF-8; the server's may not be.
_UNKNOWN_SETTING = re.compile(
    r"(?:pg_restore: while INITIALIZING:\n)?"
    r"pg_restore: error: could not execute query: [^\n]*\n"
    r"Command was: SET transaction_timeout = 0;\n+"
)
_IGNORED = re.compile(r"pg_restore: warning: errors ignored on restore: \d+\s*")
_OF_A_ROLE = re.compile(
    r"Command was: (ALTER .* OWNER TO|GRANT|REVOKE|ALTER DEFAULT PRIVILEGES|SET SESSION AUTH)"
)


class RestoreStopped(Exception):
    """pg_restore failed; ``said`` is its last words, ``of_a_role`` whether an owner or a grant was the matter."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = redact(" ".join(said.split()))[:800]
        self.of_a_role = bool(_OF_A_ROLE.search(self.said))


def difference(backup: Backup) -> str:
    """Return how a backup's file differs from what was written, or ``""``; raises OSError."""
    found, size = checksum(file_chunks(Path(backup.place)))
    if (found, size) == (backup.sha256, backup.size_bytes):
        return ""
    return f"{size} bytes with sha256 {found}, and not {backup.size_bytes} with {backup.sha256}"


def read_whole(client: Client, path: Path) -> process.Finished:
    """Have pg_restore decompress and parse all of an archive, restoring nothing."""
    return process.run(
        [client.pg_restore, "--format=custom", "--file=/dev/null", path],
        environment=process.base_environment(),
    )


def restore_into(
    client: Client, path: Path, connection: str, environment: Mapping[str, str], server_major: int
) -> None:
    """Restore an archive into an empty database; raises :class:`RestoreStopped` at the first error."""
    tolerant = client.major >= 17 > server_major
    arguments: list[str | Path] = [client.pg_restore, "--format=custom", "--no-password", connection, path]
    if not tolerant:
        arguments.insert(1, "--exit-on-error")
    seen = bytearray()

    def stop_at_an_error(chunk: bytes) -> None:
        seen.extend(chunk)
        lines = seen[: seen.rfind(b"\n") + 1].decode("utf-8", "replace")
        said = _UNKNOWN_SETTING.sub("", lines) if tolerant else lines
        if re.search(r"^Command was: ", said, re.MULTILINE):
            raise RestoreStopped(said)

    finished = process.run(arguments, environment=environment, on_stderr=stop_at_an_error)
    if finished.status == 0:
        return
    unexpected = _IGNORED.sub("", _UNKNOWN_SETTING.sub("", finished.stderr)).strip()
    if not tolerant or finished.status != 1 or unexpected:
        raise RestoreStopped(last_words(finished))


def by_hand(backup: Backup, database: str, *options: str) -> str:
    """Return the command that restores a backup without migrator, in place and in one transaction."""
    reading = ["pg_restore", "--clean", "--if-exists", *options, "--file=-", backup.place]
    return (
        " ".join(shlex.quote(word) for word in reading)
        + " | grep -v '^SET transaction_timeout' | psql --single-transaction --set=ON_ERROR_STOP=1 --dbname="
        + shlex.quote(database)
    )
