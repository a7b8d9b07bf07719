"""Postgres through psycopg2: connect, query, and turn the server's messages into our errors.

Only this module imports psycopg2. psycopg2 gives no SQLSTATE for a failed *connection*, and the
server's text is in the server's language (``lc_messages``). libpq does know the code. A second,
non-blocking attempt uses libpq's verbose error format, in which the message is ``FATAL: 28P01: ...`` in
any language. https://www.postgresql.org/docs/current/libpq-control.html#LIBPQ-PQSETERRORVERBOSITY
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg2
import psycopg2.extensions

from migrator.config.database_url import Target
from migrator.postgres import search_path
from migrator.postgres.errors import ConnectFailed as ConnectFailed
from migrator.postgres.errors import QueryFailed as QueryFailed
from migrator.postgres.errors import Refusal as Refusal
from migrator.postgres.errors import Refused as Refused
from migrator.postgres.errors import classify as classify
from migrator.runtime.deadlines import DEADLINES, PATIENCE, PROBE, PROBES, TELL, Wait, shut_down
from migrator.runtime.logs import get_logger

log = get_logger("migrator")

# Its stubs know no open-ended keyword arguments; libpq's parameters are open-ended.
_open: Callable[..., psycopg2.extensions.connection] = psycopg2.connect

# Texts arrive as bytes: psycopg2 would raise for one that is not UTF-8.
_AS_BYTES = (psycopg2._psycopg.BYTES, psycopg2._psycopg.BYTESARRAY)
_VERBOSE = 2  # PQERRORS_VERBOSE
# A SQLSTATE has a digit: with several hosts, a word such as FATAL may be in its place.
_CODED = r"(?s):\s+(?=[A-Z]*\d)([0-9A-Z]{5}): (.*)"
_HINT = r"\s*Is the server running [^?]*\?"
_PREFIX = r"(?s)^connection to server (?:at|on socket) .*? failed: "


class ServerFacts(NamedTuple):
    """The facts about server and database from one query on connecting.

    ``started_at`` (microseconds since 1970) and ``database_oid`` distinguish one database from every
    other.
    """

    version: str
    version_number: int
    in_recovery: bool
    read_only: bool
    database: str
    user: str
    started_at: int
    database_oid: int
    pid: int

    @property
    def major(self) -> int:
        return self.version_number // 10000


class Question(NamedTuple):
    """The query in a session's first message: ``columns``, and the statements ``ahead`` of them."""

    columns: str = ""
    ahead: str = ""


_NO_QUESTION = Question()


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
        also: Question = _NO_QUESTION,
    ) -> None:
        self._connection = connection
        self._application_name = application_name
        self._lock = threading.RLock()
        self._wait: Wait | None = None
        self._watched = False
        self._patient = True  # the query for the facts does this itself
        self.abandoned = False
        """Whether a wait for it was in vain: it is queried again, without another wait."""
        self.target = target
        self._ahead = ""  # the prefix of each message
        self._restricts = False  # whether the server can refuse the views of others
        self.user_path = ""
        self.facts, self.also = self._read_facts(timeout, also)
        # Behind a pooler, a setting may stay with a connection that another client gets next.
        self._patient = self.pooled
        self._ahead = search_path.each_message(self._restricts) if self.pooled else ""

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
        seconds = PATIENCE if timeout is None else timeout
        with self._lock, DEADLINES.limit(seconds, late, self._end) as wait:
            if DEADLINES.over:
                self.close()
                raise QueryFailed(_NO_TIME, lost=True)
            try:
                self._wait = wait
                with self._connection.cursor() as cursor:
                    if not self._patient:
                        _insist(cursor, no_timeouts(self.facts.major))
                        self._patient = True
                    if self._ahead and sink is None and not _ALONE.match(sql):
                        sql = (self._ahead if parameters is None else self._ahead.replace("%", "%%")) + sql
                    if sink is not None:
                        cursor.copy_expert(sql, sink)
                        return [(cursor.rowcount,)]
                    _execute(cursor, sql, parameters)
                    return (
                        [tuple(map(_decoded, row)) for row in cursor.fetchall()] if cursor.description else []
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
        while not wait.over and time.monotonic() - began < TELL:
            time.sleep(0.02)
        self._give_up(wait)

    def _give_up(self, wait: Wait) -> None:
        with contextlib.suppress(psycopg2.Error):  # closed in between
            wait.end(lambda: shut_down(self._connection.fileno()))

    def _ask_elsewhere(self, wait: Wait) -> None:
        """Check over another connection whether the server still works on the statement; give up if it does
        not.
        """
        failures, pause = 0, PATIENCE
        while not wait.over and failures < PROBES and not DEADLINES.over:
            busy = None
            try:
                with connect(self.target, self._application_name, PROBE) as other:
                    busy = other.query(_BUSY, (self.pid,), timeout=PROBE)
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
            wait.during(lambda: requests.append(_cancel_request(self._connection.pgconn_ptr)))
        telling = threading.Thread(target=lambda: [tell() for tell in requests], name="cancel", daemon=True)
        telling.start()
        telling.join(TELL)
        return not telling.is_alive()

    def notice_a_dead_client(self) -> None:
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
                self._ahead = f"{search_path.theirs(literal, 'true')}; "
            else:
                self.query(search_path.theirs(literal))
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
            self.query(search_path.ours())

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
        rows = self.query(search_path.FIND, (self.user_path, name))
        return (rows[0][0], rows[0][1]) if rows else None

    def user_schemas(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """Return the existing schemas of the user's search_path that may be used; raises
        :class:`QueryFailed`.
        """
        return tuple(row[0] for row in self.query(search_path.LIST, (self.user_path,), timeout=timeout))

    def answers(self) -> bool:
        """Check now whether the connection is there; after PROBE seconds of silence it is not."""
        try:
            self.query("SELECT 1", timeout=PROBE)
        except QueryFailed as error:
            return not error.lost
        return True

    def reconnect(self, timeout: float) -> None:
        """Replace a lost connection with a new one; raises :class:`ConnectFailed`."""
        fresh = connect(self.target, self._application_name, timeout)
        with self._lock:
            self.close()
            self._connection, self.facts = fresh._connection, fresh.facts
            self._patient, self._ahead = fresh._patient, fresh._ahead
        if self._watched:
            self.notice_a_dead_client()

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

    def _read_facts(self, timeout: float, also: Question) -> tuple[ServerFacts, tuple[Any, ...]]:
        """Query the facts, and in the same message ``also``: more columns.

        All of a message is one transaction: it costs no round trip, and its settings leave nothing
        behind in a pooler. It leaves the user's search_path before any name that could be resolved in a
        schema of others.
        """
        leave = search_path.leave(self._connection.info.backend_pid)
        columns = f"{_FACTS}, {also.columns}" if also.columns else _FACTS
        sql = f"SET LOCAL statement_timeout = 0; {leave}; {also.ahead}SELECT {columns}"
        self.user_path, self._restricts, *row = self.query(sql, timeout=timeout)[0]
        count = len(ServerFacts._fields)
        return ServerFacts(*row[:count]), tuple(row[count:])


def _decoded(value: Any) -> Any:
    """Return a text that arrived as bytes: the shared catalogs have names in the encodings of other
    databases.
    """
    if type(value) is bytes:
        return value.decode("utf-8", "surrogateescape")
    return list(map(_decoded, value)) if type(value) is list else value


class _Encoded:
    """A text that is not UTF-8, as SQL: its original bytes."""

    def __init__(self, text: str) -> None:
        self._bytes = text.encode("utf-8", "surrogateescape")

    def __conform__(self, _protocol: object) -> _Encoded:
        return self

    def getquoted(self) -> bytes:
        return b" E'" + self._bytes.replace(b"\\", b"\\\\").replace(b"'", b"''") + b"'"


def _execute(cursor: Any, sql: str, parameters: Sequence[Any] | Mapping[str, Any] | None) -> None:
    """Execute a statement that may have names of :func:`_decoded` in it."""
    try:
        cursor.execute(sql, parameters)
    except UnicodeEncodeError:  # before anything was sent
        if isinstance(parameters, Mapping):
            raise
        raw = [_Encoded(item) if isinstance(item, str) else item for item in parameters or ()]
        cursor.execute(sql.encode("utf-8", "surrogateescape"), raw or None)


_FACTS = (
    f"current_setting('{search_path.PATH}'), {search_path.RESTRICTS},"  # noqa: S608 - constants only
    " current_setting('server_version'), current_setting('server_version_num')::int,"
    " pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',"
    " current_database()::text, current_user::text,"
    " (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,"
    " (SELECT oid::bigint FROM pg_database WHERE datname = current_database()), pg_backend_pid()"
)

# The end of a transaction that may have failed, and statements that must be their own message: none
# resolves a name.
_ALONE = re.compile(
    r"\s*(?:COMMIT|ROLLBACK|(?:CREATE|DROP|ALTER)\s+DATABASE|(?:CREATE|DROP|ALTER)\s+TABLESPACE|ALTER\s+SYSTEM|VACUUM"
    r"|(?:(?:CREATE|DROP)\s+(?:UNIQUE\s+)?INDEX|REINDEX\s+\w+)\s+CONCURRENTLY)\b",
    re.IGNORECASE,
)


def no_timeouts(server_major: int) -> str:
    """Return the settings that free a session from the timeouts of its role and database, which are for the
    application.

    Not from ``lock_timeout``: no session waits longer for a lock than was set.
    """
    names = ["statement_timeout", "idle_in_transaction_session_timeout"]
    names += ["idle_session_timeout"] if server_major >= 14 else []
    names += ["transaction_timeout"] if server_major >= 17 else []
    return "; ".join(f"SET {name} = 0" for name in names)


def _insist(cursor: Any, sql: str) -> None:
    """Execute a statement that sets a timeout, which may itself be only a millisecond."""
    for left in reversed(range(3)):
        try:
            cursor.execute(sql)
            return
        except psycopg2.Error as error:
            if error.pgcode != _CANCELED or not left:
                raise


def dead_client_values(server_major: int) -> dict[str, str]:
    """Return the settings that make the server check whether a session's client is still there.

    During a statement it checks every two seconds (PostgreSQL 14 and newer). While it waits for the
    client, TCP keepalives notice within about 11 seconds. An unacknowledged answer is given up after
    15.
    https://www.postgresql.org/docs/current/runtime-config-connection.html#RUNTIME-CONFIG-TCP-SETTINGS
    """
    values = {
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "2",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "15000",
    }
    if server_major >= 14:
        values["client_connection_check_interval"] = "2s"
    return values


def dead_client_settings(server_major: int) -> str:
    """Return the query that sets :func:`dead_client_values`."""
    return "SELECT " + ", ".join(
        f"pg_catalog.set_config('{name}', '{value}', false)"
        for name, value in dead_client_values(server_major).items()
    )


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


def message_of(error: BaseException) -> str:
    """Return the server's message in one line: primary message, detail and hint."""
    diagnostics = getattr(error, "diag", None)
    if diagnostics is not None and diagnostics.message_primary:
        parts = [diagnostics.message_primary]
        if diagnostics.message_detail:
            parts.append(f"DETAIL: {diagnostics.message_detail}")
        if diagnostics.message_hint:
            parts.append(f"HINT: {diagnostics.message_hint}")
        return " ".join(" ".join(parts).split())
    # SQLAlchemy's asyncpg dialect puts the class before the server's words.
    return re.sub(r"^<class '[\w.]+'>: ", "", " ".join(str(error).split()))


def connect(
    target: Target,
    application_name: str,
    timeout: float,
    *,
    also: Callable[[], Question] = Question,
    meanwhile: Callable[[], None] = lambda: None,
) -> Session:
    """Open a session within ``timeout`` seconds, name lookup included.

    The columns from ``also`` are selected beside the server's facts and stored in the session's
    attribute of that name. ``also`` is called in another thread, after there is a connection.
    ``meanwhile`` is called while the server works.

    The attempt runs in its own thread. Nothing else can bound a resolver, or a server that accepts and
    then is silent (libpq's connect_timeout counts per address and rounds up to 2 s). Raises
    :class:`ConnectFailed`.
    """
    deadline = time.monotonic() + timeout
    answers: list[Session | BaseException] = []
    answered, given_up = threading.Event(), threading.Event()

    def attempt() -> None:
        try:
            session = _connect_now(target, application_name, deadline, also)
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
    target: Target, application_name: str, deadline: float, also: Callable[[], Question]
) -> Session:
    arguments = target.libpq(
        connect_timeout=max(2, math.ceil(deadline - time.monotonic())),
        application_name=application_name,
        client_encoding="UTF8",  # in spite of the database's own setting: it can express every name
        keepalives=1,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=5000,  # milliseconds that sent data may stay unacknowledged: this notices a cut network
    )
    arguments["application_name"] = application_name
    try:
        connection = _open(**arguments)
    except psycopg2.Error as error:
        raise _diagnose(arguments, str(error), deadline) from None
    connection.autocommit = True
    for kind in _AS_BYTES:
        psycopg2.extensions.register_type(kind, connection)
    try:
        return Session(connection, target, application_name, max(1.0, deadline - time.monotonic()), also())
    except QueryFailed as error:
        connection.close()
        refusal = classify(error.sqlstate, error.text) if error.sqlstate else Refusal.TRANSIENT
        raise ConnectFailed(refusal, error.text, error.sqlstate) from None


def _diagnose(arguments: dict[str, str], text: str, deadline: float) -> ConnectFailed:
    """Find the SQLSTATE of a failed connection with a second attempt and libpq's verbose errors."""
    plain = " ".join(re.sub(_HINT, "", re.sub(_PREFIX, "", text)).split())
    if "FATAL" not in text and not re.search(r" failed: \S+:  ", text):
        # libpq's own words: nothing answered as a server does
        return ConnectFailed(classify("", plain), plain)
    sqlstate, verbose = "", ""
    for line in _verbose_attempt(arguments, deadline):
        found = re.search(_CODED, line)
        if found:
            sqlstate, verbose = found[1], found[2].split("\n")[0]
    if not sqlstate:
        return ConnectFailed(Refusal.TRANSIENT, plain)
    return ConnectFailed(classify(sqlstate, plain), verbose.strip() or plain, sqlstate)


def _verbose_attempt(arguments: dict[str, str], deadline: float) -> Iterator[str]:
    """Connect once more without blocking, and yield libpq's verbose error text; nothing if it succeeds."""
    import ctypes
    import select

    library = ctypes.CDLL(psycopg2._psycopg.__file__)  # dlsym also searches its linked libraries: libpq
    set_verbosity = library.PQsetErrorVerbosity
    set_verbosity.argtypes = [ctypes.c_void_p, ctypes.c_int]
    set_verbosity.restype = ctypes.c_int
    try:
        connection = _open(**arguments, async_=True)
    except psycopg2.Error:
        return
    try:
        set_verbosity(connection.pgconn_ptr, _VERBOSE)
        while time.monotonic() < deadline:
            state = connection.poll()
            if state == psycopg2.extensions.POLL_OK:
                return
            reads = [connection] if state == psycopg2.extensions.POLL_READ else []
            writes = [connection] if state == psycopg2.extensions.POLL_WRITE else []
            select.select(reads, writes, [], max(0.0, deadline - time.monotonic()))
    except psycopg2.Error as error:
        yield str(error)
    finally:
        with contextlib.suppress(psycopg2.Error):
            connection.close()


def _cancel_request(connection: int) -> Callable[[], None]:
    """Return the function that sends libpq's cancel request for a connection that stays open until this
    returns.

    psycopg2's own ``cancel`` does the same, but it holds the interpreter's lock meanwhile: on a silent
    network, no thread of the process ever runs again.
    https://www.postgresql.org/docs/current/libpq-cancel.html
    """
    import ctypes

    library = ctypes.CDLL(psycopg2._psycopg.__file__)  # dlsym also searches its linked libraries: libpq
    get, send, free = library.PQgetCancel, library.PQcancel, library.PQfreeCancel
    get.restype, send.restype = ctypes.c_void_p, ctypes.c_int
    get.argtypes = free.argtypes = [ctypes.c_void_p]
    send.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    request = get(connection)

    def cancel() -> None:
        send(request, ctypes.create_string_buffer(256), 256)
        free(request)

    return cancel


def codec(encoding: str) -> str:
    """Return Python's name of a PostgreSQL encoding; without one, names pass unchanged."""
    return "utf-8" if encoding == "SQL_ASCII" else psycopg2.extensions.encodings.get(encoding, "utf-8")


def quote_literal(text: str) -> str:
    """Quote text for SQL, independent of ``standard_conforming_strings``."""
    doubled = text.replace("'", "''")
    return " E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in text else f"'{doubled}'"


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_RESERVED = """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation
    column concurrently constraint create cross current_catalog current_date current_role current_schema current_time
    current_timestamp current_user default deferrable desc distinct do else end except false fetch for foreign freeze
    from full grant group having ilike in initially inner intersect into is isnull join lateral leading left like limit
    localtime localtimestamp natural not notnull null offset on only or order outer overlaps placing primary references
    returning right select session_user similar some symmetric system_user table tablesample then to trailing true union
    unique user using variadic verbose when where window with
"""
"""Words of the grammar that need quotes as a name:
https://www.postgresql.org/docs/current/sql-keywords-appendix.html
"""


def as_typed(name: str) -> str:
    """Return a name as a user types it into SQL: quoted if needed, so that no name is a command."""
    plain = re.fullmatch("[a-z_][a-z0-9_]*", name) is not None
    return name if plain and not re.search(rf"\b{name}\b", _RESERVED) else quote_identifier(name)
