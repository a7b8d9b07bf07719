"""The history: the Alembic revision graph in the image.

This package is the only importer of alembic.  In real projects ``env.py`` imports the whole application, which
takes seconds; the graph is made from the revision files alone, and :meth:`History.run` is the one place that
loads ``env.py``.

Its names are imported when they are asked for: where a project is can be told (:mod:`migrator.layout`) without the
rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from migrator.history.project import ProjectOptions

if TYPE_CHECKING:
    from migrator.history.command_line import hand_over
    from migrator.history.graph import History, Plan, Revision
    from migrator.history.way_back import WayBack

__all__ = ["History", "Plan", "ProjectOptions", "Revision", "WayBack", "hand_over"]

_HOMES = {
    "History": "graph",
    "Plan": "graph",
    "Revision": "graph",
    "WayBack": "way_back",
    "hand_over": "command_line",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
