"""A scratch database for restoring and comparing a backup; it is removed afterwards, at any end.

It is created beside the original or on another server, and has a mark in its comment. Its user holds a
lock that ends with its session. A marked one with a free lock comes from a killed run, and the next
verification drops it. Only this one database is created: no role, no tablespace, no subscription.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator

from migrator.backups import databases
from migrator.backups.clients import Login
from migrator.backups.manifest import Backup, Properties
from migrator.errors import BackupFailed
from migrator.postgres.errors import QueryFailed
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.server import ServerFacts
from migrator.postgres.session import Session
from migrator.runtime.subprocesses import uninterrupted

LOGGER = logging.getLogger("migrator.backup")
_MARK = "migrator: scratch copy for a proof of "
_EMPTY = 12 * 1000 * 1000  # bytes: a new database from template0, on every major and page size in use
_RUN = r"_verify_\d{8}T\d{6}Z-[0-9a-f]{6}"


@dataclasses.dataclass(frozen=True)
class Place(Login):
    """The server for scratch databases; ``elsewhere`` if it is not the original's."""

    elsewhere: bool

    def beside(self, *, patient: bool = True) -> Session:
        """Open a session in the maintenance database; raises ConnectFailed."""
        return databases.maintenance(self.target, self.application_name, self.timeout, patient=patient)


def check(place: Place) -> ServerFacts:
    """Refuse a standby, and a role that may not create databases; return the facts of its server.

    Raises :class:`BackupFailed`, ConnectFailed, QueryFailed.
    """
    with place.beside() as session:
        if session.facts.in_recovery:
            raise _standby(place)
        may_create, user = session.query(
            "SELECT rolsuper OR rolcreatedb, rolname::text FROM pg_roles WHERE rolname = current_user"
        )[0]
        if not may_create:
            raise BackupFailed(
                f"Role {user} may not create databases on {place.target}, and verification by restore "
                "needs a new database there (MIGRATOR_BACKUP_VERIFY=restore).",
                next_step=f"as a superuser: ALTER ROLE {quote_identifier(user)} CREATEDB; or set "
                "MIGRATOR_VERIFY_URL to another server, or set MIGRATOR_BACKUP_VERIFY=read",
            )
        return session.facts


def _standby(place: Place) -> BackupFailed:
    name = "MIGRATOR_VERIFY_URL" if place.elsewhere else "MIGRATOR_DATABASE_URL"
    other = "" if place.elsewhere else "set MIGRATOR_VERIFY_URL to another server, "
    return BackupFailed(
        f"{place.target} is a standby, so verification by restore cannot create a database there.",
        next_step=f"point {name} at the primary (several hosts with target_session_attrs=read-write find it), "
        f"{other}or verify by reading (MIGRATOR_BACKUP_VERIFY=read, verify-backup --how read)",
    )


def left_over(session: Session, database: str) -> list[str]:
    """Return the existing scratch databases of one database, in use or not.

    One without a mark is recognised by its name and by being empty: a run was killed while it created
    it.
    """
    start = databases.shorten(database, "_verify_20000101T000000Z-000000").partition("_verify_2000")[0]
    rows = session.query(
        "SELECT datname::text FROM pg_database WHERE shobj_description(oid, 'pg_database') = %s"
        " OR (datname ~ %s AND shobj_description(oid, 'pg_database') IS NULL"
        "     AND CASE WHEN has_database_privilege(oid, 'CONNECT') THEN pg_database_size(oid) < %s ELSE false END)",
        [_MARK + database, f"^{re.escape(start)}{_RUN}$", _EMPTY],
    )
    return [row[0] for row in rows]


def clear(session: Session, database: str) -> None:
    """Drop the scratch databases of killed verifications of one database: those with a free lock."""
    for name in left_over(session, database):
        if not session.value(_TRY, [_key(name)]):
            continue
        try:
            databases.drop(session, name)
            LOGGER.info("dropped %s, which an interrupted verification left", name)
        except QueryFailed as error:
            LOGGER.warning(
                "%s, which an interrupted verification left, cannot be dropped: %s", name, error.text
            )
        finally:
            session.query("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [_key(name)])


_TRY = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"


def _key(name: str) -> str:
    return f"migrator scratch {name}"


@contextlib.contextmanager
def made(place: Place, backup: Backup, run_id: str) -> Iterator[tuple[Session, Login]]:
    """Create an empty database like the backed-up one; yield a session beside it and the login for it; drop it.

    Raises QueryFailed, ConnectFailed.
    """
    name = databases.shorten(backup.database, f"_verify_{run_id}")
    with place.beside() as session:
        clear(session, backup.database)
        session.query(_TRY, [_key(name)])
        created = False
        try:
            with uninterrupted():
                databases.create(session, name, _like(session, place, backup.properties))
                created = True
                text = quote_literal(_MARK + backup.database)  # no parameter: the name may hold a %
                session.query(f"COMMENT ON DATABASE {quote_identifier(name)} IS {text}")
            yield session, place.to(name)
        finally:
            if created:
                what = "the scratch database"
                databases.drop_surely(session, lambda: place.beside(patient=False), what, name)


def _like(session: Session, place: Place, properties: Properties) -> Properties:
    """Keep the owner if this role needs its privileges; another server has neither owner nor tablespace.

    A superuser needs none, and an owner could let others in.
    """
    if place.elsewhere:
        return dataclasses.replace(properties, owner=session.facts.user, tablespace="")
    needed = session.query(
        "SELECT pg_has_role(o.oid, 'USAGE') AND NOT u.rolsuper FROM pg_roles o, pg_roles u"
        " WHERE o.rolname = %s AND u.rolname = current_user",
        [properties.owner],
    )
    return (
        properties if needed and needed[0][0] else dataclasses.replace(properties, owner=session.facts.user)
    )
