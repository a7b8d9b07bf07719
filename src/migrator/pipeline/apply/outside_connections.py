"""Notice what a revision does past SQLAlchemy's connections: on a raw one, or with a program such as psql.

What it commits there cannot be seen, so it counts as possibly committed from before the connection is open
or the program starts: a run that is killed after that must not repeat the revision.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

_CLIENTS = re.compile(r"\b(psql|pg_restore|vacuumdb|reindexdb|clusterdb|pgbench)\b")
_STARTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")
"""https://docs.python.org/3/library/audit_events.html"""
_DRIVERS = ("psycopg2", "psycopg", "asyncpg")
_RAW = "a connection of the driver's own"


class OutsideConnections:
    """Calls ``used`` with a description when a revision opens or borrows such a connection, or starts a program.

    ``inside`` tells whether a revision's own function runs. What SQLAlchemy opens for itself does not count.
    """

    def __init__(self, inside: Callable[[], bool], used: Callable[[str], None]) -> None:
        self._inside, self._used = inside, used
        self._undo: list[Callable[[], None]] = []

    def begins(self) -> None:
        """Watch the drivers that are loaded by now."""
        for name in _DRIVERS:
            if name in sys.modules:
                self._wrap(sys.modules[name], "connect")

    def _wrap(self, owner: Any, name: str) -> None:
        call = getattr(owner, name)
        if hasattr(call, "watched"):
            return

        @functools.wraps(call)
        def watched(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if self._inside() and not caller.startswith(("sqlalchemy.", "migrator.")):
                self._used(_RAW)
            return call(*arguments, **options)

        watched.watched = True  # type: ignore[attr-defined]
        setattr(owner, name, watched)
        self._undo.append(lambda: setattr(owner, name, call))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STARTS and self._inside() and (found := _CLIENTS.search(" ".join(_words(arguments)))):
            self._used(f"the program {found[0]}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the block."""
        from sqlalchemy.engine import Engine
        from sqlalchemy.pool import Pool

        self._wrap(Engine, "raw_connection")
        self._wrap(Pool, "connect")
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


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, bytes | os.PathLike):
        value = os.fsdecode(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
