"""Notice what a revision does past SQLAlchemy's connections: on one of the driver's own, or by a program such as psql.

What is committed there cannot be seen, so a revision that did so counts as one of which a part may be committed.
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


class OutsideConnections:
    """Counts, while ``inside`` is true, connections that no Connection of SQLAlchemy's stands for."""

    def __init__(self, inside: Callable[[], bool]) -> None:
        self._inside = inside
        self._undo: list[Callable[[], None]] = []
        self.begins()

    def begins(self) -> None:
        """Forget what was counted, and count the connections of the drivers that are loaded by now."""
        self._opened = self._borrowed = (
            0  # by the driver but not by a pool; from a pool but not by a Connection
        )
        self._program = ""
        for name in _DRIVERS:
            module = sys.modules.get(name)
            if module is not None and not hasattr(module.connect, "counted"):
                self._wrap(module)

    def what(self) -> str:
        """Return what the revision used; empty if nothing."""
        if self._program:
            return f"the program {self._program}"
        return "a connection of the driver's own" if self._opened > 0 or self._borrowed > 0 else ""

    def _wrap(self, module: Any) -> None:
        connect = module.connect

        @functools.wraps(connect)
        def counting(*arguments: Any, **options: Any) -> Any:
            self._count(opened=1)
            return connect(*arguments, **options)

        counting.counted = True  # type: ignore[attr-defined]
        module.connect = counting
        self._undo.append(lambda: setattr(module, "connect", connect))

    def _count(self, opened: int = 0, borrowed: int = 0) -> None:
        if self._inside():
            self._opened = max(0, self._opened + opened)
            self._borrowed = max(0, self._borrowed + borrowed)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STARTS and self._inside():
            found = _CLIENTS.search(" ".join(_words(arguments)))
            self._program = self._program or (found[0] if found else "")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count within the block."""
        from sqlalchemy import event
        from sqlalchemy.engine import Engine
        from sqlalchemy.pool import Pool

        heard: list[tuple[Any, str, Callable[..., None]]] = [
            (Pool, "connect", lambda *_: self._count(opened=-1)),
            (Pool, "checkout", lambda *_: self._count(borrowed=1)),
            (Engine, "engine_connect", lambda *_: self._count(borrowed=-1)),
        ]
        for target, name, listener in heard:
            event.listen(target, name, listener)
        _AUDITS.append(self._audit)
        _listen_to_audits()
        try:
            yield
        finally:
            _AUDITS.remove(self._audit)
            for target, name, listener in heard:
                event.remove(target, name, listener)
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
