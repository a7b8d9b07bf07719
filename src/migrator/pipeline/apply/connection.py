"""The connection that a user's ``env.py`` opened: asked, prepared and listened to, whatever its driver."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrator.contents import LEDGER
from migrator.errors import HistoryError, SettingsError
from migrator.history.commits import watch_commits, watch_ends, watch_statements
from migrator.history.driver_calls import DriverCalls, gone
from migrator.history.statements import lift_timeouts_for_concurrent_builds
from migrator.observation import Observation
from migrator.postgres import ServerFacts, Session, dead_client_settings
from migrator.settings import Settings
from migrator.versions import VersionTable

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

log = logging.getLogger("migrator.apply")

_IDENTITY = (
    "SELECT (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint::text || ' ' || "
    "(SELECT oid FROM pg_database WHERE datname = current_database())::text || ' ' || current_database()"
)
_TRANSACTION = "SELECT (now() = statement_timestamp())::text || ' ' || txid_current()::text"
_MAY_DROP = re.compile(r"\b(?:DROP|ALTER\s+SCHEMA|RENAME)\b", re.IGNORECASE)
# What may end the transaction or change the role, and what may read the ledger.
_MAY_END = re.compile(
    r"\b(?:COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|PREPARE|ROLE|AUTHORIZATION|SET_CONFIG|RESET|DISCARD"
    rf"|{LEDGER})\b",
    re.IGNORECASE,
)
_LONG = 10_000  # characters of a statement that is not searched for it
_NOW = "SELECT now()::text"  # the start of the transaction: it stands still unless each statement is its own


def identity_of(facts: ServerFacts) -> str:
    """Return what tells a database from all others, as :attr:`MigrationConnection.identity` has it."""
    return f"{facts.started_at} {facts.database_oid} {facts.database}"


class MigrationConnection:
    """The live connection of a MigrationContext; raises :class:`HistoryError` where it has none."""

    def __init__(self, context: MigrationContext) -> None:
        if context.connection is None:
            raise HistoryError(
                "env.py ran offline: it has no connection.",
                next_step="`migrator alembic upgrade head --sql` is for offline use",
            )
        self._connection = context.connection
        self.calls: DriverCalls | None = None
        self._dropped = False

    @property
    def raw(self) -> Any:
        """Return SQLAlchemy's connection."""
        return self._connection

    @property
    def translates(self) -> bool:
        """Whether it puts other schemas in the place of those that revisions name.

        https://docs.sqlalchemy.org/en/20/core/connections.html#schema-translating
        """
        return bool(self._connection.get_execution_options().get("schema_translate_map"))

    def is_on(self, connection: Any) -> bool:
        """Whether this is about that very connection."""
        return self._connection is connection

    def ask(self, sql: str) -> Any:
        """Return the first column of the first row; no parameters, for drivers differ in how they write them."""
        if "%" in sql and self._connection.dialect.paramstyle in {"format", "pyformat"}:
            sql = sql.replace(
                "%", "%%"
            )  # in the name of a schema; these drivers look for parameters all the same
        return self._connection.exec_driver_sql(sql).scalar()

    def ask_driver(self, sql: str) -> Any:
        """Return the first column of the first row, past SQLAlchemy: for what is asked with each revision."""
        if not self.calls:
            return self.ask(sql)
        try:
            return self.calls.ask(sql)
        except Exception as error:
            # As SQLAlchemy does at the end of a connection: or it would try a rollback there, and log a traceback.
            if gone(self._connection):
                self._connection.invalidate(error)
            raise

    def tell(self, sql: str, **values: str) -> Any:
        """Run a statement and return its first value, if it has one; parameters are ``:name``, whatever the driver."""
        from sqlalchemy import text

        result = self._connection.execute(text(sql), values)
        return result.scalar() if result.returns_rows else None

    @property
    def identity(self) -> str:
        """Return what tells the database from all others; raises :class:`SettingsError` where it is not Postgres's."""
        dialect = self._connection.dialect.name
        if dialect != "postgresql":
            raise SettingsError(
                [f"env.py connects to a database of another kind than Postgres ({dialect})"],
                next_step="let env.py use sqlalchemy.url or DATABASE_URL, or name the variable that it reads"
                " with MIGRATOR_URL_VARIABLE",
            )
        return str(self.ask(_IDENTITY))

    def is_on_another_database(self, session: Session) -> bool:
        """Whether this is not the database that ``session`` locked and backed up; raises :class:`SettingsError`."""
        return self.identity != identity_of(session.facts)

    def refuse_another_database(self, session: Session) -> None:
        """Raise :class:`SettingsError` unless this is the database that ``session`` locked and backed up."""
        facts, found = session.facts, self.identity
        if found == identity_of(facts):
            return
        raise SettingsError(
            [
                f"env.py connects to another database ({found.split(' ', 2)[2]!r}) than the one that migrator"
                f" locked and backed up ({facts.database!r} of {session.target})"
            ],
            next_step="let env.py use sqlalchemy.url or DATABASE_URL, or name the variable that it reads"
            " with MIGRATOR_URL_VARIABLE; where it is to migrate several databases, call"
            " context.run_migrations(engine_name=...) for each, as Alembic's multidb template does",
        )

    def assume_role(self, role: str, session: Session) -> None:
        """Do ``SET ROLE``, so that the role owns what is made; one that ``env.py`` has set itself stays.

        Within a transaction that is rolled back it is undone, so it is asked for at every attempt.
        """
        if not role:
            return
        now, login = self.ask("SELECT current_user::text"), self.ask("SELECT session_user::text")
        if now in (login, session.facts.user):
            self.tell("SELECT set_config('role', :role, false)", role=role)
        elif now != role:
            log.info("env.py has set the role %s itself; it stays", now)

    def locate(self, table: VersionTable, session: Session) -> VersionTable:
        """Return the table with its schema, where ``env.py``'s search_path finds another than ours does."""
        literal = table.quoted.replace("'", "''")
        oid = f"SELECT to_regclass('{literal}')::oid::bigint"
        if table.schema or session.value(oid) == self.ask(oid):
            return table
        of = (
            f"pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = to_regclass('{literal}')"
        )
        schema = self.ask(f"SELECT n.nspname::text FROM {of}")  # noqa: S608 - quoted
        return VersionTable(table.name, schema or "")

    def try_lock(self, keys: tuple[int, int]) -> bool:
        """Take a session advisory lock, if nobody else has it."""
        return bool(self.ask(f"SELECT pg_try_advisory_lock({keys[0]}, {keys[1]})"))

    @property
    def pid(self) -> int:
        """Return the server process's id."""
        return int(self.ask("SELECT pg_backend_pid()"))

    @property
    def autocommits(self) -> bool:
        """Whether each statement is a transaction of its own."""
        return bool(self.ask(_NOW) != self.ask(_NOW))

    def transaction(self) -> int:
        """Return the transaction's id, for asking Postgres about it afterwards (txid_status); 0 in autocommit.

        A transaction stands still in time: only where nothing came before in it, a second question must tell.
        """
        fresh, number = self.ask(_TRANSACTION).split()
        return 0 if fresh == "true" and self.ask(_TRANSACTION).startswith("true") else int(number)

    def set_timeouts(self, settings: Settings) -> None:
        """Set Postgres's timeouts for the session; what ``env.py`` set itself stays, unless a setting was given."""
        for name, seconds in (
            ("lock_timeout", settings.lock_timeout),
            ("statement_timeout", settings.statement_timeout),
        ):
            told = settings.sources.get(name, "default") != "default"
            if seconds is None and not told:
                continue
            if not told and self.ask(f"SELECT current_setting('{name}')") != "0":
                continue
            milliseconds = int((seconds or 0) * 1000)
            self.ask(f"SELECT set_config('{name}', '{milliseconds}', false)")

    def notice_a_dead_client(self, server_major: int) -> None:
        """Let the server notice within seconds that we are gone: a killed run would keep its locks otherwise."""
        self.ask(dead_client_settings(server_major))

    def observe(self, session: Session, version_table: str) -> Observation:
        """Observe what is executed from now on; ``session`` sees the state before."""
        return Observation(self._connection, session, (version_table, LEDGER), self.ask_driver)

    def may_have_dropped(self) -> bool:
        """Whether a statement since the last call was one that may have dropped a table."""
        dropped, self._dropped = self._dropped, False
        return dropped

    def _look_for_drops(self, _: Any, __: Any, statement: str, *___: Any) -> None:
        if not self._dropped and _MAY_DROP.search(statement):
            self._dropped = True

    def listen(
        self, committed: Callable[[], None], *, ahead: Callable[[], Any], undone: Callable[[], None]
    ) -> None:
        """Call ``committed`` when something becomes permanent, and let concurrent builds wait; once a connection.

        ``ahead`` is called before what may end the transaction: a commit, or a statement that speaks of one;
        ``undone`` at a rollback.
        From then on ``calls`` knows whether the driver waits for the server.
        """

        def look_for_ends(_: Any, __: Any, statement: str, *___: Any) -> None:
            if len(statement) > _LONG or _MAY_END.search(statement):
                ahead()

        self.calls = DriverCalls(self._connection)
        lift_timeouts_for_concurrent_builds(self._connection)
        watch_statements(self._connection, look_for_ends)  # first: what it writes is written before a drop
        watch_statements(self._connection, self._look_for_drops)
        watch_ends(self._connection, ahead, undone)
        watch_commits(self._connection, committed, every_statement=self.autocommits)
