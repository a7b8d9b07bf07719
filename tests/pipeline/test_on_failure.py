"""MIGRATOR_ON_FAILURE: stop, downgrade, or restore, and never a write of others lost unasked."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from migrator.outcome import ExitCode
from tests.support import installations
from tests.support.outcomes import done, left_behind, refusal
from tests.support.programs import Held
from tests.support.projects import ENV_FILES, Revision, bring_to, linear_history
from tests.support.runner import Result, Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]

QUIET = {"autovacuum": "off"}
"""Autovacuum takes transaction ids, which are taken for writes of others."""
WRITES = """\
import psycopg2
import os
connection = psycopg2.connect(os.environ["OTHERS"])
connection.cursor().execute("INSERT INTO t1 VALUES (77, 'an order')")
connection.commit()
connection.close()
raise RuntimeError("half way")"""


def each_in_its_own(name: str = "plain_url") -> dict[str, str]:
    """Return env.py with one transaction a revision."""
    text = (ENV_FILES / f"{name}.py").read_text()
    option = "transaction_per_migration=True"
    return {
        "migrations/env.py": text.replace("connection=connection, ", f"connection=connection, {option}, ")
    }


def failing(body: str = 'raise RuntimeError("half way")') -> list[Revision]:
    """Return three revisions: the second deletes rows and the third fails."""
    revisions = linear_history(3)
    revisions[1] = Revision("r002", "r001", "DELETE FROM t1; CREATE TABLE t2 (id int)", "DROP TABLE t2")
    revisions[2] = Revision("r003", "r002", body)
    return revisions


@pytest.fixture(scope="module")
def quiet_server() -> Iterator[Server]:
    """A server where nobody else writes."""
    server = Server(installations.binaries("debian"), settings=QUIET)
    server.start()
    yield server
    server.remove()


@pytest.fixture
def quiet(quiet_server: Server) -> Database:
    """A database on a server where nobody else writes, at r001, with two rows."""
    database = quiet_server.create_database()
    bring_to(database, 1)
    database.execute("INSERT INTO t1 VALUES (1, 'one'), (2, 'two')")
    return database


def kept(database: Database) -> list[str]:
    """Return the databases that restores have set aside."""
    rows = database.server.psql(
        "SELECT datname::text FROM pg_database WHERE datname LIKE %s", [database.name + r"\_%"]
    )
    return [row[0] for row in rows]


def as_role(database: Database, role: str) -> None:
    """Give a database and what is in it to a role that may create databases and is no superuser, where it is one."""
    if role == "postgres":
        return
    if not database.server.psql("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]):
        database.server.create_role(role, "LOGIN CREATEDB")
    database.psql(f"ALTER DATABASE {database.name} OWNER TO {role}")
    database.psql("ALTER LARGE OBJECT 4711 OWNER TO " + role)
    for table in ("t1", "alembic_version", "numbers"):
        database.psql(f"ALTER TABLE {table} OWNER TO {role}")
    database.url = database.url.replace("//postgres:", f"//{role}:")


def restored(result: Result, database: Database) -> str:
    """Check that the run ended in a restore, and return the name of what was set aside."""
    assert result.code == ExitCode.RESTORED, result
    assert database.psql("SELECT id, note FROM t1 ORDER BY id") == [(1, "one"), (2, "two")]
    assert database.psql("SELECT to_regclass('t2')") == [(None,)]
    assert database.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    (name,) = kept(database)
    return name


def test_restore_and_wait_for_a_changed_image(
    quiet: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(each_in_its_own(), revisions=failing())
    env = {"MIGRATOR_ON_FAILURE": "restore"}
    result = run_migrator("--format", "json", cwd=folder, database=quiet, env=env)
    old = restored(result, quiet)
    assert "RuntimeError: half way" in result.answer["message"]
    assert f"The failed database is now {old}" in result.answer["message"]
    assert (result.answer["before"], result.answer["after"]) == (["r001"], ["r001"])
    assert result.answer["stages"][-1]["stage"] == "restore"
    assert "lost, and the lock with it" not in result.stderr
    assert Database(quiet.server, old).psql("SELECT version_num FROM alembic_version") == [("r002",)]
    rows = quiet.psql("SELECT code, details->'failed'->>'revision' FROM migrator_ledger WHERE event = 'run'")
    assert rows == [(42, "r003")]

    for _ in range(2):  # nor do those that come after the one that was refused
        again = run_migrator(cwd=folder, database=quiet, env=env)
        refusal(again, ExitCode.UNSAFE, "revision r003 failed in run", "the database was restored", "--retry")
    assert kept(quiet) == [old]
    assert run_migrator("--retry", cwd=folder, database=quiet).code == ExitCode.PARTIAL
    assert quiet.psql("SELECT version_num FROM alembic_version") == [("r002",)]


@pytest.mark.parametrize("change", ["revision", "image"])
def test_a_changed_image_goes_on(
    quiet: Database, project: Project, run_migrator: Runner, change: str
) -> None:
    folder = project(each_in_its_own(), revisions=failing())
    restored(run_migrator("--on-failure", "restore", cwd=folder, database=quiet), quiet)
    env = {"MIGRATOR_IMAGE_VERSION": "2"} if change == "image" else {}
    if change == "revision":
        project(revisions=[*failing()[:2], Revision("r003", "r002", "CREATE TABLE t3 (id int)")])
        done(run_migrator(cwd=folder, database=quiet, env=env))
    else:
        assert run_migrator(cwd=folder, database=quiet, env=env).code == ExitCode.PARTIAL


def test_a_failed_verify_is_restored(quiet: Database, project: Project, run_migrator: Runner) -> None:
    verify = {
        "migrations/verify.toml": '[[assertions]]\nname = "rows"\nsql = "SELECT count(*) FROM t1"\nexpect = 9\n'
    }
    folder = project(verify, revisions=linear_history(2))
    result = run_migrator("--on-failure", "restore", cwd=folder, database=quiet)
    restored(result, quiet)
    refusal(run_migrator(cwd=folder, database=quiet), ExitCode.UNSAFE, "verify failed in run", "was restored")


@pytest.mark.parametrize("how", ["committed before", "under way", "another database"])
def test_what_others_wrote_is_not_lost(
    quiet: Database, project: Project, run_migrator: Runner, how: str
) -> None:
    folder = project(each_in_its_own(), revisions=failing(WRITES))
    other = quiet.server.create_database()
    other.execute("CREATE TABLE t1 (id int, note text)")
    env = {"OTHERS": other.url if how == "another database" else quiet.url, "MIGRATOR_ON_FAILURE": "restore"}
    if how == "under way":
        project(
            each_in_its_own(),
            revisions=[
                Revision(
                    "r003",
                    "r002",
                    WRITES.replace(
                        "connection.commit()\nconnection.close()",
                        "KEPT = []\nimport builtins\nbuiltins.kept = connection",
                    ),
                )
            ],
        )
    result = run_migrator(cwd=folder, database=quiet, env=env)
    sentence = refusal(
        result, ExitCode.PARTIAL, "The database was not restored", "half way", "the database is at r002"
    )
    assert (
        "may be writing" if how == "under way" else "1 transaction that this run cannot account"
    ) in sentence
    assert kept(quiet) == []
    if how == "committed before":
        assert quiet.psql("SELECT id FROM t1") == [(77,)]
    told = result.stderr.strip().splitlines()[-1]
    assert "migrator restore " in told


@pytest.mark.parametrize("variable", ["MIGRATOR_DISCARD_WRITES"])
def test_unless_they_may_be_lost(
    quiet: Database, project: Project, run_migrator: Runner, variable: str
) -> None:
    folder = project(each_in_its_own(), revisions=failing(WRITES))
    env = {"OTHERS": quiet.url, "MIGRATOR_ON_FAILURE": "restore", variable: "true"}
    old = restored(run_migrator(cwd=folder, database=quiet, env=env), quiet)
    assert Database(quiet.server, old).psql("SELECT id FROM t1") == [(77,)]


def test_who_writes_meanwhile_is_ended_and_has_written_nothing_that_is_lost(
    quiet: Database, project: Project, run_migrator: Runner
) -> None:
    """A writer that waits from the failure on: what it was told to be committed is there afterwards."""
    folder = project(each_in_its_own(), revisions=failing())
    quiet.execute("CREATE TABLE orders (id serial, note text); CREATE TABLE started (id int)")
    committed: list[int] = []
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            try:
                with quiet.connect() as connection, connection.cursor() as cursor:
                    cursor.execute("SELECT to_regclass('t2') IS NOT NULL")
                    if cursor.fetchone() == (True,):
                        cursor.execute("INSERT INTO orders (note) VALUES ('x') RETURNING id")
                        found = cursor.fetchone()
                        connection.commit()
                        committed.append(found[0] if found else 0)
                connection.close()
            except psycopg2.Error:
                time.sleep(0.002)  # ended by the swap, which is what is tried

    writer = threading.Thread(target=write)
    writer.start()
    try:
        result = run_migrator("--on-failure", "restore", cwd=folder, database=quiet)
    finally:
        stop.set()
        writer.join()
    assert result.code in (ExitCode.RESTORED, ExitCode.PARTIAL), result
    present = {row[0] for row in quiet.psql("SELECT id FROM orders")}
    assert set(committed) <= present


@pytest.mark.parametrize("role", ["postgres", "creator"])
@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE late AS SELECT 1 AS a",
        "CREATE FUNCTION late() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "SELECT nextval('numbers')",
        "SELECT lo_from_bytea(0, 'late')",
        "SELECT lo_put(4711, 0, 'late')",
    ],
)
def test_what_others_make_while_it_is_restored_is_not_lost(
    quiet: Database,
    project: Project,
    start_migrator: Callable[..., Running],
    tmp_path: Path,
    sql: str,
    role: str,
) -> None:
    """A lock on tables keeps nobody from these: either nothing is restored, or it was not committed."""
    quiet.execute("CREATE SEQUENCE numbers; SELECT lo_from_bytea(4711, 'x')")
    as_role(quiet, role)
    folder = project(each_in_its_own(), revisions=failing())
    held = Held(tmp_path / "bin", quiet.server.bin, "pg_restore", when="--dbname=")
    env = {"MIGRATOR_PG_BIN": str(held.folder)}
    running = start_migrator("--on-failure", "restore", cwd=folder, database=quiet, env=env)
    running.wait_for(held.reached)
    refused: list[psycopg2.Error] = []

    def make() -> None:
        try:
            quiet.psql(sql)
        except psycopg2.Error as error:
            refused.append(error)

    making = threading.Thread(target=make)
    making.start()
    waits = "SELECT 1 FROM pg_stat_activity WHERE query = %s AND wait_event_type = 'Lock'"
    running.wait_for(lambda: not making.is_alive() or quiet.server.psql(waits, [sql]))
    held.go()
    making.join(60)
    if refused:
        assert "lo_" in sql
        assert role == "postgres"
        restored(running.finish(), quiet)
        return
    result = running.finish()
    refusal(result, ExitCode.PARTIAL, "The database was not restored", "during the restore", "is at r002")
    assert kept(quiet) == []
    assert quiet.psql("SELECT to_regclass('t2') IS NOT NULL") == [(True,)]


def test_temporary_tables_of_others_are_no_loss(
    quiet: Database, project: Project, start_migrator: Callable[..., Running], tmp_path: Path
) -> None:
    held = Held(tmp_path / "bin", quiet.server.bin, "pg_restore", when="--dbname=")
    with contextlib.closing(quiet.connect()) as before:
        before.cursor().execute("CREATE TEMPORARY TABLE mine AS SELECT 1 AS a")
        before.commit()
        folder = project(each_in_its_own(), revisions=failing())
        env = {"MIGRATOR_PG_BIN": str(held.folder)}
        running = start_migrator("--on-failure", "restore", cwd=folder, database=quiet, env=env)
        running.wait_for(held.reached)
        quiet.execute("CREATE TEMPORARY TABLE mine AS SELECT 1 AS a")
        held.go()
        restored(running.finish(), quiet)


def test_no_backup_no_restore(quiet: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(each_in_its_own(), revisions=failing())
    env = {"MIGRATOR_ON_FAILURE": "restore", "MIGRATOR_BACKUP": "off"}
    result = run_migrator(cwd=folder, database=quiet, env=env)
    refusal(
        result, ExitCode.PARTIAL, "The database was not restored: there is no backup", "MIGRATOR_BACKUP=off"
    )


@pytest.mark.parametrize("window", ["false", "true"])
def test_a_backup_that_is_not_whole_is_not_put_in_the_place_of_what_is(
    quiet: Database, project: Project, run_migrator: Runner, window: str
) -> None:
    quiet.execute("CREATE TABLE audit AS SELECT generate_series(1, 100) AS a")
    folder = project(each_in_its_own(), revisions=failing())
    env = {"MIGRATOR_BACKUP_EXCLUDE_TABLE_DATA": "audit"}
    told = {"MIGRATOR_ON_FAILURE": "restore", "MIGRATOR_DISCARD_WRITES": window}
    result = run_migrator(cwd=folder, database=quiet, env=env | told)
    refusal(
        result,
        ExitCode.PARTIAL,
        "half way",
        "The database was not restored",
        "public.audit",
        "database is at r002",
    )
    assert "--yes --incomplete" in result.stderr
    assert quiet.psql("SELECT count(*) FROM audit") == [(100,)]
    assert kept(quiet) == []

    for more in ((), ("--drop-old",), ("--incomplete", "--drop-old")):
        result = run_migrator("restore", "latest", "--yes", *more, cwd=folder, database=quiet, env=env)
        refusal(result, ExitCode.BAD_SETTINGS, "public.audit", "--incomplete")
        assert quiet.psql("SELECT count(*) FROM audit") == [(100,)]
    result = done(run_migrator("restore", "latest", "--to", "look", cwd=folder, database=quiet, env=env))
    assert "it lacks the rows of public.audit" in result.stderr
    quiet.server.drop_database("look")
    result = run_migrator("restore", "latest", "--yes", "--incomplete", cwd=folder, database=quiet, env=env)
    assert "it lacks the rows of public.audit" in done(result).stderr
    assert quiet.psql("SELECT count(*) FROM audit") == [(0,)]
    (old,) = kept(quiet)
    assert Database(quiet.server, old).psql("SELECT count(*) FROM audit") == [(100,)]


def test_a_restore_that_fails_says_where_the_backup_is(
    quiet: Database, project: Project, run_migrator: Runner
) -> None:
    body = (
        "import os\nimport pathlib\n"
        'for path in pathlib.Path(os.environ["WHERE"]).rglob("*.dump"):\n    os.truncate(path, 100)\n'
        'raise RuntimeError("half way")'
    )
    folder = project(each_in_its_own(), revisions=failing(body))
    env = {"MIGRATOR_ON_FAILURE": "restore", "WHERE": str(run_migrator.backups)}
    result = run_migrator(cwd=folder, database=quiet, env=env)
    sentence = refusal(result, ExitCode.RESTORE_FAILED, "half way", "The restore also failed", "is damaged")
    assert str(run_migrator.backups) in sentence
    assert quiet.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert kept(quiet) == []


def test_what_nothing_remembers_is_not_promised_to_be_refused(
    quiet: Database, project: Project, run_migrator: Runner
) -> None:
    """A first run: the backup has neither version table nor ledger."""
    quiet.execute("DROP TABLE alembic_version, t1; CREATE TABLE others AS SELECT 1 AS a")
    revisions = [
        Revision("r001", None, "CREATE TABLE t1 (id int)", ""),
        Revision("r002", "r001", "SELECT 1/0", ""),
    ]
    folder = project(each_in_its_own(), revisions=revisions)
    env = {"MIGRATOR_ON_FAILURE": "restore", "MIGRATOR_KEEP_OLD": "1s"}
    for _ in range(2):
        result = run_migrator("upgrade", "--baseline", "base", cwd=folder, database=quiet, env=env)
        assert result.code == ExitCode.RESTORED, result
        assert "this one refuses" not in result.stderr
        assert "each run until then tries again" in result.stderr
        assert len(kept(quiet)) == 1
        time.sleep(1.1)


def test_rolled_back_needs_no_restore(quiet: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=failing())
    for way in ("restore", "downgrade"):
        result = run_migrator("--on-failure", way, cwd=folder, database=quiet)
        refusal(result, ExitCode.ROLLED_BACK, "Everything was rolled back.")
    assert kept(quiet) == []


def test_downgrade_reverts_what_this_run_applied(
    quiet: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(each_in_its_own(), revisions=failing())
    env = {"MIGRATOR_ON_FAILURE": "downgrade"}
    result = run_migrator("--format", "json", cwd=folder, database=quiet, env=env)
    refusal(result, ExitCode.PARTIAL, "half way", "were reverted", "at r001 again")
    directions = [(item["revision"], item["direction"]) for item in result.answer["revisions"]]
    assert directions == [("r002", "upgrade"), ("r002", "downgrade")]
    assert quiet.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    assert quiet.psql("SELECT to_regclass('t2')") == [(None,)]
    events = quiet.psql("SELECT event FROM migrator_ledger WHERE revision = 'r002' ORDER BY number")
    assert events == [("applied",), ("reverted",)]
    refusal(run_migrator(cwd=folder, database=quiet, env=env), ExitCode.UNSAFE, "its revisions were reverted")


def test_a_downgrade_that_fails_too(quiet: Database, project: Project, run_migrator: Runner) -> None:
    revisions = failing()
    no_way = 'op.execute("DROP TABLE t2")\nraise RuntimeError("no way")'
    revisions[1] = Revision("r002", "r001", "CREATE TABLE t2 (id int)", no_way)
    folder = project(each_in_its_own(), revisions=revisions)
    result = run_migrator("--on-failure", "downgrade", cwd=folder, database=quiet)
    refusal(
        result, ExitCode.PARTIAL, "half way", "The downgrade also failed", "no way", "database is at r002"
    )
    assert quiet.psql("SELECT version_num FROM alembic_version") == [("r002",)]


def test_replicas_that_waited_do_not_try_it_either(
    quiet: Database, project: Project, start_migrator: Callable[..., Running]
) -> None:
    fails = "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.02)\nraise RuntimeError('half way')"
    folder = project(each_in_its_own(), revisions=failing(fails))
    env = {"MIGRATOR_ON_FAILURE": "restore"}
    runs = [start_migrator(cwd=folder, database=quiet, env=env) for _ in range(4)]
    runs[0].wait_for(lambda: sum("waiting for the run lock" in run.stderr for run in runs) == 3)
    (folder / "go").touch()
    results: list[Result] = [run.finish() for run in runs]
    codes = sorted(result.code for result in results)
    assert codes == [35, 35, 35, 42], "\n".join(map(str, results))
    assert len(kept(quiet)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_it_restores(
    number: int,
    quiet: Database,
    project: Project,
    run_migrator: Runner,
    start_migrator: Callable[..., Running],
) -> None:
    """The right name holds a whole database, the failed or the restored one, and a restore by hand finishes."""
    folder = project(each_in_its_own(), revisions=failing())
    quiet.execute("CREATE TABLE many AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g")
    codes = set()
    for seconds in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
        running = start_migrator("--on-failure", "restore", "--retry", cwd=folder, database=quiet)
        running.wait_for("Restoring ")
        time.sleep(seconds)
        running.send(number)
        codes.add(running.finish().code)
        assert left_behind(quiet) == []
        where = quiet.psql("SELECT version_num FROM alembic_version")
        assert quiet.psql("SELECT count(*) FROM many") == [(20000,)]
        rows = quiet.psql("SELECT count(*) FROM t1")
        assert (where, rows) in (([("r001",)], [(2,)]), ([("r002",)], [(0,)]))
        if where == [("r002",)]:
            newest = run_migrator("backups", "--format", "json", cwd=folder, database=quiet).answer
            first = next(row["id"] for row in newest if row["revision"] == "r001")
            done(run_migrator("restore", first, "--yes", "--drop-old", cwd=folder, database=quiet))
        assert quiet.psql("SELECT count(*) FROM t1") == [(2,)]
        assert not [name for name in kept(quiet) if "_restore_" in name]
    assert codes & {int(ExitCode.PARTIAL), -9}, "no kill came in time"
    assert codes <= {int(ExitCode.PARTIAL), int(ExitCode.RESTORED), -9}


def test_a_signal_after_the_swap_does_not_say_that_nothing_was_changed(
    quiet: Database, project: Project, run_migrator: Runner, start_migrator: Callable[..., Running]
) -> None:
    folder = project(revisions=linear_history(1))
    made = done(run_migrator("backup", "--format", "json", cwd=folder, database=quiet)).answer["id"]
    quiet.execute("DELETE FROM t1")
    running = start_migrator("restore", made, "--yes", "--drop-old", cwd=folder, database=quiet)
    pattern = quiet.name + r"\_before\_%"
    with contextlib.closing(quiet.server.connect()) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            cursor.execute("SELECT count(*) FROM pg_database WHERE datname LIKE %s", [pattern])
            if cursor.fetchone() != (0,):
                break
    running.send(signal.SIGTERM)
    result = done(running.finish())
    assert f"Restored {made}" in result.stdout + result.stderr
    assert quiet.psql("SELECT count(*) FROM t1") == [(2,)]
    assert kept(quiet) == []


def test_a_role_without_createdb_restores_from_within(
    quiet: Database, project: Project, run_migrator: Runner
) -> None:
    quiet.server.create_role("modest")
    quiet.psql(f"ALTER DATABASE {quiet.name} OWNER TO modest")
    for table in ("t1", "alembic_version"):
        quiet.psql(f"ALTER TABLE {table} OWNER TO modest")
    quiet.url = quiet.url.replace("//postgres:", "//modest:")
    folder = project(each_in_its_own(), revisions=failing())
    result = run_migrator("--on-failure", "restore", cwd=folder, database=quiet)
    assert result.code == ExitCode.RESTORED, result
    assert quiet.psql("SELECT id FROM t1 ORDER BY id") == [(1,), (2,)]
    assert kept(quiet) == []
    assert "The failed state is in backup" in result.stderr
    refusal(run_migrator(cwd=folder, database=quiet), ExitCode.UNSAFE, "r003 failed in run")
    lossy = project(each_in_its_own(), revisions=failing(WRITES), name="lossy")
    env = {"OTHERS": quiet.url, "MIGRATOR_ON_FAILURE": "restore"}
    refusal(
        run_migrator(cwd=lossy, database=quiet, env=env),
        ExitCode.PARTIAL,
        "The database was not restored: 1 transaction",
    )
    assert quiet.psql("SELECT id FROM t1") == [(77,)]
