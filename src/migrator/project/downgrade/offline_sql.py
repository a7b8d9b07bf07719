"""Render the ``downgrade()`` of a revision to SQL, which the ledger keeps for an older image.

A revision's ``downgrade()`` is rendered like in Alembic's offline mode, without ``env.py`` and without
a database. It is called only if :mod:`migrator.project.downgrade.safety` finds the call
harmless. See docs/why/adr for the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.project.downgrade.safety import Refused, SafetyChecker
from migrator.runtime.logs import redact

if TYPE_CHECKING:
    from alembic.script import Script

_MOST_STATEMENTS = 5_000
_MOST_CHARACTERS = 2_000_000
_PASSWORD = re.compile(r"\bPASSWORD\s+(?:E?'|\$)", re.IGNORECASE)
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
_CREATES = re.compile(r"\s*CREATE (TYPE|DOMAIN|TABLE|SEQUENCE)\s")
_DROPS = re.compile(r"\s*DROP (TYPE|DOMAIN|TABLE|SEQUENCE|INDEX)\s")


@dataclass(frozen=True)
class OfflineDowngrade:
    """The SQL of a ``downgrade()``, one statement per item, or None and the ``reason`` why it has no offline form.

    A statement has no semicolon of ours at its end. ``COMMIT`` and ``BEGIN`` around an ``autocommit_block``
    are separate items. The version table is not included: the caller moves the row.
    """

    statements: tuple[str, ...] | None
    reason: str = ""


def offline_downgrade(script: Script) -> OfflineDowngrade:
    """Render the revision's ``downgrade()`` without a database and without ``env.py``; never raises."""
    downgrade = getattr(script.module, "downgrade", None)
    if downgrade is None:
        return OfflineDowngrade(None, "it has no downgrade()")
    judge = SafetyChecker(script.module)
    try:
        judge.admit(downgrade)
        with _renderer().collect() as statements, _silent(judge.loggers):
            downgrade()
    except Refused as error:
        return OfflineDowngrade(None, _stable(str(error)))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's code may raise anything
        return OfflineDowngrade(None, _stable(_reason(error, str(script.path))))
    if any(_PASSWORD.search(text) or redact(text) != text for text in statements):
        return OfflineDowngrade(None, "it holds a password, which must not be kept")
    return OfflineDowngrade(tuple(statements))


def _stable(reason: str) -> str:
    """Return a reason that is the same in every process: without the memory addresses of objects."""
    return redact(_ADDRESS.sub("", reason))


def _reason(error: BaseException, path: str) -> str:
    """Distinguish an author who raises on purpose from SQL that cannot be rendered."""
    text = " ".join(str(error).split("\n")[0].split())
    said = type(error).__name__ + (f": {text}" if text else "")
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is not None and Path(place.tb_frame.f_code.co_filename).name == Path(path).name:
        return f"its author excluded a downgrade ({said})"
    return f"it cannot be written as SQL ({said})"


@contextlib.contextmanager
def _silent(loggers: list[logging.Logger]) -> Iterator[None]:
    """Suppress output and logs about a downgrade that does not happen."""
    before = [(logger, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, disabled in before:
            logger.disabled = disabled


class _Renderer:
    """Alembic's offline mode for PostgreSQL, created once and used for every revision."""

    def __init__(self) -> None:
        from alembic.operations import Operations
        from alembic.runtime.migration import MigrationContext
        from sqlalchemy.dialects.postgresql.base import PGDialect

        # Any other paramstyle doubles the percent signs of text().
        make: Any = PGDialect  # untyped
        dialect = make(paramstyle="named")
        dialect._backslash_escapes = False  # standard_conforming_strings is on, as on a live connection
        logger = logging.getLogger("alembic.runtime.migration")
        disabled, logger.disabled = logger.disabled, True
        try:
            options = {"as_sql": True, "literal_binds": True, "output_buffer": io.StringIO()}
            context: Any = MigrationContext.configure(dialect=dialect, opts=options)
        finally:
            logger.disabled = disabled
        self._texts: list[str] = []
        self._characters = 0
        context.impl.command_terminator = ""
        context.impl.static_output = self.add
        context.impl._exec = functools.partial(_refuse_missing_values, context.impl._exec)
        context.connection = context.impl.connection = _bind(dialect, context.impl, self)
        self._operations: Any = Operations(context)

    def add(self, text: str) -> None:
        """Keep a statement; raises ValueError if there are too many."""
        self._characters += len(text)
        if len(self._texts) >= _MOST_STATEMENTS or self._characters > _MOST_CHARACTERS:
            raise ValueError(f"more than {_MOST_STATEMENTS} statements or {_MOST_CHARACTERS} characters")
        self._texts.append(text)

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Replace the migration behind ``alembic.op`` within the block; a running one is put back after it."""
        from alembic import op

        self._texts, self._characters = [], 0
        before = getattr(op, "_proxy", None)
        self._operations._install_proxy()
        try:
            yield self._texts
        finally:
            if before is not None:
                before._install_proxy()
            else:
                self._operations._remove_proxy()


def _refuse_missing_values(execute: Any, construct: Any, *arguments: Any, **options: Any) -> None:
    """Raise ValueError if a parameter has no value: SQLAlchemy would write NULL for it."""
    from sqlalchemy import text
    from sqlalchemy.sql import visitors
    from sqlalchemy.sql.elements import BindParameter

    construct = text(construct) if isinstance(construct, str) else construct
    if not hasattr(construct, "target"):  # DDL has none
        for part in visitors.iterate(construct):
            if isinstance(part, BindParameter) and part.required:
                raise ValueError(f"the parameter {part.key!r} has no value")
    execute(construct, *arguments, **options)


@functools.cache
def _renderer() -> _Renderer:
    return _Renderer()


def _bind(dialect: Any, impl: Any, renderer: _Renderer) -> Any:
    """Return the object for ``op.get_bind()``: it renders statements, and returns no rows."""
    from sqlalchemy import text
    from sqlalchemy.engine.mock import MockConnection

    base: Any = MockConnection

    class Bind(base):  # type: ignore[misc]
        _checkfirst: Any = False

        def _run_ddl_visitor(self, visitorcallable: Any, element: Any, **options: Any) -> None:
            before, self._checkfirst = self._checkfirst, options.get("checkfirst", False)
            options["checkfirst"] = False  # it cannot look at the database: the statement itself has to check
            try:
                visitorcallable(dialect=self.dialect, connection=self, **options).traverse_single(element)
            finally:
                self._checkfirst = before

        def execute(self, statement: Any, parameters: Any = None, *_: Any, **__: Any) -> None:
            rows = parameters if isinstance(parameters, (list, tuple)) else [parameters or {}]
            for row in rows:
                self._execute_one(statement, row)

        def _execute_one(self, statement: Any, row: Any) -> None:
            if isinstance(statement, str):
                statement = text(statement)
            if row:
                bound = getattr(
                    statement, "values" if getattr(statement, "is_insert", False) else "bindparams", None
                )
                if bound is None:
                    raise TypeError(f"parameters of a {type(statement).__name__} cannot be written as SQL")
                statement = bound(**row)
            if not self._checkfirst:
                impl._exec(statement)
                return
            renderer.add(_if_needed(str(statement.compile(dialect=dialect)).strip()))

        def exec_driver_sql(self, statement: str, parameters: Any = None, *_: Any, **__: Any) -> None:
            if parameters:
                raise TypeError("parameters of a driver's own SQL cannot be written as SQL")
            renderer.add(statement.strip())

    return Bind(dialect, lambda *_, **__: None)


def _if_needed(sql: str) -> str:
    """Return DDL that does nothing in the cases in which ``checkfirst`` would skip it."""
    dropped, created = _DROPS.match(sql), _CREATES.match(sql)
    if dropped:
        return f"{sql[: dropped.end()]}IF EXISTS {sql[dropped.end() :]}"
    if created and created[1] in ("TABLE", "SEQUENCE"):
        return f"{sql[: created.end()]}IF NOT EXISTS {sql[created.end() :]}"
    if created:
        return f"DO $migrator$ BEGIN\n{sql};\nEXCEPTION WHEN duplicate_object THEN NULL;\nEND $migrator$"
    return sql
