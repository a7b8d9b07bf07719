"""`migrator sidecar`: the run, what it says meanwhile and afterwards, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrator.errors import Internal
from migrator.outcome import ExitCode
from migrator.sidecar.children import ChildProcess, ChildResult
from migrator.sidecar.stay import Run
from tests.support.ledgers import runs
from tests.support.outcomes import refusal
from tests.support.projects import Revision, linear_history, write_project
from tests.support.runner import ROOT, Runner
from tests.support.servers import Database, Server
from tests.support.sidecars import QUICK, Sidecar, start

Project = Callable[..., Path]


@pytest.fixture
def sidecar(run_migrator: Runner, project: Project, database: Database) -> Callable[..., Sidecar]:
    """Start one on the test's database, with a history of three revisions or what is given."""

    def begin(*words: str, revisions: list[Revision] | None = None, **env: str) -> Sidecar:
        folder = project(revisions=linear_history(3) if revisions is None else revisions)
        return start(run_migrator, folder, database, *words, env=env)

    return begin


@pytest.fixture(scope="module")
def standing(servers: Callable[[str], Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """Share one that is ready, for tests that only ask it."""
    folder = tmp_path_factory.mktemp("standing")
    database = servers("debian").create_database()
    runner = Runner(folder)
    one = start(runner, write_project(folder / "project", revisions=linear_history(3)), database)
    one.wait_until_ready()
    yield one
    assert one.stop().code == 0
    runner.close()
    database.server.drop_database(database.name)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, in any of its threads."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (thread / "children").read_text().split()]
    return found


# -- the run ----------------------------------------------------------------------------------------------


def test_it_upgrades_and_stays(sidecar: Callable[..., Sidecar], database: Database) -> None:
    one = sidecar()
    ready = one.wait_until_ready()
    assert ready.document == {
        "ready": True,
        "reason": "the database is at r003: nothing is pending",
        "code": 0,
        "outcome": "OK",
    }
    assert database.psql("SELECT version_num FROM alembic_version") == [("r003",)]
    assert runs(database) == [("upgrade", "OK")]
    assert one.ask("/livez").body == "ok\n"
    result = one.stop()
    assert result.code == 0, result
    assert result.logs[-1]["message"] == "stopped by SIGTERM"


def test_it_listens_before_the_database_is_there(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server()
    database = server.create_database()
    server.stop()
    one = start(run_migrator, project(revisions=linear_history(1)), database)
    one.running.wait_for("waiting for postgresql://")
    assert one.ask("/livez").status == 200
    held = one.ask()
    assert (held.status, held.document["reason"]) == (503, "the run has not ended yet")
    assert one.ask("/").document["report"] is None
    assert one.metrics()["migrator_ready"] == 0
    server.start()
    one.wait_until_ready()
    assert one.metrics()["migrator_ready"] == 1


def test_nothing_to_do_is_ready_too(
    sidecar: Callable[..., Sidecar], run_migrator: Runner, database: Database, tmp_path: Path
) -> None:
    one = sidecar()
    one.wait_until_ready()
    one.stop()
    assert run_migrator("freeze", cwd=tmp_path / "project", database=database).code == 0
    again = sidecar()
    again.wait_until_ready()
    report = again.ask("/").document["report"]
    assert [stage["stage"] for stage in report["stages"]] == ["wait", "inspect", "verify"]
    assert again.metrics()["migrator_last_run_revisions"] == 0


def test_a_run_that_fails_ends_it_with_its_code(sidecar: Callable[..., Sidecar], database: Database) -> None:
    one = sidecar(revisions=[Revision("r001", None, "SELECT 1/0")])
    refusal(one.running.finish(), ExitCode.ROLLED_BACK, "division by zero")
    assert database.psql("SELECT to_regclass('alembic_version')") == [(None,)]


def test_a_signal_during_the_run_ends_both_as_it_ends_a_run(
    sidecar: Callable[..., Sidecar], database: Database
) -> None:
    one = sidecar(revisions=[Revision("r001", None, "SELECT pg_sleep(300)")])
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(300)' AND state = 'active'"
    one.wait_for(lambda: database.psql(sleeping), "the revision")
    assert one.ask().status == 503
    result = one.stop()
    refusal(result, ExitCode.INTERRUPTED, "Interrupted by SIGTERM")
    assert not database.psql(sleeping)


def test_a_run_without_a_report_is_not_called_unchanged() -> None:
    class Silent(ChildProcess):
        def __init__(self) -> None: ...

        def upgrade(self, revision: str) -> ChildResult:
            return ChildResult(0, {})

    with pytest.raises(Internal) as caught:
        Run(Silent(), "head").end()
    assert "did not report how it ended" in str(caught.value)
    assert "was not changed" not in str(caught.value)
    assert "migrator current" in str(caught.value)


def test_a_run_that_is_killed_is_said_to_be(
    sidecar: Callable[..., Sidecar], database: Database, tmp_path: Path
) -> None:
    line = tmp_path / "line"
    line.touch()
    one = sidecar(
        revisions=[Revision("r001", None, "SELECT pg_sleep(300)")], MIGRATOR_TERMINATION_LOG=str(line)
    )
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(300)' AND state = 'active'"
    one.wait_for(lambda: database.psql(sleeping), "the revision")
    (child,) = children(one.running.pid)
    os.kill(child, signal.SIGKILL)
    result = one.running.finish()
    assert result.code == 128 + signal.SIGKILL, result
    assert "killed by SIGKILL, as happens at a memory limit" in result.logs[-1]["message"]
    assert line.read_text() == result.logs[-1]["message"]


def test_a_sidecar_that_is_killed_takes_its_run_with_it(
    sidecar: Callable[..., Sidecar], database: Database
) -> None:
    one = sidecar(revisions=[Revision("r001", None, "SELECT pg_sleep(300)")])
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(300)' AND state = 'active'"
    one.wait_for(lambda: database.psql(sleeping), "the revision")
    one.running.kill()
    one.running.finish()
    deadline = time.monotonic() + 60
    while database.psql(sleeping):
        assert time.monotonic() < deadline, "the run goes on alone"
        time.sleep(0.1)
    assert database.psql("SELECT to_regclass('alembic_version')") == [(None,)]


def test_what_the_project_leaves_running_is_ended_with_the_run(
    sidecar: Callable[..., Sidecar], tmp_path: Path
) -> None:
    left = "import subprocess\n" + (
        f"child = subprocess.Popen(['sleep', '300'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))"
    )
    one = sidecar(revisions=[Revision("r001", None, left)])
    one.wait_until_ready()
    pid = int((tmp_path / "pid").read_text())
    one.wait_for(lambda: not _works(pid), "the end of what the revision left")
    assert one.stop().code == 0


@pytest.mark.parametrize("revision", ["SELECT 1", "SELECT pg_sleep(300)"])
def test_a_fork_of_the_env_file_keeps_nobody_waiting(
    run_migrator: Runner, project: Project, database: Database, tmp_path: Path, revision: str
) -> None:
    folder = project(revisions=[Revision("r001", None, revision)])
    env = folder / "migrations" / "env.py"
    fork = f"""
import os, time
if not (pid := os.fork()):
    time.sleep(300)
    os._exit(0)
with open({str(tmp_path / "pids")!r}, "a") as file:
    file.write(f"{{pid}} ")
"""
    env.write_text(fork + env.read_text())
    one = start(run_migrator, folder, database)
    if revision == "SELECT 1":
        one.wait_until_ready()
        database.execute("DELETE FROM alembic_version")  # for migrator check to judge, which forks as well
        one.wait_until_not_ready(ExitCode.NOT_CURRENT)
        assert one.stop().code == 0
    else:
        sleeping = f"SELECT 1 FROM pg_stat_activity WHERE query = '{revision}' AND state = 'active'"
        one.wait_for(lambda: database.psql(sleeping), "the revision")
        refusal(one.stop(), ExitCode.INTERRUPTED, "Interrupted by SIGTERM")
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert pids
    deadline = time.monotonic() + 60
    while any(map(_works, pids)):
        assert time.monotonic() < deadline, "a fork goes on alone"
        time.sleep(0.1)


def _works(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_takes_the_options_of_a_run(
    run_migrator: Runner, project: Project, private_server: Callable[..., Server]
) -> None:
    server = private_server(start=False)
    database = Database(server, "nowhere")
    folder = project(revisions=linear_history(1))
    os.rename(folder / "alembic.ini", folder / "other.ini")
    one = start(run_migrator, folder, database, "-c", "other.ini", "-x", "a=b", "--wait-timeout", "1s")
    refusal(one.running.finish(), ExitCode.UNREACHABLE, "did not answer within 1 s")


def test_at_a_terminal_it_says_how_the_run_ended(sidecar: Callable[..., Sidecar]) -> None:
    one = sidecar(MIGRATOR_LOG_FORMAT="text")
    one.wait_until_ready()
    result = one.stop()
    assert "upgraded from base to r003 (head): 3 revisions" in result.stderr
    assert "applied 3 of 3" in result.stderr
    assert not result.logs


# -- where it listens -------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_a_bad_setting_and_nothing_runs(
    run_migrator: Runner, project: Project, database: Database
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"127.0.0.1:{other.getsockname()[1]}"
        result = run_migrator(
            "sidecar",
            cwd=project(revisions=linear_history(1)),
            database=database,
            env={**QUICK, "MIGRATOR_SIDECAR_LISTEN": place},
        )
    refusal(result, ExitCode.BAD_SETTINGS, f"cannot listen on {place}: Address already in use")
    assert database.psql("SELECT to_regclass('alembic_version')") == [(None,)]


@pytest.mark.parametrize(
    "listen", ["8086", "localhost", "127.0.0.1:65536", "::1:8086", "http://127.0.0.1:1", "a b:1"]
)
def test_what_is_no_address_is_a_bad_setting(listen: str, run_migrator: Runner, database: Database) -> None:
    result = run_migrator("sidecar", database=database, env={"MIGRATOR_SIDECAR_LISTEN": listen})
    refusal(result, ExitCode.BAD_SETTINGS, "is not an address to listen on such as 127.0.0.1:8086")


def test_an_address_of_somebody_else_is_a_bad_setting(run_migrator: Runner, database: Database) -> None:
    result = run_migrator("sidecar", database=database, env={"MIGRATOR_SIDECAR_LISTEN": "192.0.2.1:8086"})
    refusal(result, ExitCode.BAD_SETTINGS, "cannot listen on 192.0.2.1:8086")


@pytest.mark.parametrize("listen", ["[::1]:0", "localhost:0"])
def test_it_listens_on_ipv6_and_on_names(listen: str, sidecar: Callable[..., Sidecar]) -> None:
    one = sidecar(MIGRATOR_SIDECAR_LISTEN=listen)
    family = socket.AF_INET6 if listen.startswith("[") else socket.AF_UNSPEC
    (found, *_) = socket.getaddrinfo(
        listen.rpartition(":")[0].strip("[]"), one.port, family, socket.SOCK_STREAM
    )
    with socket.create_connection(found[4][:2], timeout=60) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 200 OK")


# -- the pages --------------------------------------------------------------------------------------------


def test_the_page_has_the_report_of_the_run(sidecar: Callable[..., Sidecar], tmp_path: Path) -> None:
    one = sidecar(
        MIGRATOR_REPORT_FILE=str(tmp_path / "report.json"), MIGRATOR_SIDECAR_VERIFY_INTERVAL="100ms"
    )
    one.wait_until_ready()
    one.wait_for(lambda: one.ask("/").document["verification"], "a verification")
    page = one.ask("/").document
    assert page["report"] == json.loads((tmp_path / "report.json").read_text())
    assert page["report"]["outcome"] == "OK"
    assert page["check"]["rows"] == ["r003"]
    assert page["verification"]["report"]["command"] == "verify"


def test_only_get_and_head_and_only_these_pages(standing: Sidecar) -> None:
    one = standing
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "UPGRADE"):
        for path in ("/", "/readyz", "/upgrade"):
            refused = one.ask(path, method, body="revision=base" if method == "POST" else None)
            assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD"), method
    for path in ("/healthz", "/readyz/", "/../readyz", "/metrics/../livez", "/%2e%2e/etc/passwd"):
        assert one.ask(path).status == 404, path
    assert one.ask("/readyz?ready=false&revision=base").status == 200
    head = one.ask("/readyz", "HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, "", str(len(one.ask().body)))


def test_the_headers_are_those_of_an_answer_that_nobody_keeps_or_runs(
    standing: Sidecar,
) -> None:
    one = standing
    kinds = {"/": "application/json", "/readyz": "application/json", "/livez": "text/plain; charset=utf-8"}
    for path, kind in {**kinds, "/metrics": "text/plain; version=0.0.4; charset=utf-8"}.items():
        headers = one.ask(path).headers
        assert headers["Content-Type"] == kind
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "Server" not in headers
        assert "Access-Control-Allow-Origin" not in headers


def test_on_loopback_a_name_from_elsewhere_is_refused(standing: Sidecar) -> None:
    one = standing
    for host in (
        "localhost",
        f"localhost:{one.port}",
        f"127.0.0.1:{one.port}",
        "[::1]:8086",
        "[::1]",
        "10.1.2.3",
    ):
        assert one.ask("/livez", headers={"Host": host}).status == 200, host
    for host in ("evil.example", "evil.example:8086", "localhost.evil.example", "127.0.0.1.evil.example"):
        refused = one.ask("/", headers={"Host": host})
        assert refused.status == 421, host
        assert "report" not in refused.body


def test_elsewhere_any_name_will_do(sidecar: Callable[..., Sidecar]) -> None:
    one = sidecar(MIGRATOR_SIDECAR_LISTEN="0.0.0.0:0")
    assert one.ask("/livez", headers={"Host": "migrator:8086"}).status == 200


def test_what_is_too_large_is_refused(standing: Sidecar) -> None:
    one = standing
    assert one.ask("/livez", headers={"X-Long": "a" * 100_000}).status == 431
    assert one.ask("/livez", "GET", body="a" * 100_000).status == 413
    assert one.ask("/livez").status == 200


def test_connections_that_say_nothing_keep_nobody_out(sidecar: Callable[..., Sidecar]) -> None:
    one = sidecar()
    silent = [socket.create_connection(("127.0.0.1", one.port), timeout=60) for _ in range(60)]
    half = [socket.create_connection(("127.0.0.1", one.port), timeout=60) for _ in range(60)]
    try:
        for connection in half:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: local")
        assert (
            one.ask("/livez").status == 200
        )  # more than the limit are open: once the silent ones are put out
        assert silent[0].recv(1) == b""
    finally:
        for connection in silent + half:
            connection.close()
    assert one.stop().code != 70


def test_the_metrics_are_well_formed(sidecar: Callable[..., Sidecar]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    one = sidecar(MIGRATOR_IMAGE_VERSION="2.0", MIGRATOR_SIDECAR_VERIFY_INTERVAL="100ms")
    one.wait_until_ready()
    one.wait_for(lambda: "migrator_verify_success" in one.metrics(), "a verification")
    families = {family.name: family for family in text_string_to_metric_families(one.ask("/metrics").body)}
    assert all(family.documentation for family in families.values())
    page = (ROOT / "docs" / "reference" / "sidecar.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(migrator_[a-z_]+)`", page)) - {"migrator_min_compatible"}
    served = set(re.findall(r"^# TYPE (migrator_\w+)", one.ask("/metrics").body, re.M))
    assert documented - served == {"migrator_last_run_backup_size_bytes"}  # there was no backup
    assert served <= documented
    info = families["migrator_info"].samples[0].labels
    assert info == {"version": info["version"], "image_version": "2.0"}
    said = one.metrics()
    assert said["migrator_last_run_success"] == 1
    assert said["migrator_last_run_exit_code"] == 0
    assert said["migrator_last_run_revisions"] == 3
    assert said["migrator_database_up"] == said["migrator_database_at_heads"] == 1
    assert said["migrator_pending_revisions"] == 0
    assert said["migrator_verify_success"] == 1
    assert said["migrator_checks_total"] >= 1
    assert said['migrator_last_run_stage_duration_seconds{stage="apply"}'] > 0
    assert "process_resident_memory_bytes" in said


# -- what stays -------------------------------------------------------------------------------------------


def test_what_stays_has_loaded_neither_alembic_nor_the_project(sidecar: Callable[..., Sidecar]) -> None:
    one = sidecar(MIGRATOR_SIDECAR_VERIFY_INTERVAL="100ms")
    one.wait_until_ready()
    one.wait_for(lambda: "migrator_verify_success" in one.metrics(), "a verification")
    mapped = Path(f"/proc/{one.running.pid}/maps").read_text()
    assert "psycopg2" in mapped
    assert "sqlalchemy" not in mapped
    assert "greenlet" not in mapped
