"""Event triggers, which only a superuser may make: what a role that is none would lose or could not bring back."""

from __future__ import annotations

import re
from collections.abc import Iterable

from migrator.backups import archive
from migrator.backups.manifest import Backup
from migrator.backups.restored import failed
from migrator.postgres import QueryFailed, Session, quote_identifier

_ENTRY = re.compile(r"\d+; \d+ \d+ EVENT TRIGGER - (.*) \S+$")
_DENIED = "42501"
# Whoever may is told that there is no such function; the right is looked at first, and no transaction id is taken.
_TRY = "CREATE EVENT TRIGGER migrator_probe ON ddl_command_start EXECUTE FUNCTION pg_catalog.migrator_none()"
_DROPPED_WITH_THE_REST = """
SELECT evtname::text FROM pg_event_trigger JOIN pg_proc p ON p.oid = evtfoid JOIN pg_namespace n ON n.oid = pronamespace
WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
  AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'e')
ORDER BY 1
"""


def refuse(session: Session, backup: Backup, contents: Iterable[str]) -> None:
    """Refuse a restore from within that would end at an event trigger, or drop one for good; raises RestoreFailed.

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
            f"{backup.id} has event triggers ({', '.join(stored)}), which only a superuser may make, and role {user} is"
            " none.",
            "restore as a superuser (a superuser's name in MIGRATOR_DATABASE_URL), which brings them back as well; or "
            "without them, by hand into an empty database: "
            + archive.by_hand(backup, "NEW_DATABASE", "--no-owner", "--no-privileges"),
        )
    drops = " ".join(f"DROP EVENT TRIGGER {quote_identifier(name)};" for name in there)
    raise failed(
        backup,
        f"There are event triggers ({', '.join(there)}) that {backup.id} does not have: they would go, and role {user} "
        "may not make them again, for it is no superuser.",
        f"restore as a superuser, who keeps the old database beside; or as one: {drops} then restore again, and make "
        "them anew",
    )


def _may_make(session: Session) -> bool:
    try:
        session.query(_TRY)
    except QueryFailed as error:
        if error.lost:
            raise
        return error.sqlstate != _DENIED
    return True
