"""The targets of an ``env.py``: several databases, as in Alembic's ``multidb`` template, or version tables.

The template passes the engine's name to ``context.run_migrations(engine_name=...)``, which passes it to
``upgrade()`` of each revision. An ``env.py`` for tenants calls ``context.run_migrations()`` for each of
their schemas. Only ``env.py`` knows them: migrator runs it without the migrations.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrator.config.database_url import BadAddress, Target, parse
from migrator.errors import SettingsError
from migrator.postgres.quoting import quote_literal
from migrator.postgres.version_table import VersionTable
from migrator.project.config import ProjectOptions, import_alembic, make_config
from migrator.project.loading import find_env, reading_only
from migrator.runtime.output import stdio

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

    from migrator.pipeline.apply.connection import MigrationConnection
    from migrator.postgres.session import Session
    from migrator.project.history.history import History


def env_file(options: ProjectOptions, folder: Path) -> Path:
    """Return the path of a project's ``env.py`` without reading any revision. Its configuration was read
    before.
    """
    import_alembic()
    return find_env(make_config(options, folder))


@dataclass(frozen=True)
class Visit:
    """One call of ``context.run_migrations``: the version table that its connection sees, and its rows."""

    table: VersionTable
    rows: frozenset[str]
    exists: bool


def survey(history: History, session: Session, *, before_configure: Callable[[], None]) -> tuple[Target, ...]:
    """Return the other databases of ``env.py``, in its order, without migrating.

    Raises :class:`SettingsError` if the session's database is not among them or one is not Postgres,
    and any error of ``env.py``.
    """
    from migrator.pipeline.apply.connection import identity_of

    found: dict[str, str] = {}

    def note(connection: MigrationConnection, _: MigrationContext) -> None:
        address = connection.raw.engine.url.render_as_string(hide_password=False)
        found.setdefault(connection.identity, address)

    _go_through(history, note, before_configure)
    if found.pop(identity_of(session.facts), None) is None:
        raise SettingsError(
            [f"env.py migrates several databases, but not {session.target}"],
            next_step="set migrator's address to a database that env.py connects to",
        )
    try:
        return tuple(parse(address) for address in found.values())
    except BadAddress as error:
        raise SettingsError([f"an address that env.py connects to cannot be used: {error}"]) from None


def survey_tables(
    history: History,
    session: Session,
    role: str,
    *,
    before_configure: Callable[[], None],
    read_only: bool,
) -> tuple[Visit, ...]:
    """Return the version tables that ``env.py`` uses in this database, in its order, without migrating.

    ``role`` is MIGRATOR_ROLE. With ``read_only`` an ``env.py`` that writes fails. Raises any error of
    ``env.py``.
    """
    found: dict[VersionTable, Visit] = {}

    def note(connection: MigrationConnection, context: MigrationContext) -> None:
        if connection.is_on_another_database(session):
            if not history.migrates_several:
                connection.refuse_another_database(session)
            return
        connection.assume_role(role, session)
        table = connection.place_of(VersionTable(context.version_table, context.version_table_schema or ""))
        exists = bool(
            connection.ask(f"SELECT pg_catalog.to_regclass({quote_literal(table.quoted)}) IS NOT NULL")
        )
        found.setdefault(table, Visit(table, frozenset(context.get_current_heads()), exists))

    with _reading() if read_only else contextlib.nullcontext():
        _go_through(history, note, before_configure)
    return tuple(found.values())


def _go_through(
    history: History,
    note: Callable[[MigrationConnection, MigrationContext], None],
    before_configure: Callable[[], None],
) -> None:
    from migrator.pipeline.apply.connection import MigrationConnection

    def instead(_: Callable[[], None], get_context: Callable[[], MigrationContext]) -> None:
        note(MigrationConnection(get_context()), get_context())

    try:
        with stdio.redirected():
            history.run("upgrade", "head", lambda *_: (), before_configure=before_configure, around=instead)
    finally:
        before_configure()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Block every write, also over connections that an application's pool already has.

    Many an ``env.py`` creates its schema if it does not exist. A read-only transaction refuses that even
    for an existing schema, so the statement is skipped.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def begun(connection: Any) -> None:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    def leave_out(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        if _MAKES_SCHEMA.match(statement):
            return "SET LOCAL migrator.left_out = ''", ()
        return statement, parameters

    event.listen(Engine, "begin", begun)
    event.listen(Engine, "before_cursor_execute", leave_out, retval=True)
    try:
        with reading_only():
            yield
    finally:
        event.remove(Engine, "begin", begun)
        event.remove(Engine, "before_cursor_execute", leave_out)


_MAKES_SCHEMA = re.compile(r"\s*CREATE\s+SCHEMA\s+IF\s+NOT\s+EXISTS\s+[^\s;]+\s*;?\s*$", re.IGNORECASE)
