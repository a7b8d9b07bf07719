"""The control connection with the run lock, while the migration works on its own connection.

If it is lost, the apply lock on the migration's connection keeps other runs out. This module restores
the connection and the run lock. Both the watch and the main thread use it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from migrator.errors import LockBusy
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refusal
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, read_rows
from migrator.runtime.deadlines import DEADLINES, PROBE_TIMEOUT

log = logging.getLogger("migrator.watch")

_STARTING = "57P03"  # cannot_connect_now
_AT_LEAST = 10.0
"""Seconds to wait for a server that went away during a migration, also if MIGRATOR_WAIT_TIMEOUT is less."""
_CONNECT = 5.0
"""Seconds for one connection: an overloaded server must not count as silent."""
_LOCK_PATIENCE = 5.0
"""Seconds to wait for the run lock: waiting runs hold it for a moment to see that the apply lock is held."""


def lost(error: BaseException) -> bool:
    """Tell whether an error of migrator's own connections means that Postgres went away, and may come back."""
    if isinstance(error, QueryFailed):
        return error.lost
    return isinstance(error, ConnectFailed) and error.refusal is Refusal.TRANSIENT


def reconnect_if_lost(session: Session, patience: float) -> bool:
    """Check that a session answers; return whether it had to reconnect.

    Waits for at least ten seconds, or ``patience``, but only once; raises :class:`ConnectFailed`.
    """
    if session.answers():
        return False
    log.warning("the control connection was lost; reconnecting")
    deadline = time.monotonic() + (0.0 if session.abandoned else max(_AT_LEAST, patience))
    while True:
        left = DEADLINES.left(deadline)
        session.abandoned = left <= 0
        try:
            session.reconnect(max(1.0, min(PROBE_TIMEOUT, left)))
            if session.facts.in_recovery:  # a standby during promotion, or a wrong one
                session.close()
                raise ConnectFailed(Refusal.TRANSIENT, "the server is a standby", _STARTING)
        except QueryFailed as error:
            if session.abandoned:
                raise ConnectFailed(Refusal.TRANSIENT, error.text, error.sqlstate) from error
        except ConnectFailed as error:
            if not lost(error) or session.abandoned:
                raise
        else:
            session.abandoned = False
            return True
        time.sleep(random.uniform(0.1, 0.5))  # noqa: S311 - jitter, no secret


class ControlConnection:
    """Knows whether the control connection and the run lock are there, and restores them."""

    def __init__(self, session: Session, regain: Callable[[], bool], patience: float) -> None:
        self.session = session
        self._regain = regain
        self._patience = patience
        self._mutex = threading.Lock()
        self._lost_once = False
        self.held = True
        self.silent_since: float | None = None
        """Since when nothing answers at all (time.monotonic()); None if something does, even a refusal."""

    @property
    def never_lost(self) -> bool:
        """Tell whether the connection was never lost, as far as is known."""
        return self.held and not self._lost_once

    def mark_lost(self) -> None:
        """Note that the connection was lost; log it once."""
        if self.held:
            self.held, self._lost_once = False, True
            log.warning("the control connection was lost; the migration continues under its own lock")

    def restore_once(self) -> bool:
        """Try once to restore both, for some seconds; raises ConnectFailed or QueryFailed."""
        with self._mutex:
            if self.held:
                return True
            try:
                if self.session.closed:
                    self.session.reconnect(_CONNECT)
                self.held = self._regain()
            except ConnectFailed as error:
                self.silent_since = (self.silent_since or time.monotonic()) if error.silent else None
                raise
            self.silent_since = None
        if self.held:
            log.info("the control connection is back, with the run lock")
        return self.held

    def ensure(self) -> None:
        """Restore both now; wait for the server if it went away.

        Raises :class:`ConnectFailed` if it does not come back in time, and :class:`LockBusy` if another
        run has taken the lock meanwhile.
        """
        try:
            self.held = self._regain()
        except QueryFailed as error:
            if not error.lost:
                raise
            self.mark_lost()
        if not self.held:
            self._wait()

    def refuse_changed_rows(self, table: VersionTable, *expected: frozenset[str]) -> None:
        """Raise :class:`LockBusy` if the lock was lost for a while, and the version rows have changed since."""
        rows = frozenset(read_rows(self.session, table)) if self._lost_once else frozenset()
        if self._lost_once and {rows} != set(expected):
            raise LockBusy(
                "Another run worked on the database while this one had lost its connection.",
                state=f"The database is at {', '.join(sorted(rows)) or 'base'}.",
                next_step="run it again: it applies the remaining revisions",
            )

    def _wait(self) -> None:
        busy_since = 0.0
        while True:
            reconnect_if_lost(self.session, self._patience)
            try:
                if self.restore_once():
                    return
            except (QueryFailed, ConnectFailed) as error:
                if not lost(error):
                    raise
                continue
            busy_since = busy_since or time.monotonic()
            if time.monotonic() - busy_since > _LOCK_PATIENCE:
                raise LockBusy(
                    "Another run took the run lock while this one had lost its connection.",
                    state="Everything was rolled back.",
                    next_step="run it again: it waits for the other run, then applies the remaining revisions",
                )
            time.sleep(random.uniform(0.05, 0.2))  # noqa: S311 - jitter, no secret
