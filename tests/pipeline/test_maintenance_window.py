"""MIGRATOR_MAINTENANCE_WINDOW: other roles stay out from before the backup until the end, and are let in again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from migrator.outcome import ExitCode
from tests.pipeline.test_on_failure import each_in_its_own, failing
from tests.support.outcomes import done, refusal
from tests.support.projects import Revision, bring_to, linear_history
from tests.support.runner import Runner, Running
from tests.support.servers import Database, Server

Project = Callable[..., Path]
ACL = (
    "SELECT datacl::text, shobj_description(oid, 'pg_database'), has_database_privilege('shop_app', oid, 'CONNECT')"
    " FROM pg_database WHERE datname = current_database()"
)
TRIES = """\
import os
import psycopg2
try:
    psycopg2.connect(os.environ["OTHERS"])
except psycopg2.OperationalError as error:
    assert "permission denied for database" in str(error), error
else:
    raise AssertionError("it got in")"""
WAITS = 'import time\nopen("here", "w").close()\ntime.sleep(60)'


@pytest.fixture
def shop(server: Server) -> Iterator[Database]:
    """A database at r001 of the role shop_owner, into which shop_app may log in too."""
    for role in ("shop_owner", "shop_app"):
        server.create_role(role)
    server.psql("ALTER ROLE shop_owner CREATEDB")
    server.psql("GRANT pg_signal_backend TO shop_owner")
    database = server.create_database()
    server.psql(f"ALTER DATABASE {database.name} OWNER TO shop_owner")
    server.psql(f"COMMENT ON DATABASE {database.name} IS 'the shop''s'")
    bring_to(database, 1)
    database.execute(
        "INSERT INTO t1 VALUES (1, 'one'), (2, 'two'); ALTER TABLE t1 OWNER TO shop_owner;"
        "ALTER TABLE alembic_version OWNER TO shop_owner"
    )
    yield database
    for (name,) in server.psql("SELECT datname::text FROM pg_database WHERE datdba = 'shop_owner'::regrole"):
        server.drop_database(name)
    for role in ("shop_owner", "shop_app"):
        server.psql(f"DROP ROLE {role}")


def variables(shop: Database) -> dict[str, str]:
    return {
        "MIGRATOR_DATABASE_URL": shop.url.replace("//postgres:", "//shop_owner:"),
        "DATABASE_URL": shop.url.replace("//postgres:", "//shop_owner:"),
        "OTHERS": shop.url.replace("//postgres:", "//shop_app:"),
        "MIGRATOR_MAINTENANCE_WINDOW": "true",
    }


def test_nobody_else_gets_in_and_everybody_does_afterwards(
    shop: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", TRIES)])
    before = psycopg2.connect(variables(shop)["OTHERS"])
    done(run_migrator(cwd=folder, database=shop, env=variables(shop)))
    with pytest.raises(psycopg2.Error):
        before.cursor().execute("SELECT 1")
    ((_, comment, may),) = shop.psql(ACL)
    assert (comment, may) == ("the shop's", True)
    psycopg2.connect(variables(shop)["OTHERS"]).close()


@pytest.mark.parametrize("what", ["nothing", '{"comment": null, "connect": [["nobody_at_all", false]]}'])
def test_the_comment_of_somebody_elses_database_keeps_nothing_closed(
    what: str, shop: Database, project: Project, run_migrator: Runner
) -> None:
    planted = f"""
import psycopg2
other = psycopg2.connect(os.environ["OTHERS"].rpartition("/")[0] + "/a_planted")
asked = other.cursor()
asked.execute("SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'migrator/%'")
comment = "migrator: maintenance window " + asked.fetchone()[0].split()[-1] + ' {what}'
asked.execute("COMMENT ON DATABASE a_planted IS '" + comment + "'")
other.commit()"""
    shop.server.psql("CREATE DATABASE a_planted OWNER shop_app")
    try:
        folder = project(revisions=[*linear_history(1), Revision("r002", "r001", TRIES + planted)])
        result = done(run_migrator(cwd=folder, database=shop, env=variables(shop)))
        assert "a_planted has the comment" in result.stderr
        assert shop.psql(ACL)[0][1:] == ("the shop's", True)
    finally:
        shop.server.drop_database("a_planted")


def test_grants_come_back_as_they_were(shop: Database, project: Project, run_migrator: Runner) -> None:
    name = shop.name
    shop.psql(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")
    shop.psql(f"GRANT CONNECT ON DATABASE {name} TO shop_app WITH GRANT OPTION")
    before = shop.psql(ACL)
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", TRIES)])
    done(run_migrator(cwd=folder, database=shop, env=variables(shop)))
    after = shop.psql(ACL)
    assert sorted(after[0][0].strip("{}").split(",")) == sorted(before[0][0].strip("{}").split(","))
    assert after[0][1:] == before[0][1:]


def test_a_failure_in_a_window_is_restored_whatever_the_counter_says(
    shop: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(each_in_its_own(), revisions=failing())
    env = {**variables(shop), "MIGRATOR_ON_FAILURE": "restore"}
    result = run_migrator(cwd=folder, database=shop, env=env)
    assert result.code == ExitCode.RESTORED, result
    assert shop.psql("SELECT count(*) FROM t1") == [(2,)]
    closed = "SELECT count(*) FROM pg_database WHERE shobj_description(oid, 'pg_database') LIKE 'migrator:%%'"
    assert shop.psql(closed) == [(0,)]
    psycopg2.connect(variables(shop)["OTHERS"]).close()


@pytest.mark.parametrize("pending", [True, False])
def test_what_a_killed_run_left_is_put_back_by_the_next(
    shop: Database,
    project: Project,
    run_migrator: Runner,
    start_migrator: Callable[..., Running],
    pending: bool,
) -> None:
    folder = project(revisions=[*linear_history(1), Revision("r002", "r001", WAITS)])
    running = start_migrator(cwd=folder, database=shop, env=variables(shop))
    running.wait_for((folder / "here").exists)
    running.kill()
    running.finish()
    with pytest.raises(psycopg2.OperationalError, match="permission denied"):
        psycopg2.connect(variables(shop)["OTHERS"])
    if pending:
        project(revisions=linear_history(2))
    else:
        (folder / "migrations/versions/r002.py").unlink()
    env = {**variables(shop), "MIGRATOR_MAINTENANCE_WINDOW": "false"}
    result = done(run_migrator(cwd=folder, database=shop, env=env))
    assert "opening it again" in result.stderr
    psycopg2.connect(variables(shop)["OTHERS"]).close()
    assert shop.psql(ACL)[0][1:] == ("the shop's", True)


def test_a_run_with_nothing_to_do_that_only_glances_notices_it_too(
    shop: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    env = {**variables(shop), "MIGRATOR_MAINTENANCE_WINDOW": "false"}
    done(run_migrator(cwd=folder, database=shop, env=env))
    done(run_migrator("freeze", cwd=folder, database=shop, env=env))
    comment = 'migrator: maintenance window dead-run {"comment": null, "connect": [[null, false]]}'
    shop.psql(f"COMMENT ON DATABASE {shop.name} IS '{comment}'")
    shop.psql(f"REVOKE CONNECT ON DATABASE {shop.name} FROM PUBLIC")
    done(run_migrator(cwd=folder, database=shop, env=env))
    assert shop.psql(ACL)[0][1:] == (None, True)


def test_sessions_of_the_same_role_cannot_be_kept_out(
    shop: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    same = psycopg2.connect(variables(shop)["DATABASE_URL"], application_name="the shop")
    result = run_migrator(cwd=folder, database=shop, env=variables(shop))
    refusal(result, ExitCode.ACCESS_DENIED, "cannot keep out sessions of shop_owner", "the shop (pid")
    same.close()
    assert shop.psql(ACL)[0][1:] == ("the shop's", True)


def test_only_the_owner_can_keep_others_out(shop: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(2))
    shop.psql(f"ALTER DATABASE {shop.name} OWNER TO postgres")
    result = run_migrator(cwd=folder, database=shop, env=variables(shop))
    refusal(result, ExitCode.ACCESS_DENIED, "shop_owner may not keep others out", "ALTER DATABASE")
    assert shop.psql("SELECT version_num FROM alembic_version") == [("r001",)]
    shop.psql(f"ALTER DATABASE {shop.name} OWNER TO shop_owner")


def test_sessions_that_it_may_not_end(shop: Database, project: Project, run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(2))
    shop.psql("REVOKE pg_signal_backend FROM shop_owner")
    other = psycopg2.connect(variables(shop)["OTHERS"], application_name="the shop")
    result = run_migrator(cwd=folder, database=shop, env=variables(shop))
    refusal(result, ExitCode.ACCESS_DENIED, "shop_app (the shop)", "GRANT pg_signal_backend TO")
    other.cursor().execute("SELECT 1")
    other.close()
    assert shop.psql(ACL)[0][1:] == ("the shop's", True)
