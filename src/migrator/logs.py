"""Logging: JSON or text on stderr, without secrets, surviving ``fileConfig`` in a user's ``env.py``.

Redaction replaces the known secrets themselves, in every form they can take: each character raw,
percent-encoded, or escaped as JSON, repr() and HTML do.  It guesses nothing: a pattern for "what a password
looks like" leaks the rest of a password with an ``@`` in it.
"""

from __future__ import annotations

import binascii
import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, BinaryIO, TextIO, cast

MASK = "***"
_SHORT = 6
_LONGEST_WORD = 12


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
            forms = _forms(secret)
            if len(secret) < _SHORT or _is_word(secret):
                # A password such as "postgres" is also a user's, a database's and a product's name: hide it
                # where it stands as a password, not in every sentence.
                forms = rf"(?:(?<=:)(?:{forms})(?=@)|(?:{_AFTER_ITS_NAME})(?:{forms})(?!\w))"
            parts.append((len(secret), forms))
        parts.sort(reverse=True)
        self._pattern = re.compile("|".join(forms for _, forms in parts)) if parts else None

    def __call__(self, text: str) -> str:
        """Return ``text`` with every secret masked."""
        return self._pattern.sub(MASK, text) if self._pattern else text


_AFTER_ITS_NAME = "|".join(
    f"(?<=(?i:password{gap}))"
    for gap in ("=", "='", '="', ": ", ": '", "': '", ': "', '": "', '":"', " ", " '")
)


def _is_word(secret: str) -> bool:
    return secret.isascii() and secret.isalpha() and secret.islower() and len(secret) <= _LONGEST_WORD


def _forms(secret: str) -> str:
    """Return a pattern for all forms of a secret: libraries differ in which characters they encode, and how."""
    encoded = binascii.b2a_base64(secret.encode(errors="surrogateescape"), newline=False).decode().rstrip("=")
    runs = (_run(character, len(list(run))) for character, run in itertools.groupby(secret))
    return "".join(runs) + "|" + re.escape(encoded) + "=*"


_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"}  # as html.escape() writes them


def _run(character: str, count: int) -> str:
    """Return a pattern for a character, ``count`` times, as it is or encoded.

    No two alternatives match the same text, or a long line could take for ever; (?>) never goes back.
    """
    times = f"{{{count}}}"
    encoded = "".join(f"%{{1,2}}{byte:02x}" for byte in character.encode(errors="surrogateescape"))
    if character == "%":
        return rf"(?:(?:%{{1,2}}25){times}|(?>%{{{count},{2 * count}}}))"
    if character == "\\":
        return rf"(?:(?i:{encoded}){times}|(?>\\{{{count},{8 * count}}}))"
    if character == "'":
        return rf"(?:(?i:{encoded}|&\#x27;){times}|(?>(?:\\{{0,4}}'){{{count},{2 * count}}}))"
    forms = [f"(?i:{encoded})", re.escape(character)]
    if not (character.isascii() and character.isalnum()):
        names = {json.dumps(character)[1:-1], ascii(character)[1:-1]} - {character}
        escapes = sorted({character, *(name[1:] for name in names if name.startswith("\\"))})
        within = "|".join(re.escape(name).replace(r"\\", r"\\{1,4}") for name in escapes)
        forms[1] = rf"\\{{0,4}}(?:{within})"  # none are left where a backslash before it took them
    if character == " ":
        forms.append(r"\+")
    if character in _HTML:
        forms.append(re.escape(_HTML[character]))
    return f"(?:{'|'.join(forms)}){times if count > 1 else ''}"


redact = Redactor()
"""The process's one redactor: whoever learns a secret adds it here."""


class RedactingStream:
    """A text stream that masks secrets in whatever anyone writes: prints of an ``env.py``, tracebacks, warnings.

    Nobody can close it: what an application does with its stdout must not end our log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.in_line = False

    def write(self, text: str) -> int:
        """Write ``text`` with its secrets masked."""
        self._stream.write(redact(text))
        if text:
            self.in_line = not text.endswith("\n")
        return len(text)

    def close(self) -> None:
        """Write out what is buffered."""
        self._stream.flush()

    @property
    def buffer(self) -> BinaryIO:
        """Return a stream of bytes that masks secrets as well, to be wrapped anew or written to."""
        return cast(BinaryIO, _RedactingBytes(self))

    def detach(self) -> BinaryIO:
        """Return what :attr:`buffer` is, and stay usable."""
        return self.buffer

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of ``lines``."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RedactingBytes(io.BufferedIOBase):
    """The bytes beneath a RedactingStream; closing them closes nothing."""

    def __init__(self, stream: RedactingStream) -> None:
        self._text = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._text.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)

    def flush(self) -> None:
        self._text.flush()

    def fileno(self) -> int:
        return int(self._text.fileno())

    def isatty(self) -> bool:
        return bool(self._text.isatty())


class _Handler(logging.StreamHandler[TextIO]):
    """Writes each record in a line of its own, also where someone printed without ending the line."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(self.stream, "in_line", False) and not self.stream.isatty():
            self.stream.write("\n")
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
        line = f"{time} {record.levelname:<7} {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redact(line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: the message, what was given as ``extra``, and when, how grave and from whom it is."""

    def format(self, record: logging.LogRecord) -> str:
        document = {"message": record.getMessage()}
        document |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            document["exc_info"] = self.formatException(record.exc_info)
        if record.stack_info:
            document["stack_info"] = self.formatStack(record.stack_info)
        document["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        document["level"] = record.levelname.lower()
        document["logger"] = record.name
        return redact(json.dumps(document, default=str, ensure_ascii=False))


# taskName: from Python 3.12 on.
_STANDARD = frozenset({*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"})

_OURS = ("migrator", "migrator.apply")


class Logs:
    """The process's logging, set up once and set up again after an ``env.py`` has had its way."""

    def __init__(self, log_format: str = "auto", level: str = "info", run_id: str = "") -> None:
        self.stream = sys.stderr
        as_json = log_format == "json" or (log_format == "auto" and not self.stream.isatty())
        self.is_json = as_json
        self._level = level.upper()
        self._handler = _Handler(cast(TextIO, self.stream))
        self._handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
        self._handler.addFilter(self._admit)
        self._run_id = run_id
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


def protect_streams() -> None:
    """Put a masking stream before stdout and stderr, so that not even a stray print shows a secret."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactingStream):
            setattr(sys, name, RedactingStream(stream))
