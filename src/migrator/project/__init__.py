"""The user's Alembic project: its configuration, its revision graph (the history) and its ``env.py``.

Only this package imports alembic. In real projects ``env.py`` imports the whole application, which
takes seconds. The graph comes from the revision files alone, and only :meth:`History.run` loads
``env.py``.

Its names are imported on demand: :mod:`.layout` finds a project without the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from migrator.project.config import ProjectOptions

if TYPE_CHECKING:
    from migrator.project.alembic_cli import run_alembic
    from migrator.project.downgrade.offline_sql import OfflineDowngrade
    from migrator.project.history.history import History
    from migrator.project.history.plan import Plan, Revision

__all__ = ["History", "OfflineDowngrade", "Plan", "ProjectOptions", "Revision", "run_alembic"]

_HOMES = {
    "History": "history.history",
    "Plan": "history.plan",
    "Revision": "history.plan",
    "OfflineDowngrade": "downgrade.offline_sql",
    "run_alembic": "alembic_cli",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
