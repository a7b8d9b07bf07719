"""A password that is rotated while a run lasts: what is in the file counts, before and after what took long."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrator.config import settings
from migrator.config.database_url import Target
from migrator.config.secret_files import SecretFiles
from migrator.config.settings import Settings
from migrator.errors import AccessDenied
from migrator.outcome import ExitCode
from migrator.pipeline.stages import wait as stage
from migrator.pipeline.stages.lock import LOCK_CLASS, RUN_LOCK
from migrator.postgres.errors import ConnectFailed
from migrator.postgres.session import Session, connect
from migrator.runtime.redaction import redact
from tests.support import PLANTED
from tests.support.outcomes import done, refusal
from tests.support.projects import linear_history
from tests.support.proxy import Proxy
from tests.support.runner import Runner, Running
from tests.support.servers import Database
from tests.support.volumes import SecretVolume

Project = Callable[..., Path]
Start = Callable[..., Running]
FIRST = "the first one"
REPLACED = "only a new version of"


@dataclass(frozen=True)
class Login:
    """A role that owns the database, whose password is `FIRST` until it is rotated to the planted one."""

    database: Database
    role: str
    volume: SecretVolume

    def url(self, password: str = PLANTED) -> str:
        """Return the address with a password."""
        return self.database.server.url(self.database.name, user=self.role, password=password)

    def rotate(self) -> None:
        """Give the role its new password, which its file does not say yet."""
        self.database.psql(f"ALTER ROLE {self.role} PASSWORD '{PLANTED}'")

    def replace(self, url: str = "") -> None:
        """Write the new address into the volume."""
        self.volume.replace(url=url or self.url())

    @property
    def env(self) -> Mapping[str, str | None]:
        """Return the variables of a run that reads the volume."""
        return {"MIGRATOR_DATABASE_URL": None, "MIGRATOR_DATABASE_URL_FILE": self.volume["url"]}

    def load(self, **more: str) -> Settings:
        """Load the settings of a run in this process."""
        return settings.load({}, {"MIGRATOR_DATABASE_URL_FILE": self.volume["url"], **more}, "/nonexistent")

    def rows(self) -> list[tuple[str, ...]]:
        """Return the version rows."""
        return self.database.psql("SELECT version_num FROM alembic_version")


@pytest.fixture
def login(database: Database, tmp_path: Path) -> Iterator[Login]:
    role = f"rotated_{secrets.token_hex(4)}"
    database.psql(f"CREATE ROLE {role} LOGIN PASSWORD '{FIRST}'")
    database.psql(f'ALTER DATABASE "{database.name}" OWNER TO {role}')
    database.psql(f"GRANT CREATE ON SCHEMA public TO {role}")
    login = Login(database, role, SecretVolume(tmp_path / "secret", url="?"))
    login.replace(login.url(FIRST))
    yield login
    database.psql(f'ALTER DATABASE "{database.name}" OWNER TO CURRENT_USER')
    database.psql(f"REASSIGN OWNED BY {role} TO CURRENT_USER")
    database.psql(f"DROP OWNED BY {role}")
    database.psql(f"DROP ROLE {role}")


# -- while Postgres is waited for -------------------------------------------------------------------------


def test_an_address_replaced_while_postgres_is_away_is_the_one_that_counts(
    login: Login, project: Project, start_migrator: Start, tmp_path: Path
) -> None:
    """Host, port and password: as the next container would take them."""
    report = {"MIGRATOR_REPORT_FILE": str(tmp_path / "report.json")}
    with Proxy(login.database.server.port) as nobody:
        nobody.refuse()
        login.replace(login.url(FIRST).replace(f":{login.database.server.port}/", f":{nobody.port}/"))
        run = start_migrator(
            cwd=project(revisions=linear_history(2)), database=login.database, env={**login.env, **report}
        )
        run.wait_for("waiting for postgresql://")
        login.rotate()
        login.replace()
        result = done(run.finish())
    assert login.rows() == [("r002",)]
    assert REPLACED not in result.stderr
    assert f":{login.database.server.port}/" in (tmp_path / "report.json").read_text()


def test_a_login_refused_before_the_file_is_replaced_passes_after_it(
    login: Login, project: Project, start_migrator: Start
) -> None:
    login.rotate()
    run = start_migrator(cwd=project(revisions=linear_history(2)), database=login.database, env=login.env)
    run.wait_for(REPLACED)
    login.replace()
    done(run.finish())
    assert login.rows() == [("r002",)]


def test_a_login_passes_whose_secret_was_replaced_before_the_servers_password(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_BETWEEN_LOGINS", 0.1)
    login.replace()
    attempts = 0

    def connect_at_last(target: Target, name: str, timeout: float) -> Session:
        nonlocal attempts
        attempts += 1
        if attempts == 3:
            login.rotate()
        return connect(target, name, timeout)

    loaded = login.load()
    session, count = stage.wait(loaded.required_target, loaded, "test", connect=connect_at_last)
    session.close()
    assert count == attempts == 3


def test_what_never_becomes_right_is_refused_when_the_grace_is_over(
    login: Login, project: Project, run_migrator: Runner
) -> None:
    login.replace(login.url("wrong"))
    result = run_migrator(
        cwd=project(revisions=linear_history(1)),
        database=login.database,
        env={**login.env, "MIGRATOR_ROTATION_GRACE": "300ms"},
    )
    refusal(result, ExitCode.ACCESS_DENIED, "[28P01], for ", login.volume["url"], "might have been replaced")


@pytest.mark.parametrize("more", [{"MIGRATOR_ROTATION_GRACE": "0"}, {"MIGRATOR_WAIT_TIMEOUT": "0"}])
def test_without_grace_a_refusal_is_final(login: Login, more: dict[str, str]) -> None:
    login.rotate()
    loaded = login.load(**more)
    with pytest.raises(AccessDenied, match=r"\[28P01\]\. The database was not changed"):
        stage.wait(loaded.required_target, loaded, "test")


def test_what_no_other_secret_would_mend_is_final(login: Login) -> None:
    login.replace(login.database.server.url("not_there", user=login.role, password=FIRST))
    loaded = login.load()
    with pytest.raises(AccessDenied, match=r"does not exist \[3D000\]\. The"):
        stage.wait(loaded.required_target, loaded, "test")


def test_the_end_of_the_wait_is_the_end_of_the_grace(login: Login) -> None:
    login.rotate()
    loaded = login.load(MIGRATOR_WAIT_TIMEOUT="4s")
    with pytest.raises(AccessDenied, match="might have been replaced"):
        stage.wait(loaded.required_target, loaded, "test")


# -- files that nobody keeps up to date -------------------------------------------------------------------


def counted(then: Callable[[], object]) -> tuple[list[Target], Callable[[Target, str, float], Session]]:
    """Return the list of what was connected to, and a `connect` that does `then` after the first refusal."""
    seen: list[Target] = []

    def once(target: Target, name: str, timeout: float) -> Session:
        seen.append(target)
        try:
            return connect(target, name, timeout)
        except ConnectFailed:
            then()
            raise

    return seen, once


def test_a_wrong_password_in_a_plain_file_is_final(login: Login, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(login.url("wrong"))
    loaded = settings.load({}, {"MIGRATOR_DATABASE_URL_FILE": str(file)}, "/nonexistent")
    seen, once = counted(lambda: None)
    with pytest.raises(AccessDenied, match=r"\[28P01\]\. The database was not changed"):
        stage.wait(loaded.required_target, loaded, "test", connect=once)
    assert len(seen) == 1


@pytest.mark.parametrize("part", ["PG", "POSTGRES_"])
def test_a_plain_file_that_was_replaced_meanwhile_is_read_again(
    login: Login, tmp_path: Path, part: str
) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    server = login.database.server
    user, database = ("USER", "DATABASE") if part == "PG" else ("USER", "DB")
    environment = {f"{part}HOST": server.host, f"{part}PORT": str(server.port), f"{part}{user}": login.role}
    environment |= {f"{part}{database}": login.database.name, f"{part}PASSWORD_FILE": str(file)}
    loaded = settings.load({}, environment, "/nonexistent")
    seen, once = counted(lambda: file.write_text(FIRST))
    session, _ = stage.wait(loaded.required_target, loaded, "test", connect=once)
    session.close()
    assert [target.password for target in seen] == ["wrong", FIRST]


def test_a_file_that_cannot_be_read_just_now_says_what_it_said_last(login: Login, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(login.url(FIRST))
    target = settings.load({}, {"DATABASE_URL_FILE": str(file)}, "/nonexistent").required_target
    assert isinstance(target.source, SecretFiles)
    for text in (None, "", "no address", login.url(FIRST)):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        assert target.fresh().password == FIRST
    file.write_text(login.url("a third one/2"))
    assert target.libpq()["password"] == "a third one/2"
    assert redact("a%20third%20one%2F2") == "***"
    assert target.with_database("postgres").environment()["PGPASSWORD"] == "a third one/2"
    assert "a%20third%20one%2F2@" in target.sqlalchemy_url()


def test_another_role_or_server_is_not_taken_for_a_new_password(login: Login, tmp_path: Path) -> None:
    """After the wait, a run stays where it is and who it is."""
    target = login.load().required_target
    for url in (login.url().replace(login.role, "somebody"), login.url().replace("127.0.0.1", "db.example")):
        login.replace(url)
        assert target.fresh().password == FIRST
    login.replace()
    assert target.fresh().password == PLANTED


# -- later in the run -------------------------------------------------------------------------------------


PRINTING = """
import os
print("env.py was told", os.environ["DATABASE_URL"])
"""


@pytest.mark.parametrize("lag", [False, True])
def test_pg_dump_and_env_py_log_in_with_the_password_of_then(
    login: Login, project: Project, run_migrator: Runner, start_migrator: Start, lag: bool
) -> None:
    """Rotated while another run is waited for: what logs in after that does so with what the file says then."""
    folder = project(revisions=linear_history(2))
    env_file = folder / "migrations" / "env.py"
    env_file.write_text(PRINTING + env_file.read_text())
    done(run_migrator("upgrade", "r001", cwd=folder, database=login.database, env=login.env))
    holder = login.database.connect()
    holder.cursor().execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, RUN_LOCK))
    run = start_migrator(cwd=folder, database=login.database, env={**login.env, "MIGRATOR_BACKUP": "always"})
    run.wait_for("waiting for the run lock")
    login.rotate()
    if not lag:
        login.replace()
    holder.close()
    if lag:
        run.wait_for(REPLACED)
        login.replace()
    result = done(run.finish())
    assert login.rows() == [("r002",)]
    assert len(list(run_migrator.backups.glob("*.json"))) == 1
    assert "env.py was told" in result.stdout + result.stderr


def test_a_lost_connection_is_made_again_with_the_password_of_then(login: Login) -> None:
    with connect(login.load().required_target, "test", 60) as session:
        login.rotate()
        with pytest.raises(ConnectFailed):
            session.reconnect(60)
        login.replace()
        session.reconnect(60)
        assert session.value("SELECT current_user::text") == login.role


def test_who_waits_for_current_goes_on_with_the_password_of_then(
    login: Login, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(1))
    waiting = start_migrator("wait-for-current", cwd=folder, database=login.database, env=login.env)
    waiting.wait_for("1 pending")
    login.rotate()
    login.database.psql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE usename = '{login.role}' AND application_name LIKE 'migrator/%'"
    )
    waiting.wait_for(REPLACED)
    login.replace()
    done(run_migrator(cwd=folder, database=login.database, env=login.env))
    assert "nothing is pending" in done(waiting.finish()).stdout


def test_a_run_with_nothing_to_do_is_as_patient(
    login: Login, project: Project, run_migrator: Runner, start_migrator: Start
) -> None:
    folder = project(revisions=linear_history(1))
    done(run_migrator("freeze", cwd=folder))
    done(run_migrator(cwd=folder, database=login.database, env=login.env))
    login.rotate()
    run = start_migrator(cwd=folder, database=login.database, env=login.env)
    run.wait_for(REPLACED)
    login.replace()
    assert "Nothing to do" in (result := done(run.finish())).stdout + result.stderr
