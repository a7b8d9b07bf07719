"""The SQL of docs/howto/least-privileges.md: every command works as its role, and says which privilege is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import installations, sidecars
from tests.support.projects import linear_history
from tests.support.runner import ROOT, Result, Runner
from tests.support.servers import Database, Server

Project = Callable[..., Path]
PAGE = ROOT / "docs" / "howto" / "least-privileges.md"
ROLES = ("shop_migrator", "shop_watcher", "shop_reader", "shop_backup", "shop_restorer")


def statements() -> list[str]:
    """Return every statement of the page's SQL, in its order."""
    blocks = re.findall(r"^```sql\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [statement.strip() for block in blocks for statement in block.split(";") if statement.strip()]


@dataclass(frozen=True)
class Shop:
    """The database `shop`, migrated to r002 as the page says, with all the page's roles."""

    server: Server
    folder: Path
    runner: Runner

    @property
    def database(self) -> Database:
        return Database(self.server, "shop")

    def run(self, role: str, *words: str, **env: str) -> Result:
        """Run a command as a role."""
        settings = {"MIGRATOR_ROLE": "shop_owner"} if role == "shop_migrator" else {}
        address = {"MIGRATOR_DATABASE_URL": self.server.url("shop", role)}
        return self.runner(
            *words, cwd=self.folder, database=self.database, env={**address, **settings, **env}
        )


@pytest.fixture(scope="module")
def prepared() -> Iterator[Server]:
    """A server of its own, for the page's names are used as they are."""
    server = Server(installations.binaries("debian"))
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def shop(prepared: Server, project: Project, run_migrator: Runner) -> Iterator[Shop]:
    """Run the page's SQL in its order; what needs the version table comes after the first upgrade."""
    prepared.create_database("shop")
    made = Shop(prepared, project(revisions=linear_history(3)), run_migrator)
    try:
        for statement in statements():
            if "alembic_version" in statement and "REVOKE" not in statement and not _migrated(made):
                _give_passwords(made)
                first = made.run("shop_migrator", "upgrade", "r002", MIGRATOR_BACKUP="off")
                assert first.code == 0, first
            made.database.execute(statement)
        _give_passwords(made)
        yield made
    finally:
        for name in [
            row[0]
            for row in prepared.psql("SELECT datname::text FROM pg_database WHERE datname LIKE 'shop%'")
        ]:
            prepared.drop_database(name)
        for name in (*ROLES, "shop_owner"):
            prepared.psql(f"DROP ROLE IF EXISTS {name}")


def _migrated(shop: Shop) -> bool:
    return bool(shop.database.psql("SELECT to_regclass('alembic_version') IS NOT NULL")[0][0])


def _give_passwords(shop: Shop) -> None:
    for name in ROLES:
        if shop.server.psql("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,)):
            shop.server.psql(f"ALTER ROLE {name} PASSWORD '{shop.server.password}'")


def test_the_page_grants_no_more_than_it_says() -> None:
    text = " ".join(statements())
    assert not re.search(r"SUPERUSER|CREATEROLE|REPLICATION|BYPASSRLS|WITH (GRANT|ADMIN) OPTION", text)


def test_everything_works_as_its_role(shop: Shop) -> None:
    for role in ("shop_watcher", "shop_reader"):
        for command, code in {"wait": 0, "current": 0, "check": 3}.items():
            result = shop.run(role, command)
            assert result.code == code, result
    for command in ("status", "ledger"):
        result = shop.run("shop_reader", command)
        assert (result.code, "r002" in result.stdout) == (0, True), result
    backup = shop.run("shop_backup", "backup")
    assert backup.code == 0, backup
    for words in (["upgrade"], ["downgrade", "-1"], ["stamp", "head"], ["stamp", "r002"], ["upgrade"]):
        if words == ["upgrade"]:
            shop.database.execute("DROP TABLE IF EXISTS t3")
        result = shop.run("shop_migrator", *words)
        assert result.code == 0, result
    owners = shop.database.psql(
        "SELECT DISTINCT pg_get_userbyid(relowner)::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    )
    assert owners == [("shop_owner",)]
    for role, command in {"shop_watcher": "wait-for-current", "shop_reader": "verify"}.items():
        result = shop.run(role, command)
        assert result.code == 0, result


def test_a_sidecar_looks_and_verifies_as_the_role_that_it_migrates_as(shop: Shop) -> None:
    env = {
        "MIGRATOR_DATABASE_URL": shop.server.url("shop", "shop_migrator"),
        "MIGRATOR_ROLE": "shop_owner",
        "MIGRATOR_SIDECAR_VERIFY_INTERVAL": "200ms",
    }
    one = sidecars.start(shop.runner, shop.folder, shop.database, env=env)
    one.wait_until_ready()
    one.wait_for(lambda: one.metrics().get("migrator_verify_success") == 1, "a verification")
    shop.database.execute("UPDATE alembic_version SET version_num = 'r002'")
    held = one.wait_until_not_ready(24)
    assert held.document["reason"] == "the database is at r002; 1 of this image's revisions is pending"
    assert one.stop().code == 0


def test_repair(shop: Shop) -> None:
    file = shop.folder / "migrations/versions/r001.py"
    file.write_text(file.read_text().replace("t1 (id int", "t1 (id bigint"))
    result = shop.run("shop_migrator", "repair", "--accept", "r001")
    assert result.code == 0, result
    assert shop.database.psql("SELECT count(*) FROM migrator_ledger WHERE event = 'accepted'") == [(1,)]


def test_restore(shop: Shop) -> None:
    backup = shop.run("shop_backup", "backup")
    assert backup.code == 0, backup
    for words in (["restore", "latest", "--to", "shop_look"], ["restore", "latest", "--yes"]):
        result = shop.run("shop_restorer", *words)
        assert result.code == 0, result
    assert shop.database.psql("SELECT version_num FROM alembic_version") == [("r002",)]


CONNECT = "REVOKE CONNECT ON DATABASE shop FROM {role}"
USAGE = "REVOKE USAGE ON SCHEMA public FROM {role}"
VERSION = "REVOKE SELECT ON alembic_version FROM {role}"
MEMBER = "REVOKE shop_owner FROM {role}"
BUT_CONNECT = "; GRANT CONNECT ON DATABASE shop TO {role}"
NOT_OWNED = "ALTER DATABASE shop OWNER TO postgres" + BUT_CONNECT
REPLACE = ["restore", "latest", "--yes"]
Missing = tuple[str, list[str], str, int, str]
MISSING: dict[str, Missing] = {
    "migrator, connect": (
        "shop_migrator",
        ["upgrade"],
        MEMBER,
        30,
        "GRANT CONNECT ON DATABASE shop TO shop_migrator",
    ),
    "migrator, owner": (
        "shop_migrator",
        ["upgrade"],
        MEMBER + BUT_CONNECT,
        30,
        "cannot SET ROLE to MIGRATOR_ROLE=",
    ),
    "migrator, usage": (
        "shop_migrator",
        ["upgrade"],
        NOT_OWNED,
        30,
        "GRANT USAGE ON SCHEMA public TO shop_migrator",
    ),
    "migrator, create": (
        "shop_migrator",
        ["upgrade"],
        NOT_OWNED + "; GRANT USAGE ON SCHEMA public TO shop_owner",
        30,
        "Revision r003 failed: permission denied for schema public [42501]",
    ),
    "watcher, connect": (
        "shop_watcher",
        ["current"],
        CONNECT,
        30,
        "GRANT CONNECT ON DATABASE shop TO shop_watcher",
    ),
    "watcher, usage": (
        "shop_watcher",
        ["current"],
        USAGE,
        30,
        "GRANT USAGE ON SCHEMA public TO shop_watcher",
    ),
    "watcher, version table": (
        "shop_watcher",
        ["wait-for-current"],
        VERSION,
        30,
        "may not read the version table alembic_version. The database was not changed. Next: GRANT SELECT ON",
    ),
    "reader, connect": (
        "shop_reader",
        ["status"],
        CONNECT,
        30,
        "GRANT CONNECT ON DATABASE shop TO shop_reader",
    ),
    "reader, usage": ("shop_reader", ["ledger"], USAGE, 30, "GRANT USAGE ON SCHEMA public TO shop_reader"),
    "reader, status": (
        "shop_reader",
        ["status"],
        VERSION,
        30,
        "GRANT SELECT ON alembic_version TO shop_reader",
    ),
    "reader, verify": (
        "shop_reader",
        ["verify"],
        VERSION,
        30,
        "GRANT SELECT ON alembic_version TO shop_reader",
    ),
    "reader, ledger": (
        "shop_reader",
        ["ledger"],
        "REVOKE SELECT ON migrator_ledger FROM {role}",
        30,
        "may not read the ledger public.migrator_ledger. The database was not changed. Next: GRANT SELECT ON",
    ),
    "backup, connect": (
        "shop_backup",
        ["backup"],
        CONNECT,
        30,
        "GRANT CONNECT ON DATABASE shop TO shop_backup",
    ),
    "backup, usage": (
        "shop_backup",
        ["backup"],
        "REVOKE pg_read_all_data FROM {role}",
        30,
        "GRANT USAGE ON SCHEMA public TO shop_backup",
    ),
    "backup, a table": (
        "shop_backup",
        ["backup"],
        "REVOKE pg_read_all_data FROM {role}; GRANT USAGE ON SCHEMA public TO {role};"
        "GRANT SELECT ON alembic_version, migrator_ledger, t1 TO {role}",
        36,
        "Role shop_backup may not read public.t2, so a backup would be incomplete. The database was not changed. "
        "Next: as a superuser: GRANT pg_read_all_data",
    ),
    "restorer, connect": (
        "shop_restorer",
        REPLACE,
        MEMBER,
        30,
        "GRANT CONNECT ON DATABASE shop TO shop_restorer",
    ),
    "restorer, createdb": (
        "shop_restorer",
        ["restore", "latest", "--to", "shop_look"],
        "ALTER ROLE {role} NOCREATEDB",
        43,
        "may not create databases",
    ),
    "restorer, owner": ("shop_restorer", REPLACE, MEMBER + BUT_CONNECT, 43, 'role "shop_owner"'),
}


@pytest.mark.parametrize("missing", MISSING)
def test_one_privilege_less(missing: str, shop: Shop) -> None:
    role, words, revoke, code, says = MISSING[missing]
    if words[0] == "restore":
        assert shop.run("shop_backup", "backup").code == 0
    shop.database.execute(revoke.format(role=role))
    before = shop.database.dump("--exclude-table=migrator_ledger")
    result = shop.run(role, *words)
    assert result.code == code, result
    assert says in result.logs[-1]["message"], result
    assert shop.database.dump("--exclude-table=migrator_ledger") == before
