"""Redaction: the known secrets, masked in whatever is written.

It replaces the secrets themselves, in every form they can take: each character raw, percent-encoded, or escaped as
JSON, repr() and HTML do.  It guesses nothing: a pattern for "what a password looks like" leaks the rest of a password
with an ``@`` in it.
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
from collections.abc import Iterable
from typing import Any, BinaryIO, TextIO, cast

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
        """Learn more secrets; the empty string is none."""
        self._secrets = frozenset({*self._secrets, *secrets} - {""})
        literals = (*self._secrets, *(_base64(secret) for secret in self._secrets))
        self._literals = tuple(literal.replace("+", " ") for literal in literals)

    def __call__(self, text: str) -> str:
        """Return ``text`` with every secret masked."""
        secrets = self._secrets
        return _pattern(secrets).sub(MASK, text) if secrets and self._may_hold_one(text) else text

    def _may_hold_one(self, text: str) -> bool:
        """Whether there can be a secret in a text: what tells that for most texts, without the pattern's making.

        A form of a secret is the secret itself, or its base64, or an encoding, which has one of the marks in it.
        """
        spaced = text.replace("+", " ")  # as addresses may write a space
        return any(mark in text for mark in _MARKS) or any(literal in spaced for literal in self._literals)


_MARKS = ("%", "\\", "&", "''")


@functools.lru_cache(maxsize=4)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str]:
    """Return the pattern that matches any of the secrets, in any of their forms; the longest is tried first."""
    parts = []
    for secret in secrets:
        forms = _forms(secret)
        if len(secret) < _SHORT or _is_word(secret):
            # A password such as "postgres" is also a user's, a database's and a product's name: hide it
            # where it stands as a password, not in every sentence.
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
    """Return a pattern for all forms of a secret: libraries differ in which characters they encode, and how."""
    runs = (_run(character, len(list(run))) for character, run in itertools.groupby(secret))
    return "".join(runs) + "|" + re.escape(_base64(secret)) + "=*"


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


# ValueError: closed, or what its encoding does not have; RuntimeError: written to within a write, by a signal handler.
_UNWRITABLE = (OSError, ValueError, RuntimeError)


silence = threading.local()
"""Where ``silence.on``, what this thread writes to the console is dropped."""


class RedactingStream:
    """A text stream that masks secrets in whatever anyone writes: prints of an ``env.py``, tracebacks, warnings.

    Nobody can close it: what an application does with its stdout must not end our log.  Nor does it raise: a reader
    that is gone, a full disk or a terminal that hung up changes nothing of what is done to the database.
    """

    def __init__(self, stream: TextIO, lost: Exception | None = None) -> None:
        self._stream = stream
        self.in_line = False
        self.lost = lost
        """Why something that was written did not get there; None where all of it did."""

    def write(self, text: str) -> int:
        """Write ``text`` with its secrets masked."""
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
        """Write out what is buffered."""
        try:
            self._stream.flush()
        except _UNWRITABLE as error:
            self.lost = self.lost or error

    def close(self) -> None:
        """Write out what is buffered."""
        self.flush()

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


def protect_streams() -> None:
    """Put a masking stream before stdout and stderr, so that not even a stray print shows a secret."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, RedactingStream):
            setattr(sys, name, RedactingStream(stream))
