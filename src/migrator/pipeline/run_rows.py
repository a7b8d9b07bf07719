"""The run in the ledger: that it begins to apply, how it ended, and what it found done without it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from migrator import bookkeeping
from migrator.drift import snapshot_if_moved
from migrator.edited import EDITED
from migrator.history import History
from migrator.interruption import Interrupt
from migrator.ledger import FOUND, GONE
from migrator.outcome import Outcome
from migrator.past import Standing, read_standing
from migrator.postgres import ConnectFailed, QueryFailed, Session
from migrator.run import Run, alive, harmless, known
from migrator.stages.inspect import Inspection
from migrator.stages.leftovers import built
from migrator.stages.lock import lock_if_free

log = logging.getLogger("migrator.ledger")


@contextlib.contextmanager
def on_the_books(this: Run, session: Session, history: History) -> Iterator[None]:
    """Add the run to the ledger when the block ends, well or not."""
    try:
        yield
    except (Exception, Interrupt) as error:
        if harmless(this, error):
            raise  # the run begins again
        told = known(this, error)
        _close(this, session, history, this.record.failed(told))
        raise told from error
    _close(this, session, history, this.record.succeeded())


def begin(this: Run, session: Session, found: Inspection) -> None:
    """Note that the run is about to apply, so that the next one knows what it left should it be killed."""
    table = found.version_table
    if table is None or not this.settings.ledger or not found.plan.revisions:
        return
    try:
        this.record.transactions.add(
            bookkeeping.begin(
                session,
                table,
                this.record.author(this.settings.actor),
                command=f"{this.request.kind} {this.request.destination}",
                plan=found.plan,
                indexes=[str(index) for index in built(session, found.plan)],
            )
        )
    except QueryFailed as error:
        if error.lost:
            raise
        log.info("the ledger does not say that this run began: %s", error.text)


def _close(this: Run, session: Session, history: History, outcome: Outcome) -> None:
    table = this.record.version_table
    if table is None or not this.settings.ledger or this.record.restored:
        return  # the row of a run that restored came with what was restored
    author = this.record.author(this.settings.actor)
    # Edits that were let pass are told of each time: without a digest, no run with nothing to do takes it for settled.
    edited = any(finding.rule.startswith(EDITED) for finding in outcome.findings)
    try:
        with alive(this, session) as living:
            digest = "" if edited else history.digest
            record = this.record
            bookkeeping.close(living, table, author, outcome, digest, record.failed_for, record.schema)
    except (ConnectFailed, QueryFailed) as error:
        log.warning("the ledger does not say how this run ended: %s", error.text)


def settle_up(this: Run, session: Session, history: History, found: Inspection) -> None:
    """Bring the ledger up to date in a run with nothing to do, where another image or plain Alembic was at work."""
    table, digest = found.version_table, history.digest
    only_looks = this.request.kind == "verify" or not this.settings.ledger
    if table is None or only_looks or found.ahead or found.edits or _settled(history, found, found.standing):
        return
    try:
        with lock_if_free(session) as held:
            standing = read_standing(session, table)
            if held and not _settled(history, found, standing):
                author = this.record.author(this.settings.actor)
                bookkeeping.settle(session, history, table, standing.entries, found.current, author)
                schema = snapshot_if_moved(session, this.settings, table)
                bookkeeping.close(session, table, author, this.record.succeeded(), digest, schema=schema)
    except QueryFailed as error:
        log.info("the ledger was left as it is: %s", error.text)


def _settled(history: History, found: Inspection, standing: Standing) -> bool:
    return standing.clean(history.digest) and not bookkeeping.differences(
        history, standing.entries, found.current, FOUND, GONE
    )
