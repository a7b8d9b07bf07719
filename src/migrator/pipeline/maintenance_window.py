"""A maintenance window: no other role gets into the database from before the backup until the run's end.

migrator takes CONNECT from everyone but its own role, and ends the existing sessions. The database's
comment keeps the earlier grants, written in the same transaction. It is the one thing that an owner who
is not a superuser can write on a database from outside of it (it may not set an unknown parameter). If
a run is killed, the next run of any kind restores the grants. A restore that swaps databases carries
the window over. Superusers and logins of migrator's own role cannot be kept out: the run is refused if
there is such a login's session.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator

from migrator.backups import databases
from migrator.config.database_url import Target
from migrator.errors import AccessDenied, MigratorError
from migrator.pipeline.context import Run
from migrator.pipeline.stages.lock import lock_if_free
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refused
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.session import Session
from migrator.runtime.subprocesses import uninterrupted

log = logging.getLogger("migrator")

MARK = "migrator: maintenance window "
_PATIENCE = 5.0
_BY_HAND = "the next run opens it, or by hand: GRANT CONNECT ON DATABASE"

_MARKED = """
SELECT datname::text, shobj_description(oid, 'pg_database') FROM pg_database
WHERE starts_with(shobj_description(oid, 'pg_database'), %s) ORDER BY datname <> %s
"""
_GRANTS = """
SELECT CASE a.grantee WHEN 0 THEN NULL ELSE pg_get_userbyid(a.grantee)::text END, bool_or(a.is_grantable)
FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a
WHERE d.datname = %s AND a.privilege_type = 'CONNECT' GROUP BY a.grantee
"""
_STILL_MAY = """
SELECT string_agg(rolname::text, ', ' ORDER BY rolname) FROM pg_roles
WHERE rolcanlogin AND NOT rolsuper AND rolname NOT IN (current_user, session_user)
  AND has_database_privilege(oid, %s, 'CONNECT')
"""


@contextlib.contextmanager
def window(this: Run, session: Session) -> Iterator[None]:
    """Keep every other role out within the block, if MIGRATOR_MAINTENANCE_WINDOW is set; raises AccessDenied."""
    if not this.settings.maintenance_window:
        yield
        return
    _refuse_own_role(session)
    database, closed = session.target.database, False
    left = f"{database} stays closed to other roles: {_BY_HAND} {quote_identifier(database)} TO PUBLIC"
    with this.interruption.leaving(left):
        try:
            with uninterrupted():
                _close_the_door(session, this.record.run_id)
                closed = True
            _end_sessions(session)
            yield
        finally:
            if closed:
                with uninterrupted():
                    reopen(
                        session.target,
                        this.application_name,
                        this.settings.connect_timeout,
                        this.record.run_id,
                    )


def reopen_after_death(this: Run, session: Session) -> None:
    """Close the maintenance window of a killed run; leave it if another run is at work."""
    found = session.value(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
    )
    if not str(found or "").startswith(MARK):
        return
    with lock_if_free(session) as free:
        if free:
            log.warning("a killed run left the database closed to other roles: opening it again")
            run_id = str(found)[len(MARK) :].split(" ", 1)[0]
            reopen(session.target, this.application_name, this.settings.connect_timeout, run_id)


def reopen(target: Target, application_name: str, timeout: float, run_id: str) -> None:
    """Reopen the databases that the run's maintenance window closed: the target, and the database before a
    swap.
    """
    try:
        with databases.maintenance(target, application_name, timeout, patient=False) as session:
            for name, comment in session.query(_MARKED, [f"{MARK}{run_id} ", target.database]):
                try:
                    _open_the_door(session, name, comment)
                except (QueryFailed, ValueError, LookupError, TypeError) as error:
                    if name == target.database or (isinstance(error, QueryFailed) and error.lost):
                        raise
                    _roll_back(session)  # the owner of another database may have written its comment
                    log.warning(
                        "%s has the comment of a maintenance window that cannot be used; it is left "
                        "unchanged",
                        name,
                    )
    except (QueryFailed, ConnectFailed, MigratorError) as error:
        log.error(
            "%s could not be opened to other roles again (%s): %s %s TO PUBLIC",
            target.database,
            error,
            _BY_HAND,
            quote_identifier(target.database),
        )


def _refuse_own_role(session: Session) -> None:
    rows = session.query(
        "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database()"
        " AND usename IN (current_user, session_user) AND pid <> pg_backend_pid()"
        " AND application_name NOT LIKE 'migrator/%'"
    )
    if rows:
        who = ", ".join(f"{name or 'unnamed'} (pid {pid})" for pid, name in rows[:5])
        raise AccessDenied(
            f"A maintenance window cannot keep out sessions of {session.facts.user}, migrator's own "
            f"role: {who}.",
            next_step="let the application log in as another role, or end these sessions and run again",
        )


def _ourselves(session: Session) -> list[str]:
    """Return our login and the role that it acts as; ALTER ROLE ... SET role can make them differ."""
    return list(session.query("SELECT current_user::text, session_user::text")[0])


def _close_the_door(session: Session, run_id: str) -> None:
    """Take CONNECT from all other roles, and record who had it, in one transaction; raises AccessDenied."""
    name, user = session.facts.database, session.facts.user
    database = quote_identifier(name)
    grants = session.query(_GRANTS, [name])
    comment = session.value(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()"
    )
    before = json.dumps({"comment": comment, "connect": [list(row) for row in grants]}, ensure_ascii=True)
    try:
        session.query("BEGIN")
        session.query(f"COMMENT ON DATABASE {database} IS {quote_literal(f'{MARK}{run_id} {before}')}")
        ours = _ourselves(session)
        for name_of_ours in ours:
            session.query(f"GRANT CONNECT ON DATABASE {database} TO {quote_identifier(name_of_ours)}")
        for grantee, _ in grants:
            if grantee not in ours:
                session.query(f"REVOKE CONNECT ON DATABASE {database} FROM {_role(grantee)} CASCADE")
        left = session.value(_STILL_MAY, [name])
        if left:
            raise AccessDenied(
                f"A maintenance window cannot keep {left} out of {name}: they keep the right to connect.",
                next_step=f"REVOKE CONNECT ON DATABASE {database} FROM ..., as the role that granted it",
            )
        session.query("COMMIT")
    except Refused as error:
        if error.sqlstate != "42501":
            raise
        _roll_back(session)
        raise AccessDenied(
            f"{user} may not keep others out of {name}: {error.text}.",
            next_step="migrate as the owner of the database:"
            f" ALTER DATABASE {database} OWNER TO {quote_identifier(user)}",
        ) from error
    except AccessDenied:
        _roll_back(session)
        raise
    log.info("maintenance window: other roles are kept out of %s until the end of this run", name)


def _roll_back(session: Session) -> None:
    with contextlib.suppress(QueryFailed):
        session.query("ROLLBACK")


def _open_the_door(session: Session, name: str, comment: str) -> None:
    """Give CONNECT back, and restore the database's comment, in one transaction."""
    before = json.loads(comment[len(MARK) :].split(" ", 1)[1])
    database, user = quote_identifier(name), session.facts.user
    session.query("BEGIN")
    for grantee, grantable in before["connect"]:
        option = " WITH GRANT OPTION" if grantable and grantee is not None and grantee != user else ""
        session.query(f"GRANT CONNECT ON DATABASE {database} TO {_role(grantee)}{option}")
    for name_of_ours in _ourselves(session):
        if name_of_ours not in [grantee for grantee, _ in before["connect"]]:
            session.query(f"REVOKE CONNECT ON DATABASE {database} FROM {quote_identifier(name_of_ours)}")
    text = "NULL" if before["comment"] is None else quote_literal(before["comment"])
    session.query(f"COMMENT ON DATABASE {database} IS {text}")
    session.query("COMMIT")


def _end_sessions(session: Session) -> None:
    """End the existing sessions; raises AccessDenied if one cannot be ended, except those of superusers."""
    name, deadline = session.facts.database, time.monotonic() + _PATIENCE
    while True:
        left = databases.terminate(session, name)
        gone = len(databases.others_in(session, name)) <= len(left)
        if gone or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    superusers = {row[0] for row in session.query("SELECT rolname::text FROM pg_roles WHERE rolsuper")}
    stay = [item for item in left if item.user not in superusers]
    if stay:
        raise AccessDenied(
            f"A maintenance window cannot begin while other sessions stay: {'; '.join(map(str, stay[:5]))}.",
            next_step=f"GRANT pg_signal_backend TO {quote_identifier(session.facts.user)},"
            " or stop the application first",
        )
    for item in left:
        log.warning("maintenance window: %s stays", item)


def _role(name: str | None) -> str:
    return "PUBLIC" if name is None else quote_identifier(name)
