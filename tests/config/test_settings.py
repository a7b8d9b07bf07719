"""Settings: where each comes from, and every problem in one message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from migrator.config.database_url import Target
from migrator.config.settings import (
    ADDRESS_VARIABLES,
    OPTIONS,
    SECRET_VARIABLES,
    Settings,
    flag_name,
    load,
    table,
    variable_name,
)
from migrator.config.value_parsers import backup_url, boolean, duration, optional_duration, relation
from migrator.errors import SettingsError
from migrator.outcome import ExitCode
from tests.support import PLANTED

URL = f"postgresql://u:{quote(PLANTED, safe='')}@h/db"
NOWHERE = Path("/nowhere")


def loaded(environment: Mapping[str, str] | None = None, folder: Path = NOWHERE, **flags: str) -> Settings:
    return load(flags, {"MIGRATOR_DATABASE_URL": URL, **(environment or {})}, folder)


def problems(
    environment: Mapping[str, str],
    folder: Path = NOWHERE,
    flags: Mapping[str, str] | None = None,
    **options: Any,
) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(flags or {}, environment, folder, **options)
    assert caught.value.code is ExitCode.BAD_SETTINGS
    assert PLANTED not in str(caught.value)
    assert quote(PLANTED, safe="") not in str(caught.value)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return caught.value.problems


def pyproject(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_the_defaults() -> None:
    """The numbers that other people's manifests rely on."""
    found = loaded()
    assert (found.wait_timeout, found.run_lock_timeout, found.lock_timeout) == (60, 600, 5)
    assert (found.statement_timeout, found.backup, found.backup_url) == (None, "auto", "file:///backups")
    assert (found.on_failure, found.log_format, found.log_level) == ("stop", "auto", "info")
    assert found.termination_log == "/dev/termination-log"
    for item in OPTIONS:
        if item.shown:
            assert item.read(item.shown) == item.default


def test_precedence_is_flag_environment_file_default(tmp_path: Path) -> None:
    folder = pyproject(tmp_path, "[tool.migrator]\nwait_timeout = '1s'\nlock-timeout = 2\nbackup = 'off'\n")
    environment = {"MIGRATOR_WAIT_TIMEOUT": "3s", "MIGRATOR_LOCK_TIMEOUT": "4s"}
    found = loaded(environment, folder, wait_timeout="5s")
    assert (found.wait_timeout, found.lock_timeout, found.backup, found.connect_timeout) == (5, 4, "off", 5)
    assert found.sources["wait_timeout"] == "--wait-timeout"
    assert found.sources["lock_timeout"] == "MIGRATOR_LOCK_TIMEOUT"
    assert found.sources["backup"] == "pyproject.toml [tool.migrator] backup"
    assert found.sources["connect_timeout"] == "default"


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    folder = pyproject(tmp_path, "[tool.migrator]\nbackup = 'off'\n")
    found = loaded({"MIGRATOR_BACKUP": "", "MIGRATOR_WAIT_TIMEOUT": "  ", "DATABASE_URL_FILE": ""}, folder)
    assert (found.backup, found.wait_timeout) == ("off", 60)


def test_values_of_every_kind_in_the_file(tmp_path: Path) -> None:
    text = "[tool.migrator]\nwait-for-database = true\nwait_timeout = 1.5\nlock_timeout = 'none'\n"
    found = loaded(folder=pyproject(tmp_path, text))
    assert (found.wait_for_database, found.wait_timeout, found.lock_timeout) == (True, 1.5, None)


@pytest.mark.parametrize("number", range(len(ADDRESS_VARIABLES)))
def test_the_address_comes_from_the_first_variable_of_the_list(number: int) -> None:
    environment = {name: f"postgresql://h/{name.lower()}" for name in ADDRESS_VARIABLES[number:]}
    environment |= {"PGHOST": "pg", "PGDATABASE": "pg", "POSTGRES_HOST": "image"}
    found = load({}, environment, NOWHERE)
    assert found.required_target.database == ADDRESS_VARIABLES[number].lower()
    assert found.sources["target"] == ADDRESS_VARIABLES[number]


def test_the_address_comes_from_parts_where_no_variable_has_it_whole() -> None:
    environment = {"PGHOST": "pg", "PGDATABASE": "d", "POSTGRES_HOST": "image", "POSTGRES_DB": "i"}
    assert load({}, environment, NOWHERE).target == Target("pg", "", "d")
    del environment["PGHOST"], environment["PGDATABASE"]
    found = load({}, environment, NOWHERE)
    assert found.target == Target("image", "", "i", "postgres")
    assert found.sources["target"] == "POSTGRES_*"


def test_the_direct_address_wins() -> None:
    found = loaded({"MIGRATOR_DIRECT_URL": "postgresql://direct/db"})
    assert (found.required_target.host, found.sources["target"]) == ("direct", "MIGRATOR_DIRECT_URL")
    assert PLANTED in found.secrets


NO_ADDRESS = ("AWS_", "MIGRATOR_VERIFY_URL")


@pytest.mark.parametrize("name", [name for name in SECRET_VARIABLES if not name.startswith(NO_ADDRESS)])
def test_every_secret_can_be_a_file(tmp_path: Path, name: str) -> None:
    password = name.endswith("PASSWORD")
    secret = tmp_path / "secret"
    secret.write_text((PLANTED if password else URL) + "\r\n")
    environment = {f"{name}_FILE": str(secret)}
    if password:
        prefix = "PG" if name.startswith("PG") else "POSTGRES_"
        environment |= {f"{prefix}HOST": "h", f"{prefix}USER": "u"}
        environment["PGDATABASE" if prefix == "PG" else "POSTGRES_DB"] = "db"
    found = load({}, environment, NOWHERE)
    assert found.required_target.password == PLANTED
    assert PLANTED in found.secrets


def test_a_password_in_a_file_is_that_of_an_address_without_one(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(PLANTED)
    environment = {"DATABASE_URL": "postgresql://u@h/db", "PGPASSWORD_FILE": str(secret)}
    target = load({}, environment, NOWHERE).required_target
    assert (target.host, target.password) == ("h", PLANTED)
    assert target.source is not None
    secret.write_text("the next one")
    assert target.source.now().password == "the next one"
    own = load({}, {**environment, "DATABASE_URL": "postgresql://u:own@h/db"}, NOWHERE).required_target
    assert own.password == "own"


def test_the_server_for_proofs(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(URL + "\n")
    environment = {"DATABASE_URL": "postgresql://h/db", "MIGRATOR_VERIFY_URL_FILE": str(secret)}
    found = load({}, environment, NOWHERE)
    assert (found.required_target.host, found.verify_url) == ("h", URL)
    assert PLANTED in found.secrets
    (row,) = [row for row in table(found) if row["variable"] == "MIGRATOR_VERIFY_URL"]
    assert PLANTED not in row["value"]
    assert row["value"].startswith("postgresql://")
    assert row["value"] != str(found.required_target)
    with pytest.raises(SettingsError, match="MIGRATOR_VERIFY_URL is not a database address"):
        load({}, {"DATABASE_URL": "postgresql://h/db", "MIGRATOR_VERIFY_URL": "mysql://h/db"}, NOWHERE)


def test_the_keys_of_a_bucket_can_be_files(tmp_path: Path) -> None:
    environment = {"DATABASE_URL": "postgresql://h/db"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        (tmp_path / name).write_text(f"{PLANTED}-{name}\n")
        environment[f"{name}_FILE"] = str(tmp_path / name)
    found = load({}, environment, NOWHERE)
    assert found.aws_access_key_id == f"{PLANTED}-AWS_ACCESS_KEY_ID"
    assert found.aws_secret_access_key == f"{PLANTED}-AWS_SECRET_ACCESS_KEY"
    assert {f"{PLANTED}-AWS_SECRET_ACCESS_KEY", f"{PLANTED}-AWS_SESSION_TOKEN"} <= set(found.secrets)
    assert PLANTED not in repr(found) + str(table(found))


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_a_secret_in_both_ways_is_an_error(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(URL)
    found = problems({"DATABASE_URL": URL, name: URL, f"{name}_FILE": str(secret)})
    assert found == (f"both {name} and {name}_FILE are set: keep one",)


def test_files_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    environment = {
        "MIGRATOR_DATABASE_URL": URL,
        "DATABASE_URL_FILE": str(tmp_path / "none"),
        "POSTGRES_DB_URL_FILE": str(tmp_path),
        "PGPASSWORD_FILE": str(empty),
        "POSTGRES_PASSWORD_FILE": str(binary),
    }
    assert problems(environment) == (
        f"DATABASE_URL_FILE: cannot read {tmp_path}/none: No such file or directory",
        f"POSTGRES_DB_URL_FILE: cannot read {tmp_path}: Is a directory",
        f"PGPASSWORD_FILE: {empty} is empty",
        f"POSTGRES_PASSWORD_FILE: cannot read {binary}: it is not UTF-8 text",
    )


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    folder = pyproject(
        tmp_path,
        "[tool.migrator]\nwait_timout = 1\ndatabase_url = 'x'\nlock_timeout = []\nbackup = 'maybe'\nzzz = 1\n",
    )
    environment = {
        "MIGRATOR_WAIT_TIMEOUT": "soon",
        "MIGRATOR_RUN_LOCK_TIMEOUT": "-5s",
        "MIGRATOR_WAIT_FOR_DATABASE": "maybe",
        "MIGRATOR_LOG_FORMAT": "xml",
        "MIGRATOR_BACKUP_URL": f"s3://key:{quote(PLANTED, safe='')}@bucket",
        "MIGRATOR_VERSION_TABLE": "a b",
        "MIGRATOR_ON_FAILURE": "retry",
        "MIGRATOR_DATABASE_URL": f"mysql://u:{PLANTED}@h/db",
    }
    assert problems(environment, folder, {"connect_timeout": "1 fortnight"}) == (
        "pyproject.toml [tool.migrator]: unknown key 'wait_timout'; did you mean wait_timeout?",
        "pyproject.toml [tool.migrator]: database_url holds a password; set MIGRATOR_DATABASE_URL",
        "pyproject.toml [tool.migrator]: lock_timeout is not a single value",
        "pyproject.toml [tool.migrator]: unknown key 'zzz'",
        "MIGRATOR_WAIT_TIMEOUT: 'soon' is not a duration such as 90, 90s or 5m",
        "MIGRATOR_WAIT_FOR_DATABASE: 'maybe' is not true or false",
        "--connect-timeout: '1 fortnight' is not a duration such as 90, 90s or 5m",
        "MIGRATOR_RUN_LOCK_TIMEOUT: '-5s' is not a duration such as 90, 90s or 5m",
        "pyproject.toml [tool.migrator] backup: 'maybe' is not one of auto, always, off",
        "MIGRATOR_BACKUP_URL: an address is not a folder such as file:///backups or a bucket such as s3://bucket/prefix",
        "MIGRATOR_ON_FAILURE: 'retry' is not one of stop, downgrade, restore",
        "MIGRATOR_VERSION_TABLE: 'a b' is not a table name such as alembic_version or app.alembic_version",
        "MIGRATOR_LOG_FORMAT: 'xml' is not one of auto, json, text",
        "MIGRATOR_DATABASE_URL is not a database address: its scheme is not postgresql://",
    )


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, "no database address: set MIGRATOR_DATABASE_URL (or DATABASE_URL"),
        ({"DATABASE_URL": " "}, "; DATABASE_URL is empty"),
        (
            {"MIGRATOR_DATABSE_URL": URL},
            "; MIGRATOR_DATABSE_URL is not a setting; did you mean MIGRATOR_DATABASE_URL?",
        ),
        ({"DATABASE_URL": "sqlite:///x.db"}, "DATABASE_URL is not a database address: its scheme is not"),
        ({"PGHOST": "h", "PGDATABASE": "d", "PGPORT": "x"}, "the address in PG*: its port 'x'"),
        ({"POSTGRES_HOST": "h", "POSTGRES_PORT": "x"}, "the address in POSTGRES_*: its port 'x'"),
        ({"PGPASSWORD": PLANTED}, "no database address"),
    ],
)
def test_without_an_address(environment: Mapping[str, str], problem: str) -> None:
    (found,) = problems(environment)
    assert problem in found


def test_commands_without_a_database_need_no_address() -> None:
    found = load({}, {}, NOWHERE, needs_target=False)
    assert found.target is None
    with pytest.raises(SettingsError, match="no database address"):
        _ = found.required_target
    assert "scheme" in problems({"DATABASE_URL": "sqlite:///x"}, needs_target=False)[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tool.migrator", "pyproject.toml cannot be read: "),
        ("tool = 1", "pyproject.toml: tool is not a table: write [tool.migrator]"),
        ("[tool]\nmigrator = 'x'", "pyproject.toml: migrator is not a table: write [tool.migrator]"),
        (
            "[[tool.migrator]]\nbackup = 'off'",
            "pyproject.toml: migrator is not a table: write [tool.migrator]",
        ),
        (
            "[tool.migrator.wait_timeout]\nx = 1",
            "pyproject.toml [tool.migrator]: wait_timeout is not a single value",
        ),
    ],
)
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems({"DATABASE_URL": URL}, pyproject(tmp_path, text))
    assert found.startswith(problem)


def test_a_file_for_other_tools_alone_is_fine(tmp_path: Path) -> None:
    assert loaded(folder=pyproject(tmp_path, "[tool.ruff]\nline-length = 3\n")) == loaded()
    (tmp_path / "pyproject.toml").write_bytes(b"\xef\xbb\xbf[tool.migrator]\nbackup = 'off'\n")
    assert loaded(folder=tmp_path).backup == "off"


def test_a_misspelt_variable_is_a_warning_and_kubernetes_own_are_none() -> None:
    environment = {
        "MIGRATOR_WAIT_TIMEOUTS": "3",
        "MIGRATOR_LOKC_TIMEOUT": "3",
        "MIGRATOR_DATABASE_URL_FILEE": "x",
        "MIGRATOR_PORT": "tcp://10.0.0.1:80",
        "MIGRATOR_SERVICE_HOST": "10.0.0.1",
        "MIGRATOR_PORT_80_TCP_ADDR": "10.0.0.1",
        "MIGRATOR_IMAGE_VERSION": "3",
        "MIGRATOR_": "",
    }
    assert loaded(environment).warnings == (
        "MIGRATOR_DATABASE_URL_FILEE is not a setting; did you mean MIGRATOR_DATABASE_URL_FILE?",
        "MIGRATOR_LOKC_TIMEOUT is not a setting; did you mean MIGRATOR_LOCK_TIMEOUT?",
        "MIGRATOR_WAIT_TIMEOUTS is not a setting; did you mean MIGRATOR_WAIT_TIMEOUT?",
    )


def test_secrets_of_addresses_that_are_not_used_are_secrets_too() -> None:
    found = loaded({"DATABASE_URL": "postgresql://app:other%40one@h/db", "PGPASSWORD": "third"})
    assert {PLANTED, "other@one", "third", URL, "postgresql://app:other%40one@h/db"} == set(found.secrets)
    assert [len(secret) for secret in found.secrets] == sorted(map(len, found.secrets), reverse=True)
    assert load({}, {"DATABASE_URL": "postgresql://u@h/db"}, NOWHERE).secrets == ()


def test_no_way_of_printing_settings_shows_a_secret() -> None:
    found = loaded({"PGPASSWORD": PLANTED, "MIGRATOR_DIRECT_URL": URL})
    for text in (repr(found), str(found), str(table(found)), str(found.target), repr(found.target)):
        assert PLANTED not in text
        assert quote(PLANTED, safe="") not in text


def test_the_table_has_a_row_for_every_setting() -> None:
    rows = {row["name"]: row for row in table(loaded({"MIGRATOR_LOCK_TIMEOUT": "none"}, backup="off"))}
    assert set(rows) == {item.name for item in OPTIONS}
    assert rows["lock_timeout"]["value"] == "none"
    assert rows["backup"] == {
        "name": "backup",
        "variable": "MIGRATOR_BACKUP",
        "flag": "--backup",
        "value": "off",
        "source": "--backup",
        "default": "auto",
        "help": rows["backup"]["help"],
    }
    assert rows["database_url"]["value"] == "postgresql://u@h/db"
    assert rows["direct_url"]["value"] == ""
    assert all(row["help"] for row in rows.values())


def test_what_is_secret_has_no_flag_and_names_are_unique() -> None:
    for item in OPTIONS:
        assert not (item.secret and flag_name(item))
    for name in (variable_name, flag_name):
        names = [name(item) for item in OPTIONS if name(item)]
        assert len(names) == len(set(names))
    assert set(Settings._fields) >= {item.name for item in OPTIONS}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("500ms", 0.5),
        ("5m", 300),
        ("2h", 7200),
        ("1d", 86400),
        (" 1.5 M ", 90),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds
    assert optional_duration(text) == (seconds or None)


@pytest.mark.parametrize(
    "text",
    ["", "-1", "5 minutes", "1h30m", "s", "1e3", "inf", "nan", "none", "0x10", "1,5", "9" * 400, "400d"],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|is longer than a year"):
        duration(text)


def test_readers() -> None:
    assert optional_duration("None") is None
    assert [boolean(text) for text in ("1", "TRUE", " yes ", "on", "0", "False", "no", "OFF")] == [
        True
    ] * 4 + [False] * 4
    assert relation(" app.alembic_version ") == "app.alembic_version"
    for text in ("a.b.c", "a b", '"a"', "", ".a", "a."):
        with pytest.raises(ValueError, match="is not a table name"):
            relation(text)
    assert (backup_url("/b"), backup_url("file:///b/c")) == ("file:///b", "file:///b/c")
    for text in ("b", "file://b", "file:///", "./b", "http://h/b"):
        with pytest.raises(ValueError, match="is not a folder"):
            backup_url(text)
