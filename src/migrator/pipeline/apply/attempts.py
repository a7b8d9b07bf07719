"""The one way to try a migration again: through ``env.py``, from the top.

A transaction that is rolled back takes with it what ``env.py`` did in it (search_path, role, timeouts, locks of its
own), and a new connection never had it.  So every attempt runs ``env.py`` as the next run of migrator would.  The
modules that it imports stay imported.

Nothing is tried again while a part of a revision is committed and its version row is not.
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

from migrator.pipeline.apply.failure import RETRYABLE
from migrator.postgres.control_connection import lost
from migrator.postgres.session import ConnectFailed, QueryFailed, message_of

if TYPE_CHECKING:
    from migrator.pipeline.apply.revisions import Part

log = logging.getLogger("migrator.apply")

LOSSES = 3
"""How many lost connections are tried again: a revision that makes the server fail does so each time."""

_GONE = ("08", "57P01", "57P02", "57P03")
_ENDED_FOR_A_REASON = frozenset({"25P03", "25P04", "57P05"})
"""The server's own timeouts for sessions and transactions: they would end the next attempt as well."""


class Cause(Enum):
    """Why an attempt failed: what a later one may not meet, or anything else."""

    BUSY = "lock_timeout, deadlock or serialization failure"
    LOST = "the connection was lost"
    OTHER = "anything else"


@dataclass(frozen=True)
class Attempt:
    """What one failed pass through ``env.py`` left.

    ``busy`` and ``losses`` count the attempts that failed in that way, this one too.  ``settled`` says whether the
    server has ended the transaction and has told the version rows; ``unfinished`` are the parts that are committed
    without their version row; ``stopped`` says that a signal came.
    """

    cause: Cause
    busy: int = 0
    losses: int = 0
    settled: bool = True
    unfinished: tuple[Part, ...] = ()
    stopped: bool = False


def may_repeat(attempt: Attempt, lock_retries: int) -> bool:
    """Decide whether ``env.py`` is run again, from the top.

    ``lock_retries`` is the number of attempts after the first one that a lock may fail.
    """
    if attempt.stopped or attempt.unfinished or not attempt.settled:
        return False
    if attempt.cause is Cause.BUSY:
        return attempt.busy <= lock_retries
    return attempt.cause is Cause.LOST and attempt.losses <= LOSSES


def cause_of(error: BaseException, *, connected: bool, gone: bool, answers: Callable[[], bool]) -> Cause:
    """Say why an attempt failed.

    ``connected`` says whether ``env.py`` had reached the database, ``gone`` whether its driver's connection is closed;
    ``answers`` asks whether the control connection still works.
    """
    if not isinstance(error, (Exception, SystemExit)) or isinstance(error, ConnectFailed):
        return Cause.OTHER  # a ConnectFailed was waited for already
    chain = list(_chain(error))
    codes = {code for item in chain for code in _codes(item)}
    if codes & RETRYABLE:
        return Cause.BUSY
    if codes & _ENDED_FOR_A_REASON:
        return Cause.OTHER
    if gone or any(code.startswith(_GONE) for code in codes):
        return Cause.LOST
    if any(getattr(item, "connection_invalidated", False) or lost(item) for item in chain):
        return Cause.LOST
    # env.py could not connect: its address may be wrong, unless ours does not answer either.
    network = any(isinstance(item, OSError) or _of_a_driver(item) for item in chain)
    return Cause.LOST if not connected and network and not answers() else Cause.OTHER


def cut_alike(ages: Sequence[float]) -> float:
    """Return after how many seconds of a statement connections were cut, each time; 0 where they were not cut alike.

    Something between that ends idle connections does so: it sees no byte while the server works.
    """
    if len(ages) < 2 or min(ages) < 1 or max(ages) > 2 * min(ages):
        return 0.0
    return sum(ages) / len(ages)


def told(error: BaseException) -> bool:
    """Whether the server itself said why it ended a connection."""
    return any(code for item in _chain(error) for code in _codes(item))


class Pass(Protocol):
    """One run of ``env.py``, and what can be learnt of it afterwards."""

    def begin(self) -> None:
        """Forget what the last pass saw of its connection."""

    def run(self) -> None:
        """Run ``env.py``; raises what it raised, also what it caught itself."""

    def cause(self, error: BaseException) -> Cause:
        """Say why it failed."""

    def settle(self) -> tuple[Part, ...]:
        """Wait until its transaction has ended; return the parts that are committed without their version row.

        Raises QueryFailed and ConnectFailed where the server does not tell.
        """

    def stopped(self) -> bool:
        """Whether a signal came."""

    def pause(self, seconds: float) -> None:
        """Wait; raises Interrupt."""


class Attempts:
    """Goes through ``env.py`` as often as it takes, ``lock_retries`` more times at most where a lock is busy."""

    def __init__(self, lock_retries: int) -> None:
        self._lock_retries = lock_retries
        self.busy = 0
        self.losses = 0

    @property
    def count(self) -> int:
        """Return how many attempts failed because of a lock."""
        return max(1, self.busy)

    def run(self, one: Pass) -> None:
        """Run the passes; raises what the last one raised."""
        while True:
            one.begin()
            error = self._failure(one)
            if error is None:
                return
            attempt = self._look(one, error)
            if not may_repeat(attempt, self._lock_retries):
                raise error
            pause = self._say(attempt.cause, error)
            del error  # it may keep env.py's connection
            gc.collect()
            one.pause(pause)

    @staticmethod
    def _failure(one: Pass) -> BaseException | None:
        try:
            one.run()
        except BaseException as error:  # noqa: BLE001 - raised by run(), unless it is tried again
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
        """Log that ``env.py`` is run again, and return the seconds to wait before."""
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
    """Wait, and call ``check`` meanwhile, which raises where a signal came."""
    deadline = time.monotonic() + seconds
    check()
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        check()


def _reason(error: BaseException) -> str:
    """Return the first thing in an error's chain that has words."""
    return next((message_of(item) for item in _chain(error) if str(item)), type(error).__name__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it came from: a driver's is often wrapped twice, its own first."""
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
