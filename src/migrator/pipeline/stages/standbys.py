"""Wait until commits are answered: a missing synchronous standby blocks every COMMIT for ever.

A session is not told that its COMMIT waits, and a COMMIT that is cancelled there *is* committed.
https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION
"""

from __future__ import annotations

import logging
import re
import time

from migrator.errors import Blocked
from migrator.postgres.session import Session

log = logging.getLogger("migrator")

_STANDBYS = """
SELECT current_setting('synchronous_standby_names'),
       current_setting('synchronous_commit') NOT IN ('off', 'local'),
       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')),
       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IS NULL)
"""
_REPEAT = 10.0  # seconds


def missing(names: str, waits: bool, there: int, hidden: int) -> bool:
    """Tell whether a COMMIT would wait for a standby that is not connected.

    ``there`` is the number of synchronous standbys, ``hidden`` the number of those with a state that
    this role may not see: with one of these, it is not known.
    """
    if not names.strip() or not waits or hidden:
        return False
    counted = re.match(r"\s*(?:FIRST\b|ANY\b)?\s*(\d+)\s*\(", names, re.IGNORECASE)
    return there < (int(counted[1]) if counted else 1)


def wait_for_standbys(session: Session, patience: float) -> None:
    """Wait until a COMMIT would be answered, for ``patience`` seconds; raises :class:`Blocked`."""
    deadline, said = time.monotonic() + patience, float("-inf")
    while True:
        names, waits, there, hidden = session.query(_STANDBYS)[0]
        if not missing(names, waits, there, hidden):
            return
        now = time.monotonic()
        if now >= deadline:
            raise Blocked(
                "Every COMMIT waits for a synchronous standby that is not connected: synchronous_standby_names is"
                f" '{names}', and pg_stat_replication shows {there} of them.",
                next_step="start the standby, or ALTER SYSTEM SET synchronous_standby_names = '' and"
                " SELECT pg_reload_conf(); then run it again",
            )
        if now - said >= _REPEAT:
            said = now
            log.info(
                "waiting for a synchronous standby (%.0f s left): every COMMIT would wait for it;"
                " synchronous_standby_names is '%s'",
                deadline - now,
                names,
            )
        time.sleep(min(0.5, max(0.05, deadline - now)))
