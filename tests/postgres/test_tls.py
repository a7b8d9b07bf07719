"""TLS to Postgres with verify-full, against real certificates: what is right works, what is wrong is said at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.support import PLANTED, installations
from tests.support.certificates import Authority, Pair
from tests.support.env_text import async_env
from tests.support.projects import linear_history
from tests.support.runner import Result, Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]
IMPATIENT = 30.0
"""Seconds: half of the wait timeout that every run here has; a denial must not wait for it to pass."""
CLIENT, OTHER = "by_certificate", "postgres_by_certificate"


@dataclass(frozen=True)
class Tls:
    """A server that speaks TLS only, and what was made for it."""

    server: Server
    authority: Authority
    good: Pair
    stranger: Authority
    client: Pair
    revoked: Pair

    def present(self, pair: Pair) -> None:
        """Have the server show this certificate."""
        for path, name in ((pair.certificate, "server.crt"), (pair.key, "server.key")):
            _hand_over(self.server, path, name)
        self.server.restart()

    def url(self, database: Database, *, user: object = None, **parameters: object) -> str:
        """Return the database's address with parameters."""
        address = self.server.url(database.name, str(user or "") or None, "" if user else PLANTED)
        given = {key: str(value) for key, value in parameters.items()}
        return f"{address}?{urlencode(given)}" if given else address


def _hand_over(server: Server, path: Path, name: str) -> None:
    copy = server.data / name
    shutil.copy(path, copy)
    copy.chmod(0o600)
    if server.account:
        os.chown(copy, server.account.pw_uid, server.account.pw_gid)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    """A server with a certificate for its address, and a role that must show one of its own."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = Authority(folder / "ours", "Our CA"), Authority(folder / "theirs", "Another CA")
    good = authority.issue("server", hosts=("127.0.0.1", "localhost"))
    client, revoked = authority.issue(CLIENT), authority.issue(CLIENT)
    server = Server(
        installations.binaries("debian"),
        settings={"ssl": "on", "ssl_ca_file": "root.crt", "ssl_crl_file": "root.crl"},
    )
    try:
        _hand_over(server, authority.file, "root.crt")
        _hand_over(server, authority.revoke(revoked), "root.crl")
        rules = server.data / "pg_hba.conf"
        rules.write_text(
            f"hostssl all {CLIENT},{OTHER} all cert\nhostssl all all all scram-sha-256\nhostnossl all all all reject\n"
        )
        tls = Tls(server, authority, good, stranger, client, revoked)
        for path, name in ((good.certificate, "server.crt"), (good.key, "server.key")):
            _hand_over(server, path, name)
        server.start()
        server.psql(f"CREATE ROLE {CLIENT} LOGIN SUPERUSER")
        yield tls
    finally:
        server.remove()


@pytest.fixture
def database(tls: Tls) -> Iterator[Database]:
    """An empty database of its own on the server that speaks TLS."""
    made = tls.server.create_database()
    yield made
    tls.server.drop_database(made.name)


def denied(result: Result, *said: str) -> str:
    """Check that a run was denied at once, and that its sentence says so; return the sentence."""
    assert result.code == 30, result
    assert result.seconds < IMPATIENT, result
    sentence: str = result.logs[-1]["message"]
    for words in said:
        assert words in sentence, result
    assert "The database was not changed. Next: " in sentence, result
    return sentence


# -- what is right works -----------------------------------------------------------------------------------


def _whole_life(run_migrator: Runner, folder: Path, database: Database, env: dict[str, str | None]) -> None:
    """Upgrade with a backup, and restore that: migrator's own session, env.py's, pg_dump and pg_restore."""
    env = env | {"MIGRATOR_BACKUP": "always", "MIGRATOR_RUN_LOCK_TIMEOUT": "5s"}
    upgraded = run_migrator("upgrade", cwd=folder, database=database, env=env)
    assert upgraded.code == 0, upgraded
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]
    assert list(run_migrator.backups.glob("*.json"))
    backup = run_migrator("backup", cwd=folder, database=database, env=env)
    assert backup.code == 0, backup
    database.execute("DROP TABLE t1")
    restored = run_migrator("restore", "latest", "--yes", cwd=folder, database=database, env=env)
    assert restored.code == 0, restored
    assert database.psql("SELECT to_regclass('t1') IS NOT NULL") == [(True,)]


def test_verify_full_by_parameters(
    tls: Tls, database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    url = tls.url(database, sslmode="verify-full", sslrootcert=tls.authority.file)
    _whole_life(run_migrator, folder, database, {"MIGRATOR_DATABASE_URL": url})


def test_verify_full_by_variables(
    tls: Tls, database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    env: dict[str, str | None] = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": str(tls.authority.file)}
    _whole_life(run_migrator, folder, database, {"MIGRATOR_DATABASE_URL": tls.url(database), **env})


def test_a_client_certificate_in_place_of_a_password(
    tls: Tls, database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    folder = project(revisions=linear_history(2))
    url = tls.url(
        database,
        user=CLIENT,
        sslmode="verify-full",
        sslrootcert=tls.authority.file,
        sslcert=tls.client.certificate,
        sslkey=tls.client.key,
    )
    address = tmp_path / "address"
    address.write_text(url + "\n")
    env: dict[str, str | None] = {"MIGRATOR_DATABASE_URL": None, "MIGRATOR_DATABASE_URL_FILE": str(address)}
    _whole_life(run_migrator, folder, database, env)
    ledger = database.psql("SELECT DISTINCT role::text FROM migrator_ledger")
    assert ledger == [(CLIENT,)]


@pytest.mark.parametrize("by", ["parameters", "variables"])
def test_asyncpg_verifies_too(
    by: str, tls: Tls, database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(async_env(), revisions=linear_history(2))
    names = {"sslmode": "verify-full", "sslrootcert": str(tls.authority.file)}
    names |= {"sslcert": str(tls.client.certificate), "sslkey": str(tls.client.key)}
    url = tls.url(database, user=CLIENT, **(names if by == "parameters" else {}))
    variables = {f"PG{name.upper()}": value for name, value in names.items()} if by == "variables" else {}
    env: dict[str, str | None] = {"MIGRATOR_DATABASE_URL": url, **variables}
    result = run_migrator("upgrade", cwd=folder, database=database, env=env)
    assert result.code == 0, result
    assert database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


# -- what is wrong is said at once -------------------------------------------------------------------------


SERVERS = {
    "expired": ("certificate verify failed: certificate has expired", "renew the server's certificate"),
    "wrong name": (
        'does not match host name "127.0.0.1"',
        "connect by a name in the server's certificate",
    ),
    "unknown CA": ("verify failed: unable to get local issuer certificate", "set sslrootcert to"),
    "revoked": ("certificate verify failed: certificate revoked", "renew the server's certificate"),
}


def _bad(tls: Tls, fault: str) -> Pair:
    if fault == "expired":
        return tls.authority.issue("server", hosts=("127.0.0.1",), days=(-3, -2))
    if fault == "wrong name":
        return tls.authority.issue("elsewhere.example", hosts=("elsewhere.example",))
    issuer = tls.authority if fault == "revoked" else tls.stranger
    return issuer.issue("server", hosts=("127.0.0.1",))


@pytest.mark.parametrize("fault", SERVERS)
def test_a_servers_certificate_that_is_no_good(
    fault: str, tls: Tls, database: Database, project: Project, run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    bad = _bad(tls, fault)
    parameters = {"sslmode": "verify-full", "sslrootcert": tls.authority.file}
    if fault == "revoked":
        parameters["sslcrl"] = tls.authority.revoke(bad)
    tls.present(bad)
    try:
        env = {"MIGRATOR_DATABASE_URL": tls.url(database, **parameters)}
        result = run_migrator(cwd=folder, database=database, env=env)
    finally:
        tls.present(tls.good)
    denied(result, *SERVERS[fault])
    assert database.psql("SELECT to_regclass('alembic_version') IS NULL") == [(True,)]


def test_the_tools_are_denied_as_we_are(
    tls: Tls, database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    """What verify-full refuses is refused before anything else is done, by backup and restore too."""
    root = tmp_path / "root.crt"
    shutil.copy(tls.stranger.file, root)
    folder = project(revisions=linear_history(2))
    url = tls.url(database, sslmode="verify-full", sslrootcert=root)
    for words in (
        ["backup"],
        ["restore", "latest", "--yes"],
        ["status"],
        ["check"],
        ["wait-for-current"],
        ["wait"],
    ):
        result = run_migrator(*words, cwd=folder, database=database, env={"MIGRATOR_DATABASE_URL": url})
        denied(result, "set sslrootcert to the file of the CA")
    shutil.copy(tls.authority.file, root)  # a secret that was rotated counts from the next run on
    assert run_migrator("check", cwd=folder, database=database, env={"MIGRATOR_DATABASE_URL": url}).code == 3


Wrong = tuple[dict[str, str], str, str]
WRONG: dict[str, Wrong] = {
    "no root file": (
        {"sslrootcert": "/nowhere/root.crt"},
        'root certificate file "/nowhere/root.crt" does not exist',
        "set sslrootcert to a file",
    ),
    "root file that is none": (
        {"sslrootcert": __file__},
        "could not read root certificate file",
        "set sslrootcert to a file",
    ),
    "no client certificate": (
        {"user": CLIENT},
        "connection requires a valid client certificate [28000]",
        "set sslcert and sslkey",
    ),
    "client certificate of another role": (
        {"user": "postgres_by_certificate", "pair": "client"},
        "certificate authentication failed for user",
        "with the role as common name",
    ),
    "client certificate revoked": (
        {"user": CLIENT, "pair": "revoked"},
        "certificate revoked",
        "issue a new client certificate",
    ),
    "client certificate of a stranger": (
        {"user": CLIENT, "pair": "stranger"},
        "alert unknown ca",
        "from a CA in the server's ssl_ca_file",
    ),
    "client certificate expired": (
        {"user": CLIENT, "pair": "expired"},
        "alert certificate expired",
        "issue a valid client certificate",
    ),
    "client certificate missing": (
        {"user": CLIENT, "sslcert": "/nowhere/me.crt", "sslkey": "/nowhere/me.key"},
        "connection requires a valid client certificate",
        "to existing files",
    ),
    "client key missing": (
        {"user": CLIENT, "pair": "client", "sslkey": "/nowhere/me.key"},
        'not private key file "/nowhere/me.key"',
        "set sslkey to the key",
    ),
    "client key for all to read": (
        {"user": CLIENT, "pair": "open"},
        "has group or world access",
        "in a file of mode 0600",
    ),
    "client key of another": (
        {"user": CLIENT, "pair": "mixed"},
        "key values mismatch",
        "set sslkey to the key",
    ),
    "no tls": ({"sslmode": "disable"}, "no encryption [28000]", "set sslmode=verify-full"),
}


def _pair(tls: Tls, name: str, folder: Path) -> Pair:
    opened = folder / "open.key"
    shutil.copy(tls.client.key, opened)
    opened.chmod(0o644)
    pairs = {
        "client": tls.client,
        "revoked": tls.revoked,
        "stranger": tls.stranger.issue(CLIENT),
        "expired": tls.authority.issue(CLIENT, days=(-3, -2)),
        "mixed": Pair(tls.client.certificate, tls.revoked.key, 0),
        "open": Pair(tls.client.certificate, opened, 0),
    }
    return pairs[name]


@pytest.mark.parametrize("fault", WRONG)
def test_what_the_client_has_wrong(
    fault: str, tls: Tls, database: Database, project: Project, run_migrator: Runner, tmp_path: Path
) -> None:
    given, *said = WRONG[fault]
    folder = project(revisions=linear_history(2))
    parameters: dict[str, object] = {"sslmode": "verify-full", "sslrootcert": tls.authority.file}
    if "pair" in given:
        pair = _pair(tls, given["pair"], tmp_path)
        parameters |= {"sslcert": pair.certificate, "sslkey": pair.key}
    url = tls.url(database, **{**parameters, **{key: value for key, value in given.items() if key != "pair"}})
    denied(run_migrator(cwd=folder, database=database, env={"MIGRATOR_DATABASE_URL": url}), *said)


def test_a_key_with_a_passphrase_is_none_for_the_tools(
    tls: Tls, database: Database, project: Project, run_migrator: Runner
) -> None:
    """The passphrase opens the key for our own connection; pg_dump cannot be told it, and no argument shows it."""
    folder = project(revisions=linear_history(2))
    sealed = tls.authority.issue(CLIENT, passphrase=PLANTED.encode())
    url = tls.url(
        database,
        user=CLIENT,
        sslmode="verify-full",
        sslrootcert=tls.authority.file,
        sslcert=sealed.certificate,
        sslkey=sealed.key,
        sslpassword=PLANTED,
    )
    env: dict[str, str | None] = {"MIGRATOR_DATABASE_URL": url}
    result = run_migrator("backup", cwd=folder, database=database, env=env, timeout=60)
    assert result.code == 36, result
    assert "private key file" in result.logs[-1]["message"], result
    result = run_migrator("upgrade", cwd=folder, database=database, env=env | {"MIGRATOR_BACKUP": "off"})
    assert result.code == 0, result
