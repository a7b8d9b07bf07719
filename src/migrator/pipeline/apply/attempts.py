"""Decide whether a failed migration is retried; each retry runs ``env.py`` from the start.

A rolled-back transaction also undoes the settings of ``env.py`` in it (search_path, role, timeouts,
locks), and a new connection never had them. So every attempt runs ``env.py`` as the next run of
migrator would. Its imported modules stay imported.

Nothing is retried while a part of a revision is committed without its version row.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from migrator.errors import MigratorError
from migrator.pipeline.apply.failure import RETRYABLE
from migrator.postgres.control_connection import lost
from migrator.postgres.errors import ConnectFailed, QueryFailed, message_of

if TYPE_CHECKING:
    from migrator.pipeline.apply.revisions import Part

log = logging.getLogger("migrator.apply")

LOSSES = 3
"""How many lost connections are retried: a revision that crashes the server does so each time."""

_GONE = ("57P01", "57P02", "57P03")
_NO_CONNECTION = "08"
"""Also what dblink and postgres_fdw report of their own connections, while the migration's is well."""
_ENDED_FOR_A_REASON = frozenset({"25P03", "25P04", "57P05"})
"""The server's own timeouts for sessions and transactions: they would end the next attempt as well."""


class Cause(Enum):
    """Why an attempt failed: for a passing reason, or for any other."""

    BUSY = "lock_timeout, deadlock or serialization failure"
    LOST = "the connection was lost"
    OTHER = "anything else"


@dataclass(frozen=True)
class Attempt:
    """The result of one failed pass through ``env.py``.

    ``busy`` and ``losses`` count the attempts that failed in that way, including this one. ``settled``
    says whether the server has ended the transaction and reported the version rows. ``unfinished`` are
    the parts that are committed without their version row. ``stopped`` says that a signal came.
    """

    cause: Cause
    busy: int = 0
    losses: int = 0
    settled: bool = True
    unfinished: tuple[Part, ...] = ()
    stopped: bool = False


def may_repeat(attempt: Attempt, lock_retries: int) -> bool:
    """Decide whether to run ``env.py`` again, from the top.

    ``lock_retries`` is the number of retries after lock failures.
    """
    if attempt.stopped or attempt.unfinished or not attempt.settled:
        return False
    if attempt.cause is Cause.BUSY:
        return attempt.busy <= lock_retries
    return attempt.cause is Cause.LOST and attempt.losses <= LOSSES


def cause_of(error: BaseException, *, connected: bool, gone: bool, answers: Callable[[], bool]) -> Cause:
    """Return why an attempt failed.

    ``connected`` says whether ``env.py`` had reached the database, ``gone`` whether its driver's
    connection is closed. ``answers`` checks whether the control connection still works.
    """
    if not isinstance(error, (Exception, SystemExit)) or isinstance(error, ConnectFailed):
        return Cause.OTHER  # a ConnectFailed was waited for already
    chain = list(_chain(error))
    codes = {code for item in chain for code in _codes(item)}
    if codes & RETRYABLE:
        return Cause.BUSY
    if codes & _ENDED_FOR_A_REASON:
        return Cause.OTHER
    refused = not connected and any(code.startswith(_NO_CONNECTION) for code in codes)
    if gone or refused or codes & set(_GONE):
        return Cause.LOST
    if any(getattr(item, "connection_invalidated", False) or lost(item) for item in chain):
        return Cause.LOST
    # env.py could not connect: its address may be wrong, unless ours does not answer either.
    network = any(isinstance(item, OSError) or _of_a_driver(item) for item in chain)
    return Cause.LOST if not connected and network and not answers() else Cause.OTHER


def cut_alike(ages: Sequence[float]) -> float:
    """Return after how many seconds connections were cut, if it was the same each time; else 0.

    A proxy that ends idle connections does this: it sees no byte while the server works.
    """
    if len(ages) < 2 or min(ages) < 1 or max(ages) > 2 * min(ages):
        return 0.0
    return sum(ages) / len(ages)


def told(error: BaseException) -> bool:
    """Tell whether the server itself gave a reason for ending a connection."""
    return any(code for item in _chain(error) for code in _codes(item))


class Pass(Protocol):
    """One run of ``env.py``, and its facts afterwards."""

    def begin(self) -> None:
        """Forget the connection of the last pass."""

    def run(self) -> None:
        """Run ``env.py``; raise its error, even if it caught it itself."""

    def cause(self, error: BaseException) -> Cause:
        """Return the cause of its failure."""

    def settle(self) -> tuple[Part, ...]:
        """Wait until its transaction has ended; return the parts that are committed without their version
        row.

        Raises QueryFailed and ConnectFailed if the server does not answer.
        """

    def stopped(self) -> bool:
        """Whether a signal came."""

    def pause(self, seconds: float) -> None:
        """Wait; raises Interrupt."""

    def connected(self) -> bool:
        """Whether ``env.py`` had reached the database."""


class CannotRunAgain(Exception):
    """A lock failure, after which ``env.py`` failed before it connected: it cannot run twice in a process."""

    def __init__(self, busy: str, code: str, error: BaseException) -> None:
        super().__init__(
            f"{busy}; env.py cannot run a second time in one process ({type(error).__name__}: {_reason(error)})"
        )
        self.sqlstate = code


class Attempts:
    """Runs ``env.py`` as often as needed, with at most ``lock_retries`` retries for a busy lock."""

    def __init__(self, lock_retries: int) -> None:
        self._lock_retries = lock_retries
        self.busy = 0
        self.losses = 0

    @property
    def count(self) -> int:
        """Return how many attempts failed because of a lock."""
        return max(1, self.busy)

    def run(self, one: Pass) -> None:
        """Run the passes; raise the error of the last one."""
        busy, code = "", ""  # of the attempt before
        while True:
            one.begin()
            # The frames of the last failure kept what env.py has left open: a connection and its locks. A pool
            # gets it back in the first collection, and goes in the second.
            gc.collect()
            gc.collect()
            error = self._failure(one)
            if error is None:
                return
            attempt = self._look(one, error)
            if not may_repeat(attempt, self._lock_retries):
                ours = isinstance(error, MigratorError) or attempt.stopped
                if busy and attempt.cause is Cause.OTHER and not ours and not one.connected():
                    raise CannotRunAgain(busy, code, error) from error
                raise error
            busy, code = "", ""
            if attempt.cause is Cause.BUSY:
                busy = _reason(error).rstrip(".")
                code = next(code for item in _chain(error) for code in _codes(item) if code in RETRYABLE)
            pause = self._say(attempt.cause, error)
            del error
            one.pause(pause)

    @staticmethod
    def _failure(one: Pass) -> BaseException | None:
        try:
            one.run()
        except BaseException as error:  # noqa: BLE001 - raised by run(), unless it is retried
            return error
        return None

    def _look(self, one: Pass, error: BaseException) -> Attempt:
        cause = one.cause(error)
        self.busy += cause is Cause.BUSY
        self.losses += cause is Cause.LOST
        found = Attempt(cause, self.busy, self.losses, stopped=one.stopped())
        if cause is Cause.OTHER or found.stopped:
            return found
        if cause is Cause.LOST:
            log.warning(
                "the migration's connection was lost: %s",
                _reason(error).rstrip("."),
                extra={"stage": "apply"},
            )
        try:
            unfinished = one.settle()
        except TimeoutError as failure:
            log.warning("%s", failure, extra={"stage": "apply"})
            return replace(found, settled=False)
        except (ConnectFailed, QueryFailed) as failure:
            log.warning("the database does not answer: %s", failure, extra={"stage": "apply"})
            return replace(found, settled=False)
        return replace(found, unfinished=unfinished, stopped=one.stopped())

    def _say(self, cause: Cause, error: BaseException) -> float:
        """Log that ``env.py`` runs again; return the seconds to wait before."""
        if cause is Cause.LOST:
            log.warning(
                "the server is back and has rolled back the open transaction: running env.py again (%d "
                "of %d)",
                self.losses,
                LOSSES,
                extra={"stage": "apply"},
            )
            return 0.0
        most = min(10.0, 0.5 * 2 ** (self.busy - 1))
        seconds = random.uniform(0, most)  # noqa: S311 - jitter, no secret
        log.warning(
            "%s: rolled back, retrying in %.1f s (attempt %d of %d)",
            _reason(error).rstrip("."),
            seconds,
            self.busy + 1,
            self._lock_retries + 1,
            extra={"stage": "apply"},
        )
        return seconds


def sleep(seconds: float, check: Callable[[], None]) -> None:
    """Wait, and keep calling ``check``, which raises after a signal."""
    deadline = time.monotonic() + seconds
    check()
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        check()


def _reason(error: BaseException) -> str:
    """Return the first error with a message in an error's chain."""
    return next((message_of(item) for item in _chain(error) if str(item)), type(error).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes: a driver's error is often wrapped twice, its own comes first."""
    waiting: list[Any] = [getattr(error, "orig", None), error]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop(0)
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            waiting += [getattr(item, "orig", None), item.__cause__, item.__context__]


def _codes(error: BaseException) -> Iterator[str]:
    for name in ("pgcode", "sqlstate"):
        code = getattr(error, name, None)
        if isinstance(code, str) and code:
            yield code


def _of_a_driver(error: BaseException) -> bool:
    return type(error).__name__ in {"OperationalError", "InterfaceError", "DBAPIError"}
