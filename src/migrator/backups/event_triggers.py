"""Event triggers: they are restored last, and only by a superuser; refuse a loss by another role.

They run at each DDL, and pg_restore's REFRESH MATERIALIZED VIEW counts as DDL.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from migrator.backups import pg_restore
from migrator.backups.clients import Client, failed
from migrator.backups.manifest import Backup
from migrator.backups.storage import files
from migrator.postgres.errors import Refused
from migrator.postgres.queries import IN_USER_SCHEMA, of_no_extension
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session

_ENTRY = re.compile(r"\d+; \d+ \d+ EVENT TRIGGER - (.*) \S+$")
_LISTED = re.compile(rb"^\d+; \d+ \d+ (?:(?:COMMENT|SECURITY LABEL) - )?EVENT TRIGGER .*\n", re.MULTILINE)
_DENIED = "42501"
# A role with the right gets the error that there is no such function. The right is checked first, and no
# transaction id is taken.
_TRY = "CREATE EVENT TRIGGER migrator_probe ON ddl_command_start EXECUTE FUNCTION pg_catalog.migrator_none()"
_DROPPED_WITH_THE_REST = f"""
SELECT evtname::text FROM pg_event_trigger JOIN pg_proc p ON p.oid = evtfoid JOIN pg_namespace n ON n.oid = pronamespace
WHERE {IN_USER_SCHEMA} AND {of_no_extension("pg_proc", "p")} ORDER BY 1
"""  # noqa: S608 - constants only


@contextlib.contextmanager
def apart(
    client: Client, path: Path, without: re.Pattern[bytes] | None = None
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yield pg_restore's options for an archive without its event triggers, then for those alone; nothing
    without any.

    Entries that ``without`` finds are in neither. Raises RestoreStopped.
    """
    listed = pg_restore.script(client, path, "--list")
    alone = b"".join(match[0] for match in _LISTED.finditer(listed))
    kept = without.sub(b"", listed) if without else listed
    if not alone and kept == listed:
        yield (), ()
        return
    with files.in_memory(_LISTED.sub(b"", kept)) as others, files.in_memory(alone) as last:
        yield (f"--use-list={others}",), (f"--use-list={last}",) if alone else ()


def is_one(line: str) -> bool:
    """Tell whether a line of an archive's table of contents is an event trigger, or its comment."""
    return _LISTED.match(f"{line}\n".encode(errors="surrogateescape")) is not None


def refuse(session: Session, backup: Backup, contents: Iterable[str]) -> None:
    """Refuse a restore in place that would stop at an event trigger, or drop one for good; raises
    RestoreFailed.

    ``contents`` are the lines of the archive's table of contents.
    """
    stored = [match[1] for line in contents if (match := _ENTRY.match(line))]
    there = [name for (name,) in session.query(_DROPPED_WITH_THE_REST)]
    if not (stored or there) or _may_make(session):
        return
    user = session.facts.user
    if stored:
        raise failed(
            backup,
            f"{backup.id} has event triggers ({', '.join(stored)}). Only a superuser may create them, "
            f"and role {user} is not a superuser.",
            "restore as a superuser (a superuser's name in MIGRATOR_DATABASE_URL), which restores them "
            "too; or without them, by hand into an empty database: "
            + pg_restore.by_hand(backup, "NEW_DATABASE", "--no-owner", "--no-privileges"),
        )
    drops = " ".join(f"DROP EVENT TRIGGER {quote_identifier(name)};" for name in there)
    raise failed(
        backup,
        f"There are event triggers ({', '.join(there)}) that {backup.id} does not have. A restore would "
        f"drop them, and role {user} may not create them again, because it is not a superuser.",
        f"restore as a superuser, which keeps the old database beside; or as a superuser: {drops} then "
        "restore again, and create them again",
    )


def _may_make(session: Session) -> bool:
    try:
        session.query(_TRY)
    except Refused as error:
        return error.sqlstate != _DENIED
    return True
