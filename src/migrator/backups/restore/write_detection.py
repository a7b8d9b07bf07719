"""Tell whether a restore would lose writes of others since the backup.

The server's transaction-id counter tells: every writer takes an id. Every id that the backup's snapshot
has not seen (given out since, or in progress in this database) belongs to another writer, unless it is
known as our own. The counter belongs to the whole cluster, and a revision's savepoints and autocommit
statements take uncounted ids, so this errs on the safe side only.

An answer holds only while nobody can write. :func:`nobody_writes` locks every table (SHARE: reading
continues) before it checks, and the swap ends the session with those locks last of all. Nothing is set
that could outlive us. No such lock stops anybody from creating a table, a function or a large object,
or from using a sequence. That is checked before the swap, and again when all others are gone and cannot
come back. https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migrator.backups import exported_snapshot
from migrator.backups.clients import Login, WouldLose
from migrator.backups.manifest import Backup
from migrator.errors import some
from migrator.postgres.errors import QueryFailed
from migrator.postgres.server import no_timeouts
from migrator.postgres.session import Session

_PATIENCE = 15  # seconds for current writers to end

# Every version of a row has the id of the transaction that wrote it, so these sums change with any of
# them. Temporary tables and an ANALYZE are no loss. Only superusers may read pg_largeobject: they lock
# it. For others there are the statistics, which are complete after the writing sessions have ended.
_MADE = """
SELECT pg_stat_clear_snapshot(), hashtextextended(concat_ws(' ',
  (SELECT concat(count(*), ':', sum(xmin::text::bigint)) FROM pg_class WHERE relpersistence <> 't'),
  (SELECT concat(count(*), ':', sum(a.xmin::text::bigint)) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    WHERE c.relpersistence <> 't'),
  (SELECT concat(count(*), ':', sum(r.xmin::text::bigint)) FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
    WHERE c.relpersistence <> 't'),
  (SELECT concat(count(*), ':', sum(t.xmin::text::bigint)) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
    WHERE n.nspname !~ '^pg_(toast_)?temp_'),
  (SELECT concat(count(*), ':', sum(p.xmin::text::bigint)) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname !~ '^pg_(toast_)?temp_'),
  (SELECT concat(count(*), ':', sum(xmin::text::bigint)) FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'),
  (SELECT concat(count(*), ':', sum(xmin::text::bigint)) FROM pg_enum),
  (SELECT concat(count(*), ':', sum(xmin::text::bigint)) FROM pg_largeobject_metadata),
  (SELECT concat(n_tup_ins, ':', n_tup_upd, ':', n_tup_del) FROM pg_stat_sys_tables
    WHERE relid = 'pg_catalog.pg_largeobject'::regclass),
  (SELECT string_agg(concat(schemaname, '.', sequencename, ':', last_value), ' ' ORDER BY schemaname, sequencename)
     FROM pg_sequences)
), 0)
"""
# They are locked by name, which another table may have taken.
_UNLOCKED = """
SELECT min(coalesce(oid::regclass::text, 'a table')) FROM unnest(%s::bigint[]::oid[]) AS t (oid)
 WHERE oid NOT IN (SELECT relation FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'ShareLock' AND granted
                      AND locktype = 'relation')
"""
_LOCKS_LARGE_OBJECTS = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"


class Incomplete(WouldLose):
    """The backup lacks the rows of some tables, which would be empty afterwards."""

    def __init__(self, backup: Backup) -> None:
        super().__init__(f"{backup.id} is incomplete: {missing(backup)}")


def missing(backup: Backup) -> str:
    """Return the content that a backup lacks; an empty string for a complete one."""
    rows = f"the rows of {some(backup.excluded_table_data, 10)} (MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA)"
    hidden = f"{some(backup.not_dumped, 10)} (hidden from the role that made it, which was not a superuser)"
    told = [rows] if backup.excluded_table_data else []
    told += [hidden] if backup.not_dumped else []
    return f"it lacks {' and '.join(told)}" if told else ""


def refuse_losses(session: Session, backup: Backup, own: frozenset[int]) -> int:
    """Raise :class:`WouldLose` if an id was given out since the backup that is not ``own``; return the one
    taken.
    """
    if backup.next_xid is None:
        raise WouldLose(
            f"it is not known who has written since {backup.id}: its manifest has no transaction id"
        )
    # The id that we take comes after all given-out ids, also those of unfinished transactions.
    now = int(session.value("SELECT txid_current()"))
    running: tuple[int, ...] = ()
    first = backup.next_xid
    if backup.unseen_xid is not None and backup.running_xids is not None:
        first, running = backup.unseen_xid, backup.running_xids
    ours = sum(1 for number in own if first <= number < now or number in running)
    others = now - first + len(running) - ours
    if others:
        raise WouldLose(
            f"{others} transaction{'' if others == 1 else 's'} that this run cannot account for wrote "
            f"to the server since {backup.id} ({ours} belong to this run; a revision's work outside of "
            "its transaction cannot be told apart)"
        )
    return now


def refuse_another_server(session: Session, backup: Backup) -> None:
    """Raise :class:`WouldLose` if the backup is from another server, with another counter."""
    system, _ = exported_snapshot.identity(session)
    if system and backup.system_identifier and system != backup.system_identifier:
        raise WouldLose(f"{backup.id} is from another server, so its transaction id has no meaning here")


@dataclass(frozen=True)
class Holder:
    """The session that keeps others from writing, and the content of the database when it started."""

    session: Session
    made: int

    def look(self) -> None:
        """Raise :class:`WouldLose` if others have created something since that no lock prevents."""
        try:
            made = _made(self.session)
        except QueryFailed as error:
            raise WouldLose(f"others could write during the restore: {error.text}") from error
        if made != self.made:
            raise WouldLose(
                "during the restore, others created tables, functions or large objects in it, or used "
                "a sequence"
            )


def _made(session: Session) -> int:
    return int(session.query(_MADE)[0][1])


@contextlib.contextmanager
def nobody_writes(login: Login, backup: Backup, own: Callable[[], frozenset[int]]) -> Iterator[Holder]:
    """Keep everybody from writing within the block, after a check that nobody has since the backup.

    Raises :class:`WouldLose`.
    """
    with login.connect() as session:
        session.query(no_timeouts(session.facts.major))
        session.query(f"SET lock_timeout = '{_PATIENCE}s'")
        refuse_another_server(session, backup)
        session.query("BEGIN")
        try:
            tables = [item for item in exported_snapshot.relations(session) if item.kind in ("r", "p")]
            for relation in tables:
                session.query(f"LOCK TABLE ONLY {relation.qualified} IN SHARE MODE")
            unlocked = session.value(_UNLOCKED, [[item.oid for item in tables]])
            if unlocked:
                raise WouldLose(f"others may be writing: {unlocked} was renamed or dropped")
            if session.value(_LOCKS_LARGE_OBJECTS):
                session.query("LOCK TABLE pg_catalog.pg_largeobject IN SHARE MODE")
        except QueryFailed as error:
            raise WouldLose(f"others may be writing: {error.text}") from error
        holder = Holder(
            session, _made(session)
        )  # before the ids are read: those show everything that was created before
        refuse_losses(session, backup, own())
        yield holder
