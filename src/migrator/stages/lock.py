"""Hold the run lock: however many runs start, on however many hosts, one applies.

The lock is Postgres's own session advisory lock, so nothing is persisted that could go stale.  It is taken
by *polling* ``pg_try_advisory_lock`` in autocommit: a session blocked in ``pg_advisory_lock`` holds a
snapshot, for which ``CREATE INDEX CONCURRENTLY`` in the other run waits, which is a deadlock.
Advisory locks are counted per database, so one constant pair of keys serves them all.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator

from migrator.errors import LockBusy, SettingsError
from migrator.postgres import QueryFailed, Session, in_transaction_pooling
from migrator.settings import Settings

log = logging.getLogger("migrator.lock")

LOCK_CLASS = 0x6D696772  # "migr"
RUN_LOCK = 1
APPLY_LOCK = 2
"""Held by the applying connection, so that a run whose control connection is lost still keeps others out."""

_HOLDERS = """
SELECT l.objid::int, l.pid, a.application_name, a.backend_start::text
FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.classid = %s AND l.objid IN (1, 2) AND l.objsubid = 2
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.pid <> pg_backend_pid()
ORDER BY l.objid
"""


def holder(session: Session) -> tuple[int, str] | None:
    """Return (pid, description) of whoever holds the run lock, or None."""
    rows = session.query(_HOLDERS, (LOCK_CLASS,))
    if not rows:
        return None
    _, pid, name, since = rows[0]
    return pid, f"{name or 'a session'} (pid {pid}{f', connected since {since}' if since else ''})"


@contextlib.contextmanager
def lock(
    session: Session,
    settings: Settings,
    *,
    session_ends: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[float]:
    """Hold the run lock within the block; yields the seconds that were waited for it.

    ``session_ends`` says that the block itself ends the session, as a restore does when it swaps databases.
    Raises :class:`LockBusy` when another run holds it for ``settings.run_lock_timeout`` seconds, and
    :class:`SettingsError` where a pooler makes it worthless.
    """
    _refuse_pooler(session, settings)
    if (
        session.facts.major >= 14
    ):  # a killed run's lock ends with its connection, also in the middle of a statement
        session.query("SET client_connection_check_interval = '2s'")
    started = time.monotonic()
    deadline = started + settings.run_lock_timeout
    said, said_at = "", 0.0
    while not _try(session):
        found = holder(session)
        now = time.monotonic()
        text = found[1] if found else "another run"
        if now >= deadline:
            pid = found[0] if found else "PID"
            raise LockBusy(
                f"Another run held the lock for {settings.run_lock_timeout:g} s: {text}.",
                next_step="let it finish and run again; if it hangs, end its session:"
                f" SELECT pg_terminate_backend({pid})",
            )
        if text != said or now - said_at >= 15:
            log.info("waiting for the run lock (%.0f s left), held by %s", deadline - now, text)
            said, said_at = text, now
        sleep(min(random.uniform(0.1, 0.5), max(0.01, deadline - now)))  # noqa: S311 - jitter, no secret
    try:
        yield time.monotonic() - started
    finally:
        _release(session, session_ends)


def _refuse_pooler(session: Session, settings: Settings) -> None:
    """Refuse an address through which a session lock would end with each transaction."""
    name = f"migrator probe {session.pid}"
    if not in_transaction_pooling(session, name, settings.connect_timeout):
        return
    raise SettingsError(
        [
            f"{session.target} leads through a connection pooler in transaction mode, where a session lock is worth"
            " nothing"
        ],
        next_step="give the address around it in MIGRATOR_DIRECT_URL: lock, backup and migration then use that one",
    )


def _try(session: Session) -> bool:
    """Take the run lock unless a run holds it, or an applying connection without its run is still alive."""
    if not session.value("SELECT pg_try_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK)):
        return False
    if any(row[0] == APPLY_LOCK for row in session.query(_HOLDERS, (LOCK_CLASS,))):
        session.value("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
        return False
    return True


def regain(session: Session) -> bool:
    """Take the run lock again on a session that was lost and is back; False while another run tries its luck."""
    return bool(session.value("SELECT pg_try_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK)))


def _release(session: Session, session_ends: bool) -> None:
    try:
        released = session.value("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    except QueryFailed as error:
        level = logging.DEBUG if session_ends else logging.WARNING
        log.log(level, "the connection that held the run lock was lost, and the lock with it: %s", error.text)
        return
    if not released:
        log.warning("the run lock was not ours any more when it was released")
