"""The run in the ledger: its start, its end, and the changes that it found."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from migrator.errors import AccessDenied
from migrator.ledger import writer
from migrator.ledger.edited_files import EDITED
from migrator.ledger.queries import Standing, read_standing, read_visited
from migrator.ledger.table import FOUND, GONE
from migrator.outcome import Outcome
from migrator.pipeline.context import Run, alive, ending, harmless
from migrator.pipeline.drift import snapshot_if_moved
from migrator.pipeline.stages.inspect import Inspection
from migrator.pipeline.stages.invalid_indexes import built
from migrator.pipeline.stages.lock import lock_if_free
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refused
from migrator.postgres.session import Session
from migrator.postgres.version_table import VersionTable
from migrator.project import History
from migrator.runtime.signals import Interrupt

log = logging.getLogger("migrator.ledger")


@contextlib.contextmanager
def recorded_in_the_ledger(this: Run, session: Session, history: History) -> Iterator[None]:
    """Add the run to the ledger when the block ends, also after an error."""
    try:
        yield
    except (Exception, Interrupt) as error:
        if harmless(this, error):
            raise  # the run starts again
        told = ending(this, error)
        _close(this, session, history, this.record.failed(told))
        raise told from error
    _close(this, session, history, this.record.succeeded())


def begin(this: Run, session: Session, found: Inspection) -> None:
    """Record that the run is about to apply; the next run needs it if this one ends badly."""
    table = found.version_table
    if table is None or not this.settings.ledger or not found.plan.revisions:
        return
    try:
        this.record.transactions.add(
            writer.begin(
                session,
                table,
                this.record.author(this.settings.actor),
                command=f"{this.request.kind} {this.request.destination}",
                plan=found.plan,
                indexes=[str(index) for index in built(session, found.plan)],
                backup_id=this.record.backup_id,
                rollback_backup_id=this.record.rollback_backup_id,
            )
        )
    except Refused as error:
        log.info("the ledger does not record the start of this run: %s", error.text)


def _close(this: Run, session: Session, history: History, outcome: Outcome) -> None:
    if (
        not (this.record.version_table or this.record.home)
        or not this.settings.ledger
        or this.record.restored
    ):
        return  # the row of a run that restored is in the restored database
    author = this.record.author(this.settings.actor)
    # Accepted edits are reported each time: without a digest, no up-to-date check ends early.
    edited = any(finding.rule.startswith(EDITED) for finding in outcome.findings)
    try:
        with alive(this, session) as living:
            digest = "" if edited else history.digest
            record = this.record
            for table in _beside(living, record.version_table, record.home):
                schema = record.schema if table == record.version_table else None
                writer.close(
                    living,
                    table,
                    author,
                    outcome,
                    digest,
                    record.failed_for,
                    schema,
                    keep=this.settings.drift_keep,
                    visits=record.visits,
                )
    except (ConnectFailed, QueryFailed) as error:
        log.warning("the ledger does not record the end of this run: %s", error.text)
    except AccessDenied as error:  # others got access meanwhile: the next run reports it
        log.warning("the ledger does not record the end of this run: %s", error)


def _beside(session: Session, *tables: VersionTable | None) -> Iterator[VersionTable]:
    """Yield the version tables that have a ledger each; one may be named with its schema and without."""
    seen = set()
    for table in tables:
        if table is None:
            continue
        found = None if table.schema else session.find(table.name)
        place = (found[0] if found else table.schema, table.name)
        if place not in seen:
            seen.add(place)
            yield table


def settle_up(this: Run, session: Session, history: History, found: Inspection) -> None:
    """Update the ledger in a run without pending revisions, if another image or plain Alembic worked on the
    database.
    """
    table, digest, role = found.version_table, history.digest, this.settings.role
    only_looks = this.request.kind == "verify" or not this.settings.ledger
    if table is None or only_looks or found.ahead or found.edits:
        return
    known = len(this.record.visits) < 2 or set(this.record.visits) == set(read_visited(session, table, role))
    if known and _settled(history, found, found.standing):
        return
    try:
        with lock_if_free(session) as held:
            standing = read_standing(session, table, role)
            if held and not (known and _settled(history, found, standing)):
                author = this.record.author(this.settings.actor)
                writer.settle(session, history, table, standing.entries, found.current, author)
                schema = snapshot_if_moved(session, this.settings, table)
                writer.close(
                    session,
                    table,
                    author,
                    this.record.succeeded(),
                    digest,
                    schema=schema,
                    keep=this.settings.drift_keep,
                    visits=this.record.visits,
                )
    except QueryFailed as error:
        log.info("the ledger was not changed: %s", error.text)


def _settled(history: History, found: Inspection, standing: Standing) -> bool:
    return standing.clean(history.digest) and not writer.differences(
        history, standing.entries, found.current, FOUND, GONE
    )
