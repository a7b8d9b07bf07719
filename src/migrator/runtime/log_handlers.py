"""Handlers and formatters: the standard library's logging with our lines and masked secrets.

It is separate from :mod:`.logs`, because an import of ``logging`` takes longer than all logging of an
up-to-date check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

from pythonjsonlogger import json

from migrator.runtime import terminal
from migrator.runtime.escaping import visible, visible_json, visible_lines
from migrator.runtime.redaction import begin_line, origin, redact, silence


class _Handler(logging.StreamHandler[TextIO]):
    """Writes each record in its own line, even after a print without a line end."""

    def emit(self, record: logging.LogRecord) -> None:
        begin_line(self.stream)
        super().emit(record)


class _RedactingFormatter(logging.Formatter):
    """Another formatter's text with its secrets masked."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return redact(self._inner.format(record))


class TextFormatter(logging.Formatter):
    """``12:03:04 INFO  applied 2 of 5 ...``: for people; in colour if the stream is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        # Records of others may have several lines on purpose; ours contain names from outside.
        show = visible if record.name.partition(".")[0] == "migrator" else visible_lines
        line = f"{time} {record.levelname:<7} {show(record.getMessage())}"
        if record.exc_info:
            line += "\n" + visible_lines(self.formatException(record.exc_info))
        return terminal.coloured(redact(line), self._stream)


class JsonFormatter(json.JsonFormatter):
    """One JSON object per line: the message, its ``extra``, and its origin."""

    def __init__(self) -> None:
        super().__init__("%(message)s", json_default=str, json_ensure_ascii=False)

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data |= origin(record.created, record.levelname, record.name)

    def format(self, record: logging.LogRecord) -> str:
        return redact(visible_json(super().format(record)))


_OURS = ("migrator", "migrator.apply")


class Console:
    """The one handler that writes to the console; it can be installed again."""

    def __init__(self, stream: TextIO, level: str, run_id: str, *, as_json: bool) -> None:
        self._level = level
        self._run_id = run_id
        self._handler = _Handler(stream)
        self._handler.setFormatter(JsonFormatter() if as_json else TextFormatter(stream))
        self._handler.addFilter(self._admit)
        self._installed: list[logging.Handler] = []

    def _admit(self, record: logging.LogRecord) -> bool:
        if self._run_id and not hasattr(record, "run_id"):
            record.run_id = self._run_id
        if record.name == "asyncio" and "asyncio.run() shutdown" in record.getMessage():
            return False  # an interrupt in every task of an async env.py; the outcome reports it
        # Alembic says "Running upgrade a -> b" at INFO; migrator's own line per revision says more.
        below = record.levelno < logging.WARNING and self._level != "DEBUG"
        return not (below and record.name.partition(".")[0] == "alembic")

    def keep(self) -> None:
        """Install again if other code has changed it; the check is quick, because every revision runs it."""
        root = logging.getLogger()
        ours = [logging.getLogger(name) for name in _OURS]
        changed = any(logger.disabled or logger.handlers or not logger.propagate for logger in ours)
        if changed or root.manager.disable or root.handlers != self._installed:
            self.install()

    def install(self) -> None:
        """Make the root logger write only through our handler, and enable our and Alembic's loggers.

        ``fileConfig`` disables existing loggers and replaces the root's handlers
        (https://docs.python.org/3/library/logging.config.html#logging.config.fileConfig). Our handler
        replaces handlers that write to the console. Handlers that write to files stay, with masked
        secrets. A handler of another class may write to both: it stays, without access to the console.
        """
        logging.disable(logging.NOTSET)
        root = logging.getLogger()
        root.handlers = _kept(root)
        root.addHandler(self._handler)
        # A project's own log files keep the content that they have without migrator.
        in_files = len(root.handlers) > 1 or bool(_kept(logging.getLogger("alembic")))
        if len(root.handlers) == 1:
            root.setLevel(logging.WARNING)
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if not isinstance(logger, logging.Logger):
                continue
            kept = _kept(logger)
            if any(_is_console(handler) or _is_foreign(handler) for handler in logger.handlers):
                logger.propagate = True  # its console output comes out through our handler
            logger.handlers = kept
            if name.split(".")[0] in {"migrator", "alembic"}:
                logger.disabled = False
                logger.propagate = True
                if not (in_files and name.startswith("alembic")):
                    logger.setLevel(logging.NOTSET)
        logging.getLogger("migrator").setLevel(self._level)
        if not in_files:
            logging.getLogger("alembic").setLevel("DEBUG" if self._level == "DEBUG" else "WARNING")
        logging.captureWarnings(True)
        self._installed = list(root.handlers)


def _kept(logger: logging.Logger) -> list[logging.Handler]:
    """Return a logger's remaining handlers, which now mask secrets."""
    kept = [handler for handler in logger.handlers if not _is_console(handler)]
    for handler in kept:
        if _is_foreign(handler) and "emit" not in vars(handler):
            vars(handler)["emit"] = _silent(handler.emit)
        if not isinstance(handler.formatter, _RedactingFormatter):
            handler.setFormatter(_RedactingFormatter(handler.formatter))
    return kept


def _is_foreign(handler: logging.Handler) -> bool:
    """Tell whether a handler is not a standard class: it may write anywhere, like rich's and loguru's."""
    return not isinstance(handler, logging.FileHandler) and not type(handler).__module__.startswith("logging")


def _silent(emit: Callable[[logging.LogRecord], None]) -> Callable[[logging.LogRecord], None]:
    """Return an ``emit`` that writes nothing to the console, if our own handler writes the same."""

    def emit_elsewhere(record: logging.LogRecord) -> None:
        silence.on = True
        try:
            emit(record)
        finally:
            silence.on = False

    return emit_elsewhere


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
