"""Watch the migration from the control connection: its blockers and its progress.

The watch has its own thread, because the main thread waits inside the database driver. It logs each
change and keeps the last blockers for the error message. It asks twice a second, so it also notices a
lost control connection within five seconds. It then reconnects and takes the run lock again. Meanwhile
the apply lock on the migration's own connection keeps other runs out.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migrator.pipeline.apply.driver_calls import DriverCalls, LostAnswer
from migrator.postgres.control_connection import ControlConnection
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.quoting import quote_literal
from migrator.runtime.deadlines import PROBE_TIMEOUT
from migrator.runtime.output.progress import Progress

log = logging.getLogger("migrator.watch")

# pg_blocking_pids returns 0 for a prepared transaction, which has no session.
# https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SESSION The state and times
# of another role's session are NULL, unless our role is a member of it or of pg_read_all_stats.
# https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-STATS-VIEWS
_BLOCKERS = """
SELECT b.pid, coalesce(a.application_name, ''), coalesce(a.state, ''),
       extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, a.query_start, a.backend_start))::float8,
       coalesce(left(regexp_replace(a.query, '\\s+', ' ', 'g'), 120), ''),
       w.mode,
       coalesce((SELECT CASE WHEN n.nspname = ANY(%(near)s::text[]) THEN '' ELSE quote_ident(n.nspname) || '.' END
                        || quote_ident(c.relname)
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = w.relation),
                w.relation::text, w.locktype),
       coalesce((SELECT string_agg(DISTINCT h.mode, ', ') FROM pg_locks h
                 WHERE h.pid = b.pid AND h.granted AND h.relation = w.relation), ''),
       CASE b.pid WHEN 0 THEN ARRAY(SELECT p.gid::text FROM pg_prepared_xacts p WHERE EXISTS (
         SELECT FROM pg_locks x JOIN pg_locks h USING (virtualtransaction)
          WHERE x.transactionid = p.transaction AND x.pid IS NULL AND h.pid IS NULL AND h.granted
            AND (h.relation = w.relation OR h.transactionid = w.transactionid)) ORDER BY 1) ELSE '{}' END
FROM (SELECT DISTINCT unnest(pg_blocking_pids(%(pid)s)) AS pid) b
LEFT JOIN pg_stat_activity a ON a.pid = b.pid
CROSS JOIN LATERAL (SELECT mode, relation, locktype, transactionid FROM pg_locks
                     WHERE pid = %(pid)s AND NOT granted LIMIT 1) w
ORDER BY b.pid
"""

_TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid = %s AND state IN ('idle in transaction', 'idle in transaction (aborted)')
"""

_PROGRESS = {
    # https://www.postgresql.org/docs/current/progress-reporting.html
    "pg_stat_progress_create_index": (
        "SELECT phase, CASE WHEN lockers_total > 0 THEN lockers_done WHEN blocks_total > 0 THEN blocks_done"
        " ELSE tuples_done END, CASE WHEN lockers_total > 0 THEN lockers_total WHEN blocks_total > 0 THEN"
        " blocks_total ELSE tuples_total END FROM pg_stat_progress_create_index WHERE pid = %s"
    ),
    "pg_stat_progress_cluster": (
        "SELECT phase, heap_blks_scanned, heap_blks_total FROM pg_stat_progress_cluster WHERE pid = %s"
    ),
    "pg_stat_progress_vacuum": (
        "SELECT phase, heap_blks_scanned, heap_blks_total FROM pg_stat_progress_vacuum WHERE pid = %s"
    ),
    "pg_stat_progress_copy": (
        "SELECT command, bytes_processed, bytes_total FROM pg_stat_progress_copy WHERE pid = %s"
    ),
}


@dataclass(frozen=True)
class Blocker:
    """A session that the migration waits for; ``seconds`` is how long its transaction has been open.

    ``seconds`` is None if the server hides the session of another role. A prepared transaction has no
    session (``pid`` is 0); ``gids`` are the names of those that may block.
    """

    pid: int
    application: str
    state: str
    seconds: float | None
    query: str
    wanted: str
    relation: str
    held: str
    gids: Sequence[str] = ()

    def __str__(self) -> str:
        if not self.pid:
            return f"prepared transaction {', '.join(map(quote_literal, self.gids)) or 'of an unknown name'}"
        who = f"pid {self.pid}" + (f" ({self.application})" if self.application else "")
        if self.seconds is None:
            doing = ", its activity is hidden (GRANT pg_read_all_stats shows it)"
        else:
            doing = f", {self.state or 'busy'} for {self.seconds:.0f} s"
        held = f", holds {self.held}" if self.held else ""
        query = self.query if self.seconds is not None else ""
        return f"{who}{doing}{held}" + (f': "{query}"' if query else "")


class Watch:
    """Watches one backend from another session, twice a second; also feeds the ``bar``."""

    def __init__(
        self,
        control: ControlConnection,
        *,
        terminate_after: float | None = None,
        interval: float = 0.5,
        repeat: float = 15.0,
        bar: Progress | None = None,
    ) -> None:
        self._bar = bar or Progress(0, sys.stderr, enabled=False)
        self._control = control
        self._session = control.session
        self._lost_answer = LostAnswer()
        self._terminate_after = terminate_after
        self._first_seen: dict[int, float] = {}
        self._spared: set[int] = set()
        self._interval = interval
        self._repeat = repeat
        self._pid = 0
        self._near: tuple[str, ...] | None = None  # the schemas that people leave out
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._said: tuple[object, float] = (None, 0.0)
        self.blockers: tuple[Blocker, ...] = ()

    def follow(self, pid: int, calls: DriverCalls | None) -> None:
        """Start to watch the server process ``pid``, and the driver's ``calls`` to it."""
        self._pid = pid
        self._lost_answer.follow(calls)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=PROBE_TIMEOUT + 1)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                if not self._control.held:
                    # No other run can take the run lock while the apply lock is held.
                    self._control.restore_once()
                elif not self._pid:
                    self._ask("SELECT 1")
                else:
                    self._lost_answer.look(self._ask, self._pid)
                    if not self._look_for_blockers():
                        self._look_for_progress()
            except QueryFailed as error:
                if error.lost:
                    self._control.mark_lost()
                else:
                    log.debug("cannot watch: %s", error.text)
            except ConnectFailed as error:
                log.debug("no control connection yet: %s", error.text)
            self._lost_answer.give_up(self._control.silent_since)

    def _ask(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> list[Any]:
        """Query over the control connection; it counts as lost if it does not answer in time."""
        return self._session.query(sql, parameters, timeout=PROBE_TIMEOUT)

    def _look_for_blockers(self) -> bool:
        if self._near is None:
            self._near = ("pg_catalog", *self._session.user_schemas(timeout=PROBE_TIMEOUT))
        rows = self._ask(_BLOCKERS, {"pid": self._pid, "near": list(self._near)})
        found = tuple(Blocker(*row) for row in rows)
        if not found:
            return False
        self.blockers = found
        if self._news(tuple(blocker.pid for blocker in found)):
            self._bar.clear()
            log.warning(
                "waiting for %s on %s, blocked by %s",
                found[0].wanted,
                found[0].relation,
                "; ".join(str(blocker) for blocker in found),
                extra={"stage": "apply", "blockers": [blocker.pid for blocker in found]},
            )
        self._bar.note(f"waiting for {found[0].wanted} on {found[0].relation}")
        self._terminate_idle(found)
        return True

    def _terminate_idle(self, found: tuple[Blocker, ...]) -> None:
        """End sessions that have blocked for too long, if they are idle in transaction at this moment."""
        if self._terminate_after is None:
            return
        now = time.monotonic()
        for blocker in found:
            since = self._first_seen.setdefault(blocker.pid, now)
            if now - since < self._terminate_after:
                continue
            try:
                ended = self._ask(_TERMINATE, (blocker.pid,))
            except QueryFailed as error:
                if error.lost:
                    raise
                self._cannot_end(blocker, error.text)
                continue
            if ended:
                log.warning("ended %s (MIGRATOR_TERMINATE_BLOCKERS_AFTER)", blocker)
                del self._first_seen[blocker.pid]
            elif blocker.pid and not blocker.state:
                self._cannot_end(blocker, "its activity is hidden; GRANT pg_read_all_stats shows it")

    def _cannot_end(self, blocker: Blocker, reason: str) -> None:
        """Report each blocker once that cannot be ended."""
        if blocker.pid not in self._spared:
            self._spared.add(blocker.pid)
            log.warning("cannot end pid %d: %s", blocker.pid, reason)

    def _look_for_progress(self) -> None:
        note = ""
        for view, sql in _PROGRESS.items():
            if view == "pg_stat_progress_copy" and self._session.facts.major < 14:
                continue
            for phase, done, total in self._ask(sql, (self._pid,)):
                percent = int(100 * done / total) if total else 0
                note = f"{phase}, {percent} %"
                if self._news((phase, percent // 10)):
                    self._bar.clear()
                    log.info("the server: %s, %d %%", phase, percent, extra={"stage": "apply"})
        self._bar.note(note)

    def _news(self, what: object) -> bool:
        """Tell whether this differs from the last report, or the last report is old."""
        now = time.monotonic()
        if what == self._said[0] and now - self._said[1] < self._repeat:
            return False
        self._said = (what, now)
        return True
