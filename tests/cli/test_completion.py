"""`migrator completion SHELL`: a script that completes commands, options, choices and paths."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from migrator.cli.catalogue import COMMANDS
from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal
from tests.support.runner import Runner


@pytest.fixture
def script(run_migrator: Runner, tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\nnosuch = 1\n")  # which is no matter here
    path = tmp_path / "completion.bash"
    path.write_text(done(run_migrator("completion", "bash", cwd=tmp_path)).stdout)
    return path


def completed(script: Path, *words: str) -> set[str]:
    """Return what bash offers for the last of the words."""
    program = (
        'source "$1"; shift; COMP_WORDS=(migrator "$@"); COMP_CWORD=$#; COMP_LINE="${COMP_WORDS[*]}";'
        "COMP_POINT=${#COMP_LINE}; _shtab_migrator; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    call = ["bash", "-c", program, "bash", str(script), *words]
    finished = subprocess.run(call, capture_output=True, text=True, check=False, cwd=script.parent)
    return {line.strip() for line in finished.stdout.splitlines()}


def test_bash_completes(script: Path) -> None:
    assert completed(script, "") >= set(COMMANDS)
    assert completed(script, "ver") == {"verify", "verify-backup"}
    assert "--lock-timeout" in completed(script, "upgrade", "--lock")
    assert "--drop-old" in completed(script, "restore", "--dr")
    assert completed(script, "upgrade", "--format", "") >= {"text", "json"}
    assert "completion.bash" in completed(script, "upgrade", "--report-file", "comp")


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script_of_their_own(shell: str, run_migrator: Runner) -> None:
    text = done(run_migrator("completion", shell)).stdout
    assert {"zsh": "#compdef migrator", "tcsh": "complete migrator"}[shell] in text
    assert "verify-backup" in text


def test_without_shtab_it_says_what_to_install(run_migrator: Runner, tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError('no shtab')\n")
    result = run_migrator("completion", "bash", env={"PYTHONPATH": str(tmp_path)})
    refusal(
        result, ExitCode.BAD_SETTINGS, "shtab, which is not installed", "pip install 'migrator[completion]'"
    )


def test_another_shell_is_refused(run_migrator: Runner) -> None:
    refusal(run_migrator("completion", "fsh"), ExitCode.BAD_SETTINGS, "'fsh'")
