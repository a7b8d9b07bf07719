"""One run: its request, the state that its stages share, and the meaning of its failures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from migrator.config.settings import Settings
from migrator.errors import (
    UNCHANGED,
    BackupFailed,
    Interrupted,
    MigratorError,
    Partial,
    RestoreFailed,
    Unreachable,
)
from migrator.outcome import ExitCode, Status
from migrator.pipeline.record import Record
from migrator.pipeline.unexpected import translate
from migrator.postgres.control_connection import lost, reconnect_if_lost
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, read_rows
from migrator.project import ProjectOptions
from migrator.runtime.logs import Logs
from migrator.runtime.resource_errors import lack
from migrator.runtime.signals import Interrupt, Interruption

log = logging.getLogger("migrator")

ATTEMPTS = 4
"""How often a run starts, or verifies, again if Postgres goes away each time; a setting bounds each wait."""


@dataclass(frozen=True)
class Request:
    """The request: ``upgrade``, ``downgrade``, ``stamp`` or ``verify``, the destination, and the user's
    --yes.
    """

    kind: str
    destination: str
    yes: bool = False


@dataclass(frozen=True)
class Run:
    """The state that all stages of one run share."""

    request: Request
    settings: Settings
    project: ProjectOptions
    record: Record
    logs: Logs
    interruption: Interruption

    @property
    def application_name(self) -> str:
        """Return the name of the run's sessions in pg_stat_activity."""
        return self.record.application_name

    def reinstall_logging(self) -> None:
        """Take logging and signals back from the application."""
        self.logs.install()
        self.interruption.reinstall()


def harmless(this: Run, error: BaseException) -> bool:
    """Tell whether an error is a connection that was lost before anything was applied."""
    begun = any(stage.stage == "apply" and stage.status is not Status.SKIPPED for stage in this.record.stages)
    waited = isinstance(error, ConnectFailed) and error.waited
    return lost(error) and not waited and not begun and not this.interruption.received


def of_a_signal(error: BaseException) -> bool:
    """Tell whether an error may be the effect of a signal: a cancelled query, an ended program.

    A failed clean-up then raises it in place of the :class:`Interrupt`.
    """
    if isinstance(error, RestoreFailed):
        return error.state.startswith(UNCHANGED.rstrip("."))
    return isinstance(error, (QueryFailed, ConnectFailed, Unreachable, BackupFailed))


def ending(this: Run, error: Exception | Interrupt) -> MigratorError:
    """Return the error that a run ends with: :func:`known`, but never "not changed" after a commit."""
    record, meaning = this.record, known(this, error)
    if meaning.state != UNCHANGED or None in (record.before, record.after) or record.after == record.before:
        return meaning
    return Partial(
        meaning.message,
        state=f"The database is at {', '.join(record.after or ()) or 'base'}.",
        next_step=meaning.next_step or "check with `migrator verify`",
        findings=meaning.findings,
    )


def known(this: Run, error: Exception | Interrupt) -> MigratorError:
    """Return the error that says what happened, for any exception."""
    record = this.record
    if this.interruption.received and of_a_signal(error):
        error = Interrupt(this.interruption.received)
    if isinstance(error, MigratorError):
        return error
    if lost(error) and record.after is not None and record.after != record.before:
        return Partial(
            "Postgres went away after the revisions were committed, before they were verified.",
            state=f"The database is at {', '.join(record.after) or 'base'}.",
            next_step="check with `migrator verify`",
        )
    why = lack(error)
    if why and record.after != record.before:
        return Partial(
            f"This machine lacks a resource that the run needs: {why}.",
            state="It is not known what was committed."
            if record.after is None
            else f"The database is at {', '.join(record.after) or 'base'}.",
            next_step="check with `migrator current`, then with `migrator verify`",
        )
    if not isinstance(error, Interrupt):
        meaning = translate(error)
        log.log(
            logging.ERROR if meaning.code is ExitCode.INTERNAL else logging.DEBUG,
            "unexpected",
            exc_info=error,
        )
        return meaning
    this.interruption.block()
    if record.after is None and record.before is None:
        return Interrupted(f"Interrupted by {error.name}.", next_step="run it again")
    if record.after is None:
        return Partial(
            f"Interrupted by {error.name}.",
            state="It is not known what was committed.",
            next_step="check with `migrator current`",
        )
    if record.after == record.before:
        return Interrupted(f"Interrupted by {error.name}.", next_step="run it again")
    return Partial(
        f"Interrupted by {error.name} after the revisions were committed, before they were verified.",
        state=f"The database is at {', '.join(record.after) or 'base'}.",
        next_step="check with `migrator verify`",
    )


def rows_now(this: Run, session: Session, table: VersionTable | None) -> frozenset[str] | None:
    """Read the version rows; None if Postgres does not answer."""
    if table is None:
        return frozenset()
    try:
        with alive(this, session) as living:
            return frozenset(read_rows(living, table))
    except (ConnectFailed, QueryFailed, MigratorError):
        return None


@contextlib.contextmanager
def alive(this: Run, session: Session) -> Iterator[Session]:
    """Yield the session, reconnected if it was lost; raises ConnectFailed if Postgres stays away."""
    reconnect_if_lost(session, 0 if this.interruption.received else this.settings.wait_timeout)
    yield session
