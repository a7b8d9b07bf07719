"""Databases as wholes: create one like another, drop one, and swap two by their names.

All of it runs from a *maintenance* session in ``postgres`` (or ``template1``): a database can be
neither dropped nor renamed from inside.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from migrator.backups.clients import WouldLose
from migrator.backups.manifest import Properties
from migrator.config.database_url import Target
from migrator.postgres import connection_limit
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refusal, Refused
from migrator.postgres.quoting import quote_identifier, quote_literal
from migrator.postgres.server import no_timeouts
from migrator.postgres.session import Session, connect
from migrator.runtime.deadlines import PROBE_TIMEOUT
from migrator.runtime.subprocesses import uninterrupted

if TYPE_CHECKING:
    from migrator.backups.restore.write_detection import Holder

LOGGER = logging.getLogger("migrator.restore")
NAME_BYTES = 63
"""NAMEDATALEN - 1: Postgres cuts longer names silently."""
DROP_PATIENCE = 120.0
"""Seconds for one DROP DATABASE, which makes a checkpoint and waits for every process of the server."""
_KEPT_OF_NAME = 20  # bytes
SWAP_PATIENCE = 15.0
"""Seconds to end all sessions and rename a database; a container usually has 30 seconds to stop."""
_DENIED, _OBJECT_IN_USE = "42501", "55006"
_LOCK_NOT_AVAILABLE = "55P03"
_MARK = "migrator: half-restored copy of "
_SCRATCH_NAME = re.compile(r"_restore_\d{8}T\d{6}Z-[0-9a-f]{6}\Z")

# Settings with a list of names as value, each quoted by itself: GUC_LIST_QUOTE in PostgreSQL's
# guc_tables.c.
_LISTS = frozenset(
    {
        *("local_preload_libraries", "search_path", "session_preload_libraries"),
        *("shared_preload_libraries", "temp_tablespaces", "unix_socket_directories"),
    }
)


class SwapFailed(Exception):
    """Two databases could not be swapped; neither was renamed."""


class SwapUnknown(Exception):
    """Two databases may have been swapped, and no connection can tell."""


def maintenance(
    target: Target, application_name: str, timeout: float, *, not_in: str = "", patient: bool = True
) -> Session:
    """Open a session in a database other than ``not_in``; raises ConnectFailed of the last one tried.

    It waits for a free connection unless it is not ``patient``, which is for callers that hold signals
    back.
    """
    open_session = connection_limit.connect if patient else connect
    failure: ConnectFailed | None = None
    for database in ("postgres", "template1"):
        if database == not_in:
            continue
        try:
            session = open_session(target.with_database(database), application_name, timeout)
        except ConnectFailed as error:
            if error.refusal is Refusal.TRANSIENT:
                raise  # every caller must land in the same database, because locks are kept per database
            failure = error
            continue
        session.query(no_timeouts(session.facts.major))
        session.query("SET lock_timeout = '10s'")
        return session
    assert failure is not None  # noqa: S101 - one of two names was tried
    raise failure


def shorten(name: str, suffix: str) -> str:
    """Return ``name + suffix`` within 63 bytes of UTF-8: the name is cut, and also a suffix that is too long
    itself.
    """
    if len(suffix.encode()) > NAME_BYTES - _KEPT_OF_NAME:
        suffix = suffix[:9] + hashlib.sha256(suffix.encode()).hexdigest()[:12]
    room = NAME_BYTES - len(suffix.encode())
    return name.encode()[:room].decode(errors="ignore") + suffix


def exists(session: Session, name: str) -> bool:
    return bool(session.value("SELECT count(*) FROM pg_database WHERE datname = %s", [name]))


def create(session: Session, name: str, properties: Properties) -> None:
    """Create an empty database with another's encoding, locale, owner and tablespace; raises QueryFailed.

    Nobody else can connect to it: by default everybody may, and could plant objects during the restore.
    """
    parts = [
        f"CREATE DATABASE {quote_identifier(name)} TEMPLATE template0",
        f"OWNER {quote_identifier(properties.owner)}",
        f"ENCODING {quote_literal(properties.encoding)}",
        f"LC_COLLATE {quote_literal(properties.collate)} LC_CTYPE {quote_literal(properties.ctype)}",
    ]
    if session.facts.major >= 15:
        parts.append(
            {"i": "LOCALE_PROVIDER icu", "b": "LOCALE_PROVIDER builtin"}.get(
                properties.provider, "LOCALE_PROVIDER libc"
            )
        )
    if properties.provider == "i":
        parts.append(f"ICU_LOCALE {quote_literal(properties.locale)}")
    if properties.provider == "b":
        parts.append(f"BUILTIN_LOCALE {quote_literal(properties.locale)}")
    if properties.icu_rules:
        parts.append(f"ICU_RULES {quote_literal(properties.icu_rules)}")
    if properties.tablespace:
        parts.append(f"TABLESPACE {quote_identifier(properties.tablespace)}")
    session.query(" ".join([*parts, "CONNECTION LIMIT 0"]))
    quoted = quote_identifier(name)
    session.query(f"REVOKE ALL ON DATABASE {quoted} FROM PUBLIC")
    session.query(f"GRANT ALL ON DATABASE {quoted} TO CURRENT_USER")
    session.query(f"ALTER DATABASE {quoted} CONNECTION LIMIT -1")


def drop(session: Session, name: str) -> None:
    """Drop a database if it exists, with its sessions; raises QueryFailed, after two minutes at the latest.

    The server may wait for ever for one of its own processes that does not answer a signal barrier.
    """
    session.query(f"SET statement_timeout = '{DROP_PATIENCE:.0f}s'")
    try:
        if session.facts.major < 13 or not _drop_by_force(session, name):
            terminate(session, name)
            _drop(session, name)
    finally:
        if not session.closed:
            session.query("SET statement_timeout = 0")


def _drop_by_force(session: Session, name: str) -> bool:
    """Drop a database and end all its sessions; False if one belongs to a superuser and this role may not end
    it.

    An autovacuum worker is such a session too. The server ends it for a DROP DATABASE without FORCE.
    """
    try:
        _drop(session, name, " WITH (FORCE)")
    except QueryFailed as error:
        if error.sqlstate != _DENIED:
            raise
        return False
    return True


def _drop(session: Session, name: str, how: str = "") -> None:
    # The server does not time its COMMIT.
    session.query(
        f"DROP DATABASE IF EXISTS {quote_identifier(name)}{how}", timeout=DROP_PATIENCE + PROBE_TIMEOUT
    )


def drop_surely(session: Session, again: Callable[[], Session], what: str, name: str) -> None:
    """Drop a database, over a new session where this one is gone; if it fails, the log has the SQL for it."""
    with uninterrupted():
        try:
            with again() if session.closed else contextlib.nullcontext(session) as one:
                drop(one, name)
        except (QueryFailed, ConnectFailed) as error:
            sql = f"DROP DATABASE {quote_identifier(name)};"
            LOGGER.error("%s %s could not be dropped (%s): %s", what, name, error.text, sql)


def mark(session: Session, name: str, original: str) -> None:
    """Mark a database as half restored, so that a later restore recognises it."""
    session.query(f"COMMENT ON DATABASE {quote_identifier(name)} IS {quote_literal(_MARK + original)}")


def unmark(session: Session, name: str, original: str) -> None:
    """Remove the mark: the database is complete, and gets the comment of the original, if there is one."""
    comment = session.value(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", [original]
    )
    text = "NULL" if comment is None else quote_literal(comment)
    session.query(f"COMMENT ON DATABASE {quote_identifier(name)} IS {text}")


@contextlib.contextmanager
def without_event_triggers(session: Session, name: str) -> Iterator[None]:
    """Stop event triggers in a database from firing for this role within the block, such as those on login.

    For PostgreSQL 17 and newer, and for superusers, who alone have event triggers. It is set for the
    role in this one database and not on connecting, because poolers refuse that. If the block fails,
    the caller drops the database.
    """
    whom = f"ALTER ROLE CURRENT_USER IN DATABASE {quote_identifier(name)}"
    superuser = session.value("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
    quiet = superuser and session.facts.major >= 17
    if quiet:
        session.query(f"{whom} SET event_triggers = off")
    yield
    if quiet:
        session.query(f"{whom} RESET event_triggers")


def rename(session: Session, old: str, new: str) -> None:
    """Rename a marked database without sessions, and remove its mark; raises QueryFailed."""
    session.query("BEGIN")
    try:
        unmark(session, old, new)
        session.query(f"ALTER DATABASE {quote_identifier(old)} RENAME TO {quote_identifier(new)}")
        session.query("COMMIT")
    except QueryFailed as error:
        if not error.lost:
            session.query("ROLLBACK")
        raise


def marked(session: Session, original: str) -> list[str]:
    """Return the half-restored copies that killed restores of a database have left: by their mark, or their
    name.
    """
    rows = session.query(
        "SELECT datname::text, coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database"
        " WHERE datname <> current_database()"
    )
    return [
        name
        for name, comment in rows
        if name != original  # its owner may have written that comment
        if comment == _MARK + original
        or ((match := _SCRATCH_NAME.search(name)) and name == shorten(original, match[0]))
    ]


def copy_privileges(session: Session, source: str, copy: str) -> None:
    """Give a new database the privileges of another, or the default if that has them or does not exist."""
    rows = session.query(
        "SELECT pg_get_userbyid(d.datdba)::text, CASE a.grantee WHEN 0 THEN NULL"
        " ELSE pg_get_userbyid(a.grantee)::text END, a.privilege_type, a.is_grantable"
        " FROM pg_database d, aclexplode(d.datacl) a WHERE d.datname = %s",
        [source],
    )
    has_list = session.value("SELECT datacl IS NOT NULL FROM pg_database WHERE datname = %s", [source])
    name, user = quote_identifier(copy), session.facts.user
    owner = session.value("SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = %s", [copy])
    if user != owner:
        session.query(f"REVOKE ALL ON DATABASE {name} FROM {quote_identifier(user)}")
    if not has_list:
        session.query(f"GRANT CONNECT, TEMPORARY ON DATABASE {name} TO PUBLIC")
        return
    session.query(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC, {quote_identifier(owner)}")
    for _, grantee, privilege, grantable in rows:
        to = "PUBLIC" if grantee is None else quote_identifier(grantee)
        option = " WITH GRANT OPTION" if grantable and grantee != owner else ""
        session.query(f"GRANT {privilege} ON DATABASE {name} TO {to}{option}")


def copy_settings(session: Session, source: str, copy: str) -> list[str]:
    """Give a database the settings and the connection limit of another.

    Returns a sentence for each that this role may not set; their values are not repeated, because they
    can be secret.
    """
    failed = []
    for what, statement in _setting_statements(session, source, copy):
        try:
            session.query(statement)
        except QueryFailed as error:
            failed.append(f"{what} was not restored: {error.text}")
    return failed


def _setting_statements(session: Session, source: str, copy: str) -> Iterator[tuple[str, str]]:
    name = quote_identifier(copy)
    limit = session.value("SELECT datconnlimit FROM pg_database WHERE datname = %s", [source])
    if limit != -1:
        yield "the connection limit", f"ALTER DATABASE {name} CONNECTION LIMIT {limit}"
    rows = session.query(
        "SELECT CASE s.setrole WHEN 0 THEN NULL ELSE pg_get_userbyid(s.setrole)::text END, unnest(s.setconfig)"
        " FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE d.datname = %s",
        [source],
    )
    for role, setting in rows:
        key, _, value = setting.partition("=")
        subject = f"DATABASE {name}"
        what = f"the database's setting {key}"
        if role is not None:
            subject = f"ROLE {quote_identifier(role)} IN DATABASE {name}"
            what = f"the setting {key} of role {role} in this database"
        yield what, f"ALTER {subject} SET {quote_identifier(key)} TO {_setting_value(key, value)}"


def _setting_value(key: str, value: str) -> str:
    if key.lower() not in _LISTS:
        return quote_literal(value)
    names = re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', value)
    listed = [quoted.replace('""', '"') if quoted or not bare else bare for quoted, bare in names]
    return ", ".join(quote_literal(item) for item in listed) or "''"


@dataclass(frozen=True)
class Left:
    """A session that could not be ended."""

    pid: int
    user: str
    application_name: str
    reason: str

    def __str__(self) -> str:
        return f"session {self.pid} of {self.user} ({self.application_name or 'unnamed'}): {self.reason}"


def terminate(session: Session, database: str, *, spare: int = 0) -> list[Left]:
    """End the sessions in a database, except that of the process ``spare``; return those that this role may
    not end.
    """
    left = []
    for pid, user, name in others_in(session, database, spare=spare):
        try:
            session.terminate(pid)
        except Refused as error:
            left.append(Left(pid, user, name, error.text))
    return left


def others_in(session: Session, database: str, *, spare: int = 0) -> list[tuple[int, str, str]]:
    """Return process id, user and application name of the sessions in a database, except ours and ``spare``."""
    rows = session.query(
        "SELECT pid, coalesce(usename::text, backend_type), coalesce(application_name, '')"
        " FROM pg_stat_activity WHERE datname = %s AND pid NOT IN (pg_backend_pid(), %s)",
        [database, spare],
    )
    return [(pid, user, name) for pid, user, name in rows]


def swap(
    session: Session,
    helper: Session,
    current: str,
    replacement: str,
    kept: str,
    *,
    holder: Holder | None = None,
) -> None:
    """Rename ``current`` to ``kept``, and ``replacement``, which loses its mark, to ``current``: in one
    transaction.

    Nothing is set that could outlive us. The first rename locks the database against new connections,
    and waits up to 5 s for its sessions to end (CountOtherDBBackends in PostgreSQL's procarray.c).
    ``helper`` ends them meanwhile. The session of ``holder`` has locks in the database. It ends last,
    after ``holder`` has checked whether the others wrote; if that raises, nothing was renamed. A client
    that connects meanwhile waits for the lock, gets an error about the rename, and finds the new
    database on its next try. Raises :class:`SwapFailed`, and nothing was renamed then.
    """
    deadline = time.monotonic() + SWAP_PATIENCE
    while True:
        failure, left = _try_swap(session, helper, [(current, kept), (replacement, current)], holder)
        if failure is None:
            return
        if failure.lost:
            try:
                committed = exists(helper, kept) and not exists(helper, replacement)
            except QueryFailed as error:
                raise SwapUnknown(f"the connection was lost: {error.text}") from error
            if committed:
                return  # only the answer was lost
            raise SwapFailed(f"the connection was lost: {failure.text}")
        again = failure.sqlstate in (_OBJECT_IN_USE, _LOCK_NOT_AVAILABLE) and not (
            holder and holder.session.closed
        )
        if not again or time.monotonic() > deadline:
            who = "; ".join([*map(str, left), *prepared(helper, current)])
            raise SwapFailed(failure.text + (f" ({who})" if who else ""))


def prepared(helper: Session, database: str) -> list[str]:
    """Return what ends the prepared transactions in a database, which have no session; none if nothing answers."""
    with contextlib.suppress(QueryFailed):
        rows = helper.query(
            "SELECT gid::text FROM pg_prepared_xacts WHERE database = %s ORDER BY 1", [database]
        )
        return [f"ROLLBACK PREPARED {quote_literal(gid).strip()}; in {database} ends it" for (gid,) in rows]
    return []


def _try_swap(
    session: Session, helper: Session, renames: Sequence[tuple[str, str]], holder: Holder | None
) -> tuple[QueryFailed | None, list[Left]]:
    failures: list[QueryFailed] = []

    def rename() -> None:
        try:
            session.query("BEGIN")
            unmark(session, renames[1][0], renames[0][0])
            template = session.value(
                "SELECT datistemplate FROM pg_database WHERE datname = %s", [renames[0][0]]
            )
            for old, new in renames:
                session.query(f"ALTER DATABASE {quote_identifier(old)} RENAME TO {quote_identifier(new)}")
            if template:  # while it is open, nobody can drop the old one
                session.query(f"ALTER DATABASE {quote_identifier(renames[0][1])} IS_TEMPLATE false")
                session.query(f"ALTER DATABASE {quote_identifier(renames[0][0])} IS_TEMPLATE true")
            session.query("COMMIT")
        except QueryFailed as error:
            failures.append(error)
            if not error.lost:
                session.query("ROLLBACK")

    renaming = threading.Thread(target=rename, name="swap")
    renaming.start()
    left: list[Left] = []
    current, spare = renames[0][0], holder.session.pid if holder else 0
    waiting, lost = holder, None
    try:
        while renaming.is_alive():
            left = terminate(helper, current, spare=spare)
            if waiting and not others_in(helper, current, spare=spare) and _locked(helper, session, current):
                try:
                    waiting.look()
                    waiting.session.close()
                except WouldLose as error:
                    lost = error  # that session stays, so the rename gives up
                waiting = None
            renaming.join(0.05)
    except QueryFailed as error:  # the rename continues, and reports its own result
        LOGGER.warning("the sessions in %s could not be ended: %s", current, error.text)
    finally:
        renaming.join()
    if lost and failures:
        raise lost
    if lost:  # another session had ended it, and the rename succeeded
        LOGGER.error("%s: the rows that they wrote are in %s only", lost, renames[0][1])
    return (failures[0] if failures else None), left


def _locked(helper: Session, session: Session, database: str) -> bool:
    """Tell whether the renaming session has locked the database, so that nobody can connect to it any more."""
    return bool(
        helper.value(
            "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON l.objid = d.oid WHERE l.pid = %s"
            " AND l.locktype = 'object' AND l.classid = 'pg_database'::regclass AND l.granted"
            " AND l.mode = 'AccessExclusiveLock' AND d.datname = %s)",
            [session.pid, database],
        )
    )


_KEPT_NAME = re.compile(r"(?s).*_before_(\d{8}T\d{6}Z)-[0-9a-f]{6}")


def expired(session: Session, database: str, keep: float) -> list[str]:
    """Return the databases that restores of this one set aside more than ``keep`` seconds ago.

    They are recognised by their name, which ends in the run's id, and have the same owner: a name alone
    is no evidence.
    """
    found = []
    for (name,) in session.query(
        "SELECT k.datname::text FROM pg_database k JOIN pg_database d ON d.datdba = k.datdba AND d.datname = %s"
        " WHERE k.datname LIKE '%%\\_before\\_%%'",
        [database],
    ):
        match = _KEPT_NAME.fullmatch(name)
        if match is None or name != shorten(database, name[match.start(1) - len("_before_") :]):
            continue
        moment = datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if (datetime.now(UTC) - moment).total_seconds() > keep:
            found.append(name)
    return found
