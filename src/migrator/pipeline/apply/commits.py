"""Notice when a revision commits by itself: its earlier work then outlives its failure.

It may do so on migrator's connection, on another one of SQLAlchemy, on the driver's own, with a program,
or in a child process. What it commits on the last three cannot be seen. So it counts as possibly committed from before
the connection is open or the program starts: a run that is killed after that must not repeat the revision.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from migrator.pipeline.apply.driver_calls import driver_connection
from migrator.pipeline.apply.repeatable import is_repeatable

_NO_STATEMENT = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"[^\"]*\"|(\$\w*\$).*?\1", re.DOTALL
)  # comments, strings, names, and the bodies of functions
# In the middle of a text only COMMIT: an END there ends a function's body.
_COMMIT = re.compile(r"^\s*(?:COMMIT|END)\b", re.IGNORECASE)
_SPEAKS_OF_ONE = re.compile(r"COMMIT|END", re.IGNORECASE)
_COMMIT_WITHIN = re.compile(r";\s*COMMIT\b", re.IGNORECASE)
_MAY_COMMIT = re.compile(r"^\s*(?:CALL|DO)\b|\bCONCURRENTLY\b", re.IGNORECASE)
"""Statements that may leave something behind when they fail outside of a transaction."""


def in_autocommit(connection: Any) -> bool:
    """Tell whether each statement commits by itself: by ``autocommit_block``, or by the driver's
    ``autocommit``.

    All drivers use this name, and a revision may set it (psycopg2's ``set_isolation_level(0)`` does).
    """
    told = connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
    fairy = connection.connection
    return told or getattr(fairy, "autocommit", False) is True or _left_by_sql(fairy)


def _left_by_sql(fairy: Any) -> bool:
    """Tell whether the driver still counts on a transaction that COMMIT or ROLLBACK as SQL has ended.

    It then sends no BEGIN, so each statement commits by itself. psycopg looks at the server's state.
    """
    raw = driver_connection(fairy)
    if hasattr(raw, "get_transaction_status"):  # psycopg2: STATUS_BEGIN, TRANSACTION_STATUS_IDLE
        return bool(raw.status == 2 and raw.get_transaction_status() == 0)
    if hasattr(raw, "is_in_transaction"):  # asyncpg, behind SQLAlchemy's adapter
        return bool(getattr(fairy, "_started", False) and not raw.is_in_transaction())
    return False


def watch_commits(
    connection: Any, committed: Callable[[], None], *, leaving: Callable[[], None], every_statement: bool
) -> None:
    """Call ``committed`` whenever work on a connection becomes permanent, and ``leaving`` before that.

    This happens at each commit through SQLAlchemy, at ``op.execute("COMMIT")``, and after each
    statement in autocommit (``every_statement`` says that ``env.py`` uses it). A COMMIT within a text
    of several statements counts from its start, because a later statement may fail. So does a procedure
    in autocommit.
    """
    from sqlalchemy import event

    alone = False  # the running statement is its own transaction

    def before(connection: Any, _: Any, statement: str, *__: Any) -> None:
        nonlocal alone
        alone = every_statement or in_autocommit(connection)
        if alone and _MAY_COMMIT.search(_NO_STATEMENT.sub(" ", statement)):
            committed()
        if not _SPEAKS_OF_ONE.search(statement):
            return
        bare = _NO_STATEMENT.sub(" ", statement)
        within = _COMMIT_WITHIN.search(bare)
        if within or _COMMIT.search(bare):
            leaving()
        if within:
            committed()

    def after(_: Any, __: Any, statement: str, *___: Any) -> None:
        if alone or (_SPEAKS_OF_ONE.search(statement) and _COMMIT.search(_NO_STATEMENT.sub(" ", statement))):
            committed()

    event.listen(connection, "before_cursor_execute", before)
    event.listen(connection, "after_cursor_execute", after)

    def commit(_: Any) -> None:
        leaving()
        committed()

    event.listen(connection, "commit", commit)


@contextlib.contextmanager
def watch_others(another: Callable[[Any], bool], committed: Callable[[str], None]) -> Iterator[None]:
    """Call ``committed`` with a statement before ``another`` SQLAlchemy connection, on any engine, commits
    it.

    A revision may open one. Reading does not count.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    written: dict[int, str] = {}

    def before(connection: Any, _: Any, statement: str, *__: Any) -> None:
        if not another(connection) or is_repeatable(statement):
            return
        if in_autocommit(connection):
            committed(statement)
        else:
            written.setdefault(id(connection), statement)

    def commit(connection: Any) -> None:
        if statement := written.pop(id(connection), ""):
            committed(statement)

    def undone(connection: Any) -> None:
        written.pop(id(connection), None)

    heard: dict[str, Callable[..., None]] = {
        "before_cursor_execute": before,
        "commit": commit,
        "rollback": undone,
    }
    for name, listener in heard.items():
        event.listen(Engine, name, listener)
    try:
        yield
    finally:
        for name, listener in heard.items():
            event.remove(Engine, name, listener)


_HARMLESS = re.compile(
    r"(?:basename|cat|cc|date|dirname|df|echo|file|free|gcc|git|hg|hostname|id|ldconfig|ls|lsb_release|mkdir|nproc"
    r"|ps|pwd|readlink|stat|true|tput|tty|uname|which|whoami)?"
)
"""Programs that do not connect to a database; Python's own modules (uuid, ctypes, platform) start some of them."""
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ash"})
_SIMPLE = re.compile(r"\s*([\w./-]+)[^;&|`$()<>\n]*")  # a command line of one program
_STARTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")
"""https://docs.python.org/3/library/audit_events.html"""
_FORKS = ("os.fork", "os.forkpty")
_CONNECTS = (
    ("psycopg2", ""),
    ("psycopg", ""),
    ("psycopg", "Connection"),
    ("psycopg", "AsyncConnection"),
    ("asyncpg", ""),
    ("asyncpg.connection", ""),  # for its pool
    ("pg8000", ""),
    ("pg8000.dbapi", ""),
)
"""Modules, and classes in them, with a ``connect``."""
_DRIVERS = frozenset(module for module, _ in _CONNECTS)
RAW = "a connection of the driver's own"
_CHILD = "a child process"


class OutsideConnections:
    """Calls ``used`` with a description when a revision opens or borrows such a connection, or starts a program.

    ``inside`` tells whether a revision's own function runs. What SQLAlchemy opens for itself does not count.
    ``raw`` is called with SQLAlchemy's connection when a revision takes the driver's from it.
    """

    def __init__(
        self, inside: Callable[[], bool], used: Callable[[str], None], raw: Callable[[Any], None]
    ) -> None:
        self._inside, self._used, self._raw = inside, used, raw
        self._undo: list[Callable[[], None]] = []

    def begins(self) -> None:
        """Watch the drivers that are loaded by now."""
        for module, name in _CONNECTS:
            owner = sys.modules.get(module)
            owner = getattr(owner, name, None) if name else owner
            if owner is not None:
                self._wrap(owner, "connect")

    def _wrap(self, owner: Any, name: str) -> None:
        found = vars(owner).get(name)
        call = found.__func__ if isinstance(found, classmethod) else found
        if call is None or hasattr(call, "watched"):
            return

        @functools.wraps(call)
        def watched(*arguments: Any, **options: Any) -> Any:
            if self._inside() and _is_from_outside(sys._getframe(1)):
                self._used(RAW)
            return call(*arguments, **options)

        watched.watched = True  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(watched) if isinstance(found, classmethod) else watched)
        self._undo.append(lambda: setattr(owner, name, found))

    def _watch_children(self) -> None:
        """Watch multiprocessing, whose ways to start a process are not all seen by audits."""
        from multiprocessing.process import BaseProcess

        start = BaseProcess.start

        @functools.wraps(start)
        def watched(process: BaseProcess) -> None:
            if self._inside():
                self._used(_CHILD)
            start(process)

        BaseProcess.start = watched  # type: ignore[method-assign,assignment]
        self._undo.append(lambda: setattr(BaseProcess, "start", start))

    def _watch_the_drivers_connection(self) -> None:
        from sqlalchemy.engine import Connection

        got = Connection.connection

        def connection(this: Connection) -> Any:
            if self._inside() and _is_from_outside(sys._getframe(1)):
                self._raw(this)
            return got.fget(this)  # type: ignore[attr-defined]

        Connection.connection = property(connection, doc=got.__doc__)  # type: ignore[method-assign,assignment]
        self._undo.append(lambda: setattr(Connection, "connection", got))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORKS and self._inside():
            self._used(_CHILD)
        elif event == "import" and arguments[0] in _DRIVERS and self._inside():
            self._used(RAW)  # it is not loaded yet, so it is not watched
        elif event in _STARTS and self._inside() and not _HARMLESS.fullmatch(name := _program(arguments)):
            self._used(f"the program {name}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the block."""
        from sqlalchemy.engine import Engine
        from sqlalchemy.pool import Pool

        self._wrap(Engine, "raw_connection")
        self._wrap(Pool, "connect")
        self._watch_children()
        self._watch_the_drivers_connection()
        _AUDITS.append(self._audit)
        _listen_to_audits()
        try:
            yield
        finally:
            _AUDITS.remove(self._audit)
            for undo in self._undo:
                undo()
            self._undo.clear()


_AUDITS: list[Callable[[str, tuple[Any, ...]], None]] = []


@functools.cache
def _listen_to_audits() -> None:
    """Add the hook, which can never be removed: once a process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for audit in _AUDITS:
            audit(event, arguments)

    sys.addaudithook(hook)


def _is_from_outside(frame: FrameType) -> bool:
    """Tell whether a frame belongs to other code than SQLAlchemy, Alembic and migrator."""
    name = frame.f_globals.get("__name__", "")
    return not name.startswith(("sqlalchemy.", "alembic.", "migrator."))


def _program(arguments: tuple[Any, ...]) -> str:
    """Return the name of the program that is started; of a shell that starts one program, that program's."""
    words = list(_words(arguments[:2]))  # the executable and its arguments
    names = [os.path.basename(word) for word in words] or [""]
    if len(words) == 1:  # os.system
        line = words[0]
    elif names[0] in _SHELLS and len(words) > 3 and words[2] == "-c":
        line = words[3]
    else:
        return names[0]
    simple = _SIMPLE.fullmatch(line)
    return os.path.basename(simple[1]) if simple else "sh"


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, bytes | os.PathLike):
        value = os.fsdecode(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
