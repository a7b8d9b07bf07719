"""A run with nothing to do: no Alembic, no SQLAlchemy, one question; and the long way wherever that is not enough."""

from __future__ import annotations

import json
import os
import py_compile
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import Revision, linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server

HEAVY = ("alembic", "sqlalchemy", "tenacity", "mako", "ssl", "argparse")
STALE = "manifest.json is stale"


class Glance:
    """A project at its head, frozen; runs in which nothing heavy can be imported, and runs in which it can."""

    def __init__(self, folder: Path, run: Runner, database: Database, poison: Path) -> None:
        self.folder, self.database = folder, database
        self._run, self._poison = run, poison

    def fast(self, *words: str, **options: Any) -> Result:
        """Run where only the glance can succeed."""
        path = os.pathsep.join(filter(None, (str(self._poison), os.environ.get("PYTHONPATH", ""))))
        env = {**options.pop("env", {}), "PYTHONPATH": path}
        return self.run(*words, env=env, **options)

    def run(self, *words: str, **options: Any) -> Result:
        """Run as ever."""
        options.setdefault("cwd", self.folder)
        return self._run(*words, database=self.database, **options)


@pytest.fixture
def frozen(
    project: Callable[..., Path], run_migrator: Runner, database: Database, tmp_path: Path
) -> Callable[..., Glance]:
    """Make a project, bring the database to its heads, and freeze it."""
    poison = tmp_path / "poison"
    for name in HEAVY:
        (poison / name).mkdir(parents=True)
        (poison / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")

    def make(
        *words: str,
        revisions: list[Revision] | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Glance:
        options.setdefault("name", "project")
        folder = project(revisions=revisions or linear_history(3), env="own_variable", **options)
        glance = Glance(folder, run_migrator, database, poison)
        done = glance.run(*words, "upgrade", "heads", env=env)
        assert done.code == 0, done
        assert glance.run(*words, "freeze", env=env).code == 0
        return glance

    return make


def test_nothing_heavy_is_imported(frozen: Callable[..., Glance]) -> None:
    result = frozen().fast()
    assert result.code == 0, result
    assert "Nothing to do:" in result.stdout
    assert "is at r003 (head), verified." in result.stdout


def test_no_module_of_the_standard_library_that_takes_long_is_imported(
    frozen: Callable[..., Glance], tmp_path: Path
) -> None:
    glance = frozen()
    for name in ("dataclasses", "inspect", "logging", "pathlib", "urllib"):
        (tmp_path / "poison" / name).mkdir()
        (tmp_path / "poison" / name / "__init__.py").write_text(
            f"raise RuntimeError('{name} was imported')\n"
        )
    result = glance.fast()
    assert result.code == 0, result
    assert [line["message"] for line in result.logs] == [result.stdout.strip()]


def test_psycopg2_does_not_load_ssl(frozen: Callable[..., Glance], tmp_path: Path) -> None:
    """It would hide the error of the poison, so a module in that place leaves a file."""
    glance = frozen()
    seen = tmp_path / "seen"
    (tmp_path / "poison" / "ssl" / "__init__.py").write_text(f"open({str(seen)!r}, 'w').close()\n")
    assert glance.fast().code == 0
    assert not seen.exists()


def test_the_poison_works(frozen: Callable[..., Glance]) -> None:
    glance = frozen()
    (glance.folder / "migrations" / "manifest.json").unlink()
    assert glance.fast().code != 0
    assert glance.run().code == 0


NAMED = {"MIGRATOR_VERSION_TABLE": "public.alembic_version"}


@pytest.mark.parametrize(
    ("words", "env"),
    [
        ((), {}),
        (("upgrade",), {}),
        (("upgrade", "head"), {}),
        (("upgrade", "heads"), {}),
        (("upgrade", "r003"), {}),
        ((), {**NAMED, "MIGRATOR_BOOTSTRAP": "module:callable"}),
    ],
)
def test_every_way_to_ask(words: tuple[str, ...], env: dict[str, str], frozen: Callable[..., Glance]) -> None:
    result = frozen().fast(*words, env=env)
    assert result.code == 0, result


def test_with_x_where_the_version_table_is_named(frozen: Callable[..., Glance]) -> None:
    result = frozen().run("-x", "a=b", env={**NAMED, "MIGRATOR_LOG_LEVEL": "debug"})
    assert (result.code, "the fast path is not enough" in result.stderr) == (0, False), result


SLOW = {
    "options of its own": (
        "",
        (),
        {},
        "code in env.py may choose the version table: set MIGRATOR_VERSION_TABLE",
    ),
    "-x": ("", ("-x", "a=b"), {}, "-x may choose the version table: set MIGRATOR_VERSION_TABLE=schema.name"),
    "a bootstrap": (
        "",
        (),
        {"MIGRATOR_BOOTSTRAP": "m:f"},
        "m:f may choose the version table: set MIGRATOR_VERSION",
    ),
    "a package": ("sourceless = true\n", (), {}, "sourceless"),
}


@pytest.mark.parametrize("why", SLOW)
def test_freeze_says_why_runs_are_slow_all_the_same(
    why: str, project: Callable[..., Path], run_migrator: Runner
) -> None:
    ini, words, env, reason = SLOW[why]
    folder = project(revisions=linear_history(1))
    (folder / "alembic.ini").write_text((folder / "alembic.ini").read_text() + ini)
    (folder / "m.py").write_text("import contextlib\nf = contextlib.contextmanager(lambda config: (yield))\n")
    if why == "options of its own":
        file = folder / "migrations" / "env.py"
        file.write_text(
            file.read_text().replace("connection=connection, ", "connection=connection, **dict(), ")
        )
    slow = run_migrator(*words, "freeze", cwd=folder, env=env)
    assert slow.code == 0, slow
    assert f"The up-to-date check is still slow: {reason}" in slow.stdout.replace(
        "the revisions are in a package or ", ""
    )
    if not ini:
        quick = run_migrator(*words, "freeze", cwd=folder, env={**env, **NAMED})
        assert (quick.code, "still slow" in quick.stdout) == (0, False), quick


def test_a_history_without_source_is_frozen_as_it_can_be_read(
    database: Database, project: Callable[..., Path], run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    with (folder / "alembic.ini").open("a") as ini:
        ini.write("sourceless = true\n")
    for file in (folder / "migrations" / "versions").glob("*.py"):
        py_compile.compile(str(file), cfile=f"{file}c")
        file.unlink()
    assert run_migrator("freeze", cwd=folder).code == 0
    assert run_migrator("freeze", "--check", cwd=folder).code == 0
    for _ in range(2):
        result = run_migrator(cwd=folder, database=database)
        assert result.code == 0, result
        assert "manifest.json" not in result.stderr


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Return an outcome without what differs from run to run."""
    text = re.sub(r'"(seconds|run_id|started_at)": [^,}\n]+', r'"\1": 0', json.dumps(document))
    plain: dict[str, Any] = json.loads(text)
    return plain


@pytest.mark.parametrize("verify_toml", [False, True])
def test_the_outcome_is_that_of_the_long_way(
    verify_toml: bool, frozen: Callable[..., Glance], tmp_path: Path
) -> None:
    files = {"migrations/verify.toml": '[tables.t1]\ncolumns = { id = "integer not null" }\n'}
    glance = frozen(files=files if verify_toml else {})
    fast, slow = tmp_path / "fast.json", tmp_path / "slow.json"
    said = {}
    for report, run in ((fast, glance.fast), (slow, glance.run)):
        line = tmp_path / f"{report.stem}.line"
        line.touch()
        env = {"MIGRATOR_REPORT_FILE": str(report), "MIGRATOR_TERMINATION_LOG": str(line)}
        result = run(env=env)
        assert result.code == 0, result
        assert json.loads(report.read_text())["code"] == 0
        said[report.stem] = (result.stdout, line.read_text(), [item["message"] for item in result.logs])
        (glance.folder / "migrations" / "manifest.json").unlink(missing_ok=True)
    assert said["fast"] == said["slow"]
    assert _plain(json.loads(fast.read_text())) == _plain(json.loads(slow.read_text()))


def test_the_server_is_asked_once(
    project: Callable[..., Path], run_migrator: Runner, private_server: Callable[..., Server]
) -> None:
    server = private_server(settings={"log_statement": "all", "log_line_prefix": "%a|"})
    database = server.create_database()
    folder = project(revisions=linear_history(2), env="own_variable")
    run_migrator("upgrade", cwd=folder, database=database)
    run_migrator("freeze", cwd=folder)
    before = len(server.log.read_text())
    assert run_migrator(cwd=folder, database=database).code == 0
    said = server.log.read_text()[before:].splitlines()
    asked = [line for line in said if line.startswith("migrator/") and "statement: " in line]
    assert len(asked) == 1, said
    assert not any("pg_try_advisory_lock" in line for line in said)


Change = Callable[[Path], object]


def _append(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text((path.read_text() if path.exists() else "") + text)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_append("migrations/versions/r002.py", "# a comment\n"), "versions/r002.py was edited"),
        (_append("migrations/env.py", "# a comment\n"), "env.py was edited"),
        (
            _append(
                "migrations/versions/r004.py",
                "revision = 'r004'\ndown_revision = 'r003'\ndef upgrade(): pass\n",
            ),
            "is not in it",
        ),
        (
            _append("alembic.ini", "version_locations = %(here)s/migrations/versions\n"),
            "version_locations changed",
        ),
        (_append("migrations/manifest.json", "x"), "it is not valid"),
    ],
)
def test_a_manifest_of_other_files_is_said_and_not_used(
    change: Change, says: str, frozen: Callable[..., Glance]
) -> None:
    glance = frozen(files={"alembic.ini": "[alembic]\nscript_location = %(here)s/migrations\n"})
    change(glance.folder)
    assert glance.fast().code != 0
    result = glance.run(env={"MIGRATOR_EDITED": "cosmetic"})
    assert result.code in {0, 39}, result
    assert STALE in result.stderr
    assert says in result.stderr


def test_a_new_revision_is_applied_and_not_overlooked(
    frozen: Callable[..., Glance], project: Callable[..., Path]
) -> None:
    glance = frozen()
    project(revisions=linear_history(4)[3:], env="own_variable")
    result = glance.run()
    assert result.code == 0, result
    assert glance.database.psql("SELECT version_num FROM alembic_version") == [("r004",)]
    assert glance.run("freeze").code == 0
    assert glance.fast().code == 0


@pytest.mark.parametrize(
    ("words", "env"),
    [
        (("-x", "a=b"), {}),
        (("upgrade", "r00"), {}),
        (("-x", "a=b"), {"MIGRATOR_VERSION_TABLE": "alembic_version"}),
        ((), {"MIGRATOR_BACKUP": "always"}),
        ((), {"MIGRATOR_VERSION_TABLE": "another"}),
        ((), {"MIGRATOR_BOOTSTRAP": "module:callable"}),
    ],
)
def test_what_is_unusual_goes_the_long_way(
    words: tuple[str, ...], env: dict[str, str], frozen: Callable[..., Glance]
) -> None:
    result = frozen().fast(*words, env=env)
    assert result.code not in {0, 10}, result


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE alembic_version SET version_num = 'r002'; DROP TABLE t3",
        "DELETE FROM alembic_version",
        "DROP TABLE alembic_version",
        "INSERT INTO alembic_version VALUES ('elsewhere')",
        "DROP TABLE migrator_ledger",
        "UPDATE migrator_ledger SET digest = 'another' WHERE event = 'run'",
        "UPDATE migrator_ledger SET code = 40 WHERE event = 'run'",
        "UPDATE migrator_ledger SET version_table = 'another'",
        "CREATE SCHEMA s; ALTER TABLE migrator_ledger SET SCHEMA s",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 't1_pkey'::regclass",
    ],
)
def test_a_database_that_is_not_as_the_last_run_left_it_goes_the_long_way(
    sql: str, frozen: Callable[..., Glance]
) -> None:
    glance = frozen()
    glance.database.execute(sql)
    assert glance.fast().code != 0


def test_without_a_ledger_the_version_rows_decide(frozen: Callable[..., Glance]) -> None:
    glance = frozen()
    off = {"MIGRATOR_LEDGER": "false"}
    glance.database.execute("DROP TABLE migrator_ledger")
    assert glance.fast(env=off).code == 0
    glance.database.execute("UPDATE alembic_version SET version_num = 'r002'; DROP TABLE t3")
    assert glance.fast(env=off).code != 0
    assert glance.run(env=off).code == 0
    assert glance.database.psql("SELECT count(*) FROM t3") == [(0,)]


def test_what_verify_expects_is_still_checked(frozen: Callable[..., Glance]) -> None:
    expectations = (
        '[tables.t1]\ncolumns = { id = "integer not null" }\n'
        '[[assertions]]\nname = "a"\nsql = "SELECT count(*) FROM t2"\nexpect = 0\n'
    )
    glance = frozen(files={"migrations/verify.toml": expectations})
    assert glance.fast().code == 0
    glance.database.execute("INSERT INTO t2 VALUES (1)")
    result = glance.run()
    assert result.code == 41, result
    assert "assertion 'a'" in result.stderr


def test_an_invalid_index_is_still_found(frozen: Callable[..., Glance]) -> None:
    glance = frozen()
    glance.database.execute(
        "CREATE INDEX broken ON t1 (note);"
        " UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken'::regclass"
    )
    result = glance.run()
    assert result.code == 41, result
    assert "public.broken" in result.stderr


def test_a_database_that_takes_no_changes_is_refused_as_ever(frozen: Callable[..., Glance]) -> None:
    glance = frozen()
    glance.database.execute(f'ALTER DATABASE "{glance.database.name}" SET default_transaction_read_only = on')
    result = glance.run()
    assert result.code == 30, result


LAYOUTS: Mapping[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "an ini elsewhere": (
        ("-c", "conf/db.ini"),
        {"conf/db.ini": "[alembic]\nscript_location = %(here)s/../migrations\n"},
    ),
    "a relative script_location": ((), {"alembic.ini": "[alembic]\nscript_location = migrations\n"}),
    "a reference within the ini": (
        (),
        {"alembic.ini": "[DEFAULT]\nbase = %(here)s\n[alembic]\nscript_location = %(base)s/migrations\n"},
    ),
    "an address with a percent sign": (
        (),
        {
            "alembic.ini": "[alembic]\nscript_location = migrations\nsqlalchemy.url = postgresql://u:p%40@h/d\n"
        },
    ),
    "an ini beside env.py, which names no script_location": (
        ("-c", "migrations/alembic.ini"),
        {"migrations/alembic.ini": "[alembic]\n"},
    ),
    "several folders": (
        (),
        {
            "alembic.ini": "[alembic]\nscript_location = migrations\npath_separator = space\n"
            "version_locations = %(here)s/migrations/versions %(here)s/more\n",
            "more/m001.py": "revision = 'm001'\ndown_revision = 'r003'\ndef upgrade(): pass\n",
        },
    ),
    "folders below folders": (
        (),
        {
            "alembic.ini": "[alembic]\nscript_location = migrations\nrecursive_version_locations = true\n",
            "migrations/versions/2024/m001.py": "revision = 'm001'\ndown_revision = 'r003'\ndef upgrade(): pass\n",
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_projects(layout: str, frozen: Callable[..., Glance]) -> None:
    words, files = LAYOUTS[layout]
    glance = frozen(*words, files=files)
    # An option needs the argument parser: the variable does not.
    env = {"ALEMBIC_CONFIG": words[1]} if words else {}
    result = glance.fast(env=env)
    assert result.code == 0, result
    assert STALE not in result.stderr


@pytest.mark.parametrize("config", ["pyproject.toml", None])
def test_projects_without_an_ini(config: str | None, frozen: Callable[..., Glance]) -> None:
    result = frozen(config=config).fast()
    assert result.code == 0, result
    assert STALE not in result.stderr


def test_a_section_of_the_ini(frozen: Callable[..., Glance]) -> None:
    ini = "[alembic]\nscript_location = nowhere\n[second]\nscript_location = migrations\n"
    glance = frozen("-n", "second", files={"alembic.ini": ini})
    result = glance.run("-n", "second")
    assert result.code == 0, result
    assert STALE not in result.stderr


def test_several_heads_are_named_as_such(frozen: Callable[..., Glance]) -> None:
    branches = [Revision("a1", None), Revision("b2", "a1"), Revision("c2", "a1")]
    glance = frozen(revisions=branches)
    assert glance.fast("upgrade", "heads").code == 0
    result = glance.run("upgrade", "head")
    assert result.code == 31, result


def test_an_application_that_moved_with_its_manifest(frozen: Callable[..., Glance], tmp_path: Path) -> None:
    """Frozen in the build, run somewhere else: nothing in the manifest depends on where that was."""
    glance = frozen()
    moved = tmp_path / "elsewhere" / "app"
    moved.parent.mkdir()
    glance.folder.rename(moved)
    result = glance.fast(cwd=moved)
    assert result.code == 0, result
