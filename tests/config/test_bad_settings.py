"""Bad settings and bad arguments: code 10, every problem in one message, nothing touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from migrator.outcome import ExitCode
from tests.support import PLANTED
from tests.support.outcomes import done, refusal, unchanged
from tests.support.projects import linear_history
from tests.support.runner import Runner
from tests.support.servers import Database

Project = Callable[..., Path]

BAD = ExitCode.BAD_SETTINGS


def test_without_any_address_every_way_to_give_one_is_named(project: Project, run_migrator: Runner) -> None:
    result = run_migrator(cwd=project(revisions=linear_history(1)))
    refusal(result, BAD, "no database address", "MIGRATOR_DATABASE_URL", "PGHOST", "POSTGRES_HOST")


@pytest.mark.parametrize("name", ["MIGRATOR_DATABASE_URL", "DATABASE_URL"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_address_is_said_to_be_empty(
    project: Project, run_migrator: Runner, name: str, value: str
) -> None:
    result = run_migrator(cwd=project(revisions=linear_history(1)), env={name: value})
    refusal(result, BAD, "no database address", f"{name} is empty")


def test_empty_settings_are_settings_that_are_not_set(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    # compose writes `${NAME:-}` for what its .env file leaves out
    names = ("WAIT_TIMEOUT", "BACKUP", "LOCK_TIMEOUT", "REPORT_FILE", "LOG_LEVEL", "PG_BIN", "BASELINE")
    empty = {f"MIGRATOR_{name}": "" for name in names} | {"ALEMBIC_CONFIG": "", "DATABASE_URL": ""}
    result = run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=empty)
    done(result)


def test_all_malformed_settings_are_said_in_one_message(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(1))
    (folder / "pyproject.toml").write_text('[tool.migrator]\nbackup_ulr = "file:///b"\nlog_level = "loud"\n')
    env = {
        "MIGRATOR_WAIT_TIMEOUT": "soon",
        "MIGRATOR_LOCK_TIMEOUT": "-1",
        "MIGRATOR_BACKUP": "maybe",
        "MIGRATOR_BACKUP_URL": "ftp://backups",
        "MIGRATOR_WAIT_FOR_DATABASE": "perhaps",
        "MIGRATOR_VERSION_TABLE": "a b",
    }
    with unchanged(database):
        result = run_migrator("--statement-timeout", "9 lives", cwd=folder, database=database, env=env)
    sentence = refusal(
        result,
        BAD,
        *env,
        *env.values(),
        "--statement-timeout",
        "'9 lives'",
        "'backup_ulr'; did you mean backup_url?",
        "log_level: 'loud'",
    )
    assert "9 problems" in sentence


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (f"mysql://root:{quote(PLANTED)}@127.0.0.1/db", "its scheme is not postgresql://"),
        (f"postgresql://postgres:{quote(PLANTED)}@127.0.0.1:54x2/db", "does not have the form postgresql://"),
        (f"postgresql://postgres:{quote(PLANTED)}@127.0.0.1:99999/db", "'99999' is not a number"),
        (f"postgresql://postgres:{quote(PLANTED)}@127.0.0.1", "names no database"),
        (f"host=127.0.0.1 password='{PLANTED}", "key=value pairs"),
        (f"dbname=x password='{PLANTED}' =", "key=value pairs"),
        (f"127.0.0.1 {PLANTED}", "is not a Postgres address: write postgresql://"),
    ],
)
def test_a_malformed_address_is_explained_and_not_repeated(
    project: Project, run_migrator: Runner, address: str, says: str
) -> None:
    folder = project(revisions=linear_history(1))
    result = run_migrator(cwd=folder, env={"MIGRATOR_DATABASE_URL": address})
    refusal(result, BAD, "MIGRATOR_DATABASE_URL is not a database address", says)


@pytest.mark.parametrize("name", ["MIGRATOR_DATABASE_URL", "POSTGRES_PASSWORD", "PGPASSWORD"])
def test_a_secret_and_its_file_are_one_too_many(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text(PLANTED)
    env = {name: database.url, f"{name}_FILE": str(tmp_path / "secret")}
    with unchanged(database):
        result = run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=env)
    refusal(result, BAD, f"both {name} and {name}_FILE are set")


def test_a_secret_file_that_is_missing_empty_or_no_text_is_named(
    project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    env = {
        "MIGRATOR_DATABASE_URL_FILE": str(tmp_path / "empty"),
        "PGPASSWORD_FILE": str(tmp_path / "binary"),
        "POSTGRES_PASSWORD_FILE": str(tmp_path / "missing"),
    }
    result = run_migrator(cwd=project(revisions=linear_history(1)), env=env)
    refusal(result, BAD, *env, *env.values(), "No such file", "is empty", "not UTF-8")


def address_forms(database: Database, folder: Path) -> dict[str, dict[str, str]]:
    """Return the environment of each way in which people write an address."""
    server = database.server
    host, port, user, name = server.host, str(server.port), server.user, database.name
    place = f"{host}:{port}/{name}"
    (folder / "password").write_text(f"{PLANTED}\n")
    (folder / "url").write_text(database.url)
    postgres = {"POSTGRES_HOST": host, "POSTGRES_PORT": port, "POSTGRES_USER": user, "POSTGRES_DB": name}
    libpq = {"PGHOST": host, "PGPORT": port, "PGUSER": user, "PGDATABASE": name}
    dsn = f"host={host} port={port} user={user} dbname={name}"
    encoded, raw = quote(PLANTED, safe=""), PLANTED
    return {
        "encoded": {"MIGRATOR_DATABASE_URL": f"postgresql://{user}:{encoded}@{place}"},
        "raw": {"MIGRATOR_DATABASE_URL": f"postgresql://{user}:{raw}@{place}"},
        "raw, with a query": {"DATABASE_URL": f"postgres://{user}:{raw}@{place}?sslmode=prefer"},
        "psycopg": {"SQLALCHEMY_DATABASE_URI": f"postgresql+psycopg://{user}:{encoded}@{place}"},
        "asyncpg": {"POSTGRES_DB_URL": f"postgresql+asyncpg://{user}:{encoded}@{place}"},
        "file": {"MIGRATOR_DATABASE_URL_FILE": str(folder / "url")},
        "PG*": libpq | {"PGPASSWORD": PLANTED},
        "PG* with a file": libpq | {"PGPASSWORD_FILE": str(folder / "password")},
        "POSTGRES_*": postgres | {"POSTGRES_PASSWORD": PLANTED},
        "POSTGRES_* with a file": postgres | {"POSTGRES_PASSWORD_FILE": str(folder / "password")},
        "DSN": {"MIGRATOR_DATABASE_URL": f"{dsn} password='{PLANTED}'"},
        "DSN, escaped": {"MIGRATOR_DATABASE_URL": f"{dsn} password={PLANTED.replace(' ', chr(92) + ' ')}"},
    }


@pytest.mark.parametrize("form", ["raw", "psycopg", "POSTGRES_* with a file"])
def test_any_character_in_the_password_gets_through_every_stage(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path, form: str
) -> None:
    assert set("%@:/ ") <= set(PLANTED)
    database.execute("CREATE TABLE kept (id int)")  # so that there is something to back up
    env = address_forms(database, tmp_path)[form] | {"MIGRATOR_PG_BIN": str(database.server.bin)}
    run = ("upgrade", "--baseline", "base", "--format", "json")
    result = done(run_migrator(*run, cwd=project(revisions=linear_history(1)), env=env))
    assert result.answer["backup"]["id"]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


def test_any_character_in_the_password_in_any_form_of_the_address(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(1))
    for form, env in address_forms(database, tmp_path).items():
        result = run_migrator("wait", "--wait-timeout", "0", cwd=folder, env=env)
        assert result.code == 0, f"{form}: {result}"
        assert database.name in result.stdout


def test_the_password_with_odd_characters_reaches_an_async_env_too(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(1), env="async_engine")
    result = run_migrator(cwd=folder, env=address_forms(database, tmp_path)["asyncpg"])
    done(result)
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]


def test_no_project_says_where_it_was_looked_for(
    database: Database, run_migrator: Runner, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with unchanged(database):
        result = run_migrator(cwd=tmp_path / "empty", database=database)
    refusal(result, BAD, str(tmp_path / "empty"), "alembic.ini", "pyproject.toml", "/app")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-c", "nowhere.ini"), "nowhere.ini: no such file"),
        (("-n", "nosuch"), "[nosuch]"),
    ],
)
def test_a_project_that_is_named_wrongly(
    database: Database, project: Project, run_migrator: Runner, arguments: tuple[str, ...], says: str
) -> None:
    folder = project(revisions=linear_history(1))
    with unchanged(database):
        result = run_migrator(*arguments, "upgrade", cwd=folder, database=database)
    refusal(result, BAD, says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("upgrad",), "'upgrad'"),
        (("upgrade", "--backups", "off"), "--backups"),
        (("--nosuch", "upgrade"), "--nosuch"),
        (("upgrade", "head", "head2"), "head2"),
        (("downgrade",), "REVISION"),
        (("upgrade", "--format", "xml"), "'xml'"),
        (("upgrade", "--wait-timeout"), "--wait-timeout"),
        (("current", "--yes"), "--yes"),
    ],
)
def test_wrong_arguments_touch_nothing(
    database: Database, project: Project, run_migrator: Runner, arguments: tuple[str, ...], says: str
) -> None:
    folder = project(revisions=linear_history(1))
    result = run_migrator(*arguments, cwd=folder, database=database)
    refusal(result, BAD, says, "--help")
    assert database.psql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]


def test_a_misspelt_variable_is_pointed_out_and_a_service_link_is_not(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    env = {"MIGRATOR_BACKUPS": "off", "MIGRATOR_PORT": "tcp://10.0.0.1:80"}
    result = run_migrator(cwd=project(revisions=linear_history(1)), database=database, env=env)
    done(result)
    warnings = [line["message"] for line in result.logs if line["level"] == "warning"]
    assert warnings == ["MIGRATOR_BACKUPS is not a setting; did you mean MIGRATOR_BACKUP?"]
