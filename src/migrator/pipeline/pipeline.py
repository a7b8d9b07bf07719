"""One run, first stage to last: the table of contents of the product.

::

    wait -> inspect --nothing pending--> verify
               |
             lock -> inspect -> guard -> backup -> apply -> verify

A block (``with``) surrounds stages: the session, the run lock, the run's row in the ledger, the maintenance
window, MIGRATOR_ON_FAILURE. The stages are in ``stages/`` and ``apply/``. ``run_stages.py`` gives each its
input and writes its result into the run's record.
"""

from __future__ import annotations

import logging

from migrator.outcome import Outcome
from migrator.pipeline import run_stages
from migrator.pipeline.context import ATTEMPTS, Run, ending, harmless
from migrator.pipeline.maintenance_window import window
from migrator.pipeline.on_failure import undoing_on_failure
from migrator.pipeline.run_rows import recorded_in_the_ledger
from migrator.pipeline.stages.inspect import Inspection
from migrator.pipeline.verification import verify_patiently
from migrator.postgres.errors import ConnectFailed, QueryFailed
from migrator.postgres.session import Session
from migrator.project import History
from migrator.runtime.signals import Interrupt

log = logging.getLogger("migrator")


def run(this: Run) -> Outcome:
    """Run a request from the first to the last stage; never raises."""
    interruption = this.interruption
    interruption.outcome = lambda: interruption.whole(
        this.record.failed(ending(this, Interrupt(interruption.received)))
    )
    try:
        _patiently(this)
    except (Exception, Interrupt) as error:  # noqa: BLE001 - the one place that catches everything
        outcome = this.record.failed(ending(this, error))
    else:
        outcome = this.record.succeeded()
    interruption.outcome = lambda: interruption.whole(outcome)
    return outcome


def _patiently(this: Run) -> None:
    """Run the stages; start again if Postgres went away before anything was applied."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _stages(this)
            return
        except (QueryFailed, ConnectFailed) as error:
            if attempt == ATTEMPTS or not harmless(this, error):
                raise
            log.warning(
                "the connection was lost (%s); nothing is applied yet: starting again (%d of %d)",
                error.text.rstrip("."),
                attempt,
                ATTEMPTS - 1,
            )


def _stages(this: Run) -> None:
    """Find the pending work, and do it under the run lock."""
    history, expectations = run_stages.load(this)
    with run_stages.connected(this, history) as (this, session):
        found = run_stages.inspect(this, session, history)
        if this.request.kind == "verify" or run_stages.nothing_to_do(this, found):
            run_stages.confirm(this, session, history, found, expectations)
            return
        with run_stages.run_lock(this, session, history, found) as now:
            if run_stages.nothing_to_do(this, now):  # another run has done it
                run_stages.confirm(this, session, history, now, expectations)
            else:
                _change(this, session, history, now, expectations)


def _change(
    this: Run, session: Session, history: History, found: Inspection, expectations: run_stages.Wanted
) -> None:
    """Do the pending work; the run lock is held."""
    run_stages.refuse(this, session, history, found)
    with recorded_in_the_ledger(this, session, history):
        run_stages.guard(this, session, found)
        with window(this, session):
            run_stages.back_up(this, session, found)
            run_stages.clear_invalid_indexes(this, session, found, expectations)
            before = run_stages.begin(this, session, found)
            with undoing_on_failure(
                this, history, lambda plan: run_stages.apply(this, session, history, found, plan)
            ):
                table = run_stages.apply(this, session, history, found, found.plan)
                verify_patiently(this, session, table, expectations, history, before)
            run_stages.remove_old_backups(this, session)
