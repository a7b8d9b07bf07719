"""Redaction: mask the known secrets in all output. Write a line of the log without importing ``logging``.

It replaces the secrets themselves, in all forms: each character raw, percent-encoded, or escaped like
in JSON, repr() and HTML. It does not guess: a pattern for passwords in general leaks the rest of a
password with an ``@`` in it.
"""

from __future__ import annotations

import binascii
import functools
import io
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO, TextIO, cast

from migrator.runtime.escaping import json_text

MASK = "***"
_SHORT = 6
_LONGEST_WORD = 12


class Redactor:
    """Replaces secrets in text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: frozenset[str] = frozenset()
        self._literals: tuple[str, ...] = ()
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Add secrets; the empty string is ignored."""
        self._secrets = frozenset({*self._secrets, *secrets} - {""})
        literals = (*self._secrets, *(_base64(secret) for secret in self._secrets))
        self._literals = tuple(literal.replace("+", " ") for literal in literals)

    def __call__(self, text: str) -> str:
        secrets = self._secrets
        return _pattern(secrets).sub(MASK, text) if secrets and self._may_hold_one(text) else text

    def _may_hold_one(self, text: str) -> bool:
        """Tell whether a text may contain a secret: it clears most texts without building the pattern.

        A form of a secret is the secret itself, its base64, or an encoding, which contains one of the
        marks.
        """
        spaced = text.replace("+", " ")  # the form of a space in addresses
        return any(mark in text for mark in _MARKS) or any(literal in spaced for literal in self._literals)


_MARKS = ("%", "\\", "&", "''")


@functools.lru_cache(maxsize=4)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str]:
    """Return the pattern that matches any of the secrets, in any of their forms, the longest first."""
    parts = []
    for secret in secrets:
        forms = _forms(secret)
        if len(secret) < _SHORT or _is_word(secret):
            # A password such as "postgres" is also the name of a user, a database and a product: hide it
            # only where it is used as a password.
            forms = rf"(?:(?<=:)(?:{forms})(?=@)|(?:{_AFTER_ITS_NAME})(?:{forms})(?!\w))"
        parts.append((len(secret), forms))
    parts.sort(reverse=True)
    return re.compile("|".join(forms for _, forms in parts))


_AFTER_ITS_NAME = "|".join(
    f"(?<=(?i:password{gap}))"
    for gap in ("=", "='", '="', ": ", ": '", "': '", ': "', '": "', '":"', " ", " '")
)


def _is_word(secret: str) -> bool:
    return secret.isascii() and secret.isalpha() and secret.islower() and len(secret) <= _LONGEST_WORD


def _base64(secret: str) -> str:
    return binascii.b2a_base64(secret.encode(errors="surrogateescape"), newline=False).decode().rstrip("=")


def _forms(secret: str) -> str:
    """Return a pattern for all forms of a secret: libraries encode different characters in different ways."""
    runs = (_run(character, len(list(run))) for character, run in itertools.groupby(secret))
    return "".join(runs) + "|" + re.escape(_base64(secret)) + "=*"


_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"}  # the form of html.escape()


def _run(character: str, count: int) -> str:
    """Return a pattern for a character, ``count`` times, raw or encoded.

    No two alternatives match the same text: a long line could otherwise take for ever. (?>) never goes
    back.
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
        forms[1] = rf"\\{{0,4}}(?:{within})"  # none remain if a backslash before it took them
    if character == " ":
        forms.append(r"\+")
    if character in _HTML:
        forms.append(re.escape(_HTML[character]))
    return f"(?:{'|'.join(forms)}){times if count > 1 else ''}"


redact = Redactor()
"""The process's one redactor: add each new secret here."""


# ValueError: closed, or a character outside of its encoding; RuntimeError: a write within a write, by a
# signal handler.
_UNWRITABLE = (OSError, ValueError, RuntimeError)


silence = threading.local()
"""While ``silence.on``, console output of this thread is dropped."""


class RedactingStream:
    """A text stream that masks secrets in all output: prints of an ``env.py``, tracebacks, warnings.

    Nobody can close it: an application that closes its stdout must not end our log. It never raises
    either: a reader that is gone, a full disk or a closed terminal must not affect the work on the
    database.
    """

    def __init__(self, stream: TextIO, lost: Exception | None = None) -> None:
        self._stream = stream
        self.in_line = False
        self.lost = lost
        """Why some output was not written; None if all was written."""

    def write(self, text: str) -> int:
        if getattr(silence, "on", False):
            return len(text)
        try:
            self._stream.write(redact(text))
        except _UNWRITABLE as error:
            self.lost = self.lost or error
        if text:
            self.in_line = not text.endswith("\n")
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except _UNWRITABLE as error:
            self.lost = self.lost or error

    def close(self) -> None:
        self.flush()

    @property
    def buffer(self) -> BinaryIO:
        """Return a stream of bytes that masks secrets too, to be wrapped again or written to."""
        return cast(BinaryIO, _RedactingBytes(self))

    def detach(self) -> BinaryIO:
        """Return :attr:`buffer`, and stay usable."""
        return self.buffer

    def writelines(self, lines: Iterable[str]) -> None:
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


def protect_streams() -> None:
    """Put a masking stream before stdout and stderr, so that no print shows a secret."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactingStream):
            setattr(sys, name, RedactingStream(stream))


def origin(created: float, level: str, logger: str) -> dict[str, str]:
    """Return the last keys of a line; ``created`` is in seconds since 1970."""
    time = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
    return {"time": time, "level": level.lower(), "logger": logger}


def json_line(message: str, extra: Mapping[str, Any], created: float, level: str, logger: str) -> str:
    """Return one JSON object without secrets: the message, its extra keys, and its origin."""
    return redact(json_text({"message": message, **extra, **origin(created, level, logger)}))


def begin_line(stream: TextIO) -> None:
    """End the line of a print without a line end."""
    if getattr(stream, "in_line", False) and not stream.isatty():
        stream.write("\n")
