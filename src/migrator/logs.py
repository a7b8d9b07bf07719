"""Logging: JSON or text on stderr, without secrets, surviving ``fileConfig`` in a user's ``env.py``.

Redaction replaces the known secrets themselves, in every form they can take (raw, percent-encoded,
JSON- and repr-escaped).  It guesses nothing: a pattern for "what a password looks like" leaks the rest of
a password with an ``@`` in it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, TextIO, cast
from urllib.parse import quote, quote_plus

MASK = "***"
_SHORT = 6


class Redactor:
    """Replaces secrets in text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._pattern: re.Pattern[str] | None = None
        self._secrets: set[str] = set()
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Learn more secrets; the empty string is none."""
        self._secrets |= {secret for secret in secrets if secret}
        parts = []
        for secret in self._secrets:
            forms = "|".join(re.escape(form) for form in sorted(_forms(secret), key=len, reverse=True))
            if len(secret) < _SHORT or secret.isalpha():
                # A password such as "postgres" is also a user's, a database's and a product's name: hide it
                # where it stands as a password, not in every sentence.
                forms = rf"(?<=:)(?:{forms})(?=@)|(?<=(?i:password=))(?:{forms})\b|(?<=(?i:password=.))(?:{forms})(?=')"
            parts.append((len(secret), forms))
        parts.sort(reverse=True)
        self._pattern = re.compile("|".join(forms for _, forms in parts)) if parts else None

    def __call__(self, text: str) -> str:
        """Return ``text`` with every secret masked."""
        return self._pattern.sub(MASK, text) if self._pattern else text


def _forms(secret: str) -> set[str]:
    escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
    return {
        secret,
        quote(secret, safe=""),
        quote(secret),
        quote_plus(secret),
        secret.replace("%", "%%"),
        quote(secret, safe="").replace("%", "%%"),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        escaped,
        secret.replace("'", "''"),
    }


redact = Redactor()
"""The process's one redactor: whoever learns a secret adds it here."""


class RedactingStream:
    """A text stream that masks secrets in whatever anyone writes: prints of an ``env.py``, tracebacks, warnings."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` with its secrets masked."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of ``lines``."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class TextFormatter(logging.Formatter):
    """``12:03:04 INFO  applied 2 of 5 ...``: for people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {record.levelname:<7} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redact(line)


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    class RedactingJsonFormatter(JsonFormatter):
        def add_fields(
            self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
        ) -> None:
            super().add_fields(log_data, record, message_dict)
            log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            log_data["level"] = record.levelname.lower()
            log_data["logger"] = record.name

        def format(self, record: logging.LogRecord) -> str:
            return redact(super().format(record))

    return RedactingJsonFormatter("%(message)s", json_default=str, json_ensure_ascii=False)


class Logs:
    """The process's logging, set up once and set up again after an ``env.py`` has had its way."""

    def __init__(self, log_format: str = "auto", level: str = "info", run_id: str = "") -> None:
        self.stream = sys.stderr
        as_json = log_format == "json" or (log_format == "auto" and not self.stream.isatty())
        self.is_json = as_json
        self._level = level.upper()
        self._handler = logging.StreamHandler(cast(TextIO, self.stream))
        self._handler.setFormatter(_json_formatter() if as_json else TextFormatter())
        self._handler.addFilter(self._add_run_id)
        self._run_id = run_id

    def _add_run_id(self, record: logging.LogRecord) -> bool:
        if self._run_id and not hasattr(record, "run_id"):
            record.run_id = self._run_id
        return True

    def install(self) -> None:
        """Make the root logger write through our handler alone, and switch our and Alembic's loggers on.

        ``fileConfig`` disables existing loggers and replaces the root's handlers
        (https://docs.python.org/3/library/logging.config.html#logging.config.fileConfig): handlers that
        write to the console give way to ours, those that write to files stay.
        """
        root = logging.getLogger()
        root.handlers = [handler for handler in root.handlers if not _is_console(handler)]
        root.addHandler(self._handler)
        root.setLevel(logging.WARNING)
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if not isinstance(logger, logging.Logger):
                continue
            logger.handlers = [handler for handler in logger.handlers if not _is_console(handler)]
            if name.split(".")[0] in {"migrator", "alembic"}:
                logger.disabled = False
                logger.propagate = True
                logger.setLevel(logging.NOTSET)
        logging.getLogger("migrator").setLevel(self._level)
        # Alembic says "Running upgrade a -> b" at INFO; migrator's own line per revision says more.
        logging.getLogger("alembic").setLevel("DEBUG" if self._level == "DEBUG" else "WARNING")
        logging.captureWarnings(True)


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def protect_streams() -> None:
    """Put a masking stream before stdout and stderr, so that not even a stray print shows a secret."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactingStream):
            setattr(sys, name, RedactingStream(stream))
