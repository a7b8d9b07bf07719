"""The connection that a user's ``env.py`` opened: query it, prepare it and listen to it, with any driver."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrator.config.settings import Settings
from migrator.errors import HistoryError, Internal, SettingsError
from migrator.pipeline.apply.commits import in_autocommit, watch_commits
from migrator.pipeline.apply.driver_calls import DriverCalls, gone
from migrator.pipeline.apply.metrics.observer import Observation
from migrator.postgres import search_path
from migrator.postgres.errors import QueryFailed
from migrator.postgres.queries import LEDGER
from migrator.postgres.quoting import quote_literal
from migrator.postgres.server import ServerFacts, dead_client_settings
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.runtime.deadlines import CANCEL_TIMEOUT

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

    from migrator.pipeline.apply.attempt import Inputs

log = logging.getLogger("migrator.apply")

_IDENTITY = (
    "SELECT pg_catalog.concat_ws(' ',"
    " (extract(epoch FROM pg_catalog.pg_postmaster_start_time()) OPERATOR(pg_catalog.*) 1000000)::bigint,"
    " (SELECT d.oid FROM pg_catalog.pg_database d"
    "   WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()), pg_catalog.current_database())"
)
_TRANSACTION = (
    "SELECT pg_catalog.concat_ws(' ', CAST(pg_catalog.now() OPERATOR(pg_catalog.=) pg_catalog.statement_timestamp()"
    " AS pg_catalog.text), pg_catalog.txid_current())"
)
CURRENT_USER = "SELECT CAST(current_user AS pg_catalog.text)"
_SESSION_USER = "SELECT CAST(session_user AS pg_catalog.text)"
_MAY_DROP = re.compile(r"\b(?:DROP|ALTER\s+SCHEMA|RENAME|GRANT|OWNER|OWNED)\b", re.IGNORECASE)
_FIRST_SCHEMA = (
    "SELECT coalesce(CAST((pg_catalog.current_schemas(false))[1] AS pg_catalog.text),"
    " pg_catalog.current_setting('search_path'))"
)
"""The schema for new tables; the whole path if none of its schemas exists."""
_NOW = "SELECT CAST(pg_catalog.now() AS pg_catalog.text)"
"""The start of the transaction: it changes only if each statement is its own transaction."""


def identity_of(facts: ServerFacts) -> str:
    """Return the identity of a database, as in :attr:`MigrationConnection.identity`."""
    return f"{facts.started_at} {facts.database_oid} {facts.database}"


class MigrationConnection:
    """The live connection of a MigrationContext; raises :class:`HistoryError` if there is none."""

    def __init__(self, context: MigrationContext) -> None:
        if context.connection is None:
            raise HistoryError(
                "env.py ran offline: it has no connection.",
                next_step="`migrator alembic upgrade head --sql` is for offline use",
            )
        self._connection = context.connection
        self.calls: DriverCalls | None = None
        self._dropped = False
        self._every_statement = False  # is a transaction of its own, as listen() found out

    @property
    def raw(self) -> Any:
        """Return SQLAlchemy's connection."""
        return self._connection

    @property
    def translates(self) -> bool:
        """Tell whether it replaces the schemas that revisions name.

        https://docs.sqlalchemy.org/en/20/core/connections.html#schema-translating
        """
        return bool(self._connection.get_execution_options().get("schema_translate_map"))

    def is_on(self, connection: Any) -> bool:
        """Tell whether this belongs to that connection."""
        return self._connection is connection

    def ask(self, sql: str) -> Any:
        """Return the first column of the first row. It takes no parameters: drivers differ in their form."""
        if "%" in sql and self._connection.dialect.paramstyle in {"format", "pyformat"}:
            sql = sql.replace("%", "%%")  # in a schema's name; these drivers look for parameters anyway
        return self._connection.exec_driver_sql(sql).scalar()

    def ask_driver(self, sql: str) -> Any:
        """Return the first column of the first row without SQLAlchemy, for queries that run with each
        revision.
        """
        if not self.calls:
            return self.ask(sql)
        try:
            return self.calls.ask(sql)
        except Exception as error:
            # Like SQLAlchemy at the end of a connection; otherwise it would try a rollback there, and log
            # a traceback.
            if gone(self._connection):
                self._connection.invalidate(error)
            raise

    def tell(self, sql: str, **values: str) -> Any:
        """Run a statement and return its first value, if any; parameters are ``:name`` for any driver."""
        from sqlalchemy import text

        result = self._connection.execute(text(sql), values)
        return result.scalar() if result.returns_rows else None

    @property
    def identity(self) -> str:
        """Return the identity of the database; raises :class:`SettingsError` if it is not Postgres."""
        dialect = self._connection.dialect.name
        if dialect != "postgresql":
            raise SettingsError(
                [f"env.py connects to a database that is not Postgres ({dialect})"],
                next_step="use sqlalchemy.url or DATABASE_URL in env.py, or set MIGRATOR_URL_VARIABLE to the "
                "variable that it reads",
            )
        return str(self.ask(_IDENTITY))

    def is_on_another_database(self, session: Session) -> bool:
        """Tell whether this is another database than ``session`` locked and backed up; raises
        :class:`SettingsError`.
        """
        return self.identity != identity_of(session.facts)

    def refuse_another_database(self, session: Session) -> None:
        """Raise :class:`SettingsError` unless this is the database that ``session`` locked and backed up."""
        facts, found = session.facts, self.identity
        if found == identity_of(facts):
            return
        raise SettingsError(
            [
                f"env.py connects to the database {found.split(' ', 2)[2]!r}, not to the one that "
                f"migrator locked and backed up ({facts.database!r} of {session.target})"
            ],
            next_step="use sqlalchemy.url or DATABASE_URL in env.py, or set MIGRATOR_URL_VARIABLE to the "
            "variable that it reads; to migrate several databases, call "
            "context.run_migrations(engine_name=...) for each, like Alembic's multidb template",
        )

    def assume_role(self, role: str, session: Session) -> None:
        """Run ``SET ROLE``, so that the role owns the new objects; keep a role that ``env.py`` set itself.

        A rollback undoes it, so every attempt runs it again.
        """
        if not role:
            return
        now, login = self.ask(CURRENT_USER), self.ask(_SESSION_USER)
        if now in (login, session.facts.user):
            self.tell("SELECT pg_catalog.set_config('role', :role, false)", role=role)
        elif now != role:
            log.info("env.py set the role %s itself; migrator keeps it", now)

    def find(self, name: str) -> tuple[str, str] | None:
        """Return the schema in which the connection's search_path finds a relation, and its kind; None if it
        finds none.
        """
        found = self.ask(search_path.FIND_HERE.format(name=quote_literal(name)))
        schema, kind = json.loads(found) if found else (None, "")
        return (schema, kind) if schema is not None else None

    def locate(self, table: VersionTable, session: Session) -> VersionTable:
        """Return the table with its schema, if ``env.py``'s search_path finds another one than ours."""
        if table.schema:
            return table
        here = self.find(table.name)
        if here == session.find(table.name):
            return table
        return VersionTable(table.name, here[0] if here else "")

    def place_of(self, table: VersionTable) -> VersionTable:
        """Return the table with its schema, or with the schema for new tables."""
        places = self._connection.get_execution_options().get("schema_translate_map") or {}
        schema = places.get(table.schema or None, table.schema)
        if not schema:
            found = self.find(table.name)
            schema = found[0] if found else self.ask(_FIRST_SCHEMA)
        return VersionTable(table.name, schema)

    def try_lock(self, keys: tuple[int, int]) -> bool:
        """Take a session advisory lock, if no other session holds it."""
        return bool(self.ask(f"SELECT pg_catalog.pg_try_advisory_lock({keys[0]}, {keys[1]})"))

    @property
    def pid(self) -> int:
        """Return the server process's id."""
        return int(self.ask("SELECT pg_catalog.pg_backend_pid()"))

    @property
    def autocommits(self) -> bool:
        """Tell whether each statement is its own transaction."""
        return bool(self.ask(_NOW) != self.ask(_NOW))

    @property
    def commits_each(self) -> bool:
        """Tell whether each statement commits by itself now, also because a revision ended the transaction as SQL."""
        return self._every_statement or in_autocommit(self._connection)

    def transaction(self) -> int:
        """Return the transaction's id for a later txid_status(); 0 in autocommit.

        now() stands still in a transaction; the first query in one needs a second query to tell.
        """
        if self.commits_each:
            return 0
        fresh, number = self.ask_driver(_TRANSACTION).split()
        return 0 if fresh == "true" and self.ask_driver(_TRANSACTION).startswith("true") else int(number)

    def set_timeouts(self, settings: Settings) -> None:
        """Set Postgres's timeouts for the session; keep those that ``env.py`` set, unless a setting was
        given.
        """
        for name, seconds in (
            ("lock_timeout", settings.lock_timeout),
            ("statement_timeout", settings.statement_timeout),
        ):
            told = settings.sources.get(name, "default") != "default"
            if seconds is None and not told:
                continue
            if not told and self.ask(f"SELECT pg_catalog.current_setting('{name}')") != "0":
                continue
            milliseconds = int((seconds or 0) * 1000)
            self.ask(f"SELECT pg_catalog.set_config('{name}', '{milliseconds}', false)")

    def check_client_connection(self, server_major: int) -> None:
        """Let the server notice within seconds that this side is gone; a killed run would otherwise keep its
        locks.
        """
        self.ask(dead_client_settings(server_major))

    def observe(self, session: Session, version_table: str) -> Observation:
        """Start to observe statements; ``session`` sees the state before them."""
        return Observation(self._connection, session, (version_table, LEDGER), self.ask_driver)

    def may_have_dropped(self) -> bool:
        """Tell whether a statement since the last call may have dropped a table, or granted something on it."""
        dropped, self._dropped = self._dropped, False
        return dropped

    def _look_for_drops(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        if not self._dropped and _MAY_DROP.search(statement):
            self._dropped = True

    def listen(
        self,
        committed: Callable[[], None],
        *,
        executes: Callable[[str, bool], None],
        executed: Callable[[], None],
        leaving: Callable[[], None],
    ) -> None:
        """Call ``committed`` after a commit, and let concurrent builds wait; once per connection.

        ``executes`` is called before each statement, with whether it commits by itself; ``executed``
        after it; ``leaving`` before a commit. Then ``calls`` also knows whether the driver waits for
        the server.
        """
        from sqlalchemy import event

        every_statement = self._every_statement = self.autocommits

        def look_at_statement(connection: Any, _: Any, statement: str, *__: Any) -> None:
            executes(statement, every_statement or in_autocommit(connection))

        self.calls = DriverCalls(self._connection)
        _lift_timeouts_for_concurrent_builds(self._connection)
        event.listen(self._connection, "before_cursor_execute", self._look_for_drops)
        event.listen(self._connection, "before_cursor_execute", look_at_statement)
        event.listen(self._connection, "after_cursor_execute", lambda *_: executed())
        watch_commits(self._connection, committed, leaving=leaving, every_statement=every_statement)


class Backend:
    """The server process of the connection that applies the plan, as the control connection sees it.

    It holds the apply lock. A later attempt may use the same connection again.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._settings, self._session, self._apply_lock = inputs.settings, inputs.session, inputs.apply_lock
        self.connection: MigrationConnection | None = None
        self.pid = 0
        self._server = 0  # the start time of its server

    def take_lock(self, connection: MigrationConnection) -> None:
        """Take the apply lock on a connection, unless an earlier connection of this run holds it."""
        deadline = time.monotonic() + 2  # an earlier connection may just be closing
        while not connection.try_lock(self._apply_lock):
            if not self.pid:
                raise Internal(
                    "Another connection holds the apply lock, although this run holds the run lock."
                )
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self.pid, self._server = connection.pid, self._session.facts.started_at

    def prepare(self, connection: MigrationConnection) -> None:
        """Set role and timeouts and take the lock again, after a revision rolled back or reset them."""
        self.take_lock(connection)
        connection.assume_role(self._settings.role, self._session)
        connection.set_timeouts(self._settings)

    def cancel(self) -> None:
        """Cancel the running statement; called from the signal thread."""
        if not self.pid:
            return
        with contextlib.suppress(OSError):  # a closed terminal accepts no output
            log.info("cancelling the running statement (pid %d)", self.pid)
        try:
            self._session.query("SELECT pg_cancel_backend(%s)", (self.pid,), timeout=CANCEL_TIMEOUT)
        except QueryFailed as error:
            # The server cannot be told. This side closes the connection, which ends the wait.
            log.warning("cannot cancel the running statement: %s", error.text)
            if self.connection and self.connection.calls:
                self.connection.calls.end()

    def ended(self, patience: float = 8.0) -> bool:
        """Wait until it is gone from the server; end it after half of ``patience`` seconds.

        Only then are the version rows final. Raises QueryFailed.
        """
        deadline = time.monotonic() + patience
        terminated = False
        while self.pid and self._server == self._session.facts.started_at and self._alive():
            if time.monotonic() > deadline:
                return False
            if not terminated and time.monotonic() > deadline - patience / 2:
                terminated = True
                self._session.terminate(self.pid)
            time.sleep(0.05)
        return True

    def _alive(self) -> bool:
        """Tell whether it may still act: a pool may keep the connection open and idle."""
        return bool(
            self._session.value(
                "SELECT EXISTS (SELECT 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
                " WHERE l.locktype = 'advisory' AND l.classid = %s AND l.objid = %s AND l.objsubid = 2"
                " AND l.pid = %s AND a.state IS DISTINCT FROM 'idle')",
                (*self._apply_lock, self.pid),
            )
        )


# A comment or a string that contains it is harmless: the timeouts are lifted only for that one statement.
_CONCURRENTLY = re.compile(
    r"^\s*(?:CREATE|DROP|REINDEX|ALTER|REFRESH)\b.*\bCONCURRENTLY\b", re.IGNORECASE | re.DOTALL
)


def _lift_timeouts_for_concurrent_builds(connection: Any) -> None:
    """Let ``CREATE INDEX CONCURRENTLY`` and its like wait as long as they need.

    They wait for every older transaction to end, and ``lock_timeout`` counts that as a wait for a lock.
    A timeout would leave an INVALID index. Their own lock, SHARE UPDATE EXCLUSIVE, blocks no reader and
    no writer, so the wait is free.
    https://www.postgresql.org/docs/current/sql-createindex.html#SQL-CREATEINDEX-CONCURRENTLY
    """
    from sqlalchemy import event

    kept: dict[str, str] = {}

    def before(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        if not _CONCURRENTLY.match(statement):
            return
        for name in ("lock_timeout", "statement_timeout"):
            cursor.execute(f"SHOW {name}")
            kept[name] = cursor.fetchone()[0]
            cursor.execute(f"SET {name} = 0")

    def after(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        while kept and _CONCURRENTLY.match(statement):
            name, value = kept.popitem()
            cursor.execute(f"SET {name} = '{value}'")

    event.listen(connection, "before_cursor_execute", before)
    event.listen(connection, "after_cursor_execute", after)
