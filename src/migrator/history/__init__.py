"""The history: the Alembic revision graph in the image.

This package is the only importer of alembic.  In real projects ``env.py`` imports the whole application, which
takes seconds; the graph is made from the revision files alone, and :meth:`History.run` is the one place that
loads ``env.py``.
"""

from migrator.history.graph import History, Plan, Revision
from migrator.history.project import ProjectOptions, hand_over

__all__ = ["History", "Plan", "ProjectOptions", "Revision", "hand_over"]
