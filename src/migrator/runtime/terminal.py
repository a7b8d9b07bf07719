"""Colours and columns for people at a terminal; any other stream gets the text as it is.

``NO_COLOR`` (https://no-color.org) and ``TERM=dumb`` switch the colours off. docs/why/adr/0050 says why
this is no library.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TextIO

_COLOURS = {"bad": "1;31", "warning": "33", "good": "32", "command": "36", "strong": "1", "dim": "2"}
"""The parameters of the sequence Select Graphic Rendition (ECMA-48, 8.3.117)."""
_COLOURED = re.compile(
    r"(?P<dim>^\d\d:\d\d:\d\d(?= [A-Z]))"
    r"|(?P<bad>\b[A-Z_]{5,} \((?:3\d|4[013]|70)\)|\bERROR\b|\bNOT VERIFIED\b)"
    r"|(?P<warning>\b[A-Z_]{5,} \((?:3|10|2\d|42)\)|\bWARNING\b)"
    r"|(?P<command>`[^`\n]+`)"
    r"|(?P<good>\bOK\b|\bverified(?=[;.,])|\(head\))"
    r"|(?P<strong>\bNext:)",
    re.MULTILINE,
)


def columns(stream: TextIO | None = None) -> int | None:
    """Return the width of a terminal in characters; None for another kind of stream (default: stdout)."""
    return shutil.get_terminal_size().columns if (stream or sys.stdout).isatty() else None


def coloured(text: str, stream: TextIO) -> str:
    """Return text with colours for a terminal: levels, exit codes, commands."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb":
        return text
    return _COLOURED.sub(lambda found: f"\x1b[{_COLOURS[found.lastgroup or 'dim']}m{found[0]}\x1b[0m", text)


def wrapped(text: str, indent: int) -> str:
    """Wrap a line for stdout if that is a terminal; the lines after the first are indented."""
    width = columns()
    if width is None:
        return text
    spaces = " " * min(indent, width // 2)
    return textwrap.fill(
        text, width, subsequent_indent=spaces, break_long_words=False, break_on_hyphens=False
    )


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay out rows in columns for stdout; on a terminal, the last column is wrapped."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names[:-1]}
    indent = sum(width + 2 for width in widths.values())
    lines = []
    for row in (dict(zip(names, names, strict=True)), *rows):
        start = "".join(f"{row[name]:<{width}}  " for name, width in widths.items())
        lines.append(f"{start}{wrapped('x' * indent + row[names[-1]], indent)[indent:]}".rstrip())
    return "\n".join(lines)
