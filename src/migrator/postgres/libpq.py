"""Open a connection through psycopg2, find out why that failed, and cancel a statement.

psycopg2 gives no SQLSTATE for a failed *connection*, and the server's text is in the server's language
(``lc_messages``). libpq does know the code. A second, non-blocking attempt uses libpq's verbose error
format, in which the message is ``FATAL: 28P01: ...`` in any language.
https://www.postgresql.org/docs/current/libpq-control.html#LIBPQ-PQSETERRORVERBOSITY
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator

import psycopg2
import psycopg2.extensions

from migrator.config.database_url import Target
from migrator.postgres.errors import ConnectFailed, Refusal, classify

# Texts arrive as bytes: psycopg2 would raise for one that is not UTF-8.
_AS_BYTES = (psycopg2._psycopg.BYTES, psycopg2._psycopg.BYTESARRAY)
# Its stubs know no open-ended keyword arguments; libpq's parameters are open-ended.
_open: Callable[..., psycopg2.extensions.connection] = psycopg2.connect

_VERBOSE = 2  # PQERRORS_VERBOSE

# A SQLSTATE has a digit: with several hosts, a word such as FATAL may be in its place.
_CODED = r"(?s):\s+(?=[A-Z]*\d)([0-9A-Z]{5}): (.*)"

_HINT = r"\s*Is the server running [^?]*\?"

_PREFIX = r"(?s)^connection to server (?:at|on socket) .*? failed: "


def open_connection(target: Target, application_name: str, deadline: float) -> psycopg2.extensions.connection:
    """Open an autocommit connection that notices a dead network; raises :class:`ConnectFailed`."""
    arguments = target.libpq(
        connect_timeout=max(2, math.ceil(deadline - time.monotonic())),
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
    return connection


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


def cancel_request(connection: int) -> Callable[[], None]:
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
