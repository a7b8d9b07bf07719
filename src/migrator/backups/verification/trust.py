"""Whose code a restore runs: an unattended verification does not run other roles' code as a superuser.

A restore evaluates code in a backup: checks, expression indexes, generated columns, views. No change of
role keeps a function there from becoming the superuser again (``SET ROLE``, ``SET SESSION
AUTHORIZATION``: the server checks the login). Only a login without privileges protects, or another
server. A role that may create roles can give its rights away in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from migrator.backups import exported_snapshot, pg_restore
from migrator.backups.clients import Client
from migrator.config.settings import Settings
from migrator.errors import some
from migrator.postgres.session import Session

NEXT_STEP = (
    "set MIGRATOR_VERIFY_URL to another server, or to a login of this one that is not a superuser and "
    "has CREATEDB; or set MIGRATOR_VERIFY_AS_SUPERUSER=true if you trust these roles; or verify by "
    "reading (MIGRATOR_BACKUP_VERIFY=read, verify-backup --how read)"
)
_NO_CODE = ("SCHEMA", "ACL", "DEFAULT ACL", "COMMENT", "SEQUENCE SET")

# The objects of the bootstrap superuser and of initdb are not listed.
_OWNERS = """
SELECT DISTINCT pg_get_userbyid(refobjid)::text FROM pg_shdepend JOIN pg_database d ON d.oid = dbid
 WHERE d.datname = current_database() AND refclassid = 'pg_authid'::regclass AND deptype = 'o'
   AND classid NOT IN ('pg_namespace'::regclass, 'pg_default_acl'::regclass)
"""
_ROLES = "SELECT rolname::text, rolsuper OR rolname = current_user FROM pg_roles"
_POWERFUL = "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"


def owners_in(session: Session) -> set[str]:
    """Return the roles that own something in the session's database."""
    return {row[0] for row in session.query(_OWNERS)}


def owners_of(client: Client, path: Path) -> set[str]:
    """Return the roles that own something in an archive; raises RestoreStopped."""
    return set(
        _owners(pg_restore.script(client, path, "--schema-only").decode("utf-8", "replace").split("\n"))
    )


def _owners(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        if line.startswith("-- Name: ") and "; Owner: " in line:
            about, _, owner = line.rpartition("; Owner: ")
            kind = about.rpartition("; Schema: ")[0].rpartition("; Type: ")[2]
            clear = about.count("; Type: ") == about.count("; Schema: ") == 1  # no name has these words in it
            if not (clear and kind in _NO_CODE) and owner not in ("", "-"):
                yield owner.partition("; Tablespace: ")[0]


def objection(settings: Settings, session: Session, system_identifier: str, owners: Collection[str]) -> str:
    """Return why the session's role does not fill a copy of these roles' objects; an empty text if it may.

    ``system_identifier`` is the server of the roles. They have no part on any other server.
    """
    here, _ = exported_snapshot.identity(session)
    elsewhere = here and system_identifier and here != system_identifier
    if settings.verify_as_superuser or elsewhere or not session.value(_POWERFUL):
        return ""
    trusted = dict(session.query(_ROLES))
    missing = (
        settings.verify_url != ""
    )  # if a role does not exist, a restore stops at it, except without owners
    others = sorted(name for name in owners if not trusted.get(name, not missing))
    if not others:
        return ""
    return (
        f"Verification by restore would run code of {some(others)} (checks, indexes, "
        f"views) as {session.facts.user}, who is a superuser or may create roles."
    )
