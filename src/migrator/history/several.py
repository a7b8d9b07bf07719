"""An ``env.py`` that migrates several databases, as Alembic's ``multidb`` template does.

Both hand the engine's name to ``context.run_migrations(engine_name=...)``, which hands it on to ``upgrade()`` of each
revision.  Which databases these are only ``env.py`` knows: it is asked by letting it do all but run migrations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from migrator import surroundings
from migrator.errors import SettingsError
from migrator.history.project import ProjectOptions, make_config
from migrator.target import BadAddress, Target, parse

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

    from migrator.history.graph import History
    from migrator.postgres import Session


def env_file(options: ProjectOptions, folder: Path) -> Path:
    """Return where a project's ``env.py`` is; no revision is read.  Its configuration was read before."""
    from alembic.script import ScriptDirectory

    return Path(ScriptDirectory.from_config(make_config(options, folder)).env_py_location)


def survey(history: History, session: Session, *, before_configure: Callable[[], None]) -> tuple[Target, ...]:
    """Return the databases that ``env.py`` reaches beside that of ``session``, in its order; nothing is migrated.

    Raises :class:`SettingsError` where that is not among them or one is not Postgres's, and what ``env.py`` raises.
    """
    from migrator.migration_connection import MigrationConnection, identity_of

    found: dict[str, str] = {}

    def note(_: Callable[[], None], get_context: Callable[[], MigrationContext]) -> None:
        connection = MigrationConnection(get_context())
        address = connection.raw.engine.url.render_as_string(hide_password=False)
        found.setdefault(connection.identity, address)

    with surroundings.kept():
        history.run("upgrade", "head", lambda *_: (), before_configure=before_configure, around=note)
    before_configure()
    if found.pop(identity_of(session.facts), None) is None:
        raise SettingsError(
            [f"env.py migrates several databases, but not {session.target}"],
            next_step="give migrator the address of one of those that env.py connects to",
        )
    try:
        return tuple(parse(address) for address in found.values())
    except BadAddress as error:
        raise SettingsError([f"an address that env.py connects to cannot be used: {error}"]) from None
