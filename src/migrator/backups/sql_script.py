"""pg_restore's SQL, line by line: statements, rows, and text that a server does not know."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from migrator.backups.failures import RestoreStopped

_OPTIONS = re.compile(
    rb"^(ALTER [^\n]* ALTER COLUMN [^\n]* SET )\(([^\n()]*\bpg_attver=[^\n()]*)\);\n", re.MULTILINE
)


def without_oddities(sql: bytes) -> bytes:
    """Remove the options that only one kind of server has: ``ALTER COLUMN ... SET (pg_attver=3)``."""

    def rest(match: re.Match[bytes]) -> bytes:
        kept = [item for item in match[2].split(b", ") if not item.strip().startswith(b"pg_attver=")]
        return match[1] + b"(" + b", ".join(kept) + b");\n" if kept else b""

    return _OPTIONS.sub(rest, sql)


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a stream after line ends: each item is one line or, in the middle of a long one, a part of it."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def statements(script: Iterable[bytes], change: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """Put every line of SQL through ``change``, and leave copied rows unchanged.

    A line here ends outside of any quotation: a text of several lines, or a function, belongs to its
    statement. Raises :class:`RestoreStopped` at text that would end the surrounding transaction, and at
    a psql command.
    """
    rows, blobs, quoted = False, False, Quoted()
    parts: list[bytes] = []
    for part in script:
        if rows:
            rows = part != b"\\.\n"
            yield part
            continue
        if not parts and RESTRICTION.fullmatch(part):
            yield part
            continue
        parts.append(part)
        if quoted.open_after(part):
            continue
        line = b"".join(parts)
        parts.clear()
        if line in _TRANSACTION:
            if not blobs:
                raise RestoreStopped(f"unexpected: {line.decode().strip()}")
            continue
        if line.startswith(b"-- "):
            blobs = _BLOBS.match(line) is not None
        rows = line.startswith(b"COPY ") and line.endswith(b" FROM stdin;\n")
        yield change(line)
    yield b"".join(parts)


RESTRICTION = re.compile(rb"\\(?:un)?restrict [A-Za-z0-9]+\n")
"""With these, newer clients keep psql from obeying a dump's commands (CVE-2025-8714); migrator does so with
any client.
"""
_TRANSACTION = (b"BEGIN;\n", b"COMMIT;\n")
_BLOBS = re.compile(rb"-- Data for Name: (?:BLOBS|[0-9.]+); Type: BLOBS; ")
"""The large objects: the only part with its own transaction in pg_restore's SQL."""


class Quoted:
    """Follow a script part by part, and tell whether a quotation is open, as psql sees it.

    Raises :class:`RestoreStopped` at a backslash outside of quotations, the start of a psql command
    (``\\!`` runs a shell), and at a comment that could hide one. pg_restore writes neither.
    """

    _OPENS = re.compile(
        rb"--.*|\\|/\*|\"|(?<![\w$\x80-\xff])[eE]'|'|(?<![\w$\x80-\xff])\$(?:[A-Za-z_\x80-\xff][\w\x80-\xff]*)?\$"
    )
    _STRING, _ESCAPES, _IDENTIFIER = (
        re.compile(closes, re.DOTALL) for closes in (rb"'", rb"\\.|''|'", rb'"')
    )

    def __init__(self) -> None:
        self._closes: re.Pattern[bytes] | None = None
        self._string = self._STRING

    def open_after(self, line: bytes) -> bool:
        """Tell whether one is open at the end of the next line."""
        if line == b"SET standard_conforming_strings = off;\n" and self._closes is None:
            self._string = self._ESCAPES
        place = 0
        while found := (self._closes or self._OPENS).search(line, place):
            place = found.end()
            if self._closes is None:
                if found[0] in (b"\\", b"/*"):
                    raise RestoreStopped(f"no SQL of pg_restore: {line.decode(errors='replace').strip()}")
                self._closes = self._end_of(found[0])
            elif found[0] != b"''" and not found[0].startswith(b"\\"):
                self._closes = None
        return self._closes is not None

    def _end_of(self, opened: bytes) -> re.Pattern[bytes] | None:
        if opened.startswith(b"--"):
            return None
        if opened == b"'":
            return self._string
        if opened == b'"':
            return self._IDENTIFIER
        return self._ESCAPES if opened.endswith(b"'") else re.compile(re.escape(opened))


_UNKNOWN_SETTING = b"SET transaction_timeout = 0;\n"


def for_server(server_major: int) -> Callable[[bytes], bytes]:
    """Return the function that removes text from a line of SQL that the server does not know (see
    pg_restore.py).
    """
    if server_major < 17:
        return lambda line: b"" if line == _UNKNOWN_SETTING else without_oddities(line)
    return without_oddities
