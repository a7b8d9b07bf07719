"""Write the tables that the code is the only source of into docs/, between their markers.

Run it as `python docs/generate.py` after a change of settings, commands or exit codes; tests/test_docs.py
fails while a page is not current.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from migrator import cli, errors, settings
from migrator.outcome import ExitCode

DOCS = Path(__file__).parent
CHART = DOCS.parent / "k8s" / "chart" / "generate.py"
"""The chart has pages of its own, with migrator's settings in the schema of its values."""


def settings_table() -> str:
    """Return every setting: its variable, flag, key in ``[tool.migrator]``, default and meaning."""
    rows = [["variable", "flag", "key", "default", "meaning"]]
    for item in settings.options():
        variable, flag = settings.variable_name(item), settings.flag_name(item)
        secret = item.secret
        rows.append(
            [
                f"`{variable}`" + (f", `{variable}_FILE`" if secret else ""),
                f"`{flag}`" if flag else "",
                "" if secret else f"`{item.name.replace('_', '-')}`",
                f"`{settings.default_text(item)}`" if settings.default_text(item) else "",
                item.help,
            ]
        )
    return _table(rows)


def exit_codes_table() -> str:
    """Return every exit code; those that no error carries yet are marked as reserved."""
    used = {ExitCode.OK, ExitCode.PENDING} | {kind.code for kind in _subclasses(errors.MigratorError)}
    rows = [["code", "name", "meaning", "in this version"]]
    rows += [
        [str(int(code)), f"`{code.name}`", code.meaning, "yes" if code in used else "reserved"]
        for code in ExitCode
    ]
    return _table(rows)


def commands_table() -> str:
    """Return every command with its example."""
    rows = [["command", "what it does", "example"]]
    rows += [[f"`{name}`", text, f"`{example}`"] for name, (text, example) in cli.COMMANDS.items()]
    return _table(rows)


TABLES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "settings": ("settings.md", settings_table),
    "exit-codes": ("exit-codes.md", exit_codes_table),
    "commands": ("commands.md", commands_table),
}
"""The tables by the name in their markers: the page that each stands on, and what makes it."""


def fill(page: str, name: str, table: str) -> str:
    """Return a page with a new table between its two markers; raises ValueError where they are missing."""
    begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no {begin} ... {end}")
    return pattern.sub(lambda found: f"{found[1]}{table}{found[2]}", page, count=1)


def _subclasses(kind: type[errors.MigratorError]) -> Iterator[type[errors.MigratorError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|\n" for cells in lines)


def main() -> None:
    """Rewrite the pages."""
    for name, (page, table) in TABLES.items():
        path = DOCS / page
        path.write_text(fill(path.read_text(encoding="utf-8"), name, table()), encoding="utf-8")
    runpy.run_path(str(CHART), run_name="__main__")


if __name__ == "__main__":
    main()
