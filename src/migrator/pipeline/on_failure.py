"""When apply or verify failed and something is committed: stop, downgrade, or restore (MIGRATOR_ON_FAILURE).

A signal always stops: its sender wants an end. The ledger records a downgrade or a restore, in the
restored database itself and before it takes its name. So neither the next run nor the replicas that
wait for the lock apply the same revision of the same image again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping

from migrator.errors import (
    HistoryError,
    MigratorError,
    Partial,
    RestoreFailed,
    Unsafe,
    VerifyFailed,
    WasRestored,
)
from migrator.ledger import queries
from migrator.ledger import table as ledger
from migrator.ledger.unfinished_runs import never_done
from migrator.outcome import ExitCode, Finding, Severity
from migrator.pipeline.context import Run, harmless, known
from migrator.pipeline.stages.inspect import Inspection
from migrator.postgres.errors import QueryFailed
from migrator.postgres.session import Session
from migrator.postgres.version_table import place_of
from migrator.project import History, Plan
from migrator.runtime.signals import Interrupt

log = logging.getLogger("migrator")


@contextlib.contextmanager
def undoing_on_failure(this: Run, history: History, run_plan: Callable[[Plan], object]) -> Iterator[None]:
    """Follow the setting after a failure in the block; raise the error that says how that ended.

    ``run_plan`` runs a plan through ``env.py``.
    """
    try:
        yield
    except (Exception, Interrupt) as error:
        if this.settings.on_failure == "stop" or harmless(this, error):
            raise
        told = known(this, error)
        if not isinstance(told, (Partial, VerifyFailed)) or _untouched(this) or this.interruption.received:
            raise told from error
        this.interruption.unblock()
        if this.settings.on_failure == "downgrade":
            outcome = _downgraded(this, history, told, run_plan)
        else:
            outcome = _restored(this, told, _memory(this, history))
        this.interruption.block()  # only the report remains
        raise outcome from error


def _untouched(this: Run) -> bool:
    """Tell whether the run changed nothing, or its changes are not known."""
    record = this.record
    if record.after is None:
        log.warning("nothing is rolled back: it is not known what was committed")
        return True
    return record.after == record.before and not record.committed_parts and not record.revisions


def _memory(this: Run, history: History) -> dict[str, str]:
    """Return the facts by which the next run recognises the same failure."""
    revision = this.record.failed_in
    sums = history.sums(revision) if revision and not history.unknown([revision]) else None
    return {
        "revision": revision,
        "checksum": sums.sha256 if sums else "",
        "digest": history.digest,
        "image": os.environ.get("MIGRATOR_IMAGE_VERSION", ""),
    }


def refuse_again(this: Run, session: Session, history: History, found: Inspection) -> None:
    """Raise :class:`Unsafe` if this image failed with a pending revision before, and the run was reverted or
    restored.

    Not with MIGRATOR_RETRY. The same failure means the same revision file, history and image version:
    the cause may be in another file.
    """
    if this.settings.retry or not this.settings.ledger or this.request.kind != "upgrade":
        return
    before = queries.read_failed(session, found.version_table, this.settings.role)
    if before is None or (before.digest, before.image) != (
        history.digest,
        os.environ.get("MIGRATOR_IMAGE_VERSION", ""),
    ):
        return
    pending = {item.revision for item in found.plan.revisions}
    if before.revision and before.revision not in pending:
        return
    how = "the database was restored" if before.code == ExitCode.RESTORED else "its revisions were reverted"
    what = f"revision {before.revision}" if before.revision else "verify"
    finding = Finding(
        rule="failed-before",
        severity=Severity.ERROR,
        place=before.revision or "verify",
        sentence=f"{what} failed in run {before.run_id} at {before.at:%Y-%m-%d %H:%M:%S %Z}, and {how}",
        remedy="deploy an image with a fix, or use --retry if the cause was elsewhere",
    )
    raise Unsafe(
        f"This image has failed here before: {finding.sentence}.",
        next_step=f"fix it and deploy the changed image, or run `migrator upgrade {this.request.destination} "
        "--retry`",
        findings=[finding],
    )


def refuse_one_way(this: Run, found: Inspection) -> None:
    """Raise :class:`HistoryError` if MIGRATOR_ON_FAILURE=downgrade could not revert the plan."""
    if this.settings.on_failure != "downgrade" or this.request.kind != "upgrade" or not found.plan.one_way:
        return
    names = found.plan.one_way
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise HistoryError(
        f"MIGRATOR_ON_FAILURE=downgrade is not possible: {told} {'has' if len(names) == 1 else 'have'} "
        "no downgrade(), or one that only raises.",
        next_step="write the downgrade(), or set MIGRATOR_ON_FAILURE=restore (or stop)",
    )


def refuse_to_repeat(this: Run, session: Session, found: Inspection) -> None:
    """Raise :class:`Unsafe` if an earlier run has committed a part of a pending revision.

    Also if a part of a downgrade is committed, for any revision that an upgrade would apply on top of
    it. Not with MIGRATOR_RETRY, but that run also names the backup from before the part. Only the
    ledger knows of such parts.
    """
    if not this.settings.ledger or this.request.kind == "stamp":
        return
    pending, upgrade = {item.revision for item in found.plan.revisions}, found.plan.kind != "downgrade"
    left = queries.read_partial(session, found.version_table, this.settings.role)
    parts = [
        part
        for part in left
        if ((part.revision in pending and part.upgrade == upgrade) or (upgrade and not part.upgrade))
        and not never_done(session, part.statement)
    ]
    if not parts:
        return
    this.record.backup_before_damage = backup = parts[0].backup_id
    if this.settings.retry:
        return
    command = f"migrator {found.plan.kind} {this.request.destination} --retry"
    findings = [
        Finding(
            rule="partly-committed",
            severity=Severity.ERROR,
            place=part.revision,
            sentence=f"run {part.run_id} may have committed a part of {part.name} at {part.at:%Y-%m-%d %H:%M:%S %Z} "
            f"without its version row; the part began with: {part.statement}",
            remedy=f"undo that part by hand, then run `{command}`"
            + (
                f"; if the revision is complete, run `migrator stamp {part.revision}`" if part.upgrade else ""
            ),
        )
        for part in parts
    ]
    restore = f"; or run `migrator restore {backup} --yes` (the backup from before it)" if backup else ""
    raise Unsafe(
        f"migrator does not repeat a committed part: {findings[0].sentence}.",
        next_step=f"{findings[0].remedy}{restore}",
        findings=findings,
    )


# -- downgrade --------------------------------------------------------------------------------------------


def _downgraded(
    this: Run, history: History, told: MigratorError, run_plan: Callable[[Plan], object]
) -> MigratorError:
    """Revert this run's revisions, and return the error that says how that went."""
    record = this.record
    before, rows = record.before or (), record.after or ()
    reason = _no_way_back(this, history, before, rows)
    if reason:
        return _with(told, f"No downgrade was run: {reason}.")
    log.warning("%s Reverting this run's revisions.", told.message)
    try:
        run_plan(history.plan("downgrade", before[0] if before else "base", rows))
    except (MigratorError, Interrupt) as error:
        what = error.message if isinstance(error, MigratorError) else f"interrupted by {error.name}."
        return Partial(
            f"{told.message} The downgrade also failed: {what}",
            state=f"The database is at {_names(record.after)}.",
            next_step=told.next_step,
        )
    if record.after != record.before:
        return Partial(
            f"{told.message} The downgrade did not return to the start.",
            state=f"The database is at {_names(record.after)}.",
            next_step=told.next_step,
        )
    record.failed_for = _memory(this, history)
    left = (
        f" The committed part of {', '.join(record.committed_parts)} is still there."
        if record.committed_parts
        else ""
    )
    data = (
        f"; to restore the rows too: `migrator restore {record.rollback_backup_id} --yes`"
        if record.rollback_backup_id
        else ""
    )
    return Partial(
        f"{told.message} This run's revisions were reverted.",
        state=f"The database is at {_names(record.after)} again.{left} A downgrade does not undo what the "
        "revisions deleted or changed in rows.",
        next_step="fix it and deploy a changed image (this one refuses until then; --retry overrides "
        f"that){data}",
    )


def _no_way_back(this: Run, history: History, before: tuple[str, ...], rows: tuple[str, ...]) -> str:
    """Return why this run's revisions cannot be reverted, or an empty string."""
    plan = this.record.plan
    if this.request.kind != "upgrade" or plan is None:
        return f"{this.request.kind} is not an upgrade"
    if plan.baseline:
        return "this run adopted the schema, and a downgrade would delete the older objects"
    if len(this.record.visits) > 1:
        return "env.py uses several version tables"
    if len(before) > 1:
        return f"the run began at several heads ({', '.join(before)})"
    if set(rows) == set(before):
        return f"only a part of {', '.join(this.record.committed_parts)} is committed, and no revision"
    unknown = history.unknown(rows)
    return f"{', '.join(unknown)} is not in this image" if unknown else ""


# -- restore ----------------------------------------------------------------------------------------------


def _restored(this: Run, told: MigratorError, memory: Mapping[str, str]) -> MigratorError:
    """Restore this run's backup, and return the error that says how that went."""
    from migrator.backups.clients import WouldLose
    from migrator.backups.restore.restore import RestoreOptions, restore
    from migrator.backups.restore.write_detection import Incomplete

    settings, record = this.settings, this.record
    if not record.backup_id:
        reasons = [stage.reason for stage in record.stages if stage.stage == "backup" and stage.reason]
        why = f" ({reasons[-1]})" if reasons else ""
        return _with(told, f"The database was not restored: there is no backup{why}.")
    certain = settings.discard_writes or settings.maintenance_window
    log.warning("%s Restoring %s.", told.message, record.backup_id)
    again = f"`migrator restore {record.backup_id} --yes`"
    remembered: list[bool] = []
    was, record.after = record.after, None  # not known during the restore
    try:
        with record.stage("restore") as details:
            restored = restore(
                settings.required_target,
                settings,
                record.backup_id,
                to=None,
                run_id=record.run_id,
                application_name=this.application_name,
                replace=True,
                options=RestoreOptions(
                    own=None if certain else lambda: frozenset(record.transactions),
                    before_swap=lambda session: remembered.append(_remember(this, session, told, memory)),
                    swapped=this.interruption.block,
                ),
            )
            details.update(kept=restored.kept, rows=restored.rows)
    except Incomplete as error:
        return _with(
            told,
            f"The database was not restored: {error}.",
            f"`migrator restore {record.backup_id} --yes --incomplete` restores the rest and keeps the "
            "current state",
        )
    except WouldLose as error:
        return _with(
            told,
            f"The database was not restored: {error}.",
            f"{again} restores it anyway and keeps the current database beside it (to allow this next "
            "time: MIGRATOR_DISCARD_WRITES or MIGRATOR_MAINTENANCE_WINDOW)",
        )
    except Interrupt as error:
        this.interruption.block()
        return _with(told, f"The restore was interrupted by {error.name} and changed nothing.", again)
    except MigratorError as error:
        return RestoreFailed(
            f"{told.message} The restore also failed: {error.message}",
            state=f"{told.state} The backup is {(record.backup or {}).get('place', record.backup_id)}.",
            next_step=f"{error.next_step}; then {again}" if error.next_step else again,
        )
    finally:
        record.after = was
    record.restored, record.after, record.revisions = True, record.before, ()
    kept = f" The failed database is now {restored.kept}." if restored.kept else ""
    kept += f" The failed state is in backup {restored.safety}." if restored.safety else ""
    kept += _still_there(this)
    return WasRestored(
        _sentence(this, told),
        state=" ".join((f"The database is at {_names(record.before)} again.{kept}", *restored.notes)),
        next_step="fix it and deploy a changed image ("
        + ("this one refuses until then; --retry overrides that)" if any(remembered) else _FORGOTTEN),
    )


def _still_there(this: Run) -> str:
    """Return what this run's own backup still contains: an earlier run left it before the backup."""
    record = this.record
    if record.rollback_backup_id == record.backup_id:
        return ""
    way = (
        f"`migrator restore {record.rollback_backup_id} --yes` restores the state before that"
        if record.rollback_backup_id
        else "there is no backup from before that"
    )
    return f" It still holds the committed part of a revision that an earlier run did not finish; {way}."


_FORGOTTEN = (
    "the ledger has no record of this failure: each run until then tries again and sets another "
    "database aside; MIGRATOR_KEEP_OLD bounds how many stay)"
)


def _sentence(this: Run, told: MigratorError) -> str:
    return f"{told.message} The database was restored from {this.record.backup_id}."


def _remember(this: Run, session: Session, told: MigratorError, memory: Mapping[str, str]) -> bool:
    """Add the run's row to the ledger of the database that is about to take the name; a failure is only a
    warning.

    Return whether the next run finds it; it does not without a version table.
    """
    record, table = this.record, this.record.version_table
    if table is None or not this.settings.ledger or place_of(session, table) is None:
        log.warning("the ledger cannot record this failure: the next run will try again")
        return False
    row = record.author(this.settings.actor).row(
        ledger.RUN,
        0,
        table,
        command=record.command,
        code=int(ExitCode.RESTORED),
        outcome=ExitCode.RESTORED.name,
        message=_sentence(this, told),
        rows_before=list(record.before or ()),
        rows_after=list(record.before or ()),
        backup_id=record.backup_id,
        details={"failed": dict(memory)},
    )
    try:
        ledger.append(session, table, [row])
    except QueryFailed as error:
        log.warning("the ledger cannot record this failure (%s): the next run will try again", error.text)
        return False
    return True


def _with(told: MigratorError, sentence: str, next_step: str = "") -> MigratorError:
    """Return the same kind of error with one more sentence about the state; nothing was reverted or restored."""
    return type(told)(
        told.message,
        state=f"{told.state} {sentence}".strip(),
        next_step=f"{told.next_step}; {next_step}" if next_step not in told.next_step else told.next_step,
        findings=told.findings,
    )


def _names(revisions: tuple[str, ...] | None) -> str:
    return ", ".join(revisions or ()) or "base"
