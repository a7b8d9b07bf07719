"""Live traffic: try a migration again that could not get its lock, where nothing is lost by it.

One ALTER that waits for its lock makes everybody behind it wait too, so ``lock_timeout`` ends the wait after
seconds.  The transaction is rolled back at once, for the locks that it already has keep others waiting, and tried
again after a growing, jittered pause.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from migrator.aftermath import RETRYABLE, sqlstate
from migrator.history.statements import can_roll_back, roll_back
from migrator.postgres import message_of

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationContext

log = logging.getLogger("migrator.apply")


class Attempts:
    """Runs ``context.run_migrations`` as often as it takes, ``retries`` more times at most.

    ``lasting`` says whether something that the failed attempt did is committed: then it is never run twice.
    """

    def __init__(self, retries: int, lasting: Callable[[], bool]) -> None:
        self._retries = retries
        self._lasting = lasting
        self.count = 0

    def run(self, run_migrations: Callable[[], None], get_context: Callable[[], MigrationContext]) -> None:
        """Run the migrations; raises what the last attempt raised."""

        def attempt() -> None:
            self.count += 1
            run_migrations()

        def can_pass(error: BaseException) -> bool:
            return sqlstate(error) in RETRYABLE and not self._lasting() and can_roll_back(get_context())

        def undo(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            roll_back(get_context())
            log.warning(
                "%s: rolled back, trying again in %.1f s (attempt %d of %d)",
                message_of(getattr(error, "orig", None) or error or Exception()),
                state.upcoming_sleep,
                state.attempt_number + 1,
                self._retries + 1,
                extra={"stage": "apply"},
            )

        Retrying(
            retry=retry_if_exception(can_pass),
            stop=stop_after_attempt(self._retries + 1),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            before_sleep=undo,
            reraise=True,
        )(attempt)
