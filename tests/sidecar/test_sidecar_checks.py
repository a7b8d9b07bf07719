"""`migrator sidecar` after the run: it looks, only reading, and says what it sees."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from migrator.config.settings import Settings
from migrator.config.value_parsers import interval, listen_address, optional_interval
from migrator.errors import Interrupted, SettingsError
from migrator.outcome import ExitCode
from migrator.sidecar.board import Board, Check, Readiness, Verification
from migrator.sidecar.children import ChildResult
from migrator.sidecar.stay import Run, _stopped
from migrator.sidecar.web import is_loopback, library
from tests.ledger.test_compatibility import floors
from tests.project.env.test_several_databases import write as write_several
from tests.support.projects import linear_history
from tests.support.proxy import Proxy
from tests.support.runner import ROOT, Runner
from tests.support.servers import Database, Server
from tests.support.sidecars import Sidecar, start

Project = Callable[..., Path]


@pytest.fixture
def sidecar(run_migrator: Runner, project: Project, database: Database) -> Callable[..., Sidecar]:
    """Start one on a history of three revisions, and return it when it is ready."""

    def begin(**env: str) -> Sidecar:
        one = start(run_migrator, project(revisions=linear_history(3)), database, env=env)
        one.wait_until_ready()
        return one

    return begin


# -- at the heads -----------------------------------------------------------------------------------------


def test_behind_the_heads_it_is_not_ready_until_they_are_reached_again(
    sidecar: Callable[..., Sidecar], run_migrator: Runner, database: Database, tmp_path: Path
) -> None:
    one = sidecar()
    options = {"cwd": tmp_path / "project", "database": database, "env": {"MIGRATOR_BACKUP": "off"}}
    assert run_migrator("downgrade", "-2", **options).code == 0
    held = one.wait_until_not_ready(ExitCode.NOT_CURRENT)
    assert held.document["reason"] == "the database is at r001; 2 of this image's revisions are pending"
    assert held.document["outcome"] == "NOT_CURRENT"
    said = one.metrics()
    assert (said["migrator_ready"], said["migrator_database_at_heads"], said["migrator_database_up"]) == (
        0,
        0,
        1,
    )
    assert said["migrator_pending_revisions"] == 2
    assert run_migrator("upgrade", **options).code == 0
    one.wait_until_ready()
    assert one.metrics()["migrator_pending_revisions"] == 0
    logged = [
        line["message"] for line in one.stop().logs if line["message"].startswith(("ready", "not ready"))
    ]
    assert logged[-1] == "ready: the database is at r003: nothing is pending"
    assert len(logged) == len(set(logged)) <= 3  # what changes is said, and not every look


@pytest.mark.parametrize(
    ("floor", "allow", "ready"),
    [("", "", False), ("r002", "", True), ("", "true", True), ("r004", "true", False)],
)
def test_on_a_newer_schema_it_is_ready_where_that_is_compatible(
    floor: str,
    allow: str,
    ready: bool,
    sidecar: Callable[..., Sidecar],
    project: Project,
    run_migrator: Runner,
    database: Database,
) -> None:
    one = sidecar(MIGRATOR_ALLOW_AHEAD=allow)
    newer = project(revisions=linear_history(5), name="newer")
    if floor:
        floors(newer, r004=floor, r005=floor)
    assert run_migrator(cwd=newer, database=database, env={"MIGRATOR_BACKUP": "off"}).code == 0
    if ready:
        one.wait_for(lambda: one.ask("/").document["check"]["rows"] == ["r005"], "the newer rows")
        assert one.wait_until_ready().document["reason"] == "the database is at r005: nothing is pending"
    else:
        held = one.wait_until_not_ready(ExitCode.DATABASE_AHEAD)
        assert "is at revision r005, which this image does not have" in held.document["reason"]
        assert one.ask("/livez").status == 200


def test_without_the_version_table_it_is_not_ready(
    sidecar: Callable[..., Sidecar], database: Database
) -> None:
    one = sidecar()
    database.execute("ALTER TABLE alembic_version RENAME TO gone")
    one.wait_until_not_ready(ExitCode.NOT_CURRENT)
    database.execute("ALTER TABLE gone RENAME TO alembic_version")
    one.wait_until_ready()


def test_each_of_several_databases_counts(
    project: Project, run_migrator: Runner, server: Server, database: Database
) -> None:
    other = server.create_database()
    try:
        folder = write_several(project, database, other)
        one = start(run_migrator, folder, database, "-c", "alembic.ini")
        one.wait_until_ready()
        assert one.ask("/").document["report"]["others"]
        other.execute("DELETE FROM alembic_version")
        one.wait_for(lambda: one.ask().status == 503, "not ready")
        one.stop()
    finally:
        server.drop_database(other.name)


# -- a database that goes away ----------------------------------------------------------------------------


def test_the_database_goes_away_and_comes_back(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server()
    one = start(run_migrator, project(revisions=linear_history(1)), server.create_database())
    one.wait_until_ready()
    server.stop()
    held = one.wait_until_not_ready(ExitCode.UNREACHABLE)
    assert held.document["outcome"] == "UNREACHABLE"
    assert one.ask("/livez").status == 200
    said = one.metrics()
    assert said["migrator_database_up"] == 0
    assert said["migrator_check_failures_total"] >= 1
    server.start()
    one.wait_until_ready()
    assert one.stop().code == 0


def test_a_network_that_swallows_everything_is_noticed(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    with Proxy(database.server.port) as proxy:
        env = {**proxy.environment(database), "MIGRATOR_CONNECT_TIMEOUT": "1s"}
        one = start(run_migrator, project(revisions=linear_history(1)), database, env=env)
        one.wait_until_ready()
        proxy.stall()
        one.wait_until_not_ready(ExitCode.UNREACHABLE)
        assert one.ask("/livez").status == 200
        proxy.resume()
        one.wait_until_ready()
        assert one.stop().code == 0


def test_a_new_password_is_read_from_its_file(
    project: Project, run_migrator: Runner, database: Database, tmp_path: Path
) -> None:
    server = database.server
    role = server.create_role("rotated", "SUPERUSER LOGIN")
    secret = tmp_path / "url"
    secret.write_text(server.url(database.name, user=role))
    env = {"MIGRATOR_DATABASE_URL": None, "MIGRATOR_DATABASE_URL_FILE": str(secret)}
    try:
        one = start(run_migrator, project(revisions=linear_history(1)), database, env=env)
        one.wait_until_ready()
        server.psql("ALTER ROLE rotated PASSWORD 'another one'")
        one.wait_until_not_ready(ExitCode.ACCESS_DENIED)
        secret.write_text(server.url(database.name, user=role, password="another one"))
        one.wait_until_ready()
        one.stop()
    finally:
        server.psql("REASSIGN OWNED BY rotated TO CURRENT_USER", dbname=database.name)
        server.psql("DROP OWNED BY rotated", dbname=database.name)
        server.psql("DROP ROLE rotated")


# -- only reading -----------------------------------------------------------------------------------------


def test_it_only_reads(private_server: Callable[..., Server], project: Project, run_migrator: Runner) -> None:
    server = private_server(settings={"log_statement": "all", "log_line_prefix": "%a|"})
    database = server.create_database()
    env = {"MIGRATOR_SIDECAR_VERIFY_INTERVAL": "200ms"}
    one = start(run_migrator, project(revisions=linear_history(2)), database, env=env)
    one.wait_until_ready()
    # From here on a write fails: what is at the heads must stay so, and verify as well.
    server.psql(f'ALTER DATABASE "{database.name}" SET default_transaction_read_only = on')
    before = len(server.log.read_text())
    since = time.time()
    one.wait_for(lambda: one.metrics()["migrator_last_check_timestamp_seconds"] > since, "a check")
    one.wait_for(
        lambda: one.metrics().get("migrator_last_verify_timestamp_seconds", 0) > since + 1, "a verification"
    )
    database.psql("SELECT 1")
    assert one.ask().status == 200
    assert one.metrics()["migrator_verify_success"] == 1
    said = server.log.read_text()[before:].splitlines()
    asked = [line.partition("statement: ")[2] for line in said if line.startswith("migrator/")]
    assert any(text.startswith('COPY "public"."alembic_version"') for text in asked), said
    assert any("BEGIN READ ONLY" in text for text in asked), said
    assert not [
        text for text in asked if text.startswith(("INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP"))
    ]
    assert "cannot execute" not in "\n".join(said)
    assert "pg_try_advisory_lock" not in "\n".join(said)


def test_it_holds_no_connection_between_its_looks(
    sidecar: Callable[..., Sidecar], database: Database
) -> None:
    one = sidecar(MIGRATOR_SIDECAR_INTERVAL="1h")
    ours = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name LIKE 'migrator/%' AND datname = current_database()"
    )
    one.wait_for(lambda: database.psql(ours) == [(0,)], "the end of its sessions")
    assert one.ask().status == 200


def test_what_verify_finds_is_told_and_keeps_nobody_out(
    project: Project, run_migrator: Runner, database: Database
) -> None:
    expected = '[tables.t1]\ncolumns = { id = "integer not null", note = "text" }\n'
    folder = project(revisions=linear_history(1), files={"migrations/verify.toml": expected})
    one = start(run_migrator, folder, database, env={"MIGRATOR_SIDECAR_VERIFY_INTERVAL": "200ms"})
    one.wait_until_ready()
    one.wait_for(lambda: one.metrics().get("migrator_verify_success") == 1, "a verification")
    database.execute("ALTER TABLE t1 DROP COLUMN note")
    one.wait_for(lambda: one.metrics()["migrator_verify_success"] == 0, "the finding")
    assert one.metrics()['migrator_verify_findings{rule="missing-column",severity="error"}'] == 1
    report = one.ask("/").document["verification"]["report"]
    assert (report["code"], report["findings"][0]["place"]) == (41, "public.t1.note")
    assert one.ask().status == 200
    database.execute("ALTER TABLE t1 ADD COLUMN note text")
    one.wait_for(lambda: one.metrics()["migrator_verify_success"] == 1, "the end of the finding")
    told = [line for line in one.stop().logs if line["message"].startswith("verify failed: ")]
    assert len(told) == 1  # said when it begins, and not at each look
    assert "public.t1.note: the column does not exist" in told[0]["message"]


# -- what decides -----------------------------------------------------------------------------------------


class Stubborn:
    """A run that ends as told, once it is told to stop."""

    def __init__(self, status: int) -> None:
        self._told = ChildResult(status, {"after": ["r001"], "message": "done"})
        self._stop = threading.Event()
        self.begun = threading.Event()

    def upgrade(self, revision: str) -> ChildResult:
        self.begun.set()
        self._stop.wait(60)
        return self._told

    def end(self) -> None:
        self._stop.set()


@pytest.mark.parametrize(("status", "code"), [(0, 0), (23, 23), (40, 40)])
def test_a_signal_during_the_run_ends_it_whatever_the_run_makes_of_it(status: int, code: int) -> None:
    stubborn = Stubborn(status)
    run = Run(stubborn, "head")  # type: ignore[arg-type] # as much of it as is needed
    threading.Thread(target=lambda: stubborn.begun.wait(60) and run.stop()).start()
    assert run.end().status == status
    assert _stopped("SIGTERM", run, Settings()).code == code


@pytest.mark.parametrize("ignored", [False, True])
def test_sighup_ends_it_as_sigterm_does_unless_nohup_started_it(
    sidecar: Callable[..., Sidecar], ignored: bool
) -> None:
    # A child inherits what is ignored, and nothing else.
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: None)
    try:
        one = sidecar()
    finally:
        signal.signal(signal.SIGHUP, previous)
    one.running.send(signal.SIGHUP)
    result, name = (one.stop(), "SIGTERM") if ignored else (one.running.finish(), "SIGHUP")
    assert (result.code, result.logs[-1]["message"]) == (0, f"stopped by {name}")


def test_a_signal_before_the_run_is_an_interruption() -> None:
    never, at_once = (Run(Stubborn(-signal.SIGTERM), "head") for _ in range(2))  # type: ignore[arg-type]
    threading.Timer(0.2, at_once.stop).start()
    at_once.end()
    for run in (never, at_once):
        with pytest.raises(Interrupted):
            _stopped("SIGTERM", run, Settings())


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="the sidecar needs waitress, which is not installed"):
        library()


def _check(code: ExitCode) -> Check:
    return Check(time.time(), 0.1, int(code), code.name, "as told", ("r001",), 0)


def test_what_is_known_from_long_ago_is_not_known() -> None:
    board = Board(patience=60)
    assert board.readiness().reason == "the run has not ended yet"
    board.ran({"code": 0})
    board.checked(_check(ExitCode.OK))
    assert board.readiness().ready
    board._checked -= 61  # as if that had been a minute ago
    assert not board.readiness().ready
    assert "the last check was" in board.readiness().reason
    board.checked(_check(ExitCode.DATABASE_AHEAD))
    assert board.readiness() == Readiness(ready=False, reason="as told", code=32, outcome="DATABASE_AHEAD")


def test_a_verification_without_a_result_takes_no_place() -> None:
    board = Board(patience=10)
    found = Verification(1.0, {"code": 41, "findings": []})
    board.verified(found)
    board.verified(Verification(2.0, {"code": 20, "findings": []}))
    assert board.now.verification == found
    assert board.now.verify_failures == 1


@pytest.mark.parametrize(
    ("listen", "here"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("shop.example:1", False),
    ],
)
def test_which_addresses_only_this_host_reaches(listen: str, here: bool) -> None:
    assert listen_address(listen) == listen
    assert is_loopback(listen) is here


def test_an_interval_has_a_least() -> None:
    assert interval("30s") == 30
    assert optional_interval("none") is optional_interval("0") is None
    for text in ("0", "99ms"):
        with pytest.raises(ValueError, match="too short"):
            interval(text)


def test_the_page_asks_as_the_recipe_does() -> None:
    page = (ROOT / "docs" / "howto" / "run-a-sidecar.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```yaml\n(services:.*?)^```", page, re.M | re.S)
    recipe = (ROOT / "compose" / "sidecar" / "docker-compose.yml").read_text(encoding="utf-8")
    asked = [yaml.safe_load(text)["services"]["migrator"]["healthcheck"] for text in (snippet, recipe)]
    assert asked[0] == asked[1]
