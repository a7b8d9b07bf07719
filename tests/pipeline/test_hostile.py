"""What SECURITY.md claims: hostile names, hostile backups, a neighbour in the pod."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator.backups.manifest import BadManifest, from_json
from migrator.postgres.quoting import as_typed
from migrator.runtime.escaping import json_text, visible, visible_lines
from tests.support import leaks
from tests.support.projects import Revision, linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]
HOSTILE = "x\x1b[31m\n12:00:00 ERROR   forged\r\u202e'\"; --\x9b2J$(touch /tmp/owned)"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e]")


def harmless(text: str) -> None:
    """Check that a terminal would obey nothing in this, and that no line of it is forged."""
    assert not OBEYED.search(text), ascii(text)
    assert not re.search(r"^12:00:00 ERROR +forged", text, re.M), text


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# -- the functions -----------------------------------------------------------------------------------------


def test_everything_that_a_terminal_obeys_is_made_visible() -> None:
    everything = "".join(map(chr, range(0x3000)))
    harmless(visible(everything))
    assert "\n" not in visible(everything)
    harmless(visible_lines(everything).replace("\n", ""))
    assert json.loads(json_text({"name": everything})) == {"name": everything}
    harmless(json_text({"name": everything}))
    readable = "Größe 数据 Ελλάδα “shop”, 100 %"
    assert visible(readable) == visible_lines(readable) == readable
    assert readable in json_text([readable])


def test_a_name_in_sql_that_is_shown_to_be_typed_is_no_command() -> None:
    assert as_typed("shop_1") == "shop_1"
    assert as_typed('a"; DROP TABLE t; --') == '"a""; DROP TABLE t; --"'
    assert as_typed("Shop") == '"Shop"'
    assert (as_typed("order"), as_typed("current_user")) == ('"order"', '"current_user"')


# -- a hostile database ------------------------------------------------------------------------------------


@pytest.fixture
def hostile(server: Server) -> Iterator[Database]:
    """A database whose owner has a hostile name."""
    role = f"r{HOSTILE}"
    server.psql(f"CREATE ROLE {quoted(role)} LOGIN PASSWORD '{server.password}'")
    made = server.create_database()
    server.psql(f'ALTER DATABASE "{made.name}" OWNER TO {quoted(role)}')
    made.url = server.url(made.name, role)
    yield made
    server.drop_database(made.name)
    server.psql(f"DROP ROLE {quoted(role)}")


TABLE = f"t{HOSTILE}"
HISTORY = [
    Revision("r001", None, f"op.execute({('CREATE TABLE ' + quoted(TABLE) + ' (id int)')!r})"),
    Revision("r002", "r001", f"op.execute({('ALTER TABLE ' + quoted(TABLE) + ' ADD COLUMN a int')!r})"),
    Revision("r003", "r002", f"op.execute({('DROP TABLE ' + quoted('none' + TABLE))!r})"),
]
COMMANDS: list[tuple[list[str], int]] = [
    (["upgrade", "r001"], 0),
    (["upgrade", "r002"], 0),
    (["upgrade", "r003"], 39),
    (["status"], 0),
    (["current"], 0),
    (["ledger"], 0),
    (["backup", "--name", "one"], 0),
    (["backups"], 0),
    (["verify"], 41),  # not at the heads
    (["downgrade", "-1"], 0),
    (["settings"], 0),
]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_hostile_names_are_shown_and_never_obeyed(
    log_format: str, hostile: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=HISTORY)
    report, termination = tmp_path / "report.json", tmp_path / "termination"
    termination.touch()
    env: dict[str, str | None] = {
        "MIGRATOR_LOG_FORMAT": log_format,
        "MIGRATOR_REPORT_FILE": str(report),
        "MIGRATOR_TERMINATION_LOG": str(termination),
        "MIGRATOR_ACTOR": HOSTILE,
    }
    for words, code in COMMANDS:
        result = run_migrator(*words, cwd=folder, database=hostile, env=env)
        assert result.code == code, result
        _look(result, log_format, report, termination)
        if words[0] in ("status", "ledger", "backups"):
            answer = run_migrator(*words, "--format", "json", cwd=folder, database=hostile, env=env)
            harmless(answer.stdout)
            assert answer.answer
    assert hostile.psql("SELECT count(*) FROM migrator_ledger WHERE actor = %s", (HOSTILE,))[0][0] > 0
    assert not Path("/tmp/owned").exists()


def _look(result: Result, log_format: str, report: Path, termination: Path) -> None:
    for text in (result.stdout, result.stderr, termination.read_text()):
        harmless(text)
    assert "\n" not in termination.read_text()
    if log_format == "json":
        for line in result.stderr.splitlines():
            assert isinstance(json.loads(line), dict), line
    if report.exists():
        harmless(report.read_text())
        assert isinstance(json.loads(report.read_text()), dict)


def test_names_at_a_terminal(hostile: Database, project: Project, run_migrator: Runner) -> None:
    """Progress bar and all: nothing of a name reaches the terminal as a control character."""
    folder = project(revisions=HISTORY[:2])
    environment = run_migrator.environment(
        hostile, {"MIGRATOR_LOG_FORMAT": "text", "TERM": "xterm", "COLUMNS": "200"}
    )
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*run_migrator.command, "upgrade"],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # EIO: nobody has the other end any more
                break
    os.close(ours)
    assert child.wait(60) == 0, seen
    # The bar's own way to the line's start, and our colours, which do not nest.
    text = seen.decode().replace("\r\n", "\n").replace("\r\x1b[K", "")
    text = re.sub("\x1b\\[(?:1;31|33|32|36|1|2)m([^\x1b]*)\x1b\\[0m", r"\1", text)
    assert "upgraded from base" in text
    harmless(text)


def test_a_blocker_with_a_hostile_name_is_named(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Whoever may connect chooses an application_name and what its statements look like."""
    folder = project(
        revisions=[*linear_history(1), Revision("r002", "r001", "ALTER TABLE t1 ADD COLUMN a int")]
    )
    env: dict[str, str | None] = {"MIGRATOR_BACKUP": "off", "MIGRATOR_LOG_FORMAT": "text"}
    assert run_migrator("upgrade", "r001", cwd=folder, database=database, env=env).code == 0
    holder = database.connect(application_name=HOSTILE)
    try:
        with holder.cursor() as cursor:
            cursor.execute(f"LOCK TABLE t1 /* {HOSTILE.replace('%', '%%')} */")
        limits = {"MIGRATOR_LOCK_TIMEOUT": "3s", "MIGRATOR_LOCK_RETRIES": "0"}
        result = run_migrator("upgrade", cwd=folder, database=database, env={**env, **limits})
    finally:
        holder.close()
    assert result.code == 22, result
    assert "LOCK TABLE t1" in result.stderr, result
    harmless(result.stderr)


# -- a hostile bucket, or a hostile folder of backups --------------------------------------------------------


@pytest.fixture
def backed_up(
    database: Database, project: Project, run_migrator: Runner
) -> tuple[Path, dict[str, Any], Path]:
    """A database with one backup: the project's folder, the backup's manifest, and where that is."""
    folder = project(revisions=linear_history(1))
    assert run_migrator("upgrade", cwd=folder, database=database, env={"MIGRATOR_BACKUP": "off"}).code == 0
    result = run_migrator("backup", cwd=folder, database=database)
    assert result.code == 0, result
    place = next(run_migrator.backups.glob("*.json"))
    return folder, json.loads(place.read_text()), place


EVIL: dict[str, dict[str, Any]] = {
    "an id that leads elsewhere": {"id": "../../etc/passwd"},
    "an absolute id": {"id": "/etc/passwd"},
    "an id that is a list": {"id": ["a"]},
    "a place": {"place": "/etc/passwd"},
    "a database that is a number": {"database": 7},
    "sizes that are text": {"size_bytes": "1; rm -rf /"},
    "a negative size": {"size_bytes": -1},
    "revisions that are a number": {"revisions": 1},
    "tables that are a list": {"tables": []},
    "a table's facts that are text": {"tables": {"public.t1": "many"}},
    "properties that are null": {"properties": None},
    "a format that is an option": {"dump_format": "--file=/tmp/owned"},
    "a hash that is not one": {"sha256": "../../x"},
    "proofs that are text": {"proofs": "yes"},
    "sequences that are text": {"sequences": {"s": {"before": "x", "after": 1}}},
    "a moment that is a number": {"created_at": 12},
    "a version that is a list": {"client_version": [15]},
    "jobs that are text": {"jobs": "many"},
}


@pytest.mark.parametrize("kind", EVIL)
def test_a_hostile_manifest_is_no_backup_or_a_harmless_one(
    kind: str,
    backed_up: tuple[Path, dict[str, Any], Path],
    database: Database,
    run_migrator: Runner,
) -> None:
    """Nothing that a manifest says leads out of the store or ends in a crash."""
    folder, manifest, place = backed_up
    place.write_text(json.dumps({**manifest, **EVIL[kind]}))
    database.execute("CREATE TABLE later (id int)")
    for words in (["backups"], ["restore", "latest", "--to", f"{database.name}_copy"]):
        result = run_migrator(*words, cwd=folder, database=database)
        database.server.drop_database(f"{database.name}_copy")
        assert result.code in {0, 36, 43}, result
        assert "Traceback" not in result.stderr, result
        assert "root:" not in result.stdout + result.stderr
    assert not Path("/tmp/owned").exists()
    assert database.psql("SELECT to_regclass('later') IS NOT NULL") == [(True,)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "7",
        '"x"',
        "{",
        '{"format": 1}',
        '{"format": 99}',
        "[" * 100_000,
        '{"format": 1e999}',
        "\x00",
    ],
)
def test_what_is_no_manifest_is_said_not_to_be(text: str) -> None:
    with pytest.raises(BadManifest):
        from_json(text)


# -- a neighbour in the pod ----------------------------------------------------------------------------------


def test_files_are_for_nobody_else_to_read(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(1))
    previous = os.umask(0)
    try:
        result = run_migrator("upgrade", cwd=folder, database=database, env={"MIGRATOR_BACKUP": "always"})
    finally:
        os.umask(previous)
    assert result.code == 0, result
    made = [run_migrator.backups, *run_migrator.backups.rglob("*")]
    assert len(made) >= 3
    assert [path for path in made if path.stat().st_mode & 0o077] == []


def test_nothing_is_left_in_tmp(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(2))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env: dict[str, str | None] = {"TMPDIR": str(temporary), "MIGRATOR_BACKUP": "always"}
    for words in (["upgrade"], ["downgrade", "-1"], ["backup"], ["status"]):
        result = run_migrator(*words, cwd=folder, database=database, env=env)
        assert result.code == 0, result
    assert list(temporary.iterdir()) == []


def test_a_symbolic_link_in_the_place_of_a_report_is_not_followed(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(1))
    victim, report = tmp_path / "victim", tmp_path / "report.json"
    victim.write_text("mine")
    report.symlink_to(victim)
    result = run_migrator(
        "upgrade",
        cwd=folder,
        database=database,
        env={"MIGRATOR_REPORT_FILE": str(report), "MIGRATOR_BACKUP": "off"},
    )
    assert result.code == 0, result
    assert victim.read_text() == "mine"
    assert json.loads(report.read_text())["code"] == 0


def test_a_child_gets_no_secret_but_the_databases(
    database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    """pg_dump's environment is made, not inherited: keys of the bucket and of others are not in it."""
    folder = project(revisions=linear_history(1))
    tools, seen = tmp_path / "tools", tmp_path / "seen"
    tools.mkdir()
    seen.mkdir()
    for name in ("pg_dump", "pg_restore", "pg_dumpall", "psql"):
        program = tools / name
        program.write_text(f'#!/bin/sh\nenv > {seen}/{name}.$$\nexec {database.server.bin}/{name} "$@"\n')
        program.chmod(0o755)
    env: dict[str, str | None] = {
        "MIGRATOR_PG_BIN": str(tools),
        "AWS_SECRET_ACCESS_KEY": "of-the-bucket",
        "APP_SECRET": "of-the-application",
    }
    assert (
        run_migrator("upgrade", cwd=folder, database=database, env=env | {"MIGRATOR_BACKUP": "always"}).code
        == 0
    )
    files = list(seen.iterdir())
    assert files
    for file in files:
        assert "of-the-" not in file.read_text(), file
    assert any(leaks.find(file.read_text()) for file in files)  # the password is there, and nowhere else
