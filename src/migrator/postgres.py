"""Postgres through psycopg2: connect, ask, and turn what the server says into our errors.

The only importer of psycopg2.  psycopg2 gives no SQLSTATE for a failed *connection*, and the server's text
is in the server's language (``lc_messages``).  libpq does know the code: a second, non-blocking attempt is
made with libpq's verbose error format, in which the message reads ``FATAL:  28P01: ...`` whatever the
language.  https://www.postgresql.org/docs/current/libpq-control.html#LIBPQ-PQSETERRORVERBOSITY
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import math
import queue
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import errorcodes

from migrator.target import Target

# Its stubs know no open-ended keyword arguments; libpq's parameters are open-ended.
_open: Callable[..., psycopg2.extensions.connection] = psycopg2.connect

_VERBOSE = 2  # PQERRORS_VERBOSE
# A SQLSTATE has a digit: with several hosts, a word such as FATAL may stand at its place.
_CODED = re.compile(r":\s+(?=[A-Z]*\d)([0-9A-Z]{5}): (.*)", re.DOTALL)
_HINT = re.compile(r"\s*Is the server running [^?]*\?")
_PREFIX = re.compile(r"^connection to server (?:at|on socket) .*? failed: ", re.DOTALL)


class Refusal(enum.Enum):
    """Why a connection failed, as far as it matters for what to do about it."""

    TRANSIENT = "not ready"
    DENIED = "denied"
    NO_DATABASE = "no such database"


class ConnectFailed(Exception):
    """A connection could not be made; ``refusal`` says whether waiting can help, ``sqlstate`` may be empty."""

    def __init__(self, refusal: Refusal, text: str, sqlstate: str = "") -> None:
        super().__init__(text)
        self.refusal = refusal
        self.text = text
        self.sqlstate = sqlstate


class QueryFailed(Exception):
    """A statement failed; ``sqlstate`` is empty where the connection itself was lost (``lost``)."""

    def __init__(self, text: str, sqlstate: str = "", *, lost: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.sqlstate = sqlstate
        self.lost = lost


# What libpq itself says, always in English here, when it is TLS, a credential or a parameter that is wrong:
# fe-connect.c, fe-auth.c and fe-secure-openssl.c of PostgreSQL 13 to 18.
_CLIENT_SIDE_DENIALS = (
    "certificate",
    "does not support SSL",
    "no password supplied",
    "authentication method",
    "authentication failed",
    "channel binding",
    "private key file",
    "invalid sslmode value",
    "invalid connection option",
    "invalid port number",
    "invalid integer value",
    "invalid channel_binding value",
    "definition of service",
    "service file",
    "could not open certificate",
    "tlsv1 alert",
    "SSL error: ",
    "invalid URI",
    "sslnegotiation",
    "does not support GSSAPI",
)
_INVALID_VALUE = re.compile(r"invalid \S+ value: |could not match \d+ ")
_DENIED_CLASSES = ("28",)
_DENIED_CODES = frozenset(
    {
        errorcodes.INSUFFICIENT_PRIVILEGE,
        errorcodes.OBJECT_NOT_IN_PREREQUISITE_STATE,  # ALTER DATABASE ... ALLOW_CONNECTIONS false
        errorcodes.FEATURE_NOT_SUPPORTED,  # a protocol or startup option that this server has not
        errorcodes.UNDEFINED_OBJECT,  # options=-c no_such_setting=1
        errorcodes.INVALID_PARAMETER_VALUE,
        errorcodes.SYNTAX_ERROR,  # options=--no-such-option
    }
)


def classify(sqlstate: str, text: str) -> Refusal:
    """Decide from SQLSTATE, or from libpq's own English text where there is none, whether waiting can help."""
    if sqlstate == errorcodes.INVALID_CATALOG_NAME:
        return Refusal.NO_DATABASE
    if sqlstate:
        denied = sqlstate.startswith(_DENIED_CLASSES) or sqlstate in _DENIED_CODES
        return Refusal.DENIED if denied else Refusal.TRANSIENT
    if any(phrase in text for phrase in _CLIENT_SIDE_DENIALS) or _INVALID_VALUE.search(text):
        return Refusal.DENIED
    return Refusal.TRANSIENT


@dataclass(frozen=True)
class ServerFacts:
    """What one query says about the server and the database on connecting.

    ``started_at`` (microseconds since 1970) and ``database_oid`` tell one database from every other.
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
        """Return the server's major version, such as 17."""
        return self.version_number // 10000


class Session:
    """One autocommit connection that migrator itself uses; safe to share between threads."""

    def __init__(self, connection: Any, target: Target, application_name: str = "") -> None:
        self._connection = connection
        self._application_name = application_name
        self._lock = threading.RLock()
        self._running = False
        self.target = target
        self.facts = self._read_facts()

    def query(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows (none for a statement that returns none).

        Raises :class:`QueryFailed`.
        """
        with self._lock:
            try:
                self._running = True
                with self._connection.cursor() as cursor:
                    cursor.execute(sql, parameters)
                    return list(cursor.fetchall()) if cursor.description else []
            except psycopg2.Error as error:
                lost = bool(self._connection.closed) or error.pgcode in _ENDED
                raise QueryFailed(message_of(error), error.pgcode or "", lost=lost) from error
            finally:
                self._running = False

    def cancel(self) -> None:
        """Cancel the statement that another thread is running here, if there is one.

        psycopg2 waits for the server inside libpq, where no Python signal handler runs.
        """
        if self._running:
            with contextlib.suppress(psycopg2.Error):
                self._connection.cancel()

    def value(self, sql: str, parameters: Sequence[Any] | None = None) -> Any:
        """Return the first column of the first row, or None."""
        rows = self.query(sql, parameters)
        return rows[0][0] if rows else None

    def reconnect(self, timeout: float) -> None:
        """Put a new connection in the place of one that was lost; raises :class:`ConnectFailed`."""
        fresh = connect(self.target, self._application_name, timeout)
        with self._lock:
            self._connection, self.facts = fresh._connection, fresh.facts

    @property
    def pooled(self) -> bool:
        """Whether a pooler stands in between: it gives its clients a made-up process id to cancel with."""
        return bool(self._connection.info.backend_pid != self.pid)

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be gone."""
        return bool(self._connection.closed)

    @property
    def pid(self) -> int:
        """Return the server process's id of this session."""
        return self.facts.pid

    def close(self) -> None:
        """Close the connection; closing twice is no error."""
        with contextlib.suppress(psycopg2.Error):
            self._connection.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_facts(self) -> ServerFacts:
        row = self.query(
            "SELECT current_setting('server_version'), current_setting('server_version_num')::int,"
            " pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',"
            " current_database()::text, current_user::text,"
            " (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,"
            " (SELECT oid::bigint FROM pg_database WHERE datname = current_database()), pg_backend_pid()"
        )[0]
        return ServerFacts(*row)


_ENDED = frozenset({errorcodes.ADMIN_SHUTDOWN, errorcodes.CRASH_SHUTDOWN, errorcodes.DATABASE_DROPPED})


def message_of(error: BaseException) -> str:
    """Return what the server said, in one line: primary message, detail and hint."""
    diagnostics = getattr(error, "diag", None)
    if diagnostics is not None and diagnostics.message_primary:
        parts = [diagnostics.message_primary]
        if diagnostics.message_detail:
            parts.append(f"DETAIL: {diagnostics.message_detail}")
        if diagnostics.message_hint:
            parts.append(f"HINT: {diagnostics.message_hint}")
        return " ".join(" ".join(parts).split())
    # SQLAlchemy's asyncpg dialect puts the class in front of the server's words.
    return re.sub(r"^<class '[\w.]+'>: ", "", " ".join(str(error).split()))


def connect(target: Target, application_name: str, timeout: float) -> Session:
    """Open a session within ``timeout`` seconds, name lookup included.

    The attempt runs in a thread of its own, for neither the resolver nor a server that accepts and then says
    nothing can be bounded otherwise (libpq's connect_timeout counts per address and rounds up to 2 s).
    Raises :class:`ConnectFailed`.
    """
    deadline = time.monotonic() + timeout
    answers: queue.SimpleQueue[Session | ConnectFailed | BaseException] = queue.SimpleQueue()
    given_up = threading.Event()

    def attempt() -> None:
        try:
            session = _connect_now(target, application_name, deadline)
        except BaseException as error:  # noqa: BLE001 - handed over to the waiting thread, which raises it
            answers.put(error)
            return
        if given_up.is_set():
            session.close()
        answers.put(session)

    threading.Thread(target=attempt, name="connect", daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.01, timeout))
    except queue.Empty:
        given_up.set()
        raise ConnectFailed(Refusal.TRANSIENT, f"no answer within {timeout:.1f} s") from None
    except BaseException:
        given_up.set()
        raise
    if isinstance(answer, Session):
        return answer
    raise answer


def _connect_now(target: Target, application_name: str, deadline: float) -> Session:
    arguments = target.libpq(
        connect_timeout=max(2, math.ceil(deadline - time.monotonic())),
        application_name=application_name,
        keepalives=1,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=5000,  # milliseconds that sent data may stay unacknowledged: a cut network is noticed
    )
    arguments["application_name"] = application_name
    try:
        connection = _open(**arguments)
    except psycopg2.Error as error:
        raise _diagnose(arguments, str(error), deadline) from None
    connection.autocommit = True
    try:
        return Session(connection, target, application_name)
    except QueryFailed as error:
        connection.close()
        refusal = classify(error.sqlstate, error.text) if error.sqlstate else Refusal.TRANSIENT
        raise ConnectFailed(refusal, error.text, error.sqlstate) from None


def _diagnose(arguments: dict[str, str], text: str, deadline: float) -> ConnectFailed:
    """Find the SQLSTATE of a failed connection by asking again with libpq's verbose errors."""
    plain = " ".join(_HINT.sub("", _PREFIX.sub("", text)).split())
    if "FATAL" not in text and not re.search(r" failed: \S+:  ", text):
        # libpq's own words: nothing answered as a server does.
        return ConnectFailed(classify("", plain), plain)
    sqlstate, verbose = "", ""
    for line in _verbose_attempt(arguments, deadline):
        found = _CODED.search(line)
        if found:
            sqlstate, verbose = found[1], found[2].split("\n")[0]
    if not sqlstate:
        return ConnectFailed(Refusal.TRANSIENT, plain)
    return ConnectFailed(classify(sqlstate, plain), verbose.strip() or plain, sqlstate)


def _verbose_attempt(arguments: dict[str, str], deadline: float) -> Iterator[str]:
    """Connect once more without blocking, and yield libpq's verbose error text; nothing where it succeeds."""
    library = ctypes.CDLL(psycopg2._psycopg.__file__)  # dlsym also looks in what it is linked to: libpq
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


def in_transaction_pooling(session: Session, application_name: str, timeout: float) -> bool:
    """Find out whether a pooler gives the session's server connection away between its transactions.

    What the session has set is then found by another client, which a pooler hands the connection that was
    used last; in session pooling nobody else gets it.  Costs nothing where there is no pooler.
    """
    if not session.pooled:
        return False
    for _ in range(3):
        session.query("SELECT set_config('migrator.probe', 'mine', false)")
        with connect(session.target, application_name, timeout) as other:
            other.query("BEGIN")
            if other.value("SELECT current_setting('migrator.probe', true)") == "mine":
                return True
            if session.value("SELECT current_setting('migrator.probe', true)") != "mine":
                return True
    return False


def quote_identifier(name: str) -> str:
    """Quote a name for SQL text."""
    return '"' + name.replace('"', '""') + '"'
