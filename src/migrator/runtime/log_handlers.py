"""Handlers and formatters: the standard library's logging, made to write our lines and to mask secrets.

Apart from :mod:`migrator.logs`, for ``logging`` takes longer to import than a run with nothing to do has to log.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import TextIO

from migrator.logs import begin_line, json_line
from migrator.redaction import redact
from migrator.visible import visible, visible_lines


class _Handler(logging.StreamHandler[TextIO]):
    """Writes each record in a line of its own, also where someone printed without ending the line."""

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
    """``12:03:04 INFO  applied 2 of 5 ...``: for people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        # What others log may have several lines on purpose; ours has names in it that are not ours.
        show = visible if record.name.partition(".")[0] == "migrator" else visible_lines
        line = f"{time} {record.levelname:<7} {show(record.getMessage())}"
        if record.exc_info:
            line += "\n" + visible_lines(self.formatException(record.exc_info))
        return redact(line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: the message, what was given as ``extra``, and when, how grave and from whom it is."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            extra["exc_info"] = self.formatException(record.exc_info)
        if record.stack_info:
            extra["stack_info"] = self.formatStack(record.stack_info)
        return json_line(record.getMessage(), extra, record.created, record.levelname, record.name)


# taskName: from Python 3.12 on.
_STANDARD = frozenset({*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"})

_OURS = ("migrator", "migrator.apply")


class Console:
    """The one handler that writes to the console, put in place and put in place again."""

    def __init__(self, stream: TextIO, level: str, run_id: str, *, as_json: bool) -> None:
        self._level = level
        self._run_id = run_id
        self._handler = _Handler(stream)
        self._handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
        self._handler.addFilter(self._admit)
        self._installed: list[logging.Handler] = []

    def _admit(self, record: logging.LogRecord) -> bool:
        if self._run_id and not hasattr(record, "run_id"):
            record.run_id = self._run_id
        if record.name == "asyncio" and "asyncio.run() shutdown" in record.getMessage():
            return False  # an interrupt, seen by every task of an async env.py; the outcome says it
        # Alembic says "Running upgrade a -> b" at INFO; migrator's own line per revision says more.
        below = record.levelno < logging.WARNING and self._level != "DEBUG"
        return not (below and record.name.partition(".")[0] == "alembic")

    def keep(self) -> None:
        """Install again if someone has had a hand in it since: a glance, for it is done at every revision."""
        root = logging.getLogger()
        disabled = root.manager.disable or any(logging.getLogger(name).disabled for name in _OURS)
        if disabled or root.handlers != self._installed:
            self.install()

    def install(self) -> None:
        """Make the root logger write through our handler alone, and switch our and Alembic's loggers on.

        ``fileConfig`` disables existing loggers and replaces the root's handlers
        (https://docs.python.org/3/library/logging.config.html#logging.config.fileConfig): handlers that
        write to the console give way to ours, those that write to files stay, without secrets.
        """
        logging.disable(logging.NOTSET)
        root = logging.getLogger()
        root.handlers = _kept(root)
        root.addHandler(self._handler)
        # A project's own log files go on to say what they would without us.
        in_files = len(root.handlers) > 1 or bool(_kept(logging.getLogger("alembic")))
        if len(root.handlers) == 1:
            root.setLevel(logging.WARNING)
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if not isinstance(logger, logging.Logger):
                continue
            kept = _kept(logger)
            if len(kept) < len(logger.handlers):
                logger.propagate = True  # what it wrote to the console comes out through our handler
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
    """Return a logger's handlers that stay, made to mask secrets."""
    kept = [handler for handler in logger.handlers if not _is_console(handler)]
    for handler in kept:
        if not isinstance(handler.formatter, _RedactingFormatter):
            handler.setFormatter(_RedactingFormatter(handler.formatter))
    return kept


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
