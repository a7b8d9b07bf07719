"""How a run says how it ended: exit code, last log line, answer, report file, termination message."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator import errors
from migrator.outcome import ExitCode
from tests.support import leaks
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

KEYS = {
    "run_id",
    "command",
    "code",
    "outcome",
    "message",
    "next_step",
    "target",
    "started_at",
    "seconds",
    "migrator_version",
    "image_version",
    "before",
    "after",
    "heads",
    "revisions",
    "backup",
    "findings",
    "stages",
    "version_table",
}
"""The keys of the JSON outcome: an API."""

DOCUMENTED = {
    0: "OK",
    3: "PENDING",
    10: "BAD_SETTINGS",
    20: "UNREACHABLE",
    21: "LOCK_BUSY",
    22: "BLOCKED",
    23: "INTERRUPTED",
    24: "NOT_CURRENT",
    30: "ACCESS_DENIED",
    31: "BAD_HISTORY",
    32: "DATABASE_AHEAD",
    33: "UNVERSIONED",
    34: "TAMPERED",
    35: "UNSAFE",
    36: "BACKUP_FAILED",
    37: "DRIFTED",
    38: "REHEARSAL_FAILED",
    39: "ROLLED_BACK",
    40: "PARTIAL",
    41: "VERIFY_FAILED",
    42: "RESTORED",
    43: "RESTORE_FAILED",
    70: "INTERNAL",
}


def test_the_exit_codes_are_the_documented_ones() -> None:
    assert {int(code): code.name for code in ExitCode} == DOCUMENTED
    assert all(code.meaning for code in ExitCode)


def test_each_error_has_its_own_code_and_stands_in_the_drawn_tree() -> None:
    classes = errors.MigratorError.__subclasses__()
    codes = [error.code for error in classes]
    assert len(set(codes)) == len(codes)
    for error in classes:
        assert re.search(rf"{error.__name__} +{int(error.code)} +{error.code.name}\n", errors.__doc__ or "")


def test_of_many_the_first_are_named_and_the_rest_are_counted() -> None:
    assert errors.some(["a"]) == "a"
    assert errors.some(("a", "b"), 2) == "a, b"
    assert errors.some(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert errors.some(list("abcd"), 2, "; ") == "a; b; and 2 more"


def test_a_success_in_every_form(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(3))
    bring_to(database, 1)
    report, termination = tmp_path / "report.json", tmp_path / "termination-log"
    termination.touch()
    env = {
        "MIGRATOR_REPORT_FILE": str(report),
        "MIGRATOR_TERMINATION_LOG": str(termination),
        "MIGRATOR_IMAGE_VERSION": "1.2.3",
    }
    result = done(run_migrator("--format", "json", cwd=folder, database=database, env=env))

    answer = result.answer
    assert answer.keys() == KEYS
    assert (answer["code"], answer["outcome"], answer["command"]) == (0, "OK", "upgrade")
    assert (answer["before"], answer["after"], answer["heads"]) == (["r001"], ["r003"], ["r003"])
    assert [(item["revision"], item["direction"]) for item in answer["revisions"]] == [
        ("r002", "upgrade"),
        ("r003", "upgrade"),
    ]
    stages = [(stage["stage"], stage["status"]) for stage in answer["stages"]]
    names = ["wait", "inspect", "lock", "inspect", "guard", "backup", "apply", "verify"]
    assert stages == [(name, "done") for name in names]
    assert answer["backup"]["revision"] == "r001"
    assert answer["image_version"] == "1.2.3"
    assert answer["target"] == database.url.replace(database.url.split("@")[0], "postgresql://postgres")
    assert json.loads(report.read_text()) == answer
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []

    sentence = answer["message"]
    assert f"{database.name} upgraded from r001 to r003 (head): 2 revisions" in sentence
    assert answer["backup"]["id"] in sentence
    assert termination.read_text() == sentence
    last = result.logs[-1]
    assert (last["level"], last["code"], last["outcome"]) == ("info", 0, "OK")
    assert last["message"] == sentence
    assert {line["run_id"] for line in result.logs} == {answer["run_id"]}


def test_each_revision_leaves_a_line(database: Database, project: Project, run_migrator: Runner) -> None:
    result = done(run_migrator(cwd=project(revisions=linear_history(3)), database=database))
    lines = [line for line in result.logs if line.get("revision")]
    assert [(line["revision"], line["stage"], line["level"]) for line in lines] == [
        (f"r00{number}", "apply", "info") for number in (1, 2, 3)
    ]
    assert lines[1]["message"].startswith("applied 2 of 3: r002 a change (")


def test_nothing_to_do_is_short(database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(1))
    done(run_migrator(cwd=folder, database=database))
    result = done(run_migrator("--format", "json", cwd=folder, database=database))
    assert [stage["stage"] for stage in result.answer["stages"]] == ["wait", "inspect", "verify"]
    assert result.answer["backup"] is None
    assert len(result.logs) == 1
    assert result.logs[0]["message"].startswith(f"Nothing to do: {database.name} is at r001 (head), verified")


def test_a_failure_in_every_form(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", "SELECT 1 / 0")])
    report, termination = tmp_path / "report.json", tmp_path / "termination-log"
    report.write_text("of an earlier run")
    termination.write_text("of an earlier run")
    env = {"MIGRATOR_REPORT_FILE": str(report), "MIGRATOR_TERMINATION_LOG": str(termination)}
    result = run_migrator("--format", "json", cwd=folder, database=database, env=env)
    sentence = refusal(result, ExitCode.ROLLED_BACK, "r002")
    answer = result.answer
    assert answer.keys() == KEYS
    assert (answer["code"], answer["outcome"]) == (39, "ROLLED_BACK")
    assert (answer["before"], answer["after"], answer["revisions"]) == ([], [], [])
    assert [stage["stage"] for stage in answer["stages"] if stage["status"] == "failed"] == ["apply"]
    assert json.loads(report.read_text()) == answer
    assert termination.read_text() == sentence
    assert f"{answer['message']} Next: {answer['next_step']}" in sentence


@pytest.mark.parametrize(
    ("arguments", "env", "code"),
    [
        ((), {"MIGRATOR_DATABASE_URL": ""}, 10),
        ((), {"MIGRATOR_DATABASE_URL": "postgresql://me@127.0.0.1:1/shop", "MIGRATOR_WAIT_TIMEOUT": "0"}, 20),
        (("nosuch",), {}, 10),
        (("upgrade", "nosuch"), {}, 31),
        (("check",), {"MIGRATOR_WAIT_TIMEOUT": "soon"}, 10),
        (("restore", "nosuch", "--to", "elsewhere"), {}, 36),
    ],
)
def test_every_failure_reaches_kubernetes(
    database: Database,
    project: Project,
    run_migrator: Runner,
    tmp_path: Path,
    arguments: tuple[str, ...],
    env: dict[str, str],
    code: int,
) -> None:
    termination = tmp_path / "termination-log"
    termination.write_text("of an earlier run")
    env = {**env, "MIGRATOR_TERMINATION_LOG": str(termination)}
    result = run_migrator(*arguments, cwd=project(revisions=linear_history(1)), database=database, env=env)
    sentence = refusal(result, ExitCode(code))
    assert termination.read_text() == sentence


def test_no_stale_report_is_left_when_the_settings_are_wrong(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"code": 0}')
    env = {"MIGRATOR_REPORT_FILE": str(report), "MIGRATOR_BACKUP": "maybe"}
    result = run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=env)
    refusal(result, ExitCode.BAD_SETTINGS)
    assert json.loads(report.read_text())["code"] == 10


def test_a_termination_message_is_cut_to_what_kubernetes_keeps(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    raises = f"raise RuntimeError({'é' * 5000!r})"
    folder = project(revisions=[Revision("r001", None, raises)])
    termination = tmp_path / "termination-log"
    termination.touch()
    env = {"MIGRATOR_TERMINATION_LOG": str(termination)}
    assert run_migrator(cwd=folder, database=database, env=env).code == 39
    written = termination.read_bytes()
    assert 2000 < len(written) <= 4096
    assert "ROLLED_BACK (39)" in written.decode()


def test_where_no_termination_log_is_none_is_made(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    env = {"MIGRATOR_TERMINATION_LOG": str(tmp_path / "not-there")}
    done(run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=env))
    assert not (tmp_path / "not-there").exists()


@pytest.mark.parametrize("place", ["no-such-folder/report.json", "a-folder"])
def test_a_report_that_cannot_be_written_changes_no_exit_code(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path, place: str
) -> None:
    (tmp_path / "a-folder").mkdir()
    env = {"MIGRATOR_REPORT_FILE": str(tmp_path / place)}
    result = done(run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=env))
    warnings = [line["message"] for line in result.logs if line["level"] == "warning"]
    assert len(warnings) == 1
    assert str(tmp_path / place) in warnings[0]


def test_a_downgrade_says_how_to_come_back(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(3))
    done(run_migrator(cwd=folder, database=database))
    result = done(run_migrator("downgrade", "-1", "--format", "json", cwd=folder, database=database))
    backup = result.answer["backup"]["id"]
    assert "downgraded from r003 to r002: 1 revision" in result.answer["message"]
    assert "`migrator upgrade r003`" in result.answer["next_step"]
    assert f"`migrator restore {backup}" in result.answer["next_step"]
    assert [item["direction"] for item in result.answer["revisions"]] == ["downgrade"]
    done(run_migrator("upgrade", "r003", cwd=folder, database=database))


def test_the_answer_for_people_is_one_line_on_stdout(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    result = done(run_migrator(cwd=project(revisions=linear_history(1)), database=database))
    assert len(result.stdout.splitlines()) == 1
    assert result.stdout.startswith(f"{database.name} upgraded from base to r001 (head)")


def test_a_failure_says_nothing_on_stdout_but_what_json_asks_for(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    assert run_migrator("upgrade", "nosuch", cwd=folder, database=database).stdout == ""
    result = run_migrator("show", "nosuch", "--format", "json", cwd=folder, database=database)
    refusal(result, ExitCode.BAD_HISTORY)
    assert result.answer.keys() >= {"code", "outcome", "message", "next_step"}
    assert result.answer["code"] == 31


def on_a_terminal(run: Runner, *arguments: str, **options: Any) -> tuple[int, str]:
    """Run the command with stdout and stderr on a terminal; return its exit code and what is to be read."""
    master, slave = pty.openpty()
    environment = run.environment(
        options["database"], {"TERM": "xterm", "COLUMNS": "200", **options.get("env", {})}
    )
    process = subprocess.Popen(
        [*run.command, *arguments],
        cwd=options["cwd"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other end is closed (EIO)
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    text = b"".join(chunks).decode()
    assert leaks.find(text) is None
    return process.wait(60), text


def test_on_a_terminal_logs_are_text_with_a_progress_bar(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(3))
    code, text = on_a_terminal(run_migrator, "upgrade", cwd=folder, database=database)
    assert code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "] 1/3 r002" in text
    assert re.search(r"\d\d:\d\d:\d\d INFO +applied 3 of 3: r003 a change", text)
    assert '{"' not in text
    assert text.count("upgraded from base to r003") == 1
    code, text = on_a_terminal(run_migrator, "downgrade", "base", cwd=folder, database=database)
    assert code == 35
    assert text.count("UNSAFE (35)") == 1


@pytest.mark.parametrize("command", ["ledger", "backups", "history", "prune --dry-run"])
def test_answers_are_readable_at_80_columns(
    command: str, database: Database, project: Project, run_migrator: Runner
) -> None:
    long = [
        Revision(
            f"9f{k:010d}", f"9f{k - 1:010d}" if k else None, f"CREATE TABLE t{k} ()", message="a change " * 4
        )
        for k in range(3)
    ]
    folder = project(revisions=long)
    run_migrator("upgrade", cwd=folder, database=database, env={"MIGRATOR_ACTOR": "ann.of.the.platform.team"})
    run_migrator("backup", cwd=folder, database=database)
    code, text = on_a_terminal(
        run_migrator,
        *command.split(),
        cwd=folder,
        database=database,
        env={"COLUMNS": "80", "NO_COLOR": "1", "MIGRATOR_BACKUP_KEEP": "last=1"},
    )
    assert code == 0
    lines = [line.rstrip() for line in text.splitlines() if "/" not in line]
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80, text


COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("words", "env", "coloured"),
    [
        ("upgrade nowhere", {}, True),
        ("status", {}, True),
        ("--no-color status", {}, False),
        ("status --no-color", {}, False),
        ("upgrade nowhere", {"NO_COLOR": "1"}, False),
        ("upgrade nowhere", {"TERM": "dumb"}, False),
        ("status --format json", {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    words: str,
    env: dict[str, str],
    coloured: bool,
    database: Database,
    project: Project,
    run_migrator: Runner,
) -> None:
    folder = project(revisions=linear_history(1))
    run_migrator("upgrade", cwd=folder, database=database)
    _, text = on_a_terminal(run_migrator, *words.split(), cwd=folder, database=database, env=env)
    assert bool(COLOURS.search(text)) is coloured, text
    if coloured:  # a copied command has no line break in it
        plain = COLOURS.sub("", text)
        assert "Next: `migrator history` lists the revisions" in plain or "last run: upgrade, OK (0)" in plain
    assert not COLOURS.search(run_migrator(*words.split(), cwd=folder, database=database, env=env).stdout)


@pytest.mark.parametrize("level", ["debug", "warning", "error"])
def test_the_outcome_is_said_at_every_log_level(
    database: Database, project: Project, run_migrator: Runner, level: str
) -> None:
    folder = project(revisions=[Revision("r001", None, "SELECT 1 / 0")])
    result = run_migrator("--log-level", level, cwd=folder, database=database)
    assert result.code == 39
    assert result.logs[-1]["code"] == 39
    if level == "debug":
        assert "Traceback" in result.stderr
