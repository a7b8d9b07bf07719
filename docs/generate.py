"""Write the tables that the code is the only source of into docs/, between their markers.

Run it as `python docs/generate.py` after a change of settings, commands or exit codes; tests/docs/test_docs.py
fails while a page is not current.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from migrator import errors
from migrator.cli.catalogue import COMMANDS
from migrator.config import settings
from migrator.outcome import ExitCode, Finding, Outcome, RevisionResult, StageResult

DOCS = Path(__file__).parent
CHART = DOCS.parent / "k8s" / "chart" / "generate.py"
"""The chart has pages of its own, with migrator's settings in the schema of its values."""


def settings_table() -> str:
    """Return every setting: its variable, flag, key in ``[tool.migrator]``, default and meaning."""
    rows = [["variable", "flag", "key", "default", "meaning"]]
    for item in settings.OPTIONS:
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
    for name, command in COMMANDS.items():
        text = f"{command.help}. {' '.join(command.more.split())}" if command.more else command.help
        rows.append([f"`{name}`", text, f"`{command.example}`"])
    return _table(rows)


def help_texts() -> str:
    """Return what every command prints for ``--help``, at 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    sections = []
    for name in COMMANDS:
        command = [sys.executable, "-m", "migrator", name, "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        sections.append(f"### `{name}`\n\n```text\n{lines}\n```\n")
    return "\n" + "\n".join(sections) + "\n"


_KEYS: Mapping[str, str] = {
    "run_id": "the run, as in its log, ledger and backup",
    "command": "the command",
    "code": "the exit code",
    "outcome": "the name of the exit code",
    "message": "what happened, and where the database stands",
    "next_step": "what to type next",
    "target": "the database's address, without its password",
    "started_at": "when the run began, UTC",
    "seconds": "how long it took",
    "migrator_version": "migrator's version",
    "image_version": "`MIGRATOR_IMAGE_VERSION`",
    "before": "the version rows before the run; null if they were not read",
    "after": "the version rows after the run; null if they were not read",
    "heads": "the heads of this image's history",
    "revisions": "the revisions that were applied or reverted",
    "backup": "the backup that the run made or reused; null if there is none",
    "findings": "warnings and errors of guard and verify",
    "stages": "the stages in order",
    "others": "the outcomes of the other databases of one `env.py`; only if there are some",
    "version_table": "the version table",
    "version_tables": "the version tables of an `env.py` that uses several; only if there are some",
    "stage": "its name",
    "status": "`done`, `skipped` or `failed`",
    "reason": "why it was skipped or failed",
    "details": "what it found",
    "revision": "its id",
    "direction": "`upgrade` or `downgrade`",
    "transactional": "false if it left its transaction",
    "no_way_back": "why it cannot be reverted without its file",
    "measured": "statements, locks, rewritten tables, rows and sizes",
    "rule": "a stable name",
    "severity": "`error` (it fails the stage) or `warning` (it is only reported)",
    "place": "the relation, revision or setting",
    "sentence": "what was found",
    "remedy": "how to fix it",
}
"""What the keys of the JSON outcome mean; a key without an entry fails."""

_MESSAGE = "the first line of its docstring"


def outcome_table() -> str:
    """Return the keys of the JSON outcome."""
    return _keys([*Outcome._fields[:3], "outcome", *Outcome._fields[3:]])


def stages_table() -> str:
    """Return the keys of a stage, a revision and a finding in the JSON outcome."""
    kinds = {"stages": StageResult, "revisions": RevisionResult, "findings": Finding}
    rows = [["in", "key", "meaning"]]
    for name, kind in kinds.items():
        for key in kind._fields:
            rows.append([f"`{name}`", f"`{key}`", _MESSAGE if key == "message" else _KEYS[key]])
    return _table(rows)


def _keys(names: list[str]) -> str:
    return _table([["key", "meaning"], *([f"`{name}`", _KEYS[name]] for name in names)])


TABLES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "settings": ("reference/settings.md", settings_table),
    "exit-codes": ("reference/exit-codes.md", exit_codes_table),
    "commands": ("reference/commands.md", commands_table),
    "help": ("reference/commands.md", help_texts),
    "outcome": ("reference/outcome.md", outcome_table),
    "outcome-parts": ("reference/outcome.md", stages_table),
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
