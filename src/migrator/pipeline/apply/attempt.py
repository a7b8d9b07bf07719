"""An attempt is a value: what one pass through ``env.py`` is given, and what it saw.

:mod:`.env_pass` makes the pass, :mod:`.decide` decides what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from migrator.ledger.writer import LedgerWriter
from migrator.postgres.control_connection import ControlConnection, lost
from migrator.postgres.errors import ConnectFailed, chain, sqlstate_of
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.runtime.logs import Logs
from migrator.runtime.signals import Interruption

if TYPE_CHECKING:
    from migrator.config.settings import Settings
    from migrator.outcome import RevisionResult
    from migrator.pipeline.apply.blockers import Blocker
    from migrator.project import History, Plan

RETRYABLE = frozenset({"55P03", "40P01", "40001"})
"""SQLSTATEs that can pass by themselves: lock_not_available, deadlock_detected, serialization_failure."""
_GONE = frozenset({"57P01", "57P02", "57P03"})
_NO_CONNECTION = "08"
"""Also what dblink and postgres_fdw report of their own connections, while the migration's is well."""
_ENDED_FOR_A_REASON = frozenset({"25P03", "25P04", "57P05"})
"""The server's own timeouts for sessions and transactions: they would end the next attempt as well."""


@dataclass(frozen=True)
class Inputs:
    """What stays the same for every attempt of a run.

    ``known`` are the rows of the version tables that an earlier look through ``env.py`` found, and
    ``about`` is the one that the plan is about. ``backup_id`` names the backup to go back to.
    """

    session: Session
    control: ControlConnection
    history: History
    settings: Settings
    plan: Plan
    logs: Logs
    interruption: Interruption
    ledger_writer: LedgerWriter
    apply_lock: tuple[int, int]
    known: Mapping[VersionTable, frozenset[str]]
    about: VersionTable | None
    backup_id: str

    @property
    def upgrade(self) -> bool:
        """Whether revisions are applied, not reverted."""
        return self.plan.kind != "downgrade"

    def reinstall_logging(self) -> None:
        """Take logging and signals back from the application."""
        self.logs.install()
        self.interruption.reinstall()

    def keep_logging(self) -> None:
        """Take logging and signals back from a revision."""
        self.logs.keep()
        self.interruption.reinstall()


@dataclass(frozen=True)
class Part:
    """A revision with a part that is, or may be, committed before its version row in ``table``."""

    revision: str
    table: VersionTable


@dataclass(frozen=True)
class Landed:
    """What the server says after the applying connection is gone.

    ``rows`` are the rows of the plan's version table. ``revisions`` landed in any version table, in the
    plan's order, and ``results`` are theirs. ``at`` says where several version tables are.
    ``unfinished`` are the parts that are committed without their version row.
    """

    rows: frozenset[str]
    revisions: Sequence[str] = ()
    results: tuple[RevisionResult, ...] = ()
    at: str = ""
    unfinished: tuple[Part, ...] = ()


class Cause(Enum):
    """Why an attempt failed: for a passing reason, or for any other."""

    BUSY = "lock_timeout, deadlock or serialization failure"
    LOST = "the connection was lost"
    OTHER = "anything else"


@dataclass(frozen=True)
class LockFailure:
    """Why an attempt that was retried missed a lock."""

    reason: str
    sqlstate: str


@dataclass(frozen=True)
class Attempt:
    """What one pass through ``env.py`` saw.

    ``error`` ended it, None if it went well; ``raised`` came out of a revision, and ``env.py`` may have
    replaced it. ``settled`` says whether the server has ended the transaction and returned the version
    rows while a retry was still possible. ``landed`` is None if the rows could not be read.
    ``signal`` is the name of a signal that came.

    ``connected`` says whether ``env.py`` got a connection, ``entered`` whether it did so in this pass or
    an earlier one. ``retries`` is the lock failure that this pass retries.
    ``anything_committed`` says whether something may have been committed. ``repeatable`` says that the
    unfinished parts may run again, ``certain`` that a statement of one is known to be committed.
    ``busy`` and ``losses`` count the attempts that failed in that way, including this one.
    """

    plan: Plan
    error: BaseException | None = None
    raised: BaseException | None = None
    cause: Cause = Cause.OTHER
    settled: bool = True
    signal: str = ""
    landed: Landed | None = None
    connected: bool = False
    entered: bool = False
    retries: LockFailure | None = None
    anything_committed: bool = True
    failed_in: str = ""
    repeatable: bool = False
    certain: bool = True
    busy: int = 0
    losses: int = 0
    cut_after: float = 0.0
    """After how many seconds each attempt was cut by something in between; 0 if it was not."""
    blockers: Sequence[Blocker] = ()
    rolled_back_by: str = ""
    """The revision that rolled back its own transaction."""
    alike: bool = True
    """Whether all version tables started at the plan's rows."""
    backup_id: str = ""

    @property
    def rows(self) -> frozenset[str] | None:
        """Return the rows of the plan's version table, None if they could not be read."""
        return self.landed.rows if self.landed else None

    @property
    def revisions(self) -> Sequence[str]:
        """Return the revisions that landed, as far as it is known."""
        return self.landed.revisions if self.landed else ()

    @property
    def at(self) -> str:
        """Return where the database stands, if ``env.py`` uses several version tables."""
        return self.landed.at if self.landed else ""

    @property
    def where(self) -> str:
        """Return where the database stands."""
        return self.at or ", ".join(sorted(self.rows or ())) or "base"

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Return the revisions with a committed part and no version row."""
        return tuple(dict.fromkeys(part.revision for part in self.landed.unfinished)) if self.landed else ()


def cause_of(error: BaseException, *, connected: bool, gone: bool, answers: Callable[[], bool]) -> Cause:
    """Return why an attempt failed.

    ``connected`` says whether ``env.py`` had reached the database, ``gone`` whether its driver's
    connection is closed. ``answers`` checks whether the control connection still works.
    """
    if not isinstance(error, (Exception, SystemExit)) or isinstance(error, ConnectFailed):
        return Cause.OTHER  # a ConnectFailed was waited for already
    errors = list(chain(error))
    codes = set(filter(None, map(sqlstate_of, errors)))
    if codes & RETRYABLE:
        return Cause.BUSY
    if codes & _ENDED_FOR_A_REASON:
        return Cause.OTHER
    refused = not connected and any(code.startswith(_NO_CONNECTION) for code in codes)
    if gone or refused or codes & _GONE:
        return Cause.LOST
    if any(getattr(item, "connection_invalidated", False) or lost(item) for item in errors):
        return Cause.LOST
    # env.py could not connect: its address may be wrong, unless ours does not answer either.
    network = any(isinstance(item, OSError) or type(item).__name__ in _OF_A_DRIVER for item in errors)
    return Cause.LOST if not connected and network and not answers() else Cause.OTHER


_OF_A_DRIVER = frozenset({"OperationalError", "InterfaceError", "DBAPIError"})


def cut_alike(ages: Sequence[float]) -> float:
    """Return after how many seconds connections were cut, if it was the same each time; else 0.

    A proxy that ends idle connections does this: it sees no byte while the server works.
    """
    if len(ages) < 2 or min(ages) < 1 or max(ages) > 2 * min(ages):
        return 0.0
    return sum(ages) / len(ages)
