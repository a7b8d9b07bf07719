"""Revision files that make no sound history, a database that does not fit them, an env.py that goes astray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import ENV_FILES, Revision, bring_to, linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

BAD = ExitCode.BAD_HISTORY
IMPORTS = "import a_module_of_the_application"


def head_of(folder: Path, text: str, name: str = "r003") -> Path:
    """Write the newest revision's file anew."""
    path = folder / "migrations" / "versions" / f"{name}.py"
    path.write_text(text)
    return folder


FAULTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "a missing parent": ({"r003": Revision("r003", "gone").render()}, ("gone", "r003", "down_revision")),
    "one id twice": (
        {"copy": Revision("r002", "r001").render()},
        ("r002", "more than once", "a new id"),
    ),
    "an import that fails": (
        {"r003": f'"""a"""\n{IMPORTS}\nrevision = "r003"\ndown_revision = "r002"\n'},
        ("r003.py, line 2", "ModuleNotFoundError", "a_module_of_the_application", "fix r003.py"),
    ),
    "a syntax error": (
        {"r003": '"""a"""\nrevision = "r003"\ndown_revision = "r002"\ndef upgrade(:\n'},
        ("r003.py, line 4", "SyntaxError", "fix r003.py"),
    ),
    "an error while it is imported": (
        {"r003": 'revision = "r003"\ndown_revision = "r002"\n1 / 0\n'},
        ("r003.py, line 3", "ZeroDivisionError", "fix r003.py"),
    ),
    "sys.exit while it is imported": (
        {"r003": 'import sys\nrevision = "r003"\ndown_revision = "r002"\nsys.exit(3)\n'},
        ("r003.py, line 4", "SystemExit", "fix r003.py"),
    ),
    "no revision id": ({"r003": '"""a"""\n'}, ("r003.py",)),
    "a circle": (
        {"r001": Revision("r001", "r003").render()},
        ("cycle", "r001", "r003", "down_revision"),
    ),
    "a circle below sound revisions": (
        {"r001": Revision("r001", "r002").render()},
        ("cycle", "r001", "r002", "down_revision"),
    ),
    "its own parent": ({"r001": Revision("r001", "r001").render()}, ("cycle", "r001")),
    "a dependency that is missing": (
        {"r003": Revision("r003", "r002").render().replace("depends_on = None", 'depends_on = "gone"')},
        ("gone", "depends_on"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_history_is_named_by_file_or_parent(
    database: Database, project: Project, run_migrator: Runner, fault: str
) -> None:
    files, words = FAULTS[fault]
    folder = project(revisions=linear_history(3))
    for name, text in files.items():
        head_of(folder, text, name)
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, *words)


IN_A_CIRCLE = {
    "shop/__init__.py": "",
    "shop/models.py": "from shop import kinds\nclass Order:\n    kind = kinds.Kind()\n",
    "shop/kinds.py": "import shop.models\nclass Kind:\n    pass\n",
}
"""The models have to be imported first, as with fastapi-users: env.py does that, and revisions import the kinds."""


@pytest.mark.parametrize("env", ["plain_url", "async_engine", "online only"])
def test_revisions_that_import_after_env_py_alone(
    database: Database, project: Project, run_migrator: Runner, env: str
) -> None:
    text = (ENV_FILES / f"{env.replace('online only', 'plain_url')}.py").read_text()
    if env == "online only":
        text = text.replace(
            "if context.is_offline_mode():", "if context.is_offline_mode():\n    raise SystemExit(3)\nif 0:"
        )
    last = linear_history(2)[-1].render().replace("import sqlalchemy", "import shop.kinds\nimport sqlalchemy")
    project(revisions=linear_history(1))
    folder = project(
        {
            **IN_A_CIRCLE,
            "migrations/env.py": f"import shop.models\n{text}",
            "migrations/versions/r002.py": last,
        }
    )
    assert run_migrator("check", cwd=folder, database=database).code == 3
    history = done(run_migrator("history", cwd=folder))
    assert history.stdout.count("\n") == 2, history
    done(run_migrator(cwd=folder, database=database))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    done(run_migrator("downgrade", "-1", cwd=folder, database=database))


@pytest.mark.parametrize("command", ["upgrade", "check", "alembic upgrade head", "history"])
@pytest.mark.parametrize("fault", ["raise TypeError('too old')", "import sys; sys.exit(3)", "import gone"])
def test_a_plugin_of_alembic_that_fails_is_named_with_its_distribution(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path, command: str, fault: str
) -> None:
    place = tmp_path / "packages"
    (place / "shop_tools-1.2.dist-info").mkdir(parents=True)
    (place / "shop_tools.py").write_text(f"{fault}\n")
    files = {
        "METADATA": "Name: shop-tools\nVersion: 1.2\n",
        "entry_points.txt": "[alembic.plugins]\ntools = shop_tools\n",
    }
    for name, text in files.items():
        (place / "shop_tools-1.2.dist-info" / name).write_text(text)
    folder = project(revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(*command.split(), cwd=folder, database=database, env={"PYTHONPATH": str(place)})
    refusal(result, BAD, "tools = shop_tools of shop-tools 1.2", "fix shop-tools in the image")


def test_an_empty_versions_folder_is_no_success(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project()
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, str(folder / "migrations" / "versions"), "no revision", "check the mount")


def test_a_script_location_that_is_not_there(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    (folder / "migrations").rename(folder / "elsewhere")
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, str(folder / "migrations"))


def two_heads() -> list[Revision]:
    """Return a history that forks after its first revision."""
    fork = Revision("fork", "r001", "CREATE TABLE fork (id int)", "DROP TABLE fork")
    return [*linear_history(2), fork]


def test_two_heads_are_named_with_both_ways_out(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=two_heads())
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, "r002", "fork", "`migrator merge heads", "`migrator upgrade heads`")

    # both ways out lead out
    done(run_migrator("upgrade", "heads", cwd=folder, database=database))
    assert database.psql("SELECT version_num FROM alembic_version ORDER BY 1") == [("fork",), ("r002",)]
    done(run_migrator("alembic", "merge", "heads", "-m", "merge", cwd=folder, database=database))
    done(run_migrator(cwd=folder, database=database))
    assert len(database.psql("SELECT version_num FROM alembic_version")) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("upgrade", "nosuch"), ("nosuch", "`migrator history`")),
        (("upgrade", "r00"), ("r00", "`migrator history`")),
        (("upgrade", "+5"), ("5",)),
        (("downgrade", "-5"), ("5",)),
        (("downgrade", "nosuch"), ("nosuch",)),
        (("upgrade", "r001-1"), ("'r001-1' leads to no revision from r002",)),
        (("upgrade", "@"), ("'@' leads to no revision",)),
        (("stamp", "nosuch"), ("nosuch",)),
        (("show", "nosuch"), ("nosuch",)),
        (("upgrade", "--baseline", "nosuch"), ("nosuch",)),
    ],
)
def test_a_revision_that_nobody_knows_or_that_is_ambiguous(
    database: Database,
    project: Project,
    run_migrator: Runner,
    command: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    folder = project(revisions=linear_history(3))
    if "--baseline" not in command:
        bring_to(database, 2)
    else:
        database.execute("CREATE TABLE t1 (id int)")
    with unchanged(database):
        result = run_migrator(*command, cwd=folder, database=database)
    refusal(result, BAD, *words)


@pytest.mark.parametrize("command", [("downgrade", "fork@-1"), ("stamp", "-1")])
def test_a_step_back_from_base_on_a_branch(
    database: Database, project: Project, run_migrator: Runner, command: tuple[str, ...]
) -> None:
    """Alembic ends it with an assertion of its own."""
    folder = project(revisions=two_heads())
    with unchanged(database):
        result = run_migrator(*command, cwd=folder, database=database)
    refusal(result, BAD, f"'{command[1]}' leads to no revision from base")


@pytest.mark.parametrize(
    "command", [("upgrade",), ("upgrade", "r001"), ("downgrade", "-1"), ("check",), ("status",), ("verify",)]
)
def test_a_database_of_a_newer_image_is_left_alone(
    database: Database, project: Project, run_migrator: Runner, command: tuple[str, ...]
) -> None:
    database.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    database.execute("INSERT INTO alembic_version VALUES ('r009')")
    folder = project(revisions=linear_history(2))
    with unchanged(database):
        result = run_migrator(*command, cwd=folder, database=database)
    refusal(result, ExitCode.DATABASE_AHEAD, "r009", "r002", "older", "deploy the image")


def test_a_row_that_is_a_prefix_of_a_revision_is_not_taken_for_it(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    database.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
    database.execute("INSERT INTO alembic_version VALUES ('r00')")
    with unchanged(database):
        result = run_migrator(cwd=project(revisions=linear_history(1)), database=database)
    refusal(result, ExitCode.DATABASE_AHEAD, "r00")


def test_tables_without_a_version_are_adopted_only_on_demand(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(3))
    database.execute("CREATE TABLE t1 (id int PRIMARY KEY, note text); CREATE TABLE t2 (id int)")
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.UNVERSIONED, "2 tables", "--baseline REV", "--baseline base", "r003")
    result = run_migrator("upgrade", "--baseline", "r002", "--format", "json", cwd=folder, database=database)
    done(result)
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
    assert [revision["revision"] for revision in result.answer["revisions"]] == ["r003"]
    assert result.answer["backup"], "there was something to lose"


def test_a_baseline_at_head_only_stamps(database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(2))
    database.execute("CREATE TABLE t1 (id int)")
    done(run_migrator("--baseline", "head", cwd=folder, database=database))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert database.psql("SELECT to_regclass('t2')") == [(None,)]


def test_a_baseline_that_stays_set_does_not_concern_an_empty_database(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    for _ in range(2):
        done(run_migrator("upgrade", cwd=folder, database=database, env={"MIGRATOR_BASELINE": "r001"}))
        assert database.psql("SELECT to_regclass('t1')::text, to_regclass('t2')::text") == [("t1", "t2")]
        # Down to base the version table is there, and empty.
        done(run_migrator("downgrade", "base", "--yes", cwd=folder, database=database))


def test_another_applications_tables_are_no_baseline(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    database.execute("CREATE TABLE of_another (id int)")
    done(run_migrator("--baseline", "base", cwd=folder, database=database))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    # the setting stays in the deployment, and does nothing once there is a version
    done(run_migrator("--baseline", "base", cwd=folder, database=database))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise RuntimeError('no config for you')", ("RuntimeError", "no config for you")),
        ("import a_module_of_the_application", ("ModuleNotFoundError", "a_module_of_the_application")),
        ("import sys; sys.exit(7)", ("sys.exit(7)",)),
        ("def broken(:", ("SyntaxError", "env.py")),
        ("import os; os.environ['NOT_SET']", ("KeyError", "NOT_SET")),
        ("from alembic import context; context.config.ours", ("no attribute 'ours'", "MIGRATOR_BOOTSTRAP")),
    ],
)
def test_an_env_that_fails(
    database: Database, project: Project, run_migrator: Runner, line: str, words: tuple[str, ...]
) -> None:
    env = f"{line}\n" + (ENV_FILES / "plain_url.py").read_text()
    folder = project({"migrations/env.py": env}, revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, "env.py", *words)


def test_an_env_that_runs_no_migration_is_no_success(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project({"migrations/env.py": "print('hello')\n"}, revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, "run_migrations")
    assert "hello" in result.stderr
    assert result.stdout == ""


FIXED_ADDRESS = """
from alembic import context
from sqlalchemy import create_engine

with create_engine({url!r}).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""


def test_an_env_that_connects_to_another_database_changes_neither(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    other = database.server.create_database()
    env = FIXED_ADDRESS.format(url=other.url)
    folder = project({"migrations/env.py": env}, revisions=linear_history(1))
    with unchanged(database), unchanged(other):
        result = run_migrator(cwd=folder, database=database)
    refusal(
        result,
        ExitCode.BAD_SETTINGS,
        other.name,
        database.name,
        "not to the one that",
        "MIGRATOR_URL_VARIABLE",
    )
    database.server.drop_database(other.name)


def test_an_env_that_connects_with_a_wrong_password(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    env = FIXED_ADDRESS.format(url=database.server.url(database.name, password="not it"))
    folder = project({"migrations/env.py": env}, revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(
        result, ExitCode.ACCESS_DENIED, "env.py", "password authentication failed", "MIGRATOR_URL_VARIABLE"
    )


def test_version_rows_that_overlap(database: Database, project: Project, run_migrator: Runner) -> None:
    # both a revision and its ancestor: what a hand that inserted instead of updating leaves
    folder = project(revisions=linear_history(3))
    bring_to(database, 2)
    database.execute("INSERT INTO alembic_version VALUES ('r001')")
    with unchanged(database):
        result = run_migrator(cwd=folder, database=database)
    refusal(result, BAD, "r001", "r002", "overlap")


def test_downgrade_to_base_needs_a_yes(database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(2))
    done(run_migrator(cwd=folder, database=database))
    for way in ("base", "-2"):
        with unchanged(database):
            result = run_migrator("downgrade", way, cwd=folder, database=database)
        refusal(result, ExitCode.UNSAFE, "deletes the schema", f"migrator downgrade {way} --yes")
    done(run_migrator("downgrade", "base", "--yes", cwd=folder, database=database))
    assert database.psql("SELECT count(*) FROM alembic_version") == [(0,)]
    assert database.psql("SELECT to_regclass('t1')") == [(None,)]


def test_a_step_back_from_several_heads_must_say_which(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    branches = [
        *linear_history(1),
        Revision("a001", "r001", "CREATE TABLE a (id int)", "DROP TABLE a"),
        Revision("b001", "r001", "CREATE TABLE b (id int)", "DROP TABLE b"),
    ]
    folder = project(revisions=branches)
    done(run_migrator("upgrade", "heads", cwd=folder, database=database))
    database.execute("DELETE FROM alembic_version WHERE version_num = 'a001'")
    database.execute("INSERT INTO alembic_version VALUES ('a001')")  # rows come in any order
    with unchanged(database):
        result = run_migrator("downgrade", "-1", cwd=folder, database=database)
    refusal(result, ExitCode.BAD_HISTORY, "several heads (a001, b001)", "migrator downgrade a001@-1")
    done(run_migrator("downgrade", "a001@-1", cwd=folder, database=database))
    assert database.psql("SELECT to_regclass('a'), to_regclass('b')::text") == [(None, "b")]


def lacking(name: str, function: str, *, how: str) -> dict[str, str]:
    """Return the file of a revision of `linear_history(3)` that has no such function."""
    number = int(name[1:])
    text = linear_history(3)[number - 1].render().replace(f"def {function}(", "def _not_it(")
    return {f"migrations/versions/{name}.py": text + INSTEAD[how].format(function)}


INSTEAD = {
    "missing": "",
    "None": "\n\n{} = None\n",
    "raises": '\n\ndef {}():\n    """No."""\n    raise NotImplementedError("one way")\n',
}


@pytest.mark.parametrize("how", INSTEAD)
def test_a_revision_without_downgrade_is_no_way_back(
    database: Database, project: Project, run_migrator: Runner, how: str
) -> None:
    files = lacking("r002", "downgrade", how=how) | {
        "migrations/env.py": (ENV_FILES / "plain_url.py")
        .read_text()
        .replace("connection=connection, ", "connection=connection, transaction_per_migration=True, ")
    }
    project(revisions=linear_history(3))
    folder = project(files)
    broken = folder / "migrations/versions/r003.py"
    sound = broken.read_text()
    broken.write_text(sound.replace("def upgrade():", "def upgrade():\n    op.execute('SELECT 1/0')"))
    bring_to(database, 1)
    with unchanged(database):  # known when the plan is made
        result = run_migrator(cwd=folder, database=database, env={"MIGRATOR_ON_FAILURE": "downgrade"})
    refusal(result, BAD, "r002 has no downgrade()", "MIGRATOR_ON_FAILURE=restore")

    result = run_migrator(cwd=folder, database=database)
    sentence = refusal(result, ExitCode.PARTIAL, "the database is at r002", "migrator restore")
    assert "migrator downgrade" not in sentence

    broken.write_text(sound)
    done(run_migrator(cwd=folder, database=database))
    for place in ("r001", "-2"):
        with unchanged(database):  # not even r003, which has one
            result = run_migrator("downgrade", place, cwd=folder, database=database)
        said = "r002.py cannot be reverted: its downgrade() is `raise NotImplementedError('one way')`"
        refusal(result, BAD, said if how == "raises" else "r002.py has no downgrade()", "`migrator backups`")
    done(run_migrator("downgrade", "-1", cwd=folder, database=database))

    (folder / "migrations/verify.toml").write_text(
        '[[assertions]]\nname = "never"\nsql = "SELECT 1"\nexpect = 2\n'
    )
    database.execute("DROP TABLE t2; UPDATE alembic_version SET version_num = 'r001'")
    result = run_migrator(cwd=folder, database=database)
    sentence = refusal(result, ExitCode.VERIFY_FAILED, "never", "migrator restore")
    assert "migrator downgrade" not in sentence


@pytest.mark.parametrize("how", ["missing", "None"])
def test_a_pending_revision_without_upgrade_is_found_before_anything_runs(
    database: Database, project: Project, run_migrator: Runner, how: str
) -> None:
    project(revisions=linear_history(3))
    folder = project(lacking("r003", "upgrade", how=how))
    bring_to(database, 1)
    for command in ("upgrade", "check", "verify"):
        with unchanged(database):
            result = run_migrator(command, cwd=folder, database=database)
        refusal(result, BAD, "r003.py has no upgrade()")


@pytest.mark.parametrize(
    ("at", "command", "words", "out"),
    [
        ("r001", "upgrade +15", "branches at r001 (b001, c001)", "migrator upgrade b001"),
        ("b001,c001", "upgrade +15", "at several heads (b001, c001)", "migrator upgrade b001@+1"),
        ("last", "downgrade -2", "merged at m001 (b001, c001)", "migrator downgrade b001"),
    ],
)
def test_a_number_of_steps_over_a_branch_says_where_it_branches_and_what_to_type(
    database: Database, project: Project, run_migrator: Runner, at: str, command: str, words: str, out: str
) -> None:
    folder = project(
        revisions=[
            *linear_history(1),
            Revision("b001", "r001"),
            Revision("c001", "r001"),
            Revision("m001", ("b001", "c001")),
            Revision("last", "m001"),
        ]
    )
    bring_to(database, 1)
    rows = ", ".join(f"('{name}')" for name in at.split(","))
    database.execute(f"DELETE FROM alembic_version; INSERT INTO alembic_version VALUES {rows}")
    with unchanged(database):
        result = run_migrator(*command.split(), cwd=folder, database=database)
    refusal(result, BAD, command.split()[1], words, f"`{out}`")
    done(run_migrator(*out.split()[1:], cwd=folder, database=database))
