"""Colour, bars and columns on a terminal, by rich.

Nothing changes where the stream is no terminal, where rich is not installed, or for ``NO_COLOR``
(https://no-color.org). rich is imported on a terminal only, and not for the answer of an up-to-date check.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_STYLES = (
    (r"^(?P<time>\d\d:\d\d:\d\d) (?:(?P<bad>ERROR|CRITICAL)|(?P<warn>WARNING)|INFO|DEBUG)", re.MULTILINE),
    (r"(?P<bad>\b[A-Z_]{5,} \((?:3\d|4[013]|70)\)|NOT VERIFIED)", 0),
    (r"(?P<warn>\b[A-Z_]{5,} \((?:3|10|2\d|42)\))", 0),
    (r"(?P<command>`[^`\n]+`)", 0),
    (r"(?P<good>(?<=\b)(?:OK(?=:|\b)|verified(?=[;.,]))|\(head\))", 0),
    (r"(?P<next>\bNext:)", 0),
)
_COLOURS = {
    "time": "dim",
    "bad": "bold red",
    "warn": "yellow",
    "good": "green",
    "command": "cyan",
    "next": "bold",
}


def columns(stream: TextIO | None = None) -> int | None:
    """Return the width of a terminal in characters; None for another kind of stream (default: stdout)."""
    stream = stream or sys.stdout
    import shutil

    return shutil.get_terminal_size().columns if stream.isatty() else None


def coloured(text: str, stream: TextIO) -> str:
    """Return text for people with the colours of a terminal: levels, exit codes, commands."""
    console = _console(stream)
    if console is None or not console.color_system or console.no_color:
        return text
    from rich.text import Text

    shown = Text(text)
    for pattern, flags in _STYLES:
        for found in re.finditer(pattern, text, flags):
            for name, part in found.groupdict().items():
                if part:
                    shown.stylize(_COLOURS[name], *found.span(name))
    return _rendered(console, shown, soft_wrap=True)  # the terminal wraps: a copied command has no line break


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay out rows in columns for stdout: on a terminal within its width, else with one line a row."""
    names = list(rows[0])
    console = _console(sys.stdout)
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    if console is None or sum(widths.values()) + 2 * len(names) <= console.width:
        widths[names[-1]] = 0
        lines = [dict(zip(names, names, strict=True)), *rows]
        return "\n".join("  ".join(row[name].ljust(widths[name]) for name in names).rstrip() for row in lines)
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    for name in names:
        one_word = not any(" " in row[name] for row in rows)  # an id is copied as a whole
        grid.add_column(name, overflow="fold", no_wrap=one_word and name != names[-1])
    for row in rows:
        grid.add_row(*(Text(row[name]) for name in names))
    return re.sub(r" +$", "", _rendered(console, grid), flags=re.MULTILINE)


def bar(done: int, total: int, width: int, stream: TextIO) -> str:
    """Return a bar of ``width`` characters."""
    console = _console(stream)
    if console is None:
        filled = width * done // total
        return f"[{'#' * filled}{'.' * (width - filled)}]"
    from rich.progress_bar import ProgressBar

    shown = ProgressBar(total, done, width, style="dim", complete_style="cyan", finished_style="green")
    return _rendered(console, shown).ljust(width)  # without colours it draws the finished part alone


def _console(stream: TextIO) -> Console | None:
    """Return rich's console for a terminal."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    # It detects the colours by the variables, and writes nothing to the stream: the caller does.
    return Console(
        file=stream, force_terminal=True, width=columns(stream), highlight=False, markup=False, emoji=False
    )


def _rendered(console: Console, what: RenderableType, *, soft_wrap: bool = False) -> str:
    with console.capture() as captured:
        console.print(what, end="", soft_wrap=soft_wrap)
    return captured.get()
