"""A server on which an ordinary role has planted hostile objects, and what can be seen of it afterwards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.security import canaries
from tests.support import installations
from tests.support.servers import Database, Server

APPLICATION = Path(__file__).with_name("application.sql")
SUPERUSER, OWNER = "boss", "mig"
"""The two logins that commands run as: a superuser, and a role that owns the database and no more."""

_CANARY = re.compile(
    r'CANARY (?P<what>.*) called by (?P<login>\S+) as (?P<role>\S+) in "(?P<application_name>.*)"$'
)

_PRIVILEGES = """
SET search_path = pg_catalog;
SELECT 'role', rolname::text, concat_ws(' ', rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin,
  rolreplication, rolbypassrls, rolvaliduntil) FROM pg_roles WHERE rolname !~ '^pg_' AND rolname !~ '^migrator_'
UNION ALL SELECT 'member', roleid::regrole::text, member::regrole::text FROM pg_auth_members
  WHERE roleid::regrole::text !~ '^migrator_'
UNION ALL SELECT 'setting', concat(setdatabase, ' ', setrole), setconfig::text FROM pg_db_role_setting
  WHERE setdatabase = 0 OR setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL SELECT 'database', datname::text, concat_ws(' ', datdba::regrole, (SELECT array_agg(a::text ORDER BY a::text)
  FROM unnest(coalesce(datacl, acldefault('d', datdba))) AS u (a))) FROM pg_database
  WHERE datname = current_database()
UNION ALL SELECT 'default privileges', concat_ws(' ', defaclrole::regrole, defaclnamespace::regnamespace,
  defaclobjtype), defaclacl::text FROM pg_default_acl
UNION ALL SELECT 'schema', nspname::text, concat_ws(' ', nspowner::regrole, nspacl) FROM pg_namespace
  WHERE nspname !~ '^pg_(toast_)?temp' AND nspname !~ '^restored'
UNION ALL SELECT 'relation', oid::regclass::text, concat_ws(' ', relowner::regrole, relacl) FROM pg_class
  WHERE relowner = (SELECT oid FROM pg_roles WHERE rolname = 'app')
ORDER BY 1, 2, 3
"""


@dataclass(frozen=True)
class Call:
    """A canary that was called: what it is, by which login, as which role, and in which statement."""

    what: str
    login: str
    role: str
    application_name: str
    statement: str

    def __str__(self) -> str:
        return (
            f"{self.what}, called by {self.login} as {self.role} in {self.application_name!r}:"
            f" {' '.join(self.statement.split())[:300]}"
        )


@dataclass(frozen=True)
class World:
    """A server with the roles, and a template database of each kind."""

    server: Server

    def copy(self, template: str, owner: str) -> Database:
        """Return a new database of the owner, with all that is in the template."""
        database = self.server.create_database(template=template)
        self.server.psql(f'ALTER DATABASE "{database.name}" OWNER TO {owner}')
        if template == "first":
            self.server.psql(f'ALTER DATABASE "{database.name}" SET search_path = evil, public, pg_catalog')
        return database

    @contextmanager
    def calls(self) -> Iterator[list[Call]]:
        """Collect the calls of canaries within the block."""
        before = self.server.log.stat().st_size
        found: list[Call] = []
        yield found
        with self.server.log.open(errors="replace") as log:
            log.seek(before)
            found += _calls(log.read())

    def privileges(self, database: Database) -> list[tuple[Any, ...]]:
        """Return who is what, and who may do what, in the server and in the database."""
        return self.server.psql(_PRIVILEGES, dbname=database.name)

    def reset(self) -> None:
        """Take away what an attack gained, so that the next one starts as this one did."""
        self.server.psql(f"ALTER ROLE {canaries.OWNER} NOSUPERUSER")


def _calls(text: str) -> Iterator[Call]:
    """Parse the server's log: a line with a canary, then its context, then the statement that called it."""
    found: re.Match[str] | None = None
    statement: list[str] | None = None
    for line in text.splitlines():
        if line.startswith("\t"):
            if statement is not None:
                statement.append(line)
            continue
        if found and statement is not None:
            yield Call(**found.groupdict(), statement="\n".join(statement))
            found = statement = None
        if " STATEMENT:  " in line:
            statement = [line.partition(" STATEMENT:  ")[2]]
        elif new := _CANARY.search(line):
            if found:
                yield Call(**found.groupdict(), statement="")
            found, statement = new, None
        elif " CONTEXT:  " not in line:
            statement = None
    if found:
        yield Call(**found.groupdict(), statement="\n".join(statement or []))


TEMPLATES: Mapping[str, Sequence[str]] = {
    "hostile": ("public",),
    "first": ("evil",),
    "login": (OWNER,),
}
"""Each kind of hostile database, and the schemas in which everything is planted."""


@contextmanager
def make(kind: str, templates: Iterable[str] = TEMPLATES) -> Iterator[World]:
    """Start a server of a kind, with the roles, a harmless template and hostile ones; stop it at the end."""
    with _running(kind) as server:
        server.create_role(canaries.OWNER)
        server.create_role(SUPERUSER, "SUPERUSER LOGIN")
        server.create_role(OWNER, "LOGIN CREATEDB")
        server.psql(f"GRANT {canaries.OWNER} TO {OWNER}")
        place = World(server)
        _template(place)
        for template in templates:
            server.create_database(template, "harmless")
            for schema in TEMPLATES[template]:
                if schema != "public":
                    server.psql(f"CREATE SCHEMA {schema} AUTHORIZATION {canaries.OWNER}", dbname=template)
                    server.psql(f"GRANT USAGE, CREATE ON SCHEMA {schema} TO PUBLIC", dbname=template)
                canaries.plant(server, template, schema)
        yield place


def _template(place: World) -> None:
    """Make a database with an application's own objects, and CREATE on public for all (as before version 15)."""
    place.server.create_database("harmless")
    place.server.psql("GRANT USAGE, CREATE ON SCHEMA public TO PUBLIC", dbname="harmless")
    place.server.psql(f"CREATE SCHEMA app AUTHORIZATION {canaries.OWNER}", dbname="harmless")
    canaries.run_as_app(place.server, "harmless", canaries.sql(canaries.SAW, "app"))
    canaries.run_as_app(place.server, "harmless", APPLICATION.read_text(encoding="utf-8"))


@contextmanager
def _running(kind: str) -> Iterator[Server]:
    server = Server(installations.binaries(kind), settings={"log_min_messages": "warning"})
    try:
        server.start()
        yield server
    finally:
        server.remove()
