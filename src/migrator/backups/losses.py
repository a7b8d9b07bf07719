"""Would a restore lose what others have written since the backup?

The server's transaction-id counter answers it: whoever writes takes an id.  Between the backup's snapshot and now,
every id that is not known to be one of our own is taken for another's.  The counter is the whole cluster's, and a
revision's savepoints and autocommit statements take ids that nobody counts, so this errs on the safe side only.

An answer holds only while nobody can write: :func:`nobody_writes` locks every table (SHARE: reading goes on) before
it asks, and the swap ends the session that holds those locks last of all.  Nothing is set that could outlive us.
https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from migrator.backups import snapshot
from migrator.backups.manifest import Backup
from migrator.postgres import QueryFailed, Session, connect
from migrator.target import Target

_PATIENCE = 15  # seconds for those who write just now to end
_NO_TIMEOUTS = ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")


class WouldLose(Exception):
    """Others have written since the backup, or may have; the message says which."""


class Incomplete(WouldLose):
    """The backup does not have the rows of some tables, which would be empty afterwards."""

    def __init__(self, backup: Backup) -> None:
        super().__init__(f"{backup.id} is not whole: {empty_tables(backup)}")


def empty_tables(backup: Backup) -> str:
    """Say which tables are empty in what is made of a backup; an empty string for one that is whole."""
    names = backup.excluded_table_data
    if not names:
        return ""
    more = f" and of {len(names) - 10} more tables" if len(names) > 10 else ""
    return f"the rows of {', '.join(names[:10])}{more} are not in this backup (MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA)"


def refuse_losses(session: Session, backup: Backup, own: frozenset[int]) -> int:
    """Raise :class:`WouldLose` where an id was given out since the backup that is not ``own``; return the one taken."""
    if backup.next_xid is None:
        raise WouldLose(f"nobody knows who has written since {backup.id}: its manifest has no transaction id")
    # The id that we take ourselves comes after all those that were given out, the unfinished ones too.
    now = int(session.value("SELECT txid_current()"))
    ours = sum(1 for number in own if backup.next_xid <= number < now)
    others = now - backup.next_xid - ours
    if others:
        raise WouldLose(
            f"{others} transaction{'' if others == 1 else 's'} that this run cannot account for wrote to the server"
            f" since {backup.id} ({ours} were its own; what a revision does outside of transactions is not known to be)"
        )
    return now


def refuse_another_server(session: Session, backup: Backup) -> None:
    """Raise :class:`WouldLose` where the backup is another server's, whose counter says nothing here."""
    system, _ = snapshot.identity(session)
    if system and backup.system_identifier and system != backup.system_identifier:
        raise WouldLose(f"{backup.id} was taken from another server, so its transaction id says nothing here")


@contextlib.contextmanager
def nobody_writes(
    target: Target,
    application_name: str,
    timeout: float,
    backup: Backup,
    own: Callable[[], frozenset[int]],
) -> Iterator[Session]:
    """Keep everybody from writing within the block, having found that nobody has since the backup.

    Yields the session that holds the locks.  Raises :class:`WouldLose`.
    """
    with connect(target, application_name, timeout) as session:
        for name in _NO_TIMEOUTS:
            with contextlib.suppress(QueryFailed):  # PostgreSQL before 17 has no transaction_timeout
                session.query(f"SET {name} = 0")
        session.query(f"SET lock_timeout = '{_PATIENCE}s'")
        refuse_another_server(session, backup)
        session.query("BEGIN")
        try:
            for relation in snapshot.relations(session):
                if relation.kind in ("r", "p"):
                    session.query(f"LOCK TABLE {relation.qualified} IN SHARE MODE")
        except QueryFailed as error:
            raise WouldLose(f"others may be writing: {error.text}") from error
        refuse_losses(session, backup, own())
        yield session
