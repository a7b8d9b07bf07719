"""Wait until the database is at this image's heads, for backends, workers and cron jobs that must not
migrate.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from migrator.config.settings import Settings
from migrator.errors import NotCurrent
from migrator.ledger.compatibility import refuse_or_allow
from migrator.ledger.queries import Standing, read_standing
from migrator.pipeline.stages.inspect import UNKNOWN, Ask, asking, find_tables
from migrator.pipeline.stages.wait import wait
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable, refusal

if TYPE_CHECKING:
    from migrator.pipeline.apply.env_targets import Visit
    from migrator.pipeline.fast_path.up_to_date import FrozenHistory
    from migrator.project import History

log = logging.getLogger("migrator.wait")


def wait_for_current(
    frozen: FrozenHistory | None,
    load: Callable[[], History],
    settings: Settings,
    application_name: str,
    *,
    reinstall_logging: Callable[[], None],
) -> tuple[str, ...]:
    """Return the database's revisions as soon as nothing is pending, within ``settings.wait_timeout``
    seconds.

    With a manifest (``frozen``), the history is loaded only if the database is not at its heads. A
    newer schema is accepted if it declares this image compatible, or with MIGRATOR_ALLOW_AHEAD. It only
    reads, and needs only SELECT on the version table. Declarations are in the ledger, which is ignored
    if the role may not read it. Raises :class:`NotCurrent` after the timeout, :class:`DatabaseAhead`
    for revisions that this image does not know, and any connection error.
    """
    deadline = time.monotonic() + settings.wait_timeout
    wanted = _Wanted(frozen, load, settings, deadline, reinstall_logging)
    while True:
        rest = settings._replace(wait_timeout=wanted.left)
        session, _ = wait(settings.required_target, rest, application_name)
        with session:
            try:
                return wanted.on(session)
            except QueryFailed as error:
                if not error.lost:
                    raise
                log.info("the connection was lost, connecting again: %s", error.text)


class _Wanted:
    """The expected state and the deadline; outlives a lost connection."""

    def __init__(
        self,
        frozen: FrozenHistory | None,
        load: Callable[[], History],
        settings: Settings,
        deadline: float,
        reinstall_logging: Callable[[], None],
    ) -> None:
        self._frozen, self._load, self._reinstall_logging = frozen, load, reinstall_logging
        self._settings, self._deadline = settings, deadline
        self._said: tuple[str, float] = ("", 0.0)

    @functools.cached_property
    def _history(self) -> History:
        return self._load()

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self._deadline - time.monotonic())

    def on(self, session: Session) -> tuple[str, ...]:
        """Return the revisions as soon as nothing is pending."""
        while True:
            table, current, sure = self._look(session, ask=None)
            pending = self._pending(session, table, current)
            if not sure and (not pending or table is None):
                table, current, _ = self._look(session, ask=lambda: self._ask(session))
                pending = self._pending(session, table, current)
            if not pending:
                return current
            at = ", ".join(current) or "base"
            if not self.left:
                hint = self._history.branch_hint(self._settings.destination)
                raise NotCurrent(
                    f"{session.target} is at {at} after {self._settings.wait_timeout:g} s;"
                    f" {pending} of this image's revisions {'is' if pending == 1 else 'are'} pending.",
                    next_step="see how the run that migrates is doing (`migrator status`), or wait longer with"
                    f" MIGRATOR_WAIT_TIMEOUT{'; ' if hint else ''}{hint}",
                )
            now = time.monotonic()
            if at != self._said[0] or now - self._said[1] >= 10:
                self._said = (at, now)
                log.info(
                    "waiting for %s (%.0f s left): at %s, %d pending", session.target, self.left, at, pending
                )
            time.sleep(min(self.left, random.uniform(0.3, 1.0)))  # noqa: S311 - jitter, no secret

    def _look(self, session: Session, ask: Ask | None) -> tuple[VersionTable | None, tuple[str, ...], bool]:
        """Return the version table with the most pending revisions, its rows, and whether these are certainly
        all.
        """
        known = self._frozen or self._history
        where = find_tables(session, known, self._settings, self._count, ask)
        if ask and where.table is None and where.others:
            raise refusal(where.others)
        return where.table, where.rows, not where.doubt

    def _ask(self, session: Session) -> Sequence[Visit] | None:
        return asking(session, self._history, self._settings, self._reinstall_logging, locked=False)()

    def _count(self, rows: frozenset[str]) -> int:
        if self._frozen and self._frozen.rows == rows:
            return 0
        if self._history.unknown(rows):
            return UNKNOWN
        return len(self._history.plan("upgrade", self._settings.goal, rows).revisions)

    def _pending(self, session: Session, table: VersionTable | None, current: tuple[str, ...]) -> int:
        if self._frozen and self._frozen.rows == frozenset(current):
            return 0
        unknown = self._history.unknown(current)
        if unknown:
            why = refuse_or_allow(
                self._history,
                unknown,
                read_standing(session, table, self._settings.role) if self._settings.ledger else Standing(),
                allow_ahead=self._settings.allow_ahead,
                target=session.target,
                table=table,
            )
            log.info("the schema is newer than this image, and %s", why)
            return 0
        return self._count(frozenset(current))
