"""Roles and tablespaces, which belong to the cluster and are in no dump: saved beside it, without passwords.

``pg_dumpall --globals-only --no-role-passwords`` writes them, without any table for superusers only. If
it is missing or refused, the roles and their memberships are written from catalogs that every role may
read.
"""

from __future__ import annotations

from pathlib import Path

from migrator.backups import clients
from migrator.backups.clients import Client, Login
from migrator.postgres.errors import Refused
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session
from migrator.runtime import subprocesses

ENDING = ".globals.sql"
_TIMEOUT = 120.0
_MOST_BYTES = 64 * 1024 * 1024

_ROLES = """
SELECT rolname::text, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls,
       rolconnlimit
  FROM pg_roles WHERE rolname !~ '^pg_' ORDER BY 1
"""
_MEMBERS = """
SELECT r.rolname::text, m.rolname::text, a.admin_option
  FROM pg_auth_members a JOIN pg_roles r ON r.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
 WHERE m.rolname !~ '^pg_' ORDER BY 1, 2
"""
_ATTRIBUTES = ("SUPERUSER", "INHERIT", "CREATEROLE", "CREATEDB", "LOGIN", "REPLICATION", "BYPASSRLS")


class _TooMuch(Exception):
    """More roles than any cluster has."""


def read(session: Session, client: Client, login: Login) -> tuple[bytes, str]:
    """Return SQL that creates the roles and tablespaces, and a note for the manifest if something is missing.

    If the role may not read them, return nothing (``b""``) and the reason: the backup itself is still
    good. Raises QueryFailed if the connection was lost.
    """
    text, why = _dumpall(client, login)
    if text:
        return text, ""
    try:
        text = _by_query(session)
    except Refused as error:
        return b"", f"roles and tablespaces are not saved beside it: {why}; {error.text}"
    return text, f"only roles are saved, without settings and tablespaces: {why}"


def _dumpall(client: Client, login: Login) -> tuple[bytes, str]:
    program = client.folder / "pg_dumpall"
    if not program.exists():
        return b"", f"there is no pg_dumpall in {client.folder}"
    chunks: list[bytes] = []

    def take(chunk: bytes) -> None:
        chunks.append(chunk)
        if sum(map(len, chunks)) > _MOST_BYTES:
            raise _TooMuch

    database = login.target.database
    arguments: list[str | Path] = [program, "--globals-only", "--no-role-passwords", "--no-password"]
    # A name with = in it would be read as a connection string; without one it connects to "postgres",
    # then "template1".
    if "=" not in database and "://" not in database:
        arguments.append(f"--database={database}")
    try:
        done = subprocesses.run(arguments, environment=login.environment(), on_output=take, timeout=_TIMEOUT)
    except (OSError, subprocesses.TimedOut, _TooMuch) as error:
        return b"", f"pg_dumpall: {error or 'too much output'}"
    if done.status != 0:
        return b"", clients.last_words(done)
    return b"".join(chunks), ""


def _by_query(session: Session) -> bytes:
    lines = ["-- Roles and their memberships; no passwords, no settings of roles, no tablespaces."]
    for name, *flags, limit in session.query(_ROLES):
        words = [word if on else f"NO{word}" for word, on in zip(_ATTRIBUTES, flags, strict=True)]
        role = quote_identifier(name)
        lines.append(f"CREATE ROLE {role};")
        lines.append(f"ALTER ROLE {role} WITH {' '.join(words)} CONNECTION LIMIT {limit};")
    for role, member, admin in session.query(_MEMBERS):
        option = " WITH ADMIN OPTION" if admin else ""
        lines.append(f"GRANT {quote_identifier(role)} TO {quote_identifier(member)}{option};")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
