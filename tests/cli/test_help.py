"""The help: one screen for all of it, a command's own options and settings, types as metavars; and what is mistyped."""

from __future__ import annotations

import re

import pytest

from migrator.cli.arguments import PASSED_ON
from migrator.cli.catalogue import COMMANDS, overview
from migrator.cli.parser import make_parser
from migrator.config import settings
from migrator.errors import SettingsError
from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal
from tests.support.runner import Runner

FLAGS = {item.name: flag for item in settings.OPTIONS if (flag := settings.flag_name(item)) and flag != "-c"}
OURS = [name for name in COMMANDS if name not in PASSED_ON]

TYPES = {
    *("DURATION", "URL", "N", "PATH", "TEXT", "NAME", "REVISION", "POLICY", "SECTION", "HOST:PORT"),
    *("MODULE:CALLABLE", "KEY=VALUE", "TABLE,...", "KEY,...", "METHOD:N"),
}
"""What stands for a value in the help; words in lower case stand for themselves."""


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def helped(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


def flags(text: str) -> set[str]:
    """Return the options that a help describes."""
    return set(re.findall(r"^  (?:-\w(?: \S+)?, )?(--[\w-]+)", text, re.MULTILINE))


def test_the_help_is_one_screen(run_migrator: Runner) -> None:
    text = done(run_migrator("--help")).stdout
    assert text == overview()
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if re.fullmatch(r"\w+:", line)] == [
        *("run:", "look:", "backups:", "history:", "project:"),
    ]
    assert not [flag for flag in FLAGS.values() if flag in text]


@pytest.mark.parametrize("command", OURS)
def test_a_command_shows_the_settings_that_matter_to_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = flags(helped(command, "--help", capsys=capsys))
    mattering = COMMANDS[command].settings.split()
    assert set(mattering) <= FLAGS.keys()
    assert len(mattering) == len(set(mattering))
    own = {"--help", "--help-all", "--format"}
    assert own | {FLAGS[name] for name in mattering} <= shown
    assert not (shown & set(FLAGS.values())) - {FLAGS[name] for name in mattering}


@pytest.mark.parametrize("command", ["", *OURS])
def test_help_all_shows_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(*filter(None, [command]), "--help-all", capsys=capsys)
    assert set(FLAGS.values()) <= flags(text)


@pytest.mark.parametrize("command", ["", *OURS])
def test_a_metavar_is_a_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(*filter(None, [command]), "--help-all", capsys=capsys)
    values = re.findall(r"^  (?:-\w(?: \S+)?, )?--?[\w-]+ \[?([^\s\]]+)\]?", text, re.MULTILINE)
    assert values
    kinds = {kind for value in values for kind in value.split("|")}
    assert not [kind for kind in kinds if kind not in TYPES and kind != kind.lower()]


@pytest.mark.parametrize(
    ("words", "says", "help_of"),
    [
        ("upgrad", "unknown command 'upgrad'; did you mean upgrade?", ""),
        (
            "--backup off verfy-backup latest",
            "unknown command 'verfy-backup'; did you mean verify-backup?",
            "",
        ),
        ("zzz", "unknown command 'zzz'.", ""),
        (
            "upgrade --lock-timout 5s",
            "unknown option --lock-timout; did you mean --lock-timeout?",
            " upgrade",
        ),
        ("--lock-timout 5s upgrade", "unknown option --lock-timout; did you mean --lock-timeout?", ""),
        ("restore latest --drop-odl", "unknown option --drop-odl; did you mean --drop-old?", " restore"),
        ("current --yes", "unknown option --yes.", " current"),
        ("current here", "unexpected argument 'here'", " current"),
    ],
)
def test_what_is_mistyped_is_answered_with_the_nearest(
    words: str, says: str, help_of: str, run_migrator: Runner
) -> None:
    result = run_migrator(*words.split())
    assert f"Next: migrator{help_of} --help" in refusal(result, ExitCode.BAD_SETTINGS, says)


@pytest.mark.parametrize("words", ["{}", "upgrade head {}", "--database-url {}", "upgrade --database-url={}"])
def test_an_address_among_the_arguments_is_not_repeated(words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        make_parser().parse_args(words.format("postgresql://me:hush@h/d").split())
    assert "hush" not in str(refused.value)
    if "--database-url" in words and "upgrade" in words:
        assert "set MIGRATOR_DATABASE_URL" in str(refused.value)
