"""The harness itself: a check that cannot fail would prove nothing."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import psycopg2
import pytest

from tests.support import PLANTED, leaks
from tests.support.projects import linear_history
from tests.support.runner import ROOT, Runner
from tests.support.servers import Database, Server, normalise


def test_databases_are_empty_and_separate(database: Database, server: Server) -> None:
    other = server.create_database()
    database.execute("CREATE TABLE only_here (id int); INSERT INTO only_here VALUES (1)")
    assert database.psql("SELECT * FROM only_here WHERE id = %s", (1,)) == [(1,)]
    assert other.psql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    assert "only_here" in database.schema_dump()
    assert "only_here" not in other.schema_dump()
    server.drop_database(other.name)


def test_every_major_answers_under_its_url_and_refuses_another_password(each_database: Database) -> None:
    server = each_database.server
    with psycopg2.connect(each_database.url) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW server_version_num")
        assert cursor.fetchall()[0][0].startswith(str(server.major))
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(server.url(each_database.name, password="wrong"))


def test_the_servers_are_of_different_majors(servers: Callable[[str], Server]) -> None:
    assert servers("embedded").major == 16
    assert servers("debian").major != servers("embedded").major


def test_a_private_server_keeps_port_and_data_over_a_crash(private_server: Callable[..., Server]) -> None:
    server = private_server(settings={"max_connections": "7"})
    port = server.port
    server.psql("CREATE TABLE kept (id int)")
    server.restart("immediate")
    assert server.port == port
    assert server.psql("SELECT count(*) FROM kept") == [(0,)]
    assert server.psql("SHOW max_connections") == [("7",)]


def test_dumps_of_equal_databases_are_equal(server: Server, database: Database) -> None:
    database.execute("CREATE TABLE t (note text); INSERT INTO t VALUES ('-- kept'), ('SET kept = 1')")
    copy = server.create_database(template=database.name)
    assert copy.dump() == database.dump()
    assert "-- kept\nSET kept = 1\n" in database.dump()
    copy.execute("INSERT INTO t VALUES ('-- one more')")
    assert copy.dump() != database.dump()
    assert copy.schema_dump() == database.schema_dump()
    server.drop_database(copy.name)


def test_normalise_drops_what_differs_by_chance() -> None:
    dump = (
        "\\restrict kE9\n-- Dumped by\nSET lock_timeout = 0;\n\nCREATE TABLE t (a int);\n\\unrestrict kE9\n"
    )
    assert normalise(dump) == "CREATE TABLE t (a int);\n"


@pytest.mark.parametrize("config", ["alembic.ini", "pyproject.toml", None])
def test_a_project_is_what_alembic_expects(project: Callable[..., Path], config: str | None) -> None:
    folder = project(revisions=linear_history(3), config=config)
    found = {path.name for path in folder.iterdir()}
    assert found == {"migrations", config} - {None}
    assert len(list((folder / "migrations" / "versions").glob("*.py"))) == 3


def leaky(tmp_path: Path, code: str) -> Runner:
    """Return a runner of a stand-in for migrator: a Python program that can give the password away."""
    program = tmp_path / "stand_in.py"
    program.write_text(code)
    return Runner(tmp_path, [sys.executable, str(program)])


SHOWN = [
    PLANTED,
    quote(PLANTED, safe=""),
    quote(PLANTED, safe="").lower(),
    PLANTED.replace("%", "%%"),
    "postgresql://postgres:***@s:cr/et pw@127.0.0.1/db",  # redacted up to the first @ only
    "postgresql://postgres:pl%25nted@***/db",
]


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_password_in_the_output_is_found(tmp_path: Path, shown: str, stream: str) -> None:
    runner = leaky(tmp_path, f"import sys; print({shown!r}, file=sys.{stream})")
    runner()
    with pytest.raises(AssertionError, match=f"the planted password got out:\n{stream}"):
        runner.close()


@pytest.mark.parametrize("place", ["backups/a/manifest.json", "report.json"])
def test_a_password_in_a_file_is_found(tmp_path: Path, place: str) -> None:
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True, exist_ok=True)\n"
    runner = leaky(tmp_path, code + f"p.write_text({PLANTED!r})")
    runner(str(tmp_path / place), env={"MIGRATOR_REPORT_FILE": "report.json"})
    with pytest.raises(AssertionError, match=Path(place).name):
        runner.close()


def test_a_password_in_the_arguments_of_a_grandchild_is_found(tmp_path: Path) -> None:
    code = "import subprocess, sys\nsubprocess.run(['sh', '-c', 'sleep 60; :', sys.argv[0], 'x' + {!r}])"
    runner = leaky(tmp_path, code.format(PLANTED))
    run = runner.start()
    run.wait_for(run.leaks)
    run.kill()
    with pytest.raises(AssertionError, match="process arguments: b'sh -c sleep"):
        runner.close()


def test_a_password_in_a_ledger_is_found(database: Database) -> None:
    database.execute("CREATE TABLE migrator_ledger (note text); INSERT INTO migrator_ledger VALUES ('fine')")
    assert leaks.find_in_tables(database) == []
    database.psql("INSERT INTO migrator_ledger VALUES (%s)", (f"postgresql://me:{quote(PLANTED)}@db/x",))
    (found,) = leaks.find_in_tables(database)
    assert "public.migrator_ledger" in found
    database.execute("DROP TABLE migrator_ledger")


def test_a_run_that_keeps_the_secret_passes(tmp_path: Path) -> None:
    runner = leaky(tmp_path, "import os, sys; print('{}'); print('{\"event\": \"done\"}', file=sys.stderr)")
    result = runner(env={"MIGRATOR_DATABASE_URL": f"postgresql://postgres:{quote(PLANTED)}@h/db"})
    runner.close()
    assert (result.code, result.answer, result.logs) == (0, {}, [{"event": "done"}])


def test_a_run_that_hangs_is_killed_and_fails(tmp_path: Path) -> None:
    runner = leaky(tmp_path, "import subprocess; subprocess.run(['sleep', '60'])")
    with pytest.raises(AssertionError, match="still running"):
        runner(timeout=0.5)
    assert leaks.process_tree(runner.runs[0].pid) == [runner.runs[0].pid]
    runner.close()


def test_what_a_killed_run_left_behind_is_ended(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    runner = leaky(tmp_path, code)
    run = runner.start()
    run.wait_for("\n")
    run.kill()
    child = Path(f"/proc/{run.finish().stdout.strip()}/cmdline")
    assert child.read_bytes() == b"sleep\x0060\x00"
    runner.close()
    deadline = time.monotonic() + 60
    while child.exists() and child.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_environment_holds_no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runner = leaky(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))")
    seen = runner().answer
    ours = [
        name for name in seen if name.startswith(("MIGRATOR_", "PG", "POSTGRES_")) or name == "DATABASE_URL"
    ]
    assert ours == ["MIGRATOR_BACKUP_URL"]


def demo(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [str(ROOT / "bin" / "demo")], env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_demo_runs_on_a_server_of_its_own() -> None:
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  compared: ") == 3
    for command in ("upgrade", "status", "downgrade -1", "backups", "restore "):
        assert f"$ migrator {command}" in done.stdout


def test_the_demo_leaves_a_given_server_as_it_was(each_database: Database) -> None:
    server = each_database.server
    databases = server.psql("SELECT datname FROM pg_database ORDER BY 1")
    before = each_database.dump()
    done = demo(DATABASE_URL=each_database.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  compared: ") == 3
    assert leaks.find(done.stdout + done.stderr) is None
    assert each_database.dump() == before
    assert server.psql("SELECT datname FROM pg_database ORDER BY 1") == databases


def test_the_demo_fails_where_it_may_not_create_a_database(database: Database, server: Server) -> None:
    role = server.create_role(f"poor_{database.name}")
    done = demo(DATABASE_URL=server.url(database.name, user=role))
    server.psql(f"DROP ROLE {role}")
    assert done.returncode == 1
    assert "The demo failed: the demo needs a database of its own: permission denied" in done.stderr


def test_a_comparison_that_does_not_hold_fails_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(ROOT / "bin" / "demo.py"))
    target = program["addresses"].parse("postgresql://localhost/any")
    with pytest.raises(program["DemoError"], match="not so: both are the same\n  expected: b\n  found:    c"):
        program["Demo"](target, Path("/"), Path("/")).compare("both are the same", "a\nb\n", "a\nc\n")
    assert capsys.readouterr().out == ""
