"""A second attempt goes through env.py from the top: it sees what the first one saw, and nothing is done twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from migrator.config.settings import Settings
from migrator.errors import LockBusy
from migrator.outcome import ExitCode
from migrator.pipeline.apply.attempt import Attempt, Cause, Landed, LockFailure, Part, cause_of, cut_alike
from migrator.pipeline.apply.decide import LOSSES, Again, Done, Failed, decide
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refusal
from migrator.postgres.version_table import VersionTable
from migrator.project import Plan
from migrator.project.history import history
from tests.support.env_shapes import SHAPES
from tests.support.env_text import env
from tests.support.ledgers import agrees
from tests.support.outcomes import done, left_behind, refusal
from tests.support.projects import Revision, linear_history
from tests.support.proxy import Proxy
from tests.support.runner import Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]
Start = Callable[..., Running]

# What a session sees, one line an attempt; the file is opened anew by each.
LOOK = """\
import json, os
from sqlalchemy import text
with op.get_context().connection.begin_nested():
    rows = op.get_bind().execute(text(
        "SELECT 'setting ' || name, setting FROM pg_settings WHERE name <> 'transaction_timestamp'"
        " UNION ALL SELECT 'role', current_user || ' of ' || session_user"
        " UNION ALL SELECT 'lock ' || classid || ' ' || objid, mode FROM pg_locks"
        "  WHERE pid = pg_backend_pid() AND locktype = 'advisory'"
        " UNION ALL SELECT 'temporary', coalesce(to_regclass('pg_temp.scratch')::text, 'none')"
        " UNION ALL SELECT 'orders', coalesce(to_regclass('orders')::oid::text, 'none')"))
    found = dict(tuple(row) for row in rows)
with open(os.environ['SEEN'], 'a') as file: file.write(json.dumps(found) + '\\n')
op.execute('ALTER TABLE orders DROP COLUMN note')
"""
PREPARED = """
CREATE SCHEMA app;
CREATE TABLE app.orders (id int, note text); CREATE TABLE public.orders (id int, note text);
GRANT ALL ON SCHEMA app, public TO "{role}"; ALTER TABLE app.orders OWNER TO "{role}";
ALTER TABLE public.orders OWNER TO "{role}"
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_second_attempt_sees(
    database: Database, project: Project, start_migrator: Start, tmp_path: Path, shape: str
) -> None:
    role = database.server.create_role(f"owns_{database.name}")
    database.execute(PREPARED.format(role=role))
    files = {name: text.replace("{role}", f'\\"{role}\\"') for name, text in SHAPES[shape].items()}
    folder = project(files, revisions=[Revision("a1", None, LOOK)])
    seen = tmp_path / "seen"
    blocker = database.connect()
    blocker.cursor().execute("LOCK TABLE app.orders, public.orders IN ACCESS SHARE MODE")
    settings: Mapping[str, str | None] = {
        "MIGRATOR_LOCK_TIMEOUT": None if "lock_timeout" in shape else "300ms",
        "MIGRATOR_LOCK_RETRIES": "100",
        "SEEN": str(seen),
        "MIGRATOR_VERSION_TABLE": "app.alembic_version" if "version_table_schema" in str(files) else None,
        "MIGRATOR_BASELINE": "base",
        "MIGRATOR_BACKUP": "off",
    }
    run = start_migrator("upgrade", cwd=folder, database=database, env=settings)
    run.wait_for("rolled back, retrying")
    blocker.close()
    result = done(run.finish())
    attempts = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(attempts) >= 2, result
    assert all(attempt == attempts[0] for attempt in attempts[1:]), _difference(attempts)
    lost = "SELECT attrelid::regclass::text FROM pg_attribute WHERE attisdropped AND attrelid = {}"
    assert database.psql(lost.format(attempts[0]["orders"])), "the column is still where env.py pointed to"
    others = "SELECT count(*)::int FROM information_schema.columns WHERE column_name = 'note'"
    assert database.psql(others) == [(1,)]
    assert left_behind(database) == []


def _difference(attempts: list[dict[str, Any]]) -> str:
    first, second = attempts[0], attempts[1]
    names = sorted({*first, *second})
    return "; ".join(
        f"{name}: {first.get(name)} != {second.get(name)}"
        for name in names
        if first.get(name) != second.get(name)
    )


PENDING = (history.Revision("b1", ("a1",), "", "b1.py"),)
PLAN = Plan("upgrade", "head", PENDING, frozenset({"a1"}), frozenset({"b1"}))
THERE, PART = Landed(PLAN.before), Part("b1", VersionTable())
SETTINGS = Settings(lock_retries=3)
MISSED = LockFailure("55P03", "55P03")
LAST = {Cause.BUSY: 3, Cause.LOST: LOSSES, Cause.OTHER: 0}
"""How many attempts may fail for each cause before the last retry."""


class Coded(Exception):
    """A driver's error."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.sqlstate = code


CODES = {Cause.BUSY: "55P03", Cause.LOST: "08006", Cause.OTHER: "22012"}


def seen(cause: Cause, count: int = 1, code: str = "", **facts: Any) -> Attempt:
    """Return a failed attempt: the ``count``th that failed for this cause."""
    facts = {"landed": THERE, "entered": True, "failed_in": "b1"} | facts
    error = Coded(code or CODES[cause])
    return Attempt(
        PLAN,
        error,
        cause=cause,
        busy=count if cause is Cause.BUSY else 0,
        losses=count if cause is Cause.LOST else 0,
        **facts,
    )


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("unfinished", [(), (PART,)])
@pytest.mark.parametrize("signal", ["", "SIGTERM"])
@pytest.mark.parametrize("used_up", [False, True])
def test_what_follows_from_an_attempt(
    cause: Cause, settled: bool, unfinished: tuple[Part, ...], signal: str, used_up: bool
) -> None:
    landed = Landed(PLAN.before, unfinished=unfinished)
    attempt = seen(cause, LAST[cause] + used_up, settled=settled, signal=signal, landed=landed)
    decision = decide(attempt, SETTINGS, 0.5)
    alone = settled and not unfinished and not signal
    if alone and not used_up and cause is not Cause.OTHER:
        assert isinstance(decision, Again)
        return
    assert isinstance(decision, Failed)
    told = str(decision.error)
    if unfinished:
        assert decision.error.code is ExitCode.PARTIAL
        assert "A part of b1 was committed outside of its transaction" in told
    elif signal:
        assert decision.error.code is ExitCode.INTERRUPTED
    else:
        assert decision.error.code is (ExitCode.BLOCKED if cause is Cause.BUSY else ExitCode.ROLLED_BACK)
    assert told.startswith("Interrupted by SIGTERM in revision b1" if signal else "Revision b1 failed")


@pytest.mark.parametrize(
    ("attempt", "code", "words"),
    [
        (seen(Cause.LOST, LOSSES + 1, landed=None), 40, "The database could not be read after that"),
        (seen(Cause.LOST, landed=None, settled=False, anything_committed=False), 20, "did not come back"),
        (seen(Cause.OTHER, landed=None, anything_committed=False, signal="SIGTERM"), 40, "It is not known"),
        (seen(Cause.OTHER, landed=Landed(PLAN.after, ["b1"])), 40, "the database is at b1"),
        (seen(Cause.OTHER, signal="SIGINT", landed=Landed(PLAN.after, ["b1"])), 40, "Interrupted by SIGINT"),
        (seen(Cause.BUSY, 4), 22, "It was tried 4 times"),
        (seen(Cause.BUSY, 4, certain=False, landed=Landed(PLAN.before, unfinished=(PART,))), 40, "may have"),
        (seen(Cause.LOST, LOSSES + 1, cut_after=5.0), 39, "lost its connection about 5 s after"),
        (seen(Cause.OTHER, code="42501"), 30, "Everything was rolled back"),
        (seen(Cause.OTHER, entered=False), 31, "env.py failed"),
        (seen(Cause.OTHER, retries=MISSED), 22, "env.py cannot run a second time in one process"),
        (seen(Cause.OTHER, retries=MISSED, signal="SIGTERM"), 23, "Interrupted by SIGTERM"),
        (seen(Cause.OTHER, retries=MISSED, connected=True), 39, "Revision b1 failed"),
        (Attempt(PLAN, SystemExit(3), raised=Coded("22012"), landed=THERE, entered=True), 39, "22012"),
        (
            Attempt(PLAN, LockBusy("Another run."), cause=Cause.BUSY, settled=False, landed=THERE),
            21,
            "Another",
        ),
    ],
)
def test_the_code_and_the_sentence_of_a_failure(attempt: Attempt, code: int, words: str) -> None:
    decision = decide(attempt, SETTINGS, 0.5)
    assert isinstance(decision, Failed)
    assert decision.error.code == code
    assert words in f"{decision.error} {decision.error.state}"


def test_an_attempt_without_an_error_is_the_last() -> None:
    assert decide(Attempt(PLAN, landed=Landed(PLAN.after, ["b1"])), SETTINGS, 0.5) == Done()


@pytest.mark.parametrize(
    ("attempt", "again"),
    [
        (seen(Cause.BUSY, 1), Again(0.25, "55P03: rolled back, retrying in 0.2 s (attempt 2 of 4)", MISSED)),
        (seen(Cause.BUSY, 3), Again(1.0, "55P03: rolled back, retrying in 1.0 s (attempt 4 of 4)", MISSED)),
        (
            seen(Cause.LOST, 2),
            Again(
                0.0,
                "the server is back and has rolled back the open transaction: running env.py again (2 of 3)",
            ),
        ),
    ],
)
def test_how_long_a_retry_waits(attempt: Attempt, again: Again) -> None:
    assert decide(attempt, SETTINGS, 0.5) == again


def test_a_lock_failure_that_env_py_replaced_is_retried() -> None:
    attempt = Attempt(PLAN, RuntimeError("no"), raised=Coded("55P03"), cause=Cause.BUSY, busy=1)
    decision = decide(attempt, SETTINGS, 0.5)
    assert isinstance(decision, Again)
    assert decision.lock_failure == LockFailure("no", "55P03")


def test_no_pause_is_longer_than_ten_seconds() -> None:
    decision = decide(seen(Cause.BUSY, 5000), Settings(lock_retries=9999), 1.0)
    assert isinstance(decision, Again)
    assert decision.after == 10.0


def wrapped(error: BaseException) -> BaseException:
    """Return an error that a program has raised from another one."""
    outer = RuntimeError("no luck")
    outer.__cause__ = error
    return outer


class OperationalError(Exception):
    """What SQLAlchemy makes of a failed connection: no SQLSTATE."""


@pytest.mark.parametrize(
    ("error", "connected", "gone", "answers", "cause"),
    [
        (Coded("55P03"), True, False, True, Cause.BUSY),
        (Coded("40P01"), True, False, True, Cause.BUSY),
        (Coded("40001"), True, False, True, Cause.BUSY),
        (wrapped(Coded("55P03")), True, False, True, Cause.BUSY),
        (Coded("08006"), True, True, True, Cause.LOST),
        (Coded("08006"), False, False, True, Cause.LOST),
        (Coded("08006"), True, False, True, Cause.OTHER),  # dblink's own connection
        (Coded("57P01"), True, False, True, Cause.LOST),
        (Coded("25P03"), True, True, True, Cause.OTHER),
        (Coded("22012"), True, False, True, Cause.OTHER),
        (Coded("22012"), True, True, True, Cause.LOST),
        (OperationalError("no route"), False, False, True, Cause.OTHER),
        (OperationalError("no route"), False, False, False, Cause.LOST),
        (OperationalError("no route"), True, False, False, Cause.OTHER),
        (QueryFailed("gone", "", lost=True), True, False, True, Cause.LOST),
        (ConnectFailed(Refusal.TRANSIENT, "waited for it"), False, False, False, Cause.OTHER),
        (KeyboardInterrupt(), True, True, False, Cause.OTHER),
    ],
)
def test_why_an_attempt_failed(
    error: BaseException, connected: bool, gone: bool, answers: bool, cause: Cause
) -> None:
    assert cause_of(error, connected=connected, gone=gone, answers=lambda: answers) is cause


def test_a_retry_does_not_leave_env_py_s_schema(
    database: Database, project: Project, start_migrator: Start
) -> None:
    """The case that was reported: the second attempt dropped the column of the other schema's table, with 0."""
    database.execute(
        "CREATE SCHEMA app; CREATE TABLE app.orders (id int, note text); CREATE TABLE public.orders (id int, note text)"
    )
    folder = project(
        SHAPES["SET search_path in the transaction"],
        revisions=[Revision("a1", None, "ALTER TABLE orders DROP COLUMN note")],
    )
    reader = database.connect()
    reader.cursor().execute("SELECT * FROM app.orders")
    env = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "MIGRATOR_BASELINE": "base", "MIGRATOR_BACKUP": "off"}
    run = start_migrator(
        "upgrade",
        cwd=folder,
        database=database,
        env={**env, "MIGRATOR_VERSION_TABLE": "app.alembic_version"},
    )
    run.wait_for("rolled back, retrying")
    reader.close()
    assert run.finish().code == ExitCode.OK
    columns = "SELECT table_schema FROM information_schema.columns WHERE column_name = 'note'"
    assert database.psql(columns) == [("public",)]


def test_a_prepared_transaction_in_the_way_is_named(
    private_server: Callable[..., Server], project: Callable[..., Path], run_migrator: Runner
) -> None:
    database = private_server(settings={"max_prepared_transactions": "2"}).create_database()
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", "ALTER TABLE t1 ADD n int")])
    done(run_migrator("upgrade", "r001", cwd=folder, database=database))
    with closing(database.connect()) as other:
        other.tpc_begin("it's held")
        other.cursor().execute("LOCK TABLE t1 IN SHARE MODE")
        other.tpc_prepare()
    env = {"MIGRATOR_BACKUP": "off", "MIGRATOR_LOCK_TIMEOUT": "3s", "MIGRATOR_LOCK_RETRIES": "0"}
    result = run_migrator(cwd=folder, database=database, env=env)
    named = "blocked by prepared transaction 'it''s held'"
    refusal(result, ExitCode.BLOCKED, named, "ROLLBACK PREPARED 'it''s held';")


@pytest.mark.parametrize(
    ("ages", "alike"),
    [
        ((5.1, 5.0, 5.4, 5.0), True),
        ((600.2, 640.0), True),
        ((5.0,), False),
        ((5.0, 11.0), False),
        ((0.1, 0.1), False),
    ],
)
def test_connections_that_are_cut_at_a_like_age(ages: tuple[float, ...], alike: bool) -> None:
    assert bool(cut_alike(ages)) is alike


def test_a_proxy_that_ends_idle_connections_is_named_and_no_revision(
    database: Database, project: Callable[..., Path], start_migrator: Start
) -> None:
    asleep = (
        "SELECT client_port, query_start FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'"
        " AND state = 'active'"
    )
    cut: set[Any] = set()
    with Proxy(database.server.port) as proxy:
        env = {"MIGRATOR_BACKUP": "off", **proxy.environment(database)}
        run = start_migrator(cwd=project(revisions=[Revision("r001", None, "SELECT pg_sleep(600)")]), env=env)
        while run.process.poll() is None:
            for port, since in database.psql(f"{asleep} AND clock_timestamp() - query_start > interval '4s'"):
                if since not in cut:
                    cut.add(since)
                    proxy.drop(port)
            time.sleep(0.05)
        result = run.finish()
    assert len(cut) == LOSSES + 1
    told = refusal(result, ExitCode.ROLLED_BACK, "ends connections that look idle", "MIGRATOR_DIRECT_URL")
    assert "fix revision" not in told


MODELS = {"models.py": "from sqlalchemy.orm import declarative_base\nBase = declarative_base()\n"}
EXTRA = """from models import Base
from sqlalchemy import Column, Integer
class Extra(Base):
    __tablename__ = 'extra'
    id = Column(Integer, primary_key=True)"""


def test_an_env_py_that_cannot_run_twice_is_no_fault_of_the_lock_wait(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Its second run fails by itself, so the run ends as if there were no retry: another run can help."""
    database.execute("CREATE TABLE busy (id int)")
    files = {**env(top=EXTRA), **MODELS}
    folder = project(files, revisions=[Revision("a1", None, "ALTER TABLE busy ADD n int")])
    variables = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "MIGRATOR_BASELINE": "base", "MIGRATOR_BACKUP": "off"}
    with closing(database.connect()) as reader:
        reader.cursor().execute("SELECT * FROM busy")
        result = run_migrator(cwd=folder, database=database, env=variables)
    words = ("lock timeout", "env.py cannot run a second time", "Table 'extra' is already defined", "[55P03]")
    refusal(result, ExitCode.BLOCKED, *words)
    done(run_migrator(cwd=folder, database=database, env=variables))


def test_an_env_py_that_changes_its_directory_runs_again(
    database: Database, project: Project, start_migrator: Start
) -> None:
    database.execute("CREATE TABLE busy (id int)")
    files = env(top="os.chdir('migrations'); open('env.py').close()")
    folder = project(files, revisions=[Revision("a1", None, "ALTER TABLE busy ADD n int")])
    variables = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "MIGRATOR_BASELINE": "base", "MIGRATOR_LOCK_RETRIES": "50"}
    with closing(database.connect()) as reader:
        reader.cursor().execute("SELECT * FROM busy")
        run = start_migrator(cwd=folder, database=database, env=variables)
        run.wait_for("retrying")
    done(run.finish())


def test_a_connection_of_dblink_that_fails_is_not_the_migrations(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    database.execute("CREATE EXTENSION dblink")
    body = "op.execute(\"SELECT dblink_connect('host=127.0.0.1 port=1')\")"
    result = run_migrator(cwd=project(revisions=[Revision("a1", None, body)]), database=database)
    refusal(result, ExitCode.ROLLED_BACK, "Revision a1 failed: could not establish connection", "[08001]")
    assert "connection was lost" not in result.stderr


def test_an_env_py_that_exits_after_its_work(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Alembic ends with the same code."""
    folder = project(env(after="raise SystemExit(0)"), revisions=linear_history(2))
    done(run_migrator(cwd=folder, database=database))
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


RETRIES = """import time
for _ in range(3):
    try:
        with engine.connect() as another:
            run(another)
        break
    except Exception:
        time.sleep(0.1)
else:
    raise SystemExit('gave up')"""


def test_an_env_py_that_retries_by_itself_does_not_repeat_a_part(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """It would not have to without migrator, whose lock_timeout ends its first attempt."""
    part = "with op.get_context().autocommit_block():\n    op.execute('UPDATE t SET n = n * 2')"
    history = [
        Revision("a1", None, "CREATE TABLE busy (id int)"),
        Revision("b1", "a1", part),
        Revision("c1", "b1", "ALTER TABLE busy ADD n int"),
    ]
    database.execute("CREATE TABLE t AS SELECT 1 AS n")
    folder = project(env(run=RETRIES), revisions=history)
    variables = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "MIGRATOR_BASELINE": "base", "MIGRATOR_BACKUP": "off"}
    done(run_migrator("upgrade", "a1", cwd=folder, database=database, env=variables))
    with closing(database.connect()) as reader:
        reader.cursor().execute("SELECT * FROM busy")
        result = run_migrator(cwd=folder, database=database, env=variables)
    assert database.psql("SELECT n FROM t") == [(2,)], result
    refusal(result, ExitCode.PARTIAL, "A part of b1 was committed", "[55P03]", "--retry")


def test_an_env_py_with_a_loop_records_its_run_once(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """Its version table is known with and without its schema: it is one."""
    result = done(run_migrator(cwd=project(env(run=RETRIES), revisions=linear_history(2)), database=database))
    assert "the ledger does not record" not in result.stderr
    ended = "SELECT count(*) FROM migrator_ledger WHERE event = 'run' AND outcome = 'OK'"
    assert database.psql(ended) == [(1,)]


def test_a_version_table_that_a_revision_moves_is_not_called_rolled_back(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    moves = (
        "op.execute('CREATE SCHEMA app')\nop.execute('ALTER TABLE alembic_version SET SCHEMA app')\n"
        "op.execute('SET search_path TO app, public')"
    )
    folder = project(revisions=[*linear_history(1), Revision("b1", "r001", moves)])
    result = run_migrator(cwd=folder, database=database)
    assert database.psql("SELECT version_num FROM app.alembic_version") == [("b1",)]
    refusal(result, ExitCode.PARTIAL, "the version table does not show them")


def test_a_hook_of_env_py_that_commits_loses_no_row_of_the_ledger(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    hook = "on_version_apply=lambda ctx, **_: ctx.connection.commit()"
    folder = project(env(configure=hook), revisions=linear_history(2))
    done(run_migrator(cwd=folder, database=database))
    agrees(database, ["r001", "r002"])
    assert "something else" not in done(run_migrator(cwd=folder, database=database)).stderr
