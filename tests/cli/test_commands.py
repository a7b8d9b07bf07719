"""Every command, as a person types it, and what it answers in both formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.cli.arguments import PASSED_ON
from migrator.cli.catalogue import COMMANDS
from migrator.cli.parser import make_parser
from migrator.outcome import ExitCode
from tests.support import PLANTED
from tests.support.outcomes import done, left_behind, refusal, unchanged
from tests.support.ports import free_port
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]


@pytest.fixture
def at_second(database: Database, project: Project, run_migrator: Runner) -> Path:
    """A project of three revisions whose database is at the second."""
    folder = project(revisions=linear_history(3))
    bring_to(database, 2)
    return folder


def versions(database: Database) -> list[str]:
    """Return the version rows."""
    return [row[0] for row in database.psql("SELECT version_num FROM alembic_version ORDER BY 1")]


# -- where to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        ((), ["r003"]),
        (("upgrade",), ["r003"]),
        (("upgrade", "head"), ["r003"]),
        (("upgrade", "heads"), ["r003"]),
        (("upgrade", "+1"), ["r003"]),
        (("upgrade", "r003"), ["r003"]),
        (("upgrade", "r002"), ["r002"]),
        (("upgrade", "r001"), ["r002"]),
        (("downgrade", "-1"), ["r001"]),
        (("downgrade", "r001"), ["r001"]),
        (("downgrade", "base", "--yes"), []),
        (("downgrade", "-2", "--yes"), []),
        (("stamp", "head"), ["r003"]),
        (("stamp", "r001"), ["r001"]),
    ],
)
def test_where_each_command_goes(
    database: Database, at_second: Path, run_migrator: Runner, arguments: tuple[str, ...], after: list[str]
) -> None:
    env = {"MIGRATOR_BACKUP": "off"}
    done(run_migrator(*arguments, cwd=at_second, database=database, env=env))
    assert versions(database) == after
    tables = [row[0] for row in database.psql("SELECT tablename FROM pg_tables WHERE tablename ~ '^t[0-9]'")]
    if arguments[:1] != ("stamp",):
        assert len(tables) == (int(after[0][-1]) if after else 0)
    assert left_behind(database) == []


def test_plus_two_and_a_unique_prefix(database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(
        revisions=[Revision("abc123", None), Revision("abd456", "abc123"), Revision("fff", "abd456")]
    )
    done(run_migrator("upgrade", "+2", cwd=folder, database=database))
    assert versions(database) == ["abd456"]
    done(run_migrator("downgrade", "abc", cwd=folder, database=database))
    assert versions(database) == ["abc123"]
    refusal(run_migrator("upgrade", "ab", cwd=folder, database=database), ExitCode.BAD_HISTORY, "ab")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--backup", "off", "--format", "json", "upgrade", "r003"),
        ("upgrade", "r003", "--backup", "off", "--format", "json"),
        ("--format", "json", "upgrade", "--backup", "off", "r003"),
        ("--backup=off", "upgrade", "--format=json"),
        ("--backup", "off", "--format", "json"),
        ("--wait-for-database", "upgrade", "--backup", "off", "--format", "json"),
        ("upgrade", "--wait-for-database", "r003", "--backup", "off", "--format", "json"),
    ],
)
def test_options_stand_before_or_after_the_command(
    database: Database, at_second: Path, run_migrator: Runner, arguments: tuple[str, ...]
) -> None:
    result = done(run_migrator(*arguments, cwd=at_second, database=database))
    assert result.answer["after"] == ["r003"]
    assert result.answer["backup"] is None


def test_alembics_own_options_reach_env_py_from_both_sides(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    env = (
        "from alembic import context\n"
        "arguments = context.get_x_argument(as_dictionary=True)\n"
        "open('seen', 'w').write(repr((sorted(arguments.items()), context.config.config_ini_section)))\n"
    )
    folder = project(revisions=linear_history(1))
    env += (folder / "migrations" / "env.py").read_text()
    ini = "[other]\nscript_location = %(here)s/migrations\n"
    project({"migrations/env.py": env, "elsewhere.ini": ini}, config=None)
    (folder / "alembic.ini").unlink()
    done(
        run_migrator(
            *("-c", "elsewhere.ini", "-x", "a=1", "upgrade", "-n", "other", "-x", "b=2"),
            cwd=folder,
            database=database,
        )
    )
    assert (folder / "seen").read_text() == "([('a', '1'), ('b', '2')], 'other')"


def test_flags_win_over_variables_and_these_over_the_file(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    (folder / "pyproject.toml").write_text(
        '[tool.migrator]\nwait_timeout = "7s"\nlock_timeout = "8s"\nbackup = "off"\n'
    )
    env = {"MIGRATOR_LOCK_TIMEOUT": "9s", "MIGRATOR_BACKUP": "always"}
    result = done(
        run_migrator(
            "settings", "--format", "json", "--backup", "auto", cwd=folder, database=database, env=env
        )
    )
    rows = {row["name"]: (row["value"], row["source"]) for row in result.answer["settings"]}
    assert rows["wait_timeout"] == ("7.0", "pyproject.toml [tool.migrator] wait_timeout")
    assert rows["lock_timeout"] == ("9.0", "MIGRATOR_LOCK_TIMEOUT")
    assert rows["backup"] == ("auto", "--backup")
    assert rows["connect_timeout"][1] == "default"


# -- what only looks -----------------------------------------------------------------------------------------


def test_current(database: Database, at_second: Path, run_migrator: Runner) -> None:
    with unchanged(database):
        text = done(run_migrator("current", cwd=at_second, database=database)).stdout
        answer = done(run_migrator("current", "--format", "json", cwd=at_second, database=database)).answer
    assert text == "r002\n"
    assert answer == {"current": ["r002"], "heads": ["r003"]}


def test_current_of_an_empty_and_of_a_newer_database(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    assert done(run_migrator("current", cwd=folder, database=database)).stdout == "base\n"
    database.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    database.execute("INSERT INTO alembic_version VALUES ('r009')")
    assert done(run_migrator("current", cwd=folder, database=database)).stdout == "r009\n"


def test_history_heads_and_show_need_no_database(project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=[*linear_history(2), Revision("r003", "r002", message="third: a 'ü'")])
    history = done(run_migrator("history", cwd=folder)).stdout.splitlines()
    assert history[0] == "r002 -> r003 (head): third: a 'ü'"
    assert history[-1] == "<base> -> r001: a change"
    assert done(run_migrator("heads", cwd=folder)).stdout.splitlines() == history[:1]
    shown = done(run_migrator("show", "head", cwd=folder)).stdout
    assert "r003" in shown
    assert str(folder / "migrations" / "versions" / "r003.py") in shown

    answer = done(run_migrator("history", "--format", "json", cwd=folder)).answer
    assert [item["revision"] for item in answer] == ["r003", "r002", "r001"]
    assert answer[0].keys() == {"revision", "parents", "message", "path", "head", "labels"}
    assert (answer[0]["parents"], answer[0]["head"], answer[2]["parents"]) == (["r002"], True, [])
    assert done(run_migrator("heads", "--format", "json", cwd=folder)).answer == answer[:1]
    assert done(run_migrator("show", "r002", "--format", "json", cwd=folder)).answer == answer[1:2]


def test_check(database: Database, at_second: Path, run_migrator: Runner) -> None:
    with unchanged(database):
        result = run_migrator("check", cwd=at_second, database=database)
        as_json = run_migrator("check", "--format", "json", cwd=at_second, database=database)
    assert (result.code, as_json.code) == (3, 3), str(result)
    assert result.stdout.splitlines()[0] == "1 pending:"
    assert [item["revision"] for item in as_json.answer["pending"]] == ["r003"]
    done(run_migrator(cwd=at_second, database=database))
    assert (
        done(run_migrator("check", cwd=at_second, database=database)).stdout == "nothing is pending: r003\n"
    )


def test_verify_behind_head_is_a_failure_that_changed_nothing(
    database: Database, at_second: Path, run_migrator: Runner
) -> None:
    with unchanged(database):
        result = run_migrator("verify", cwd=at_second, database=database)
    refusal(result, ExitCode.VERIFY_FAILED, "r002", "r003", "this run changed nothing")
    done(run_migrator(cwd=at_second, database=database))
    result = done(run_migrator("verify", "--format", "json", cwd=at_second, database=database))
    assert [stage["stage"] for stage in result.answer["stages"]] == ["wait", "inspect", "verify"]


def test_status(database: Database, at_second: Path, run_migrator: Runner) -> None:
    with unchanged(database):
        text = done(run_migrator("status", cwd=at_second, database=database)).stdout
        result = run_migrator("status", "--exit-code", "--format", "json", cwd=at_second, database=database)
    assert result.code == 3
    answer = result.answer
    assert (answer["current"], answer["heads"], answer["running"]) == (["r002"], ["r003"], "")
    assert answer["version_table"].endswith("alembic_version")
    assert answer["server_version"].startswith(str(database.server.major))
    assert answer["newest_backup"] is None
    lines = dict(line.split(":", 1) for line in text.splitlines() if not line.startswith(" "))
    assert lines["pending"].strip() == "1"
    assert lines["backup"].strip() == "none"

    backup = done(run_migrator("--format", "json", cwd=at_second, database=database)).answer["backup"]["id"]
    result = done(run_migrator("status", "--exit-code", "--format", "json", cwd=at_second, database=database))
    assert (result.answer["pending"], result.answer["newest_backup"]["id"]) == ([], backup)


def test_wait(database: Database, server: Server, project: Project, run_migrator: Runner) -> None:
    result = done(run_migrator("wait", "--format", "json", database=database))  # needs no project
    assert result.answer["attempts"] == 1
    assert result.answer["target"].endswith(f"/{database.name}")
    assert "answers" in done(run_migrator("wait", database=database)).stdout
    nobody = {"MIGRATOR_DATABASE_URL": f"postgresql://me@127.0.0.1:{free_port()}/shop"}
    result = run_migrator("wait", "--wait-timeout", "0", env=nobody)
    refusal(result, ExitCode.UNREACHABLE, "refused")


def test_backup_and_backups(database: Database, at_second: Path, run_migrator: Runner) -> None:
    assert done(run_migrator("backups", cwd=at_second, database=database)).stdout == "no backups\n"
    assert done(run_migrator("backups", "--format", "json", cwd=at_second, database=database)).answer == []
    with unchanged(database):
        made = done(
            run_migrator(
                "backup", "--name", "before-sale", "--format", "json", cwd=at_second, database=database
            )
        )
    listed = done(run_migrator("backups", "--format", "json", cwd=at_second, database=database)).answer
    assert listed == [made.answer]
    assert (listed[0]["name"], listed[0]["database"], listed[0]["revision"]) == (
        "before-sale",
        database.name,
        "r002",
    )
    text = done(run_migrator("backups", cwd=at_second, database=database)).stdout
    assert made.answer["id"] in text
    assert text.startswith(f"in {run_migrator.backups}:\nID ")


def test_settings_show_where_each_comes_from_and_no_secret(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    env = {"MIGRATOR_WAIT_TIMEOUT": "2m"}
    text = done(run_migrator("settings", cwd=folder, database=database, env=env)).stdout
    assert f"target: postgresql://postgres@127.0.0.1:{database.server.port}/{database.name}" in text
    (line,) = [line for line in text.splitlines() if line.startswith("MIGRATOR_WAIT_TIMEOUT ")]
    assert line.split()[1:3] == ["120.0", "MIGRATOR_WAIT_TIMEOUT"]
    assert PLANTED not in text
    assert "target: none" in done(run_migrator("settings", cwd=folder)).stdout


# -- Alembic's own command line ------------------------------------------------------------------------------


def test_alembic_upgrade_as_sql(database: Database, at_second: Path, run_migrator: Runner) -> None:
    with unchanged(database):
        result = done(run_migrator("alembic", "upgrade", "head", "--sql", cwd=at_second, database=database))
    assert "CREATE TABLE t3" in result.stdout
    assert "INSERT INTO alembic_version" in result.stdout
    # the SQL is the whole answer: psql runs it
    other = database.server.create_database()
    other.execute(result.stdout)
    assert versions(other) == ["r003"]
    database.server.drop_database(other.name)


@pytest.mark.parametrize("through", [("alembic",), ()])
def test_alembic_revision_autogenerate(
    through: tuple[str, ...], database: Database, project: Project, run_migrator: Runner
) -> None:
    app = (
        "import sqlalchemy as sa\nmetadata = sa.MetaData()\n"
        "sa.Table('t1', metadata, sa.Column('id', sa.Integer, primary_key=True), sa.Column('note', sa.Text))\n"
        "sa.Table('fresh', metadata, sa.Column('id', sa.Integer, primary_key=True))\n"
    )
    folder = project({"app.py": app}, revisions=linear_history(1), env="imports_app")
    done(run_migrator(cwd=folder, database=database))
    words = (*through, "revision", "--autogenerate", "-m", "fresh table", "--rev-id", "r002")
    with unchanged(database):
        done(run_migrator(*words, cwd=folder, database=database))
    (written,) = (folder / "migrations" / "versions").glob("r002_*.py")
    assert "create_table('fresh'" in written.read_text()
    done(run_migrator(cwd=folder, database=database))
    assert versions(database) == ["r002"]
    assert database.psql("SELECT to_regclass('fresh')::text") == [("fresh",)]


@pytest.mark.parametrize("through", [("alembic",), ()])
def test_alembic_merge_branches_history_and_current(
    through: tuple[str, ...], database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=[*linear_history(2), Revision("fork", "r001")])
    assert "branchpoint" in done(run_migrator("alembic", "branches", cwd=folder, database=database)).stdout
    done(run_migrator(*through, "merge", "-m", "one again", "heads", cwd=folder, database=database))
    done(run_migrator(cwd=folder, database=database))
    current = done(run_migrator("alembic", "current", "-v", cwd=folder, database=database)).stdout
    assert "one again" in current
    history = done(
        run_migrator("alembic", "history", "-r", "r001:heads", cwd=folder, database=database)
    ).stdout
    assert "fork" in history


def test_alembic_upgrade_works_and_says_what_is_left_out(
    database: Database, at_second: Path, run_migrator: Runner
) -> None:
    result = done(run_migrator("alembic", "upgrade", "head", cwd=at_second, database=database))
    assert versions(database) == ["r003"]
    assert any("without lock, backup and verify" in line["message"] for line in result.logs)
    done(run_migrator("alembic", "downgrade", "-1", cwd=at_second, database=database))
    assert versions(database) == ["r002"]


def test_alembic_init_and_help_need_no_project(run_migrator: Runner, tmp_path: Path) -> None:
    done(run_migrator("alembic", "init", "fresh", cwd=tmp_path))
    assert (tmp_path / "fresh" / "env.py").is_file()
    assert "upgrade" in done(run_migrator("alembic", "--help", cwd=tmp_path)).stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("upgrade", "nosuch"), 31, "nosuch"),
        (("nosuch",), 10, "nosuch"),
        ((), 10, "no command"),
        (("upgrade", "head", "--nosuch"), 10, "--nosuch"),
    ],
)
def test_what_alembic_refuses(
    database: Database,
    at_second: Path,
    run_migrator: Runner,
    words: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    with unchanged(database):
        result = run_migrator("alembic", *words, cwd=at_second, database=database)
    refusal(result, ExitCode(code), "migrator alembic")
    assert says in result.stderr


def test_a_failure_under_alembics_own_command_is_no_defect_of_ours(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", "SELECT 1 / 0")])
    result = run_migrator("alembic", "upgrade", "head", cwd=folder, database=database)
    refusal(result, ExitCode.PARTIAL, "division by zero", "migrator current")
    nobody = {"MIGRATOR_DATABASE_URL": f"postgresql://me@127.0.0.1:{free_port()}/shop"}
    result = run_migrator("alembic", "current", cwd=folder, env=nobody)
    refusal(result, ExitCode.UNREACHABLE, "refused")
    wrong = {"MIGRATOR_DATABASE_URL": database.server.url(database.name, password="wrong")}
    result = run_migrator("alembic", "current", cwd=folder, env=wrong)
    refusal(result, ExitCode.ACCESS_DENIED, "password authentication failed")


# -- help ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in PASSED_ON])
def test_the_help_of_each_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    example = COMMANDS[command].example
    assert f"example:\n  {example}" in text
    assert example.startswith("migrator ")
    words = example.split("||")[0].split()[1:]
    assert make_parser().parse_args(words).command == command


def test_help_and_version_exit_zero_and_name_every_command(run_migrator: Runner) -> None:
    text = done(run_migrator("--help")).stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "Exit codes" in text
    assert done(run_migrator("--version")).stdout.startswith("migrator ")
    assert "migrator restore latest" in done(run_migrator("restore", "--help")).stdout


def test_answers_in_json_are_json_and_nothing_else(
    database: Database, at_second: Path, run_migrator: Runner
) -> None:
    for command in (
        *(("current",), ("history",), ("heads",), ("show", "head"), ("check",), ("status",), ("wait",)),
        *(("backups",), ("backup",), ("settings",), ("verify",), ("stamp", "r002"), ("upgrade",)),
        *(("downgrade", "-1"), ("restore", "latest", "--to", f"{database.name}_look")),
    ):
        result = run_migrator(*command, "--format", "json", cwd=at_second, database=database)
        assert result.code in (0, 3, 41), str(result)
        json.loads(result.stdout)
        assert all(line.startswith("{") for line in result.stderr.splitlines())
    database.server.drop_database(f"{database.name}_look")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("backup",), "backing up "),
        (("verify-backup", "latest"), "verifying "),
        (("restore", "latest", "--yes", "--drop-old"), "restoring "),
        (("restore", "latest", "--table", "t1"), "Restored "),
        (("prune", "--keep", "last=1"), "removed "),
    ],
)
def test_what_a_command_does_is_logged_in_lines_of_json(
    database: Database, project: Project, run_migrator: Runner, arguments: tuple[str, ...], said: str
) -> None:
    folder = project(revisions=linear_history(1))
    for command in ("upgrade", "freeze", "backup", "backup"):
        assert run_migrator(command, cwd=folder, database=database).code == 0
    done = run_migrator(*arguments, cwd=folder, database=database, env={"MIGRATOR_LOG_FORMAT": "json"})
    assert done.code == 0, done
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert any(message.startswith(said) for message in messages), messages
