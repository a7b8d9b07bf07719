"""One run: what was asked for, what its stages share, and what its failures mean."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from migrator.aftermath import translate
from migrator.errors import Interrupted, MigratorError, Partial
from migrator.history import ProjectOptions
from migrator.interruption import Interrupt, Interruption
from migrator.lifeline import lost, revive
from migrator.logs import Logs
from migrator.outcome import Status
from migrator.postgres import ConnectFailed, QueryFailed, Session
from migrator.record import Record
from migrator.settings import Settings
from migrator.versions import VersionTable, read_rows

log = logging.getLogger("migrator")

ATTEMPTS = 4
"""So often a run begins, or verifies, where Postgres goes away each time; each wait is bounded by its own setting."""


@dataclass(frozen=True)
class Request:
    """What was asked for: ``upgrade``, ``downgrade``, ``stamp`` or ``verify``, where to, and whether they are sure."""

    kind: str
    destination: str
    yes: bool = False


@dataclass(frozen=True)
class Run:
    """What every stage of one run shares."""

    request: Request
    settings: Settings
    project: ProjectOptions
    record: Record
    logs: Logs
    interruption: Interruption

    @property
    def application_name(self) -> str:
        """Return the name under which the run's sessions are seen in pg_stat_activity."""
        return self.record.application_name


def harmless(this: Run, error: BaseException) -> bool:
    """Whether an error is a connection that was lost before anything was applied."""
    begun = any(stage.stage == "apply" and stage.status is not Status.SKIPPED for stage in this.record.stages)
    return lost(error) and not begun and not this.interruption.received


def known(this: Run, error: Exception | Interrupt) -> MigratorError:
    """Return the error that says what happened, whatever was raised."""
    record = this.record
    if isinstance(error, MigratorError):
        return error
    if lost(error) and record.after is not None and record.after != record.before:
        return Partial(
            "Postgres went away after the revisions were committed, before they were verified.",
            state=f"The database is at {', '.join(record.after) or 'base'}.",
            next_step="`migrator verify` checks it",
        )
    if not isinstance(error, Interrupt):
        log.error("unexpected", exc_info=error)
        return translate(error)
    this.interruption.shield()
    if record.after is None or record.after == record.before:
        return Interrupted(f"Interrupted by {error.name}.", next_step="run it again")
    return Partial(
        f"Interrupted by {error.name} after the revisions were committed, before they were verified.",
        state=f"The database is at {', '.join(record.after) or 'base'}.",
        next_step="`migrator verify` checks it",
    )


def rows_now(this: Run, session: Session, table: VersionTable | None) -> frozenset[str] | None:
    """Read the version rows; None where nobody answers."""
    if table is None:
        return frozenset()
    try:
        with alive(this, session) as living:
            return frozenset(read_rows(living, table))
    except (ConnectFailed, QueryFailed, MigratorError):
        return None


@contextlib.contextmanager
def alive(this: Run, session: Session) -> Iterator[Session]:
    """Yield the session, connected again where it was lost; raises ConnectFailed where Postgres stays away."""
    revive(session, 0 if this.interruption.received else this.settings.wait_timeout)
    yield session
