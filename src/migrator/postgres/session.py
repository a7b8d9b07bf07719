"""Sessions of migrator's own: connect, query, cancel, and reconnect."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg2

from migrator.config.database_url import Target
from migrator.errors import AccessDenied
from migrator.postgres import search_path
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refusal, Refused, classify, message_of
from migrator.postgres.libpq import cancel_request, open_connection
from migrator.postgres.quoting import decoded, execute, quote_literal
from migrator.postgres.server import FACTS, ServerFacts, dead_client_settings, no_timeouts
from migrator.runtime.deadlines import (
    ANSWER_TIMEOUT,
    CANCEL_TIMEOUT,
    DEADLINES,
    PROBE_TIMEOUT,
    PROBES,
    Wait,
    shut_down,
)
from migrator.runtime.logs import get_logger

log = get_logger("migrator")


class FirstQuery(NamedTuple):
    """More columns for the query in a session's first message, and the statements ``before`` it."""

    columns: str = ""
    before: str = ""


_NO_FIRST_QUERY = FirstQuery()


class Session:
    """One autocommit connection for migrator's own use; safe to share between threads.

    It resolves names only in pg_catalog (search_path.py). ``user_path`` is the search_path from the
    address, the role or the database.
    """

    def __init__(
        self,
        connection: Any,
        target: Target,
        application_name: str = "",
        timeout: float = 10.0,
        first_query: FirstQuery = _NO_FIRST_QUERY,
    ) -> None:
        self._connection = connection
        self._application_name = application_name
        self._lock = threading.RLock()
        self._wait: Wait | None = None
        self._watched = False
        self._timeouts_off = True  # the query for the facts does this itself
        self.abandoned = False
        """Whether a wait for it was in vain: it is queried again, without another wait."""
        self.target = target
        self._ahead = ""  # the prefix of each message
        self._restricts = False  # whether the server can refuse the views of others
        self.user_path = ""
        self.facts, self.first_row = self._read_facts(timeout, first_query)
        # Behind a pooler, a setting may stay with a connection that another client gets next.
        self._timeouts_off = self.pooled
        self._ahead = search_path.prefix_behind_pooler(self._restricts) if self.pooled else ""

    def query(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        sink: Any = None,
    ) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows (none if it returns none).

        ``COPY ... TO STDOUT`` writes each row into the ``sink``, and returns the number of rows.

        It may take as long as the server works on it, but it does not wait for an answer that will not
        come. With ``timeout`` it ends, and the connection with it, after that many seconds. Raises
        :class:`QueryFailed`.
        """
        late = self._ask_elsewhere if timeout is None else self._give_up
        seconds = ANSWER_TIMEOUT if timeout is None else timeout
        with self._lock, DEADLINES.limit(seconds, late, self._end) as wait:
            if DEADLINES.over:
                self.close()
                raise QueryFailed(_NO_TIME, lost=True)
            try:
                self._wait = wait
                with self._connection.cursor() as cursor:
                    if not self._timeouts_off:
                        _execute_with_retries(cursor, no_timeouts(self.facts.major))
                        self._timeouts_off = True
                    if self._ahead and sink is None and not _ALONE.match(sql):
                        sql = (self._ahead if parameters is None else self._ahead.replace("%", "%%")) + sql
                    if sink is not None:
                        cursor.copy_expert(sql, sink)
                        return [(cursor.rowcount,)]
                    execute(cursor, sql, parameters)
                    return (
                        [tuple(map(decoded, row)) for row in cursor.fetchall()] if cursor.description else []
                    )
            except psycopg2.Error as error:
                lost = bool(self._connection.closed) or error.pgcode in _ENDED
                text = message_of(error)
                if wait.cut:
                    text = f"no answer for {time.monotonic() - wait.began:.0f} s"
                raise (QueryFailed if lost else Refused)(text, error.pgcode or "", lost=lost) from error
            finally:
                self._wait = None

    def _end(self, wait: Wait) -> None:
        """End a wait for good: cancel on the server if it can be reached, so that the statement releases its
        locks.
        """
        began = time.monotonic()
        self._tell(wait)
        while not wait.over and time.monotonic() - began < CANCEL_TIMEOUT:
            time.sleep(0.02)
        self._give_up(wait)

    def _give_up(self, wait: Wait) -> None:
        with contextlib.suppress(psycopg2.Error):  # closed in between
            wait.end(lambda: shut_down(self._connection.fileno()))

    def _ask_elsewhere(self, wait: Wait) -> None:
        """Check over another connection whether the server still works on the statement; give up if it does
        not.
        """
        failures, pause = 0, ANSWER_TIMEOUT
        while not wait.over and failures < PROBES and not DEADLINES.over:
            busy = None
            try:
                with connect(self.target, self._application_name, PROBE_TIMEOUT) as other:
                    busy = other.query(_BUSY, (self.pid,), timeout=PROBE_TIMEOUT)
            except (ConnectFailed, QueryFailed) as error:
                # A refusal such as "too many clients" is an answer too: the server is there.
                failures = failures + 1 if error.sqlstate in ("", _CANNOT_CONNECT_NOW) else 0
            else:
                failures, pause = 0, min(2 * pause, 60.0)
                if not busy or not busy[0][0]:
                    break
                _still_waiting(wait, *busy[0][1:])
            deadline = time.monotonic() + pause
            while not wait.over and DEADLINES.left(deadline) > 0:
                time.sleep(0.2)
        if not DEADLINES.over:
            self._give_up(wait)

    def cancel(self) -> None:
        """Cancel the statement that another thread runs here, if there is one.

        psycopg2 waits for the server inside libpq, where no Python signal handler runs. If the server
        cannot be reached (libpq would wait without end), the connection is closed on this side.
        """
        wait = self._wait
        if wait is None:
            return
        if not self._tell(wait):
            self._give_up(wait)

    def _tell(self, wait: Wait) -> bool:
        """Tell the server to cancel, in a thread, because libpq waits without end; return whether it was
        told.
        """
        requests: list[Callable[[], None]] = []
        with contextlib.suppress(psycopg2.Error):  # closed in between
            wait.during(lambda: requests.append(cancel_request(self._connection.pgconn_ptr)))
        telling = threading.Thread(target=lambda: [tell() for tell in requests], name="cancel", daemon=True)
        telling.start()
        telling.join(CANCEL_TIMEOUT)
        return not telling.is_alive()

    def check_client_connection(self) -> None:
        """Let the server notice within seconds that this side is gone, because our locks end then; kept on
        reconnecting.
        """
        self._watched = True
        self.query(dead_client_settings(self.facts.major))

    def value(
        self, sql: str, parameters: Sequence[Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        rows = self.query(sql, parameters, timeout=timeout)
        return rows[0][0] if rows else None

    @contextlib.contextmanager
    def as_role(self, role: str) -> Iterator[None]:
        """Act as another role (``SET ROLE``) within the block, in this thread only; an empty name changes
        nothing.

        Only for writes: as another role the session may not see or cancel its own login's statements.
        Raises :class:`QueryFailed`.
        """
        if not role:
            yield
            return
        with self._lock:
            self.query("SELECT set_config('role', %s, false)", (role,))
            try:
                yield
            finally:
                with contextlib.suppress(QueryFailed):  # lost, and the role with it
                    self.query("RESET ROLE")

    @contextlib.contextmanager
    def as_user(self, path: str = "") -> Iterator[None]:
        """Run the user's own SQL: names are resolved in ``path``, or in the user's search_path.

        If a transaction fails within the block, the caller rolls it back, which also restores our path.
        """
        with self._lock:
            ahead, literal = self._ahead, quote_literal(path or self.user_path)
            if ahead:
                self._ahead = f"{search_path.set_users_path(literal, 'true')}; "
            else:
                self.query(search_path.set_users_path(literal))
            try:
                yield
            except BaseException:
                with contextlib.suppress(QueryFailed):
                    self._as_ourselves(ahead)
                raise
            self._as_ourselves(ahead)

    def _as_ourselves(self, ahead: str) -> None:
        self._ahead = ahead
        if not ahead:
            self.query(search_path.set_our_path())

    def terminate(self, pid: int) -> None:
        """End another session, as our role or as our login: ALTER ROLE ... SET role can make them differ.

        Raises :class:`QueryFailed`.
        """
        statement = "SELECT pg_terminate_backend(%s)"
        try:
            self.query(statement, [pid])
        except QueryFailed as error:
            if error.sqlstate != _DENIED:
                raise
            with self.as_role("none"):
                self.query(statement, [pid])

    def find(self, name: str) -> tuple[str, str] | None:
        """Return the schema in which the user's search_path finds a relation, and its kind; None if it finds
        none.

        Raises :class:`QueryFailed`.
        """
        rows = self.query(search_path.FIND_RELATION, (self.user_path, name))
        return (rows[0][0], rows[0][1]) if rows else None

    def user_schemas(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """Return the existing schemas of the user's search_path that may be used; raises
        :class:`QueryFailed`.
        """
        return tuple(
            row[0] for row in self.query(search_path.LIST_SCHEMAS, (self.user_path,), timeout=timeout)
        )

    def require_writes(self) -> None:
        """Raise :class:`AccessDenied` if the server accepts no writes."""
        if self.facts.in_recovery:
            raise AccessDenied(
                f"{self.target} is a standby and accepts no changes.",
                next_step="point migrator to the primary (several hosts with target_session_attrs=read-write find it)",
            )
        if self.facts.read_only:
            raise AccessDenied(
                f"{self.target} accepts only read-only transactions (default_transaction_read_only is on).",
                next_step="ALTER ROLE or ALTER DATABASE ... SET default_transaction_read_only = off",
            )

    def answers(self) -> bool:
        """Check now whether the connection is there; after PROBE seconds of silence it is not."""
        try:
            self.query("SELECT 1", timeout=PROBE_TIMEOUT)
        except QueryFailed as error:
            return not error.lost
        return True

    def reconnect(self, timeout: float) -> None:
        """Replace a lost connection with a new one; raises :class:`ConnectFailed`."""
        fresh = connect(self.target, self._application_name, timeout)
        with self._lock:
            self.close()
            self._connection, self.facts = fresh._connection, fresh.facts
            self._timeouts_off, self._ahead = fresh._timeouts_off, fresh._ahead
        if self._watched:
            self.check_client_connection()

    @property
    def pooled(self) -> bool:
        """Whether there is a pooler in between: it gives its clients a made-up process id to cancel with."""
        return bool(self._connection.info.backend_pid != self.pid)

    @property
    def closed(self) -> bool:
        return bool(self._connection.closed)

    @property
    def pid(self) -> int:
        return self.facts.pid

    def close(self) -> None:
        """Close the connection; closing twice is no error."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_facts(self, timeout: float, first_query: FirstQuery) -> tuple[ServerFacts, tuple[Any, ...]]:
        """Query the facts, and in the same message the columns of ``first_query``.

        All of a message is one transaction: it costs no round trip, and its settings leave nothing
        behind in a pooler. It leaves the user's search_path before any name that could be resolved in a
        schema of others.
        """
        leave = search_path.leave_users_path(self._connection.info.backend_pid)
        columns = f"{FACTS}, {first_query.columns}" if first_query.columns else FACTS
        sql = f"SET LOCAL statement_timeout = 0; {leave}; {first_query.before}SELECT {columns}"
        self.user_path, self._restricts, *row = self.query(sql, timeout=timeout)[0]
        count = len(ServerFacts._fields)
        return ServerFacts(*row[:count]), tuple(row[count:])


# The end of a transaction that may have failed, and statements that must be their own message: none
# resolves a name.
_ALONE = re.compile(
    r"\s*(?:COMMIT|ROLLBACK|(?:CREATE|DROP|ALTER)\s+DATABASE|(?:CREATE|DROP|ALTER)\s+TABLESPACE|ALTER\s+SYSTEM|VACUUM"
    r"|(?:(?:CREATE|DROP)\s+(?:UNIQUE\s+)?INDEX|REINDEX\s+\w+)\s+CONCURRENTLY)\b",
    re.IGNORECASE,
)


def _execute_with_retries(cursor: Any, sql: str) -> None:
    """Execute a statement that sets a timeout, which may itself be only a millisecond."""
    for left in reversed(range(3)):
        try:
            cursor.execute(sql)
            return
        except psycopg2.Error as error:
            if error.pgcode != _CANCELED or not left:
                raise


# A statement that has just ended counts as running: its answer is on the way.  NULL: hidden from this role.
_BUSY = """
SELECT coalesce(state = 'active' OR clock_timestamp() - state_change < interval '2s', true),
       coalesce(wait_event_type || ' ' || wait_event, ''), coalesce(left(query, 80), '')
FROM pg_stat_activity WHERE pid = %s
"""

_BEAT = 12.0
"""Seconds after which a running statement of our own is reported, at the next check."""
_NO_TIME = "after the signal there was no time left for a query"


def _still_waiting(wait: Wait, event: str, query: str) -> None:
    """Report that the server still works on a statement of ours, and what the statement waits for there."""
    seconds = time.monotonic() - wait.began
    if wait.over or seconds < _BEAT:
        return
    why = f", which waits for {event}" if event else ""
    if event == "IPC SyncRep":
        why = ", which waits for a synchronous standby (SyncRep); synchronous_standby_names says which"
    log.info("still waiting after %.0f s for the server%s: %s", seconds, why, " ".join(query.split()))


_CANNOT_CONNECT_NOW = "57P03"
_CANCELED = "57014"
_DENIED = "42501"
_ENDED = frozenset({"57P01", "57P02", "57P04"})  # admin_shutdown, crash_shutdown, database_dropped


def connect(
    target: Target,
    application_name: str,
    timeout: float,
    *,
    first_query: Callable[[], FirstQuery] = FirstQuery,
    meanwhile: Callable[[], None] = lambda: None,
) -> Session:
    """Open a session within ``timeout`` seconds, name lookup included.

    The columns of ``first_query`` are selected beside the server's facts and stored in ``first_row``.
    ``first_query`` is called in another thread, after there is a connection. ``meanwhile`` is called
    while the server works.

    The attempt runs in its own thread. Nothing else can bound a resolver, or a server that accepts and
    then is silent (libpq's connect_timeout counts per address and rounds up to 2 s). Raises
    :class:`ConnectFailed`.
    """
    deadline = time.monotonic() + timeout
    answers: list[Session | BaseException] = []
    answered, given_up = threading.Event(), threading.Event()

    def attempt() -> None:
        try:
            session = _connect_now(target, application_name, deadline, first_query)
            answers.append(session)
            if given_up.is_set():
                session.close()
        except BaseException as error:  # noqa: BLE001 - passed to the waiting thread, which raises it
            answers.append(error)
        answered.set()

    if DEADLINES.over:
        raise ConnectFailed(Refusal.TRANSIENT, _NO_TIME)
    threading.Thread(target=attempt, name="connect", daemon=True).start()
    try:
        meanwhile()
        with DEADLINES.limit(deadline - time.monotonic(), lambda _: answered.set()):
            answered.wait()
        if not answers:
            raise ConnectFailed(Refusal.TRANSIENT, f"no answer within {timeout:.1f} s")
    except BaseException:
        given_up.set()
        raise
    if isinstance(answers[0], Session):
        return answers[0]
    raise answers[0]


def _connect_now(
    target: Target, application_name: str, deadline: float, first_query: Callable[[], FirstQuery]
) -> Session:
    connection = open_connection(target, application_name, deadline)
    try:
        return Session(
            connection, target, application_name, max(1.0, deadline - time.monotonic()), first_query()
        )
    except QueryFailed as error:
        connection.close()
        refusal = classify(error.sqlstate, error.text) if error.sqlstate else Refusal.TRANSIENT
        raise ConnectFailed(refusal, error.text, error.sqlstate) from None
