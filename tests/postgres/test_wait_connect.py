"""Connecting: every way a server can refuse, in its own language, and nothing that takes longer than it may."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from migrator.config import settings
from migrator.config.database_url import Target, parse
from migrator.errors import Unreachable
from migrator.pipeline.stages.wait import wait
from migrator.postgres.errors import ConnectFailed, Refusal, classify
from migrator.postgres.session import Session, connect
from tests.support import PLANTED, installations, leaks
from tests.support.pace import Stopwatch
from tests.support.ports import free_port
from tests.support.servers import Server

PATIENCE = 60.0  # seconds, where it is not the time that is tested

LANGUAGES = {
    "C": "password authentication failed",
    "fr_FR.UTF-8": "authentification par mot de passe échouée",
}
FRENCH = ("fr_FR", "fr_FR.UTF-8", Path("/usr/share/locale/fr/LC_MESSAGES"))


def make_french() -> None:
    """Make the locale, and the server's messages in it, where the machine has them not."""
    name, encoded, messages = FRENCH
    have = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=True).stdout.lower().split()
    if encoded.lower().replace("-", "") not in have:
        installations.apt_install("locales")
        installations.as_root("localedef", "-i", name, "-f", "UTF-8", encoded)
    binaries = installations.debian()
    if not list(messages.glob(f"postgres-{binaries.parent.name}.mo")):
        # Slim images keep the translations of packages out (/etc/dpkg/dpkg.cfg.d).
        with installations.apt_lock():
            installations.as_root(
                *(
                    "apt-get",
                    "install",
                    "-q",
                    "-y",
                    "--reinstall",
                    "-o",
                    "Dpkg::Options::=--path-include=*.mo",
                ),
                f"postgresql-{binaries.parent.name}",
            )


@pytest.fixture(scope="module", params=LANGUAGES)
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that speaks a language, with roles and databases that refuse in each way."""
    if request.param != "C":
        make_french()
    server = Server(
        installations.binaries("debian"),
        settings={
            "lc_messages": request.param,
            "max_connections": "12",
            "superuser_reserved_connections": "3",
        },
    )
    try:
        with (server.data / "pg_hba.conf").open("r+") as rules:
            others = rules.read()
            rules.seek(0)
            rules.write("host all unwelcome all reject\nhost all trusted all trust\n" + others)
        server.start()
        for name, options in {
            "plain": "LOGIN",
            "unwelcome": "LOGIN",
            "trusted": "NOLOGIN",
            "group": "NOLOGIN",
            "single": "LOGIN CONNECTION LIMIT 1",
            "late": "LOGIN VALID UNTIL '2001-01-01'",
        }.items():
            server.create_role(name, options)
        for name in ("app", "closed", "private", "full"):
            server.create_database(name)
        server.psql("ALTER DATABASE closed ALLOW_CONNECTIONS false")
        server.psql("REVOKE CONNECT ON DATABASE private FROM PUBLIC")
        server.psql('ALTER DATABASE "full" CONNECTION LIMIT 0')
        yield server
    finally:
        server.remove()


def refused(target: Target | str, timeout: float = PATIENCE) -> ConnectFailed:
    """Fail to connect, within the time and without giving the password away."""
    target = parse(target) if isinstance(target, str) else target
    with Stopwatch() as watch, pytest.raises(ConnectFailed) as caught:
        connect(target, "test", timeout)
    assert watch.within(timeout + 0.5)
    error = caught.value
    assert error.text
    assert "\n" not in error.text
    assert leaks.find(error.text) is None
    return error


REFUSALS = {
    "wrong password": ("app", "plain", "wrong", "28P01", Refusal.DENIED),
    "no such role": ("app", "nobody here", PLANTED, "28P01", Refusal.DENIED),
    "password expired": ("app", "late", PLANTED, "28P01", Refusal.DENIED),
    "role may not log in": ("app", "trusted", PLANTED, "28000", Refusal.DENIED),
    "rejected by pg_hba.conf": ("app", "unwelcome", PLANTED, "28000", Refusal.DENIED),
    "no such database": ("nowhere", "plain", PLANTED, "3D000", Refusal.NO_DATABASE),
    "no such database, odd name": (
        'n\'o: "FATAL:  28P01: x"',
        "plain",
        PLANTED,
        "3D000",
        Refusal.NO_DATABASE,
    ),
    "no CONNECT privilege": ("private", "plain", PLANTED, "42501", Refusal.DENIED),
    "closed to all": ("closed", "plain", PLANTED, "55000", Refusal.DENIED),
    "database is full": ("full", "plain", PLANTED, "53300", Refusal.TRANSIENT),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refusal_is_known_in_any_language(speaker: Server, reason: str) -> None:
    database, role, password, sqlstate, refusal = REFUSALS[reason]
    error = refused(speaker.url(database, role, password))
    assert (error.sqlstate, error.refusal) == (sqlstate, refusal)
    if reason == "wrong password":
        assert LANGUAGES[speaker.psql("SHOW lc_messages")[0][0]] in error.text


def test_no_password(speaker: Server) -> None:
    error = refused(f"postgresql://plain@127.0.0.1:{speaker.port}/app")
    assert (error.refusal, error.sqlstate) == (Refusal.DENIED, "")
    assert "no password supplied" in error.text


def test_tls_that_the_server_has_not(speaker: Server) -> None:
    for mode in ("require", "verify-full"):
        error = refused(f"{speaker.url('app')}?sslmode={mode}")
        assert error.refusal is Refusal.DENIED, error.text
    for mode in ("disable", "allow", "prefer"):
        connect(parse(f"{speaker.url('app')}?sslmode={mode}"), "test", PATIENCE).close()


@pytest.mark.parametrize(
    "query",
    [
        "options=-c%20no_such_setting%3D1",
        "options=-c%20work_mem%3Dmuch",
        "options=--no-such-option",
        "no_such_parameter=1",
        "sslmode=perhaps",
        "connect_timeout=soon",
        "service=nowhere",
        "channel_binding=require",
        "client_encoding=klingon",
    ],
)
def test_parameters_that_can_never_work(speaker: Server, query: str) -> None:
    assert refused(f"{speaker.url('app', 'plain')}?{query}").refusal is Refusal.DENIED


def test_too_many_clients_of_a_role(speaker: Server) -> None:
    target = parse(speaker.url("app", "single"))
    with connect(target, "first", PATIENCE) as session:
        error = refused(target)
        assert (error.refusal, error.sqlstate) == (Refusal.TRANSIENT, "53300")
        assert session.value("SELECT 1") == 1
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connect(target, "second", PATIENCE).close()
            return
        except ConnectFailed:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_too_many_clients_of_the_server(speaker: Server) -> None:
    target = parse(speaker.url("app", "plain"))
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(psycopg2.OperationalError):
            for _ in range(20):
                stack.callback(speaker.connect("app", user="plain").close)
        error = refused(target)
        assert (error.refusal, error.sqlstate) == (Refusal.TRANSIENT, "53300")
        with contextlib.suppress(psycopg2.OperationalError):
            for _ in range(20):
                stack.callback(speaker.connect("app").close)
        error = refused(speaker.url("app"))
        assert (error.refusal, error.sqlstate) == (Refusal.TRANSIENT, "53300")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_server_that_starts_up_or_shuts_down(private_server: Callable[..., Server], language: str) -> None:
    server = private_server(settings={"lc_messages": language})
    target = parse(server.url())
    with connect(target, "keeps it from stopping", PATIENCE) as session:
        assert server.process is not None
        server.process.terminate()  # "smart": no new sessions, the old ones go on
        deadline = time.monotonic() + PATIENCE
        refusal = None
        while refusal is None:
            try:
                connect(target, "test", PATIENCE).close()
            except ConnectFailed as error:
                refusal = (error.refusal, error.sqlstate)
            assert time.monotonic() < deadline, "it did not shut down"
            time.sleep(0.02)
        assert refusal == (Refusal.TRANSIENT, "57P03")
        assert session.value("SELECT 1") == 1
    server.process.wait(20)
    server.stop()
    assert refused(target).refusal is Refusal.TRANSIENT

    # A recovery that has to wait for its first file is a start that does not end.
    (server.data / "recovery.signal").touch()
    server.configure(restore_command="sleep 60")
    starting = threading.Thread(target=start, args=(server,))
    starting.start()
    try:
        codes = set()
        deadline = time.monotonic() + PATIENCE
        while "57P03" not in codes and time.monotonic() < deadline:
            error = refused(target)
            assert error.refusal is Refusal.TRANSIENT
            codes.add(error.sqlstate)
            time.sleep(0.02)
        assert codes <= {"", "57P03"}
        assert "57P03" in codes
    finally:
        assert server.process is not None
        server.process.kill()
        starting.join(20)


def start(server: Server) -> None:
    """Start a server that will be killed before it is up."""
    with contextlib.suppress(RuntimeError):
        server.start()


def test_a_port_where_nobody_listens() -> None:
    error = refused(f"postgresql://u:{'p' * 9}@127.0.0.1:{free_port()}/db")
    assert (error.refusal, error.sqlstate) == (Refusal.TRANSIENT, "")
    assert "refused" in error.text.lower()


def test_a_name_that_does_not_resolve() -> None:
    error = refused("postgresql://u:p@no-such-host.invalid/db", 5)
    assert error.refusal is Refusal.TRANSIENT
    assert "no-such-host.invalid" in error.text or "no answer within" in error.text


def test_a_socket_folder_without_a_server(tmp_path: Path) -> None:
    assert refused(f"host={tmp_path} dbname=db user=u").refusal is Refusal.TRANSIENT


@contextlib.contextmanager
def listener(talk: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """Accept TCP connections and do with each what `talk` does."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        kept: list[socket.socket] = []

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    client, _ = server.accept()
                    kept.append(client)
                    threading.Thread(target=talk, args=(client, done), daemon=True).start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            thread.join()
            for client in kept:
                client.close()


def silence(client: socket.socket, done: threading.Event) -> None:
    done.wait(30)


def silence_after_refusing_tls(client: socket.socket, done: threading.Event) -> None:
    client.recv(8)
    client.sendall(b"N")
    done.wait(30)


def a_byte_now_and_then(client: socket.socket, done: threading.Event) -> None:
    client.recv(8)
    client.sendall(b"NR\0\0\0\x17")  # an authentication request that takes for ever to arrive
    while not done.wait(0.1):
        with contextlib.suppress(OSError):
            client.sendall(b"\0")


def silence_after_a_refusal(client: socket.socket, done: threading.Event) -> None:
    """Refuse the first attempt as a server does, without a code, and say nothing to the second."""
    client.recv(8)
    if not done.__dict__.setdefault("refused", False):
        done.__dict__["refused"] = True
        client.sendall(b"E" + (4 + 19).to_bytes(4, "big") + b"SFATAL\0Mno way\0\0\0\0\0\0")
        client.close()
        return
    done.wait(30)


@pytest.mark.parametrize(
    "talk", [silence, silence_after_refusing_tls, a_byte_now_and_then, silence_after_a_refusal]
)
@pytest.mark.parametrize("timeout", [0.3, 1.0, 2.5])
def test_a_server_that_does_not_answer_is_bounded(
    talk: Callable[[socket.socket, threading.Event], None], timeout: float
) -> None:
    with listener(talk) as port:
        error = refused(f"postgresql://u:p@127.0.0.1:{port}/db", timeout)
        assert error.refusal is Refusal.TRANSIENT


@pytest.mark.parametrize(
    ("told", "refusal", "words"),
    [
        ("3D000", Refusal.NO_DATABASE, "the database was not created within 1 s"),
        ("", Refusal.TRANSIENT, "the last one: Connection refused"),
    ],
)
def test_an_attempt_for_which_there_was_no_time_does_not_hide_what_the_others_were_told(
    told: str, refusal: Refusal, words: str
) -> None:
    """At the end of a wait an attempt gets what is left, in which a busy server does not get to answer."""
    attempts: list[float] = []

    def busy(target: Target, name: str, seconds: float) -> Session:
        attempts.append(seconds)
        if len(attempts) == 1:
            raise ConnectFailed(refusal, "Connection refused", told)
        raise ConnectFailed(Refusal.TRANSIENT, f"no answer within {seconds:.1f} s")

    environment = {"DATABASE_URL": "postgresql://me@db/shop", "MIGRATOR_WAIT_TIMEOUT": "1s"}
    loaded = settings.load({}, {**environment, "MIGRATOR_WAIT_FOR_DATABASE": "true"}, "/nonexistent")
    with pytest.raises(Unreachable, match=words):
        wait(loaded.required_target, loaded, "test", connect=busy)
    assert len(attempts) > 1


def test_several_silent_hosts_are_bounded_together() -> None:
    with listener(silence) as one, listener(silence) as two:
        error = refused(f"postgresql://u:p@127.0.0.1:{one},127.0.0.1:{two},127.0.0.1:{one}/db", 1.0)
        assert error.refusal is Refusal.TRANSIENT


def garbage(client: socket.socket, done: threading.Event) -> None:
    with contextlib.suppress(OSError):
        client.recv(8)
        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    client.close()


def goodbye(client: socket.socket, done: threading.Event) -> None:
    client.close()


@pytest.mark.parametrize("talk", [garbage, goodbye])
def test_something_else_on_the_port_may_become_a_server(
    talk: Callable[[socket.socket, threading.Event], None],
) -> None:
    with listener(talk) as port:
        assert refused(f"postgresql://u:p@127.0.0.1:{port}/db", 2).refusal is Refusal.TRANSIENT


def test_of_several_hosts_one_that_answers_is_enough(speaker: Server) -> None:
    url = speaker.url("app").replace(
        f"127.0.0.1:{speaker.port}", f"127.0.0.1:{free_port()},127.0.0.1:{speaker.port}"
    )
    with connect(parse(url), "test", PATIENCE) as session:
        assert session.value("SELECT current_database()") == "app"


def test_a_refusal_by_one_of_several_hosts_is_known(speaker: Server) -> None:
    here = f"127.0.0.1:{speaker.port}"
    url = speaker.url("app", password="wrong").replace(here, f"127.0.0.1:{free_port()},{here}")
    error = refused(url)
    assert (error.refusal, error.sqlstate) == (Refusal.DENIED, "28P01")


def test_an_open_session(speaker: Server) -> None:
    with connect(
        parse(speaker.url("app", "plain") + "?application_name=theirs"), "migrator run-1", PATIENCE
    ) as session:
        assert session.facts.major == speaker.major
        assert (session.facts.database, session.facts.user) == ("app", "plain")
        assert (session.facts.in_recovery, session.facts.read_only) == (False, False)
        assert session.value("SHOW application_name") == "migrator run-1"
        session.query("SET application_name = 'kept: every statement is its own transaction'")
        assert session.value("SHOW application_name").startswith("kept")
    assert session.closed


def test_no_thread_and_no_connection_is_left_behind(speaker: Server) -> None:
    def sessions() -> int:
        return int(speaker.psql("SELECT count(*) FROM pg_stat_activity WHERE usename = 'plain'")[0][0])

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "connect"]

    for _ in range(5):
        connect(parse(speaker.url("app", "plain")), "test", PATIENCE).close()
        refused(speaker.url("app", "plain", "wrong"))
        with contextlib.suppress(ConnectFailed):
            connect(parse(speaker.url("app", "plain")), "test", 0.004).close()  # given up at any point
    deadline = time.monotonic() + PATIENCE
    while (sessions() or threads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (sessions(), threads()) == (0, [])


def test_tls_that_cannot_be_trusted(private_server: Callable[..., Server], tmp_path: Path) -> None:
    server = private_server(start=False)
    for name in ("server", "other"):
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=elsewhere",
                ),
                *("-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.crt")),
            ],
            check=True,
            capture_output=True,
        )
        for kind in ("key", "crt"):
            copy = server.data / f"{name}.{kind}"
            copy.write_bytes((tmp_path / f"{name}.{kind}").read_bytes())
            copy.chmod(0o600)
            if server.account:
                subprocess.run(["chown", str(server.account.pw_uid), str(copy)], check=True)
    server.configure(ssl="on", ssl_cert_file="server.crt", ssl_key_file="server.key")
    server.start()
    url = server.url()
    right, wrong = tmp_path / "server.crt", tmp_path / "other.crt"
    for query in ("sslmode=require", f"sslmode=verify-ca&sslrootcert={right}"):
        with connect(parse(f"{url}?{query}"), "test", PATIENCE) as session:
            assert session.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
    for query in (
        f"sslmode=verify-full&sslrootcert={right}",  # made out to another name
        f"sslmode=verify-ca&sslrootcert={wrong}",
        f"sslmode=verify-ca&sslrootcert={tmp_path}/none.crt",
        f"sslmode=require&sslcert={tmp_path}/server.crt&sslkey={tmp_path}/none.key",
    ):
        error = refused(f"{url}?{query}")
        assert error.refusal is Refusal.DENIED, (query, error.text)


@pytest.mark.parametrize("query", ["ssl_min_protocol_version=TLSv9", "port=1,2"])
def test_values_that_libpq_itself_refuses(query: str) -> None:
    assert refused(f"postgresql://u:p@127.0.0.1/db?{query}").refusal is Refusal.DENIED


@pytest.mark.parametrize(
    ("sqlstate", "text", "refusal"),
    [
        ("28P01", "", Refusal.DENIED),
        ("28000", "", Refusal.DENIED),
        ("42501", "", Refusal.DENIED),
        ("55000", "", Refusal.DENIED),
        ("42704", "", Refusal.DENIED),
        ("3D000", "", Refusal.NO_DATABASE),
        ("53300", "", Refusal.TRANSIENT),
        ("57P01", "", Refusal.TRANSIENT),
        ("57P03", "", Refusal.TRANSIENT),
        ("08P01", "", Refusal.TRANSIENT),
        ("XX000", "", Refusal.TRANSIENT),
        ("57P03", "certificate", Refusal.TRANSIENT),
        ("", "Connection refused", Refusal.TRANSIENT),
        ("", "could not translate host name", Refusal.TRANSIENT),
        ("", "timeout expired", Refusal.TRANSIENT),
        ("", "server closed the connection unexpectedly", Refusal.TRANSIENT),
        ("", "fe_sendauth: no password supplied", Refusal.DENIED),
        ("", "server does not support SSL, but SSL was required", Refusal.DENIED),
        ("", "SSL error: certificate verify failed", Refusal.DENIED),
        ("", "", Refusal.TRANSIENT),
    ],
)
def test_classify(sqlstate: str, text: str, refusal: Refusal) -> None:
    assert classify(sqlstate, text) is refusal
