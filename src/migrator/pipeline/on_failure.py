"""When apply or verify failed and something is committed: stop, downgrade, or restore (MIGRATOR_ON_FAILURE).

A signal stops, whatever the setting says: whoever sent it wants an end.  What was taken back is remembered in the
ledger, in the very database that came back and before it takes its name, so that neither the next run nor the
replicas that wait for the lock apply the same revision of the same image again.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping

from migrator import ledger, past
from migrator.errors import MigratorError, Partial, RestoreFailed, Unsafe, VerifyFailed, WasRestored
from migrator.history import History, Plan
from migrator.interruption import Interrupt
from migrator.outcome import ExitCode, Finding, Severity
from migrator.postgres import QueryFailed, Session
from migrator.run import Run, harmless, known
from migrator.stages.inspect import Inspection

log = logging.getLogger("migrator")


@contextlib.contextmanager
def taking_back(this: Run, history: History, run_plan: Callable[[Plan], object]) -> Iterator[None]:
    """Do within the block's failure what the setting says; raises the error that tells how that ended.

    ``run_plan`` carries out a plan through ``env.py``.
    """
    try:
        yield
    except (Exception, Interrupt) as error:
        if this.settings.on_failure == "stop" or harmless(this, error):
            raise
        told = known(this, error)
        if not isinstance(told, (Partial, VerifyFailed)) or _untouched(this) or this.interruption.received:
            raise told from error
        this.interruption.expose()
        if this.settings.on_failure == "downgrade":
            outcome = _downgraded(this, history, told, run_plan)
        else:
            outcome = _restored(this, told, _memory(this, history))
        this.interruption.shield()  # what remains is to say it
        raise outcome from error


def _untouched(this: Run) -> bool:
    """Whether the run is known to have changed nothing, or nobody knows what it has changed."""
    record = this.record
    if record.after is None:
        log.warning("nothing is taken back: what was committed is not known")
        return True
    return record.after == record.before and not record.committed_parts


def _memory(this: Run, history: History) -> dict[str, str]:
    """Return what tells the next run that it is about to do the same again."""
    revision = this.record.failed_in
    sums = history.sums(revision) if revision and not history.unknown([revision]) else None
    return {
        "revision": revision,
        "checksum": sums.sha256 if sums else "",
        "digest": history.digest,
        "image": os.environ.get("MIGRATOR_IMAGE_VERSION", ""),
    }


def refuse_again(this: Run, session: Session, history: History, found: Inspection) -> None:
    """Raise :class:`Unsafe` where this very image has failed with what is pending, and it was taken back.

    Not with MIGRATOR_RETRY.  Who failed is told by the revision's file, the whole history, and the image's version:
    what makes it fail may be in another file.
    """
    if this.settings.retry or not this.settings.ledger or this.request.kind != "upgrade":
        return
    before = past.read_failed(session, found.version_table)
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
        remedy="deploy an image in which it is mended, or --retry where something else was the cause",
    )
    raise Unsafe(
        f"This very image has failed here before: {finding.sentence}.",
        next_step=f"mend it and deploy the changed image, or `migrator upgrade {this.request.destination} --retry`",
        findings=[finding],
    )


# -- downgrade --------------------------------------------------------------------------------------------


def _downgraded(
    this: Run, history: History, told: MigratorError, run_plan: Callable[[Plan], object]
) -> MigratorError:
    """Revert what this run applied, and return the error that says how that went."""
    record = this.record
    before, rows = record.before or (), record.after or ()
    reason = _no_way_back(this, history, before, rows)
    if reason:
        return _with(told, f"It was not downgraded: {reason}.")
    plan = history.plan("downgrade", before[0] if before else "base", rows)
    log.warning("%s Reverting what this run has applied.", told.message)
    try:
        run_plan(plan)
    except (MigratorError, Interrupt) as error:
        what = error.message if isinstance(error, MigratorError) else f"interrupted by {error.name}."
        return Partial(
            f"{told.message} The downgrade failed too: {what}",
            state=f"The database is at {_names(record.after)}.",
            next_step=told.next_step,
        )
    if record.after != record.before:
        return Partial(
            f"{told.message} The downgrade did not lead back to where it was.",
            state=f"The database is at {_names(record.after)}.",
            next_step=told.next_step,
        )
    record.failed_for = _memory(this, history)
    left = (
        f" A part of {record.failed_in} that it had committed is still there."
        if record.committed_parts
        else ""
    )
    data = f"; `migrator restore {record.backup_id} --yes` brings that back too" if record.backup_id else ""
    return Partial(
        f"{told.message} What this run had applied was reverted.",
        state=f"The database is at {_names(record.after)} again.{left} What the revisions deleted or changed in rows is"
        " not undone by a downgrade.",
        next_step=f"mend it and deploy a changed image (this one refuses until then, or with --retry){data}",
    )


def _no_way_back(this: Run, history: History, before: tuple[str, ...], rows: tuple[str, ...]) -> str:
    """Return why what was applied cannot be reverted, or an empty string."""
    plan = this.record.plan
    if this.request.kind != "upgrade" or plan is None:
        return f"{this.request.kind} is no upgrade"
    if plan.baseline:
        return "the schema was adopted in this run, and a downgrade would delete what was there before"
    if len(before) > 1:
        return f"it began at several heads ({', '.join(before)})"
    if set(rows) == set(before):
        return f"what was committed is a part of {this.record.failed_in}, and no revision"
    unknown = history.unknown(rows)
    return f"{', '.join(unknown)} is not of this image" if unknown else ""


# -- restore ----------------------------------------------------------------------------------------------


def _restored(this: Run, told: MigratorError, memory: Mapping[str, str]) -> MigratorError:
    """Restore this run's backup, and return the error that says how that went."""
    from migrator.backups.losses import Incomplete, WouldLose
    from migrator.backups.restore import Wishes, restore

    settings, record = this.settings, this.record
    if not record.backup_id:
        reasons = [stage.reason for stage in record.stages if stage.stage == "backup" and stage.reason]
        why = f" ({reasons[-1]})" if reasons else ""
        return _with(told, f"It was not restored: there is no backup{why}.")
    certain = settings.discard_writes or settings.maintenance_window
    log.warning("%s Restoring %s.", told.message, record.backup_id)
    again = f"`migrator restore {record.backup_id} --yes`"
    remembered: list[bool] = []
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
                wishes=Wishes(
                    own=None if certain else lambda: frozenset(record.transactions),
                    before_swap=lambda session: remembered.append(_remember(this, session, told, memory)),
                    swapped=this.interruption.shield,
                ),
            )
            details.update(kept=restored.kept, rows=restored.rows)
    except Incomplete as error:
        return _with(
            told,
            f"It was not restored: {error}.",
            f"`migrator restore {record.backup_id} --yes --incomplete` restores the rest all the same, and keeps what"
            " is there now",
        )
    except WouldLose as error:
        return _with(
            told,
            f"It was not restored: {error}.",
            f"{again} restores it all the same, and keeps the database as it is now beside it (or set"
            " MIGRATOR_DISCARD_WRITES or MIGRATOR_MAINTENANCE_WINDOW for the next time)",
        )
    except Interrupt as error:
        this.interruption.shield()
        return _with(told, f"The restore was interrupted by {error.name}, and has changed nothing.", again)
    except MigratorError as error:
        return RestoreFailed(
            f"{told.message} The restore failed too: {error.message}",
            state=f"{told.state} The backup is {(record.backup or {}).get('place', record.backup_id)}.",
            next_step=f"{error.next_step}; then {again}" if error.next_step else again,
        )
    record.restored, record.after, record.revisions = True, record.before, ()
    kept = f" As the failure left it, it is now {restored.kept}." if restored.kept else ""
    kept += f" As the failure left it, it is in backup {restored.safety}." if restored.safety else ""
    return WasRestored(
        _sentence(this, told),
        state=" ".join((f"The database is at {_names(record.before)} again.{kept}", *restored.notes)),
        next_step="mend it and deploy a changed image ("
        + ("this one refuses until then, or with --retry)" if any(remembered) else _FORGOTTEN),
    )


_FORGOTTEN = (
    "no ledger remembers this failure, so each run until then tries this one again, and sets another database aside:"
    " MIGRATOR_KEEP_OLD bounds how many stay)"
)


def _sentence(this: Run, told: MigratorError) -> str:
    return f"{told.message} The database was restored from {this.record.backup_id}."


def _remember(this: Run, session: Session, told: MigratorError, memory: Mapping[str, str]) -> bool:
    """Add the run's row to the ledger of the database that is about to take the name; it is not worth failing for.

    Returns whether the next run will find it: not beside a version table that is not there yet.
    """
    record, table = this.record, this.record.version_table
    if table is None or not this.settings.ledger or not ledger.exists(table, session.value):
        log.warning("no ledger can remember that this failed: the next run will try it again")
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
        log.warning(
            "the ledger cannot remember that this failed (%s): the next run will try it again", error.text
        )
        return False
    return True


def _with(told: MigratorError, sentence: str, next_step: str = "") -> MigratorError:
    """Return the error with one more sentence about the state, of the same kind; nothing was taken back."""
    return type(told)(
        told.message,
        state=f"{told.state} {sentence}".strip(),
        next_step=f"{told.next_step}; {next_step}" if next_step else told.next_step,
        findings=told.findings,
    )


def _names(revisions: tuple[str, ...] | None) -> str:
    return ", ".join(revisions or ()) or "base"
