"""A part of a revision that left its transaction is named and never run twice, and is not called rolled back.

The matrix: how the part is committed, how the run ends, which driver, and in which direction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.outcome import ExitCode
from migrator.pipeline.apply.repeatable import is_repeatable
from tests.support.env_text import env
from tests.support.gates import Gate
from tests.support.outcomes import done, left_behind, refusal
from tests.support.projects import Revision
from tests.support.runner import Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]
Start = Callable[..., Running]

ASYNC = (Path(__file__).parents[1] / "support/env_files/async_engine.py").read_text()
PSYCOPG = "config.get_main_option('sqlalchemy.url').replace('postgresql:', 'postgresql+psycopg:')"
DRIVERS = {
    "psycopg2": env(),
    "psycopg": env(engine=f"create_engine({PSYCOPG}, poolclass=pool.NullPool)"),
    "asyncpg": {"migrations/env.py": ASYNC},
    "its own transaction": env(run="with connection.begin():\n    run(connection)"),
}
DOUBLE = "UPDATE t SET n = n * 2"
PARTS = {
    "autocommit block": f"with op.get_context().autocommit_block():\n    op.execute('{DOUBLE}')",
    "commit in SQL": f"op.execute('{DOUBLE}')\nop.execute('COMMIT')",
    "commit within a text": f"op.execute('{DOUBLE}; COMMIT; SELECT 1')",
    "commit of the driver": f"op.execute('{DOUBLE}')\nop.get_bind().connection.commit()",
    "nothing": f"op.execute('{DOUBLE}')",
    "commit of SQLAlchemy": f"op.execute('{DOUBLE}')\nop.get_bind().commit()",
}
PASSES = {
    "autocommit block, psycopg2": ("psycopg2", "autocommit block"),
    "autocommit block, psycopg": ("psycopg", "autocommit block"),
    "autocommit block, asyncpg": ("asyncpg", "autocommit block"),
    **{f"{how}, psycopg2": ("psycopg2", how) for how in PARTS if how not in ("autocommit block", "nothing")},
    "commit of the driver, psycopg": ("psycopg", "commit of the driver"),
    "commit in SQL, its own transaction": ("its own transaction", "commit in SQL"),
}
each_way = pytest.mark.parametrize(("driver", "how"), PASSES.values(), ids=PASSES)
START = Revision(
    "a1",
    None,
    "op.execute('CREATE TABLE t (id int PRIMARY KEY, n int)')\n"
    "op.execute('CREATE TABLE busy (id int)')\n"
    "op.execute('INSERT INTO t SELECT g, g FROM generate_series(1, 3) g')",
    "DROP TABLE t, busy",
)


def history(how: str, last: str, before: str = "pass") -> list[Revision]:
    """Return a1, which makes the tables, b1 with the part, and c1, in which the run is to end badly; and backwards."""
    return [
        START,
        Revision("b1", "a1", f"{PARTS[how]}  # op.", before),
        Revision("c1", "b1", last, f"{PARTS[how]}  # op."),
    ]


def numbers(database: Database) -> list[int]:
    """Return the column that the part doubles."""
    return [row[0] for row in database.psql("SELECT n FROM t ORDER BY id")]


def at(database: Database) -> list[str]:
    """Return the version rows."""
    return [row[0] for row in database.psql("SELECT version_num FROM alembic_version")]


def named(result: object, database: Database, revision: str = "b1") -> str:
    """Check that a run ended with 40, and that it names the part, and says nothing false."""
    sentence = refusal(result, ExitCode.PARTIAL, f"A part of {revision} was committed", "--retry")  # type: ignore[arg-type]
    assert "verything was rolled back" not in sentence
    assert "Everything was rolled back" not in sentence
    assert numbers(database) == [2, 4, 6], sentence
    assert left_behind(database) == []
    return sentence


def not_twice(run_migrator: Runner, folder: Path, database: Database) -> None:
    """Check that the same image, started again as an init container is, does not run the part again."""
    for _ in range(2):
        again = run_migrator(cwd=folder, database=database)
        refusal(
            again, ExitCode.UNSAFE, "migrator does not repeat a committed part", "a part of b1", "--retry"
        )
        assert numbers(database) == [2, 4, 6]


@each_way
def test_a_lock_that_is_not_to_be_had_after_a_part(
    database: Database, project: Project, run_migrator: Runner, driver: str, how: str
) -> None:
    folder = project(DRIVERS[driver], revisions=history(how, "ALTER TABLE busy ADD n int"))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    reader = database.connect()
    reader.cursor().execute("SELECT * FROM busy")
    env_ = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "MIGRATOR_LOCK_RETRIES": "1"}
    result = run_migrator(cwd=folder, database=database, env=env_)
    reader.close()
    landed = at(database)
    if landed == ["a1"]:
        assert "retrying" not in result.stderr
        named(result, database)
        not_twice(run_migrator, folder, database)
    else:  # after a raw COMMIT, psycopg2 begins no transaction: the version row of b1 was committed too
        assert landed == ["b1"], result
        refusal(result, ExitCode.PARTIAL, "1 of 2 revisions were applied", "the database is at b1")
        assert "A part of" not in result.stderr
        assert numbers(database) == [2, 4, 6]


@each_way
def test_an_error_after_a_part(
    database: Database, project: Project, run_migrator: Runner, driver: str, how: str
) -> None:
    folder = project(DRIVERS[driver], revisions=history(how, "SELECT 1 / 0"))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    if at(database) == ["a1"]:
        named(result, database)
        not_twice(run_migrator, folder, database)
    else:
        assert at(database) == ["b1"]
        refusal(result, ExitCode.PARTIAL, "1 of 2 revisions were applied", "the database is at b1")


AUTOCOMMIT = env(
    engine="create_engine(config.get_main_option('sqlalchemy.url'), isolation_level='AUTOCOMMIT')"
)
PROCEDURE = f"CREATE PROCEDURE p() LANGUAGE plpgsql AS 'BEGIN {DOUBLE}; COMMIT; PERFORM 1 / 0; END'"
BY_THE_DRIVER = f"""raw = op.get_bind().connection.dbapi_connection
raw.rollback()
raw.autocommit = True
op.execute('{DOUBLE}')
raw.autocommit = False"""
ADDRESS = "os.environ['DATABASE_URL']"
ON_A_CURSOR = f"import os\nown = {{}}\nown.cursor().execute('{DOUBLE}')\nown.commit()\nown.close()"
IN_A_CHILD = (
    "import os, psycopg2\n"
    f"own = psycopg2.connect(os.environ['DATABASE_URL'])\nown.cursor().execute('{DOUBLE}')\nown.commit()"
)
ON_THE_CURSOR = f"""raw = op.get_bind().connection
raw.{{leaves}}
raw.cursor().execute('{DOUBLE}')
raw.{{returns}}
op.execute('SELECT 1')"""
UNUSUAL = {
    "a cursor in autocommit, psycopg2": (
        DRIVERS["psycopg2"],
        ON_THE_CURSOR.format(leaves="set_isolation_level(0)", returns="set_isolation_level(1)"),
    ),
    "a cursor in autocommit, psycopg": (
        DRIVERS["psycopg"],
        ON_THE_CURSOR.format(leaves="rollback(); raw.set_autocommit(True)", returns="set_autocommit(False)"),
    ),
    "a cursor in an autocommit block": (
        DRIVERS["psycopg2"],
        f"with op.get_context().autocommit_block():\n    op.get_bind().connection.cursor().execute('{DOUBLE}')",
    ),
    "a class of psycopg": (
        DRIVERS["psycopg"],
        f"import psycopg\n{ON_A_CURSOR.format(f'psycopg.Connection.connect({ADDRESS})')}",
    ),
    "a pool of asyncpg": (
        DRIVERS["psycopg2"],
        "import asyncio, asyncpg, os\nasync def go():\n"
        "    async with asyncpg.create_pool(os.environ['DATABASE_URL'], min_size=1) as pool:\n"
        f"        await pool.execute('{DOUBLE}')\nasyncio.run(go())",
    ),
    "a program in Python": (
        DRIVERS["psycopg2"],
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {IN_A_CHILD!r}], check=True)",
    ),
    "a line of a shell": (
        DRIVERS["psycopg2"],
        f"import os, shlex, sys\nos.system('true && ' + shlex.join([sys.executable, '-c', {IN_A_CHILD!r}]))",
    ),
    "a fork": (
        DRIVERS["psycopg2"],
        f"import os\nif not (child := os.fork()):\n    exec({IN_A_CHILD!r})\n    os._exit(0)\nos.waitpid(child, 0)",
    ),
    **{
        f"multiprocessing, {method}": (
            DRIVERS["psycopg2"],
            "import multiprocessing\nchild = multiprocessing.get_context('"
            f"{method}').Process(target=exec, args=({IN_A_CHILD!r},))\nchild.start()\nchild.join()",
        )
        for method in ("fork", "spawn", "forkserver")
    },
    "dblink": (DRIVERS["psycopg2"], f"op.execute(\"SELECT dblink_exec('itself', '{DOUBLE}')\")"),
    "autocommit of psycopg2": (DRIVERS["psycopg2"], BY_THE_DRIVER),
    "autocommit of psycopg": (DRIVERS["psycopg"], BY_THE_DRIVER),
    "autocommit of asyncpg": (DRIVERS["asyncpg"], BY_THE_DRIVER),
    "another connection": (
        DRIVERS["psycopg2"],
        "with op.get_bind().engine.begin() as other:\n    other.exec_driver_sql('SELECT 1')\n"
        f"    other.exec_driver_sql('{DOUBLE}')",
    ),
    "a procedure that commits": (AUTOCOMMIT, "op.execute('CALL p()')"),
    "a raw connection of the engine": (
        DRIVERS["psycopg2"],
        ON_A_CURSOR.format("op.get_bind().engine.raw_connection()"),
    ),
    "psycopg2's own": (
        DRIVERS["psycopg2"],
        f"import psycopg2\n{ON_A_CURSOR.format(f'psycopg2.connect({ADDRESS})')}",
    ),
    "psycopg's own": (
        DRIVERS["psycopg"],
        f"import psycopg\n{ON_A_CURSOR.format(f'psycopg.connect({ADDRESS})')}",
    ),
    "psql": (
        DRIVERS["psycopg2"],
        f"import os, subprocess\nfrom urllib.parse import unquote, urlsplit\nurl = urlsplit({ADDRESS})\n"
        f"subprocess.run(['psql', '-c', '{DOUBLE}'], check=True, env=dict(os.environ, PGHOST=url.hostname,"
        " PGPORT=str(url.port), PGUSER=url.username, PGPASSWORD=unquote(url.password), PGDATABASE=url.path[1:]))",
    ),
}


def let_it_reach_itself(database: Database) -> None:
    """Make a server for dblink, which is the database, with a role whose password is no secret."""
    server, role = database.server, f"other_{database.name}"
    database.execute(
        f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD 'no secret'; CREATE EXTENSION dblink;"
        " CREATE SERVER itself FOREIGN DATA WRAPPER dblink_fdw"
        f" OPTIONS (host '{server.host}', port '{server.port}', dbname '{database.name}');"
        f" CREATE USER MAPPING FOR CURRENT_USER SERVER itself OPTIONS (user '{role}', password 'no secret')"
    )


@pytest.mark.parametrize(("files", "part"), UNUSUAL.values(), ids=UNUSUAL)
def test_an_error_after_a_part_that_only_the_driver_or_the_server_commits(
    database: Database, project: Project, run_migrator: Runner, files: dict[str, str], part: str
) -> None:
    revisions = [START, Revision("b1", "a1", part + "  # op."), Revision("c1", "b1", "SELECT 1 / 0")]
    folder = project(files, revisions=revisions)
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    database.psql(PROCEDURE)
    if "dblink" in part:
        let_it_reach_itself(database)
    result = run_migrator(cwd=folder, database=database, env={"DATABASE_URL": database.url})
    sentence = refusal(result, ExitCode.PARTIAL, "A part of b1 ", " committed outside of", "--retry")
    assert "verything was rolled back" not in sentence
    not_twice(run_migrator, folder, database)


def test_an_index_that_a_failed_build_left_is_not_called_rolled_back(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(
        AUTOCOMMIT,
        revisions=[START, Revision("b1", "a1", "CREATE UNIQUE INDEX CONCURRENTLY by_n ON t (n)")],
    )
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    database.psql("UPDATE t SET n = 1")
    result = run_migrator(cwd=folder, database=database)
    assert database.psql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_n'::regclass") == [(False,)]
    refusal(
        result,
        ExitCode.PARTIAL,
        "A part of b1 may have been committed",
        "its committed part is safe to repeat",
    )
    database.psql("UPDATE t SET n = id")
    done(run_migrator(cwd=folder, database=database))
    assert database.psql("SELECT indisvalid FROM pg_index WHERE indexrelid = 'by_n'::regclass") == [(True,)]


@pytest.mark.parametrize(("opened", "statement"), [("begin", "SELECT * FROM t"), ("connect", DOUBLE)])
def test_another_connection_that_commits_nothing_is_no_part(
    database: Database, project: Project, run_migrator: Runner, opened: str, statement: str
) -> None:
    part = f"with op.get_bind().engine.{opened}() as other:\n    other.exec_driver_sql('{statement}')  # op."
    folder = project(
        DRIVERS["psycopg2"],
        revisions=[START, Revision("b1", "a1", part), Revision("c1", "b1", "SELECT 1 / 0")],
    )
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    refusal(run_migrator(cwd=folder, database=database), ExitCode.ROLLED_BACK, "Everything was rolled back")
    assert numbers(database) == [1, 2, 3]


def test_a_serialization_failure_after_a_part(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    fail = "DO $$ BEGIN RAISE EXCEPTION 'could not serialize' USING ERRCODE = '40001'; END $$"
    folder = project(DRIVERS["psycopg2"], revisions=history("autocommit block", fail))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    assert "retrying" not in result.stderr
    named(result, database)
    not_twice(run_migrator, folder, database)


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_a_connection_that_is_lost_after_a_part(
    database: Database, project: Project, run_migrator: Runner, driver: str
) -> None:
    ended = "SELECT pg_terminate_backend(pg_backend_pid())"
    folder = project(DRIVERS[driver], revisions=history("autocommit block", ended))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    assert "running env.py again" not in result.stderr
    named(result, database)
    not_twice(run_migrator, folder, database)


def test_a_signal_after_a_part(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(DRIVERS["psycopg2"], revisions=history("autocommit block", Gate.statement))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    with Gate(database) as gate:
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(gate.reached)
        run.send()
        result = run.finish()
    named(result, database)
    not_twice(run_migrator, folder, database)


def test_a_kill_after_a_part(
    database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    """What was killed can say nothing: the ledger knew of the part before it was committed."""
    folder = project(DRIVERS["psycopg2"], revisions=history("autocommit block", Gate.statement))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    with Gate(database) as gate:
        run = start_migrator(cwd=folder, database=database)
        run.wait_for(gate.reached)
        run.kill()
        run.process.wait()
    not_twice(run_migrator, folder, database)


ENDS_IT = ["COMMIT", "ROLLBACK", "END", "ROLLBACK AND CHAIN"]


@pytest.mark.parametrize("ends", ENDS_IT)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_statements_after_the_transaction_was_ended_as_sql(
    database: Database, project: Project, run_migrator: Runner, driver: str, ends: str
) -> None:
    """psycopg2 and asyncpg then send no BEGIN: each of them commits by itself."""
    part = f"op.execute('{ends}')\nop.execute('{DOUBLE}')\nop.execute('SELECT 1 / 0')"
    folder = project(DRIVERS[driver], revisions=[START, Revision("b1", "a1", part)])
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    if numbers(database) == [2, 4, 6]:
        named(result, database)
        not_twice(run_migrator, folder, database)
    elif ends.startswith("ROLLBACK"):
        refusal(result, ExitCode.ROLLED_BACK, "Everything was rolled back")
        assert numbers(database) == [1, 2, 3]
    else:
        refusal(result, ExitCode.PARTIAL, "its committed part is safe to repeat")
        assert numbers(database) == [1, 2, 3]


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg", "asyncpg"])
def test_what_only_failed_after_a_rollback_as_sql_is_no_part(
    database: Database, project: Project, run_migrator: Runner, driver: str
) -> None:
    folder = project(DRIVERS[driver], revisions=history("nothing", "ALTER TABLE busy ADD n int"))
    (folder / "migrations/versions/b1.py").write_text(
        Revision("b1", "a1", f"op.execute('ROLLBACK')\nop.execute('{DOUBLE}')").render()
    )
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    reader = database.connect()
    reader.cursor().execute("SELECT * FROM busy")
    env_ = {"MIGRATOR_LOCK_TIMEOUT": "300ms", "MIGRATOR_LOCK_RETRIES": "1"}
    result = run_migrator(cwd=folder, database=database, env=env_)
    reader.close()
    assert "part of c1" not in result.stderr
    assert numbers(database) == ([1, 2, 3] if at(database) == ["a1"] else [2, 4, 6])


IN_THE_TRANSACTION = {
    "COPY on the cursor": "import io\n"
    "op.get_bind().connection.cursor().copy_from(io.StringIO('7\\t7\\n'), 't')",
    "a look at the driver": "assert op.get_bind().connection.encoding",
    "git": "import subprocess\nsubprocess.run(['git', '--version'], check=True)",
    "uname of a shell": "import os\nos.system('uname -a')",
}


@pytest.mark.parametrize("how", IN_THE_TRANSACTION)
def test_what_stays_in_the_transaction_is_no_part(
    database: Database, project: Project, run_migrator: Runner, how: str
) -> None:
    revisions = [
        START,
        Revision("b1", "a1", IN_THE_TRANSACTION[how] + "  # op."),
        Revision("c1", "b1", "SELECT 1 / 0"),
    ]
    folder = project(DRIVERS["psycopg2"], revisions=revisions)
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    refusal(run_migrator(cwd=folder, database=database), ExitCode.ROLLED_BACK, "Everything was rolled back")
    assert numbers(database) == [1, 2, 3]


def test_a_replication_slot_is_not_called_rolled_back(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    slot = f"s_{database.name}"
    body = f"op.execute(\"SELECT pg_create_physical_replication_slot('{slot}')\")\nop.execute('SELECT 1 / 0')"
    result = run_migrator(cwd=project(revisions=[Revision("a1", None, body)]), database=database)
    assert database.psql("SELECT pg_drop_replication_slot(%s)", (slot,))
    refusal(result, ExitCode.PARTIAL, "A part of a1 may have been committed", "--retry")


def test_a_prepared_transaction_is_not_called_rolled_back(
    private_server: Callable[..., Server], project: Project, run_migrator: Runner
) -> None:
    server = private_server(settings={"max_prepared_transactions": "5"})
    database = server.create_database()
    part = f"op.execute('{DOUBLE}')\nop.execute(\"PREPARE TRANSACTION 'left'\")\nop.execute('SELECT 1 / 0')"
    folder = project(DRIVERS["psycopg2"], revisions=[START, Revision("b1", "a1", part)])
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    assert server.psql("SELECT gid FROM pg_prepared_xacts") == [("left",)]
    refusal(result, ExitCode.PARTIAL, "A part of b1 may have been committed", "--retry")


@pytest.mark.parametrize(
    "how", ["a raw connection of the engine", "psycopg2's own", "psycopg's own", "psql", "a fork"]
)
def test_a_kill_after_a_part_on_an_outside_connection(
    how: str, database: Database, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    """Seen in a container: the next run repeated the revision, and said "verified"."""
    files, part = UNUSUAL[how]
    folder = project(
        files, revisions=[START, Revision("b1", "a1", f"{part}\nop.execute({Gate.statement!r})")]
    )
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    with Gate(database) as gate:
        run = start_migrator(cwd=folder, database=database, env={"DATABASE_URL": database.url})
        run.wait_for(gate.reached)
        run.kill()
    not_twice(run_migrator, folder, database)


def test_a_person_decides_about_a_part(database: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(DRIVERS["psycopg2"], revisions=history("autocommit block", "SELECT 1 / 0"))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    named(run_migrator(cwd=folder, database=database), database)
    # Undone by hand, and told so.
    database.execute("UPDATE t SET n = n / 2")
    again = run_migrator("upgrade", "head", "--retry", cwd=folder, database=database)
    named(again, database)
    # Or taken for done: b1 is not run again, and what comes after it is.
    done(run_migrator("stamp", "b1", cwd=folder, database=database))
    (folder / "migrations/versions/c1.py").write_text(
        Revision("c1", "b1", "ALTER TABLE busy ADD n int").render()
    )
    done(run_migrator(cwd=folder, database=database))
    assert (numbers(database), at(database)) == ([2, 4, 6], ["c1"])


@each_way
def test_a_part_of_a_downgrade(
    database: Database, project: Project, run_migrator: Runner, driver: str, how: str
) -> None:
    folder = project(DRIVERS[driver], revisions=history("nothing", "SELECT 1", "SELECT 1 / 0"))
    text = (folder / "migrations/versions/c1.py").read_text()
    part = "\n".join(f"    {line}" for line in PARTS[how].splitlines())
    head, _, _ = text.partition("def downgrade():")
    (folder / "migrations/versions/c1.py").write_text(f"{head}def downgrade():\n{part}\n")
    done(run_migrator(cwd=folder, database=database))
    assert numbers(database) == [2, 4, 6]
    result = run_migrator("downgrade", "a1", cwd=folder, database=database)
    assert numbers(database) == [4, 8, 12]
    if at(database) == ["c1"]:
        refusal(result, ExitCode.PARTIAL, "A part of c1 was committed", "the database is at c1", "--retry")
        again = run_migrator("downgrade", "a1", cwd=folder, database=database)
        refusal(again, ExitCode.UNSAFE, "a part of the downgrade of c1")
        assert numbers(database) == [4, 8, 12]
        # Forwards there is nothing to do, but all is not well: until a person says that it is.
        for command in ("upgrade", "verify"):
            refusal(
                run_migrator(command, cwd=folder, database=database),
                ExitCode.VERIFY_FAILED,
                "may have committed a part of the downgrade of c1",
                "--retry",
            )
        done(run_migrator("upgrade", "--retry", cwd=folder, database=database))
        done(run_migrator("upgrade", cwd=folder, database=database))
    else:
        refusal(result, ExitCode.PARTIAL, "1 of 2 revisions were reverted", "the database is at b1")


def test_what_landed_is_counted_from_the_rows(
    database: Database, project: Project, run_migrator: Runner
) -> None:
    """From an empty database, a to d pending and d failing: only the row of a landed, with the part of b."""
    revisions = history("autocommit block", "CREATE TABLE c (id int)")
    folder = project(DRIVERS["psycopg2"], revisions=[*revisions, Revision("d1", "c1", "SELECT 1 / 0")])
    result = run_migrator("upgrade", "--format", "json", cwd=folder, database=database)
    sentence = refusal(result, ExitCode.PARTIAL, "1 of 4 revisions were applied", "the database is at a1")
    assert "A part of b1 was committed" in sentence
    assert [item["revision"] for item in result.answer["revisions"]] == ["a1"]
    assert database.psql("SELECT to_regclass('c')") == [(None,)]


GOES_ON = """
    try:
        op.execute("ALTER TYPE mood ADD VALUE 'fine'")
    except Exception:
        pass
    op.execute("SELECT 1")
    op.execute("SELECT nosuch")"""


@pytest.mark.parametrize("block", ["\n    op.execute(\"ALTER TYPE mood ADD VALUE 'fine'\")", GOES_ON])
def test_a_statement_that_failed_by_itself_is_not_called_committed(
    database: Database, project: Project, run_migrator: Runner, block: str
) -> None:
    add = f"with op.get_context().autocommit_block():{block}"
    first = Revision("a1", None, "CREATE TYPE mood AS ENUM ('fine')")
    folder = project(DRIVERS["psycopg2"], revisions=[first, Revision("b1", "a1", add)])
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    result = run_migrator(cwd=folder, database=database)
    refusal(result, ExitCode.PARTIAL, "A part of b1 may have been committed", "--retry")
    (folder / "migrations/versions/b1.py").write_text(Revision("b1", "a1", "SELECT 1").render())
    done(run_migrator("upgrade", "head", "--retry", cwd=folder, database=database))


@pytest.mark.parametrize("on_failure", ["restore", "downgrade"])
def test_on_failure_acts_where_only_a_part_is_committed(
    database: Database, project: Project, run_migrator: Runner, on_failure: str
) -> None:
    folder = project(DRIVERS["psycopg2"], revisions=history("autocommit block", "SELECT 1 / 0"))
    done(run_migrator("upgrade", "a1", cwd=folder, database=database))
    env = {"MIGRATOR_ON_FAILURE": on_failure, "MIGRATOR_DISCARD_WRITES": "true"}
    result = run_migrator(cwd=folder, database=database, env=env)
    if on_failure == "restore":
        refusal(result, ExitCode.RESTORED, "The database is at a1 again")
        assert numbers(database) == [1, 2, 3]
    else:
        refusal(result, ExitCode.PARTIAL, "only a part of b1 is committed, and no revision")
        assert numbers(database) == [2, 4, 6]
    assert at(database) == ["a1"]


@pytest.mark.parametrize(
    ("statement", "again"),
    [
        ("CREATE INDEX CONCURRENTLY by_n ON t (n)", True),
        ("DROP INDEX CONCURRENTLY by_n", False),
        ("DROP INDEX CONCURRENTLY IF EXISTS by_n", True),
        ("VACUUM t", True),
        ("CREATE INDEX IF NOT EXISTS by_n ON t (n)", True),
        ("SELECT count(*) FROM t", True),
        ("INSERT INTO t SELECT id + 10, n FROM t", False),
        ("ALTER TABLE t ADD COLUMN more int", False),
        ("DO $$ BEGIN UPDATE t SET n = 0; END $$", False),
        ("SELECT setval('s', 5)", False),
        ("WITH gone AS (DELETE FROM t RETURNING *) SELECT count(*) FROM gone", False),
        ("SELECT 1; UPDATE t SET n = 0", False),
        ("SELECT app.fill_batch(5)", False),
        ("SELECT pg_catalog.count(*) FROM t", True),
        ("CREATE OR REPLACE VIEW v AS SELECT 1; -- and that is all", True),
        ("-- a comment; of two parts\nVACUUM t;", True),
        ("CREATE TABLE IF NOT EXISTS u (id int)", True),
        ("CREATE TABLE u AS SELECT 'IF NOT EXISTS'", False),
        ("ALTER TYPE mood ADD VALUE IF NOT EXISTS 'fine'", True),
        ("ALTER TYPE mood ADD VALUE 'fine'", False),
        ("ALTER TABLE t VALIDATE CONSTRAINT positive", True),
        ("ALTER TABLE t VALIDATE CONSTRAINT positive, ADD COLUMN more int", False),
        ("EXPLAIN ANALYZE UPDATE t SET n = n * 2", False),
        ("EXPLAIN (ANALYZE) UPDATE t SET n = n * 2", False),
        ("EXPLAIN (COSTS off, ANALYZE) UPDATE t SET n = n * 2", False),
        ("EXPLAIN UPDATE t SET n = n * 2", True),
        ("SELECT pg_sleep(30)", True),
    ],
)
def test_what_may_run_twice(statement: str, again: bool) -> None:
    assert is_repeatable(statement) is again
