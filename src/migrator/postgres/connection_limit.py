"""A server without a free connection: wait for one, as long as for a server that is not there yet.

Each later connection of a run may meet this, and each program's: the first connection says nothing
about the next one.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from migrator.config.database_url import Target
from migrator.errors import AccessDenied
from migrator.postgres.errors import (
    FREE_CONNECTION_WAIT,
    ConnectFailed,
    Refusal,
    child_refused,
    classify,
    had_no_free_connection,
    message_of,
)
from migrator.postgres.quoting import as_typed
from migrator.postgres.session import Session
from migrator.postgres.session import connect as _connect
from migrator.runtime.subprocesses import Finished

log = logging.getLogger("migrator.wait")

_LONGEST_PAUSE = 2.0


def connect(target: Target, application_name: str, timeout: float) -> Session:
    """Open a session; wait for a free connection. Raises :class:`ConnectFailed`."""
    waiting = _Waiting(str(target))
    while True:
        try:
            return _connect(target, application_name, timeout)
        except ConnectFailed as error:
            if not error.no_free_connection:
                raise
            if not waiting.goes_on(error.text):
                error.waited = True
                raise
        waiting.pause()


_LIMIT = """
SELECT least(nullif(rolconnlimit, -1), nullif(datconnlimit, -1)), session_user::text
  FROM pg_roles, pg_database WHERE rolname = session_user AND datname = current_database() AND NOT rolsuper
"""


def refuse_too_few(session: Session, needed: int, what: str) -> None:
    """Raise :class:`AccessDenied` if role or database can never have the connections that ``what`` takes at
    once.
    """
    for limit, role in session.query(_LIMIT):
        if limit is not None and limit < needed:
            raise AccessDenied(
                f"{what} takes {needed} connections at once. Role {role} may have {limit} to "
                f"{session.facts.database} (CONNECTION LIMIT).",
                next_step=f"ALTER ROLE {as_typed(role)} CONNECTION LIMIT {needed};"
                f" or ALTER DATABASE {as_typed(session.facts.database)} CONNECTION LIMIT, where that is the lower one",
            )


def run(start: Callable[[], Finished]) -> Finished:
    """Run a PostgreSQL program; retry if the server refused its connection, because it did nothing then.

    The server's message may be in any language, and the program hides its SQLSTATE. Sessions of ours
    were accepted with the same address and password. Raises :class:`ConnectFailed` after the wait.
    """
    waiting = None
    while True:
        finished = start()
        if finished.status == 0 or not child_refused(finished.stderr):
            return finished
        words = " ".join(finished.stderr.split())
        if classify("", words) is Refusal.DENIED:
            return finished
        waiting = waiting or _Waiting(finished.program)
        if not waiting.goes_on(words):
            refused = ConnectFailed(Refusal.TRANSIENT, words[-600:])
            refused.waited = True
            raise refused
        waiting.pause()


def run_env(go: Callable[[], None], entered: Callable[[], bool]) -> None:
    """Run ``env.py``; retry from the top if the server had no free connection and ``env.py`` reached no
    database.

    Raises its last error.
    """
    waiting = _Waiting("env.py")
    while True:
        try:
            go()
            return
        except Exception as error:
            if entered() or not had_no_free_connection(error) or not waiting.goes_on(message_of(error)):
                raise
        waiting.pause()


class _Waiting:
    def __init__(self, who: str) -> None:
        self._who = who
        self._deadline = time.monotonic() + FREE_CONNECTION_WAIT.seconds
        self._pause = 0.2
        self._said = False

    def goes_on(self, why: str) -> bool:
        """Report the wait once; return whether any time is left."""
        left = self._deadline - time.monotonic()
        if left > 0 and not self._said:
            log.warning("%s: no connection yet (%.0f s left): %s", self._who, left, why)
            self._said = True
        return left > 0

    def pause(self) -> None:
        """Sleep for a growing, jittered time."""
        left = max(0.0, self._deadline - time.monotonic())
        time.sleep(min(left, random.uniform(self._pause / 2, self._pause)))  # noqa: S311 - jitter, no secret
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
