"""The errors of connections and queries, and whether a wait can help."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator


class FreeConnectionWait:
    """For how many seconds the process waits for a free connection, each time: MIGRATOR_WAIT_TIMEOUT."""

    seconds = 0.0


FREE_CONNECTION_WAIT = FreeConnectionWait()


class Refusal(enum.Enum):
    """Why a connection failed, as far as it matters for the fix."""

    TRANSIENT = "not ready"
    DENIED = "denied"
    NO_DATABASE = "no such database"


class ConnectFailed(Exception):
    """A connection failed; ``refusal`` says whether a wait can help, ``sqlstate`` may be empty."""

    def __init__(self, refusal: Refusal, text: str, sqlstate: str = "") -> None:
        super().__init__(text)
        self.refusal = refusal
        self.text = text
        self.sqlstate = sqlstate
        self.waited = False
        """Whether it was retried already, for the whole wait for Postgres."""

    @property
    def no_free_connection(self) -> bool:
        """Whether the server, or a pooler before it, has no free connection."""
        return no_free_connection(self.sqlstate, self.text)

    @property
    def silent(self) -> bool:
        """Tell whether nothing answered: no server, and no host with a refusal."""
        return not self.sqlstate and ("no answer within" in self.text or "timeout expired" in self.text)


class QueryFailed(Exception):
    """A statement failed: it was :class:`Refused`, or the connection was ``lost`` (``sqlstate`` may be empty then)."""

    def __init__(self, text: str, sqlstate: str = "", *, lost: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.sqlstate = sqlstate
        self.lost = lost


class Refused(QueryFailed):
    """The server refused a statement, and the connection is there."""


# libpq's own messages about TLS, a credential or a parameter, always in English here: fe-connect.c,
# fe-auth.c and fe-secure-openssl.c of PostgreSQL 13 to 18.
_CLIENT_SIDE_DENIALS = re.compile(
    r"certificate|does not support SSL|no password supplied|authentication method|authentication failed"
    r"|channel binding|private key file|invalid sslmode value|invalid connection option"
    r"|invalid port number|invalid integer value|invalid channel_binding value|definition of service"
    r"|service file|tlsv1 alert|SSL error: |invalid URI|sslnegotiation|does not support GSSAPI"
    r"|invalid \S+ value: |could not match \d+ "
)
_DENIED_CLASSES = ("28",)
_OF_POOLERS = ("08", "XX000", "58000")
_DENIED_CODES = frozenset(
    {
        "42501",  # insufficient_privilege
        "55000",  # object_not_in_prerequisite_state: ALTER DATABASE ... ALLOW_CONNECTIONS false
        "0A000",  # feature_not_supported: a protocol or startup option that this server has not
        "42704",  # undefined_object: options=-c no_such_setting=1
        "22023",  # invalid_parameter_value
        "42601",  # syntax_error: options=--no-such-option
    }
)


# Messages of poolers under meaningless codes (08P01, XX000): PgBouncer, Odyssey, pgcat, Supavisor.
_POOLERS_DENY = re.compile(
    r"authentication failed|auth failed|no such user|(?:wrong|incorrect|invalid) password|tenant or user not found"
    r"|not allowed",
    re.IGNORECASE,
)


def classify(sqlstate: str, text: str) -> Refusal:
    """Decide from SQLSTATE, or without it from libpq's own English text, whether a wait can help."""
    of_a_pooler = sqlstate.startswith(_OF_POOLERS) and not no_free_connection(sqlstate, text)
    if sqlstate == "3D000" or (of_a_pooler and "no such database" in text):  # invalid_catalog_name
        return Refusal.NO_DATABASE
    if of_a_pooler and _POOLERS_DENY.search(text):
        return Refusal.DENIED
    if sqlstate:
        denied = sqlstate.startswith(_DENIED_CLASSES) or sqlstate in _DENIED_CODES
        return Refusal.DENIED if denied else Refusal.TRANSIENT
    if _CLIENT_SIDE_DENIALS.search(text):
        return Refusal.DENIED
    return Refusal.TRANSIENT


# 53: insufficient_resources, of which 53300 is too_many_connections and 53400 configuration_limit_exceeded.
# 57P03: cannot_connect_now.
_NO_ROOM = ("53", "57P03")
# For errors without SQLSTATE: psycopg2 has none for a failed connection, and poolers send 08P01 or XX000.
# From PostgreSQL, PgBouncer, Odyssey, Pgpool-II, pgcat, Supavisor and RDS Proxy.
_NO_ROOM_TEXT = re.compile(
    r"too many (?:clients|connections|client connections|database connections|active clients)"
    r"|remaining connection slots are reserved"
    r"|the database system is (?:starting up|shutting down|in recovery mode|not (?:yet )?accepting connections)"
    r"|no more connections allowed"
    r"|max[_ ]client[_ ]?conn"
    r"|max clients reached"
    r"|query_wait_timeout"
    r"|server_login_retry"
    r"|timed[- ]out waiting to acquire database connection"
    r"|could not get connection from the pool",
    re.IGNORECASE,
)


def no_free_connection(sqlstate: str, text: str) -> bool:
    """Decide whether a connection failed because none was free: a wait can help then."""
    if sqlstate and not sqlstate.startswith(_OF_POOLERS):
        return sqlstate.startswith(_NO_ROOM)
    return _NO_ROOM_TEXT.search(text) is not None


def had_no_free_connection(error: BaseException) -> bool:
    """Decide the same for an error of any driver, through SQLAlchemy or not: psycopg2, psycopg 3, asyncpg,
    pg8000.
    """
    return any(
        no_free_connection(sqlstate_of(item), _words(item)) for item in chain(error) if _of_a_driver(item)
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes: a driver's error is often wrapped twice."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += [getattr(item, "orig", None), item.__cause__, item.__context__]


def sqlstate_of(error: BaseException) -> str:
    """Return the SQLSTATE of an exception itself; empty if it has none."""
    for name in ("pgcode", "sqlstate"):
        code = getattr(error, name, None)
        if isinstance(code, str) and code:
            return code
    fields = error.args[0] if error.args else None  # pg8000 has the message's fields, by letter
    return str(fields.get("C", "")) if isinstance(fields, dict) else ""


def _words(error: BaseException) -> str:
    """Return the server's message without the statement that SQLAlchemy adds, which may hold anything."""
    return " ".join(str(item) for item in error.args[:1])


def _of_a_driver(error: BaseException) -> bool:
    """Tell whether an error is about a connection or a statement, and not a program's own error with such
    words.
    """
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"ConnectFailed", "QueryFailed", "Error", "PostgresError", "DBAPIError"})


_CHILD_REFUSED = re.compile(
    r"connection to server (?:at|on) .*? failed: |connection to database .*? failed: "
)


def child_refused(stderr: str) -> bool:
    """Tell whether a PostgreSQL program could not connect; its own words are in English, the server's may not
    be.
    """
    return _CHILD_REFUSED.search(stderr) is not None


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
