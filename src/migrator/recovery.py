"""Go through ``env.py`` again where the migration lost its connection and nothing of what it lost was committed.

A new connection knows nothing of what ``env.py`` did on the old one (search_path, role, locks and timeouts of its
own), so ``env.py`` itself is run again, as the next run of migrator would run it.  Before that, the control
connection and the run lock are back, the old connection is gone from the server, and the server has said what
became of the transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from migrator.errors import MigratorError
from migrator.history import driver_calls
from migrator.lifeline import lost
from migrator.postgres import ConnectFailed, QueryFailed, message_of
from migrator.versions import VersionTable, read_rows

if TYPE_CHECKING:
    from migrator.stages.apply import Application

log = logging.getLogger("migrator.apply")

LIMIT = 3
"""So often at most: a revision that makes the server fall over does so each time."""

_GONE = ("08", "57P01", "57P02", "57P03")
_ENDED_FOR_A_REASON = frozenset({"25P03", "25P04", "57P05"})
"""The server's own timeouts for sessions and transactions: they would end the next attempt as well."""


class Recovery:
    """Runs the way through ``env.py``, again where a connection was lost and nothing with it."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._used = 0
        self._connection: Any = None
        self._lost = False
        self._table: VersionTable | None = None
        self._heads: tuple[str, ...] = ()
        self._steps: Sequence[Any] = ()
        self._results = 0

    def run(self, go: Callable[[], None]) -> None:
        """Call ``go`` until it gets through; raises what it raised last."""
        while True:
            self._connection, self._lost = None, False
            try:
                go()
                if self._application.steps.failure is not None:
                    raise self._application.steps.failure  # env.py swallowed it
                return
            except BaseException as error:
                if not self._may_go_on(error):
                    raise
            # Outside of the except block, where the error no longer keeps env.py's connection alive.
            self._application.steps.failure, self._application.steps.running = None, ""

    def entered(
        self, connection: Any, table: VersionTable, heads: Sequence[str], steps: Sequence[Any]
    ) -> None:
        """Note where a pass begins: SQLAlchemy's connection, the version table, its rows, and the steps to do."""
        self._connection, self._table = connection, table
        self._heads, self._steps = tuple(heads), tuple(steps)
        self._results = len(self._application.steps.results)

    def around(self, run_migrations: Callable[[], None]) -> None:
        """Run the migrations, and look at the connection where they fail: ``env.py`` closes it afterwards."""
        try:
            run_migrations()
        except BaseException:
            self._lost = self._connection is not None and driver_calls.gone(self._connection)
            raise

    def _may_go_on(self, error: BaseException) -> bool:
        """Find out whether another pass takes nothing twice, and wait until it can begin."""
        application = self._application
        if application.interruption.received or not isinstance(error, (Exception, SystemExit)):
            return False
        if self._used >= LIMIT or not self._is_loss(error):
            return False
        self._used += 1
        reason = next((message_of(item) for item in _chain(error) if str(item)), type(error).__name__)
        log.warning("the migration's connection was lost: %s", reason.rstrip("."), extra={"stage": "apply"})
        try:
            application.lifeline.ensure()
            if not application.ended() or not self._nothing_lost():
                return False
        except (ConnectFailed, QueryFailed) as failure:
            log.warning("the database does not answer: %s", failure)
            return False
        application.interruption.check()
        log.warning(
            "the server is back and has rolled back what was under way: going through env.py again (%d of %d)",
            self._used,
            LIMIT,
            extra={"stage": "apply"},
        )
        return True

    def _is_loss(self, error: BaseException) -> bool:
        """Whether it was a lost connection that the pass failed of, and not a statement or a program."""
        if isinstance(error, ConnectFailed):
            return False  # it was waited for already
        chain = list(_chain(error))
        codes = {code for item in chain for code in _codes(item)}
        if codes & _ENDED_FOR_A_REASON:
            return False
        if self._lost or any(code.startswith(_GONE) for code in codes):
            return True
        if any(getattr(item, "connection_invalidated", False) or lost(item) for item in chain):
            return True
        # env.py could not connect: its address may be wrong, unless ours does not answer either.
        network = any(isinstance(item, OSError) or _of_a_driver(item) for item in chain)
        return self._connection is None and network and not self._application.session.answers()

    def _nothing_lost(self) -> bool:
        """Ask the server what became of the transaction; what was committed meanwhile is kept."""
        application, steps = self._application, self._application.steps
        if self._connection is None or self._table is None:
            return True
        if steps.running and not steps.transactional:
            steps.committed()  # a statement may have been done whose answer was lost
        steps.look_for_commits()
        if steps.running in steps.committed_parts:
            return False
        try:
            rows = read_rows(application.session, self._table)
        except MigratorError:
            return False
        done = application.history.steps_done(self._steps, self._heads, rows)
        if done is None:
            return False
        landed = [step for step in self._steps[:done] if getattr(step, "revision", None) is not None]
        del steps.results[self._results + len(landed) :]
        return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it came from: a driver's is often wrapped twice."""
    waiting: list[BaseException | None] = [error]
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
