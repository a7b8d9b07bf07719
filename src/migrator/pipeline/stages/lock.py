"""Hold the run lock: any number of runs may start, on any number of hosts, and one applies.

The lock is Postgres's own session advisory lock, so there is no stored state that could go stale.
migrator *polls* ``pg_try_advisory_lock`` in autocommit. A session blocked in ``pg_advisory_lock`` holds
a snapshot, and ``CREATE INDEX CONCURRENTLY`` in the other run waits for that snapshot: a deadlock.
Advisory locks are counted per database, so one constant pair of keys serves them all.

A run that had to wait takes a *shared* lock and checks again for pending revisions. The shared lock
blocks runs that apply, not other checks: all waiting runs finish together and not one after another.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from migrator.config.settings import Settings
from migrator.errors import LockBusy, SettingsError
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.session import Session, connect
from migrator.runtime.deadlines import PROBE_TIMEOUT

log = logging.getLogger("migrator.lock")

LOCK_CLASS = 0x6D696772  # "migr"
RUN_LOCK = 1
APPLY_LOCK = 2
"""Held by the applying connection: a run that loses its control connection still keeps others out."""

_HOLDERS = """
SELECT l.objid::int, l.pid, a.application_name, a.backend_start::text, coalesce(a.wait_event, '')
FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.classid = %s AND l.objid IN (1, 2) AND l.objsubid = 2
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.mode = 'ExclusiveLock' AND l.pid <> pg_backend_pid()
ORDER BY l.objid
"""
"""Holders that apply, or are about to; not the checks under the shared lock."""

_REGAIN = """
SELECT CASE WHEN EXISTS (
  SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()
  AND classid = %(class)s AND objid = %(lock)s AND objsubid = 2 AND mode = 'ExclusiveLock'
) THEN true ELSE pg_try_advisory_lock(%(class)s, %(lock)s) END
"""

_POLL = (0.1, 0.3)
"""Seconds between two tries, jittered: fifty waiting runs then ask the server some 250 times a second."""

_ALONE = 3
"""Tries for the exclusive lock after a check that found work, before another check: checks block each other's
exclusive lock.
"""

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Held(Generic[Seen]):
    """How the lock is held: after ``waited`` seconds, and shared if ``seen`` shows that nothing is pending."""

    waited: float
    seen: Seen | None = None


def holder(session: Session) -> tuple[int, str] | None:
    """Return (pid, description) of the session that holds the run lock, or None."""
    rows = session.query(_HOLDERS, (LOCK_CLASS,))
    if not rows:
        return None
    _, pid, name, since, event = rows[0]
    hangs = ""
    if event == "SyncRep":
        hangs = (
            ", whose COMMIT waits for a synchronous standby (SyncRep); SELECT "
            f"pg_terminate_backend({pid}) ends it, and its committed work stays"
        )
    return pid, f"{name or 'a session'} (pid {pid}{f', connected since {since}' if since else ''}){hangs}"


@contextlib.contextmanager
def lock(
    session: Session,
    settings: Settings,
    *,
    look: Callable[[], Seen | None] | None = None,
    session_ends: Callable[[], bool] = lambda: False,
) -> Iterator[Held[Seen]]:
    """Hold the run lock within the block.

    A run that had to wait calls ``look`` while no run applies. If its result shows that nothing is
    pending, the lock is held shared. ``session_ends`` says whether the block itself has ended the
    session, as a restore does when it swaps databases. Raises :class:`LockBusy` if another run holds
    the lock for ``settings.run_lock_timeout`` seconds, and :class:`SettingsError` if a pooler breaks
    session locks.
    """
    _refuse_pooler(session, settings)
    session.check_client_connection()  # a killed run's lock ends with its connection
    started = time.monotonic()
    seen = _acquire(session, settings.run_lock_timeout, look)
    try:
        yield Held(time.monotonic() - started, seen)
    finally:
        _release(session, session_ends(), shared=seen is not None)


def _acquire(session: Session, patience: float, look: Callable[[], Seen | None] | None) -> Seen | None:
    """Take the lock: exclusive, or shared if ``look`` returned something, which is returned."""
    waiting = _Waiting(session, patience)
    alone = 1  # a run with work to do wants the exclusive lock
    while True:
        if alone > 0 or look is None:
            alone -= 1
            if _try(session):
                return None
        elif _try(session, shared=True):
            seen = look()
            if seen is not None:
                return seen
            _unlock(session, shared=True)
            alone = _ALONE
            continue
        time.sleep(waiting.pause())


class _Waiting:
    """The wait for another run: bounded, and logged."""

    def __init__(self, session: Session, patience: float) -> None:
        self._session = session
        self._patience = patience
        self._deadline = time.monotonic() + patience
        self._said, self._said_at, self._asked_at = "", float("-inf"), float("-inf")

    def pause(self) -> float:
        """Return the seconds until the next try; raises :class:`LockBusy` after the last one."""
        now = time.monotonic()
        if now >= self._deadline:
            raise self._busy()
        if now - self._asked_at >= 1:  # not at every try: the answer costs the server more than the try
            self._asked_at = now
            self._say(now)
        return min(random.uniform(*_POLL), max(0.01, self._deadline - now))  # noqa: S311 - jitter, no secret

    def _say(self, now: float) -> None:
        found = holder(self._session)
        text = found[1] if found else "another run"
        if text != self._said or now - self._said_at >= 15:
            log.info("waiting for the run lock (%.0f s left), held by %s", self._deadline - now, text)
            self._said, self._said_at = text, now

    def _busy(self) -> LockBusy:
        found = holder(self._session)
        pid, text = found or ("PID", "another run")
        return LockBusy(
            f"Another run held the lock for {self._patience:g} s: {text}.",
            next_step="wait for it and run again; if it hangs, end its session: SELECT "
            f"pg_terminate_backend({pid})",
        )


def _refuse_pooler(session: Session, settings: Settings) -> None:
    """Refuse an address that ends a session lock with each transaction, or gives no second session.

    Raises :class:`SettingsError`, and the error of a server that has no free connection or is gone. It
    is free without a pooler.
    """
    if not session.pooled:
        return
    why = _what_a_pooler_does(session, f"migrator probe {session.pid}", settings.connect_timeout)
    if not why:
        log.info(_SERVER_CONNECTIONS, session.target)
        return
    raise SettingsError(
        [f"{session.target} leads through a connection pooler {why}"],
        next_step="set MIGRATOR_DIRECT_URL to an address that goes around it; lock, backup and migration "
        "then use that address",
    )


_SERVER_CONNECTIONS = (
    "%s leads through a connection pooler. A run takes 2 of its server connections at once. A backup "
    "takes 3, and one more for each further worker (MIGRATOR_BACKUP_JOBS). A restore takes 4. If the "
    "pooler has fewer, set MIGRATOR_DIRECT_URL"
)


def _what_a_pooler_does(session: Session, application_name: str, timeout: float) -> str:
    """Return why a run cannot work through a pooler; an empty text if the pooler keeps a connection for its
    client.

    Without that, another client finds this session's setting: a pooler gives it the connection that was
    used last. A check that is lost or not answered is an answer too: the pooler has no second
    connection, or rejects the check.
    """
    given_away = "in transaction mode, in which session locks do not work"
    seen = "SELECT current_setting('migrator.probe', true)"
    try:
        for _ in range(3):
            session.query("SELECT set_config('migrator.probe', 'mine', false)", timeout=PROBE_TIMEOUT)
            with connect(session.target, application_name, timeout) as other:
                other.query("BEGIN", timeout=PROBE_TIMEOUT)
                others = other.value(seen, timeout=PROBE_TIMEOUT)
                if others == "mine" or session.value(seen, timeout=PROBE_TIMEOUT) != "mine":
                    return given_away
    except ConnectFailed as error:
        if not error.silent:
            raise
        return f"that gives no second session beside the first ({error.text})"
    except QueryFailed as error:
        return f"that keeps no session for its client ({error.text})"
    return ""


def _try(session: Session, *, shared: bool = False) -> bool:
    """Take the run lock, unless a run holds it, or an applying connection without its run is still alive."""
    take = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
    if not session.value(f"SELECT {take}(%s, %s)", (LOCK_CLASS, RUN_LOCK)):
        return False
    if any(row[0] == APPLY_LOCK for row in session.query(_HOLDERS, (LOCK_CLASS,))):
        _unlock(session, shared=shared)
        return False
    return True


def regain(session: Session) -> bool:
    """Confirm the run lock; take it again if the session was lost. False if another run has it."""
    ours = {"class": LOCK_CLASS, "lock": RUN_LOCK}
    return bool(session.query(_REGAIN, ours, timeout=PROBE_TIMEOUT)[0][0])


@contextlib.contextmanager
def lock_if_free(session: Session) -> Iterator[bool]:
    """Hold the run lock within the block if it is free; yield whether it is held."""
    held = _try(session)
    try:
        yield held
    finally:
        if held:
            _release(session, session_ends=False, shared=False)


def _unlock(session: Session, *, shared: bool) -> bool:
    """Release the lock; return whether this session held it."""
    give = "pg_advisory_unlock_shared" if shared else "pg_advisory_unlock"
    return bool(session.value(f"SELECT {give}(%s, %s)", (LOCK_CLASS, RUN_LOCK)))


def _release(session: Session, session_ends: bool, *, shared: bool) -> None:
    try:
        released = _unlock(session, shared=shared)
    except QueryFailed as error:
        level = logging.DEBUG if session_ends else logging.WARNING
        log.log(level, "the connection that held the run lock was lost, and the lock with it: %s", error.text)
        return
    if not released:
        log.warning("the run lock was lost before its release")
