"""Completion for shells. Only this module imports shtab, which makes a script from the parser."""

from __future__ import annotations

from migrator.cli.parser import make_parser
from migrator.errors import SettingsError


def script(shell: str) -> str:
    """Return the script that completes commands, options and paths in ``shell``: bash, zsh or tcsh.

    Raises SettingsError if shtab is not installed. The image does not contain it.
    """
    try:
        import shtab
    except ImportError as error:
        raise SettingsError(
            ["completion scripts need shtab, which is not installed"],
            next_step="pip install 'migrator[completion]'",
        ) from error
    parser = make_parser()
    for item in (parser, *parser.commands.values()):
        for action in item.paths:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)
