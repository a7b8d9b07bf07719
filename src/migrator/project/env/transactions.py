"""How many transactions a run takes: as in ``env.py``, or as in the setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from migrator.errors import SettingsError

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

MODES: Mapping[str, Mapping[str, bool]] = {
    "env.py": {},
    "each": {"transactional_ddl": True, "transaction_per_migration": True},
    "all": {"transactional_ddl": True, "transaction_per_migration": False},
    "none": {"transactional_ddl": False},
}
"""The options for ``context.configure`` in each mode.

https://alembic.sqlalchemy.org/en/latest/api/runtime.html#alembic.runtime.environment.EnvironmentContext.configure
"""


def configure_in(
    mode: str, configure: Callable[..., None], get_context: Callable[[], MigrationContext]
) -> Callable[..., None]:
    """Return ``configure`` with the options of a mode in place of ``env.py``'s own.

    It raises :class:`SettingsError` if ``env.py`` holds its own transaction: Alembic then begins none.
    """
    if mode == "env.py":
        return configure

    def configure_as_told(*arguments: Any, **options: Any) -> None:
        configure(*arguments, **{**options, **MODES[mode]})
        if mode != "all" and get_context()._in_external_transaction:
            raise SettingsError(
                [
                    f"MIGRATOR_TRANSACTION={mode} is not possible: env.py calls context.configure() in "
                    "its own transaction, which then holds all revisions"
                ],
                next_step="remove MIGRATOR_TRANSACTION, or commit in env.py before it configures Alembic",
            )

    return configure_as_told
