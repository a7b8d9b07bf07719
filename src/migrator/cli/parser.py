"""The argument parser, built from the settings and Alembic's own options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from migrator import __version__
from migrator.cli.arguments import ARGUMENTS, PASSED_ON
from migrator.cli.catalogue import COMMANDS, overview
from migrator.config import settings
from migrator.config.sources import did_you_mean
from migrator.config.value_parsers import type_name
from migrator.errors import SettingsError

_SWITCHES = frozenset(settings.flag_name(item) for item in settings.OPTIONS if isinstance(item.default, bool))


class Parser(argparse.ArgumentParser):
    """A parser that knows which options its help hides, and raises SettingsError."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.flags: list[str] = []
        self.paths: list[argparse.Action] = []
        self._left_out: list[tuple[argparse.Action, str]] = []

    def option(self, group: Any, *flags: str, shown: bool = True, help: str, **keywords: Any) -> None:
        """Add an option to a group; if it is not ``shown``, only ``--help-all`` has it."""
        text = help.replace("%", "%%")
        action = group.add_argument(*flags, help=text if shown else argparse.SUPPRESS, **keywords)
        self.flags += flags
        self.paths += [action] if action.metavar == "PATH" else []
        if not shown:
            self._left_out.append((action, text))

    def show_all(self) -> None:
        """Show every option in the help."""
        for action, text in self._left_out:
            action.help = text

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse. A switch alone means true and does not take the next word, which may be the command."""
        words = [f"{word}=true" if word in _SWITCHES else word for word in args or ()]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError instead of ending the program."""
        raise SettingsError([message], next_step=f"{self.prog} --help")


class MigratorParser(Parser):
    """The parser of the whole command line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(prog="migrator", usage="migrator [COMMAND] [OPTIONS]", **options)
        self.commands: dict[str, Parser] = {}
        self._words: list[str] = []
        self._all = False

    def format_help(self) -> str:
        """Return the commands by group; after ``--help-all`` with every setting."""
        # Without argparse's usage and its own list of the commands.
        return overview() + ("\n" + super().format_help().split("\n\n", 2)[2] if self._all else "")

    def show_all(self) -> None:
        """Show every option in the help."""
        self._all = True
        super().show_all()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and suggest the nearest name for a mistyped one."""
        self._words = list(args or ())
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown, found.command)
        return found

    def error(self, message: str) -> NoReturn:
        """Suggest the nearest command for an unknown one; an option before it may be the mistyped word."""
        mistyped = re.match(r"argument COMMAND: invalid choice: (['\"])(.*?)\1 \(", message)
        if mistyped:
            word = mistyped[2]
            before = self._words[: self._words.index(word)] if word in self._words else []
            known = [flag for flag in self.flags if flag.startswith("--")]
            names = [item.partition("=")[0] for item in before if item.startswith("--")]
            wrong = [name for name in names if not any(flag.startswith(name) for flag in known)]
            if wrong:
                self._refuse(wrong, None)
            message = f"unknown command {_shown(word)}{did_you_mean(word, COMMANDS)}"
        super().error(message)

    def _refuse(self, unknown: Sequence[str], command: str | None) -> NoReturn:
        """Refuse unknown words. The value of an unknown option is not repeated: it may be a secret."""
        known = {*self.flags, *(self.commands[command].flags if command else ())}
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        problems = [f"unknown option {flag}{_nearest(flag, known)}" for flag in flags]
        problems = problems or [f"unexpected argument {_shown(word)}" for word in unknown]
        raise SettingsError(
            problems, next_step=f"migrator {command} --help" if command else "migrator --help"
        )


def _shown(word: str) -> str:
    return "(an address)" if "@" in word else repr(word)  # which may hold a password


def _nearest(flag: str, known: Iterable[str]) -> str:
    name = flag.lstrip("-").replace("-", "_")
    for item in settings.OPTIONS:
        if settings.flag_name(item) is None and item.name == name:
            return f": set {settings.variable_name(item)}; other users can read arguments"
    return did_you_mean(flag, known)


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if isinstance(parser, Parser):
            parser.show_all()
        parser.print_help()
        parser.exit()


def make_parser(words: Sequence[str] | None = None) -> MigratorParser:
    """Return the parser of the commands; options may stand before or after the command.

    With ``words``, only the commands among them get their options, which saves time.
    """
    parser = MigratorParser()
    parser.add_argument("--version", action="version", version=f"migrator {__version__}")
    _add_common(parser)
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", prog="migrator", parser_class=Parser
    )
    for name, command in COMMANDS.items():
        if words is not None and name not in words:
            subparsers.add_parser(name)
            continue
        passed_on = name in PASSED_ON
        own = parser.commands[name] = subparsers.add_parser(
            name,
            help=command.help,
            usage=" ".join(filter(None, ("migrator", name, command.usage, "" if passed_on else "[OPTIONS]"))),
            description=f"{command.help[0].upper()}{command.help[1:]}.\n{command.more}".rstrip(),
            epilog=f"example:\n  {command.example}",
            prefix_chars="\0" if passed_on else "-",
            add_help=not passed_on,
        )
        where = own.add_mutually_exclusive_group(required=True) if name == "repair" else own
        for argument in ARGUMENTS.get(name, ()):
            own.option(where, *argument.flags, help=argument.help, **argument.keywords)
        if not passed_on:
            _add_common(own, name)
    return parser


def _add_common(parser: Parser, name: str = "") -> None:
    """Add the options of every command; show those that matter to the command ``name``."""
    shown = frozenset(COMMANDS[name].settings.split() if name else ())
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "shown": bool(name)}
    parser.option(
        *(parser, "--help-all"),
        action=_HelpAll,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show this help with every setting, and exit",
    )
    format_ = {"choices": ("text", "json"), "metavar": "text|json", **keywords}
    parser.option(parser, "--format", help="format of the answer on stdout [text]", **format_)
    parser.option(
        *(parser, "--no-color"),
        action="store_true",
        help="no colour on a terminal; NO_COLOR=1 does the same",
        **keywords,
    )
    chosen = parser.add_argument_group("settings that matter here (each is also a variable, MIGRATOR_...)")
    rest = parser.add_argument_group("other settings")
    for item in settings.OPTIONS:
        flag = settings.flag_name(item)
        if flag is None or item.name == "config":
            continue
        parser.option(
            *(chosen if item.name in shown else rest, flag),
            dest=item.name,
            metavar=type_name(item.read),
            nargs="?" if isinstance(item.default, bool) else None,
            default=argparse.SUPPRESS,
            shown=item.name in shown,
            help=f"{item.help} [{settings.default_text(item) or 'not set'}]",
        )
    project = parser.add_argument_group("project (Alembic's own options)")
    config = {"action": "append", "metavar": "PATH", **keywords}
    parser.option(project, "-c", "--config", help="alembic.ini or pyproject.toml of the project", **config)
    section = ("-n",) if name == "backup" else ("-n", "--name")  # a backup's --name is its own
    parser.option(
        project, *section, help="section of the ini file", dest="section", metavar="SECTION", **keywords
    )
    # In argparse, options after the command replace those before it. Here both count.
    x = {"dest": "x" if name else "x_before", "action": "append", "metavar": "KEY=VALUE", **keywords}
    parser.option(project, "-x", help="argument for env.py", **x)
