"""Decide what follows from an attempt: run ``env.py`` again, done, or failed with a code and a sentence.

Every rule of it is here, and none of it touches the world. A rolled-back transaction also undoes the settings
of ``env.py`` in it (search_path, role, timeouts, locks), and a new connection never had them. So every retry
runs ``env.py`` from the start, as the next run of migrator would. Its imported modules stay imported.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from migrator.config.settings import Settings
from migrator.errors import (
    AccessDenied,
    Blocked,
    HistoryError,
    Interrupted,
    MigratorError,
    Partial,
    RolledBack,
    Unreachable,
)
from migrator.outcome import Finding
from migrator.pipeline.apply.attempt import RETRYABLE, Attempt, Cause, LockFailure
from migrator.pipeline.unexpected import sqlstate, translate, without_room
from migrator.postgres.errors import (
    ConnectFailed,
    QueryFailed,
    chain,
    had_no_free_connection,
    message_of,
    sqlstate_of,
)
from migrator.postgres.quoting import quote_literal
from migrator.runtime.resource_errors import lack, without
from migrator.runtime.signals import Interrupt

LOSSES = 3
"""How many lost connections are retried: a revision that crashes the server does so each time."""


@dataclass(frozen=True)
class Again:
    """Run ``env.py`` again, from the top, after so many seconds; ``sentence`` says why."""

    after: float
    sentence: str
    lock_failure: LockFailure | None = None


@dataclass(frozen=True)
class Done:
    """The plan is applied."""


@dataclass(frozen=True)
class Failed:
    """The run ends with this error."""

    error: MigratorError


def decide(attempt: Attempt, settings: Settings, jitter: float) -> Again | Done | Failed:
    """Decide what follows from an attempt; ``jitter`` is a random number from 0 to 1.

    Nothing is retried after a signal, while a part of a revision is committed without its version row,
    or before the server has ended the transaction and returned the version rows.
    """
    if attempt.error is None:
        return Done()
    if attempt.signal or attempt.unfinished or not attempt.settled:
        return Failed(explain(attempt))
    if attempt.cause is Cause.LOST and attempt.losses <= LOSSES:
        return Again(
            0.0,
            "the server is back and has rolled back the open transaction: running env.py again "
            f"({attempt.losses} of {LOSSES})",
        )
    if attempt.cause is Cause.BUSY and attempt.busy <= settings.lock_retries:
        seconds = jitter * min(10.0, 0.5 * 2 ** min(attempt.busy - 1, 5))
        failure = attempt.raised or attempt.error  # env.py may have ended in another way
        code = next(code for code in map(sqlstate_of, chain(failure)) if code in RETRYABLE)
        missed = LockFailure(reason(attempt.error).rstrip("."), code)
        times = f"attempt {attempt.busy + 1} of {settings.lock_retries + 1}"
        return Again(seconds, f"{missed.reason}: rolled back, retrying in {seconds:.1f} s ({times})", missed)
    return Failed(explain(attempt))


def reason(error: BaseException) -> str:
    """Return the first error with a message in an error's chain; a driver's own comes first."""
    errors = (getattr(error, "orig", None) or error, *chain(error))
    return next((message_of(item) for item in errors if str(item)), type(error).__name__)


class CannotRunAgain(Exception):
    """A lock failure, after which ``env.py`` failed before it connected: it cannot run twice in a process."""

    def __init__(self, lock_failure: LockFailure, error: BaseException) -> None:
        super().__init__(
            f"{lock_failure.reason}; env.py cannot run a second time in one process "
            f"({type(error).__name__}: {reason(error)})"
        )
        self.sqlstate = lock_failure.sqlstate


def explain(attempt: Attempt) -> MigratorError:
    """Turn a failed attempt into the error that says what happened and where the database stands."""
    error = _cause(attempt)
    what = _what(error, attempt)
    if attempt.cut_after:
        what += (
            f" Each attempt lost its connection about {attempt.cut_after:.0f} s after its statement "
            "began, and the server was up. A proxy or a firewall in between ends connections that look "
            "idle."
        )
    way_back = _way_back(attempt)
    if attempt.rows is None and not attempt.anything_committed and not isinstance(error, Interrupt):
        return Unreachable(
            f"{what} Postgres did not come back.",
            state="Nothing was committed: the server rolls back the open transaction.",
            next_step="run it again when Postgres is back; `migrator current` then shows where the database is",
        )
    if attempt.rows is None:
        return Partial(
            f"{what} The database could not be read after that.",
            state="It is not known what was committed.",
            next_step=f"run `migrator current` when Postgres answers again; {way_back}",
        )
    if attempt.rows != attempt.plan.before or attempt.revisions:
        return _partial(what, way_back, attempt, _cure(error, attempt))
    if attempt.unfinished:
        return Partial(
            what,
            state=f"{_parts(attempt)} The rest was rolled back; the database is at {attempt.where}.",
            next_step=f"{_finish(attempt)}; {way_back}",
        )
    return _unchanged(error, what, attempt)


def _cause(attempt: Attempt) -> BaseException:
    """Return the error to report: that of a cancelled statement, for one, stands for the signal."""
    error = attempt.error or Interrupt(attempt.signal)
    if attempt.signal:
        return Interrupt(attempt.signal)
    failed_early = attempt.cause is Cause.OTHER and not attempt.connected
    if attempt.retries and failed_early and not isinstance(error, MigratorError):
        return CannotRunAgain(attempt.retries, error)
    if isinstance(error, SystemExit) and attempt.raised is not None:
        return attempt.raised  # env.py caught it, and ended in another way
    while type(error).__name__ == "PendingRollbackError" and error.__context__ is not None:
        error = error.__context__  # SQLAlchemy only reports the broken transaction that followed
    return error


def _parts(attempt: Attempt) -> str:
    """Return which revisions are partly committed."""
    names = ", ".join(attempt.unfinished)
    rows = "its version row was not" if len(attempt.unfinished) == 1 else "their version rows were not"
    was = "was" if attempt.certain else "may have been"
    return f"A part of {names} {was} committed outside of its transaction; {rows}."


def _finish(attempt: Attempt) -> str:
    """Return what to do about the committed parts."""
    names, command = ", ".join(attempt.unfinished), f"migrator {attempt.plan.kind} {attempt.plan.destination}"
    if attempt.repeatable:
        return (
            f"fix the cause, then run `{command}`: it repeats {names}, and its committed part is safe "
            "to repeat"
        )
    return f"undo the committed part of {names} by hand, then run `{command} --retry`"


_AROUND = (
    "raise that proxy's idle timeout (HAProxy: timeout client and timeout server), or set "
    "MIGRATOR_DIRECT_URL to an address that goes around it"
)


def _cannot_leave(error: BaseException | None) -> bool:
    """Tell whether Alembic's ``autocommit_block`` met a transaction that Alembic did not begin: it asserts
    that.

    https://alembic.sqlalchemy.org/en/latest/api/runtime.html#alembic.runtime.migration.MigrationContext.autocommit_block
    """
    while error is not None:  # env.py may raise another one from it
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, AssertionError) and names[-1:] == ["autocommit_block"]:
            return True
        error = error.__cause__ or error.__context__
    return False


def _cure(error: BaseException, attempt: Attempt) -> str:
    """Return the fix for an error that is not the revision's fault; empty if it may be."""
    code, failed = sqlstate(error), attempt.failed_in
    if _cannot_leave(error):
        return (
            "in env.py, begin no transaction before context.configure() (or commit it there), and call "
            "context.run_migrations() in `with context.begin_transaction():`, like Alembic's own "
            "template"
        )
    if code == _TOO_LONG and "version_num" in str(getattr(error, "statement", "") or ""):
        return (
            f"the id {failed} has {len(failed)} characters, more than version_num takes: ALTER TABLE "
            "the version table ALTER version_num TYPE varchar(255), or shorten the id"
        )
    if "Online migration expected to match" in str(error) and attempt.rolled_back_by:  # Alembic's own words
        return (
            f"use a savepoint in {attempt.rolled_back_by} (op.get_bind().begin_nested()): it rolled back the "
            "transaction with the version row of the revision before it; then run migrator again"
        )
    if "Online migration expected to match" in str(error):
        return (
            "the row of the version table could not be changed: look for a trigger, a rule or row-level "
            "security on that table, and for another tool that writes it; then run migrator again"
        )
    first = bool(failed) and attempt.plan.kind == "upgrade" and failed == attempt.plan.revisions[0].revision
    if code in _IS_THERE and first and not attempt.plan.before and not attempt.plan.baseline:
        return (
            "the version table is empty; if the existing objects belong to this application, name "
            "their revision: `migrator upgrade --baseline REV`"
        )
    return ""


_TOO_LONG = "22001"
_IS_THERE = frozenset({"42P07", "42P06", "42701", "42710", "42723"})
"""Duplicate tables, schemas, columns, objects and functions."""


def _partial(what: str, way_back: str, attempt: Attempt, cure: str) -> Partial:
    landed, total = attempt.revisions, len(attempt.plan.revisions)
    done = "reverted" if attempt.plan.kind == "downgrade" else "applied"
    rows = attempt.where
    state = f"{len(landed)} of {total} revisions were {done} and committed; the database is at {rows}."
    if attempt.at:
        were = "was" if len(landed) == 1 else "were"
        state = f"{', '.join(landed)} {were} {done} and committed; the database is at {rows}."
    if attempt.unfinished:
        state += f" {_parts(attempt)}"
    if attempt.plan.baseline and not landed:
        state = f"The database was stamped {rows}; no revision was applied."
    cause = _AROUND if attempt.cut_after else cure or "fix the cause"
    again = f"{cause}, then continue with `migrator {attempt.plan.kind} {attempt.plan.destination}`"
    if attempt.unfinished:
        again = _finish(attempt)
    elif attempt.rows == attempt.plan.after and not attempt.at:
        again = "fix the cause, then check with `migrator verify`"
    return Partial(what, state=state, next_step=f"{again}; {way_back}")


def _unchanged(error: BaseException, what: str, attempt: Attempt) -> MigratorError:
    if isinstance(error, Interrupt):
        return Interrupted(what, next_step="run it again", state="Everything was rolled back.")
    if isinstance(error, MigratorError):
        return error
    if isinstance(error, (QueryFailed, ConnectFailed)):
        return translate(error)
    code = sqlstate(error)
    if code in RETRYABLE:
        times = f" It was tried {attempt.busy} times." if attempt.busy > 1 else ""
        by = f" It was last blocked by {'; '.join(map(str, attempt.blockers))}." if attempt.blockers else ""
        return Blocked(
            f"{what}{times}{by}",
            state="Everything was rolled back.",
            next_step=_end_prepared([gid for blocker in attempt.blockers for gid in blocker.gids])
            or "run it again when the table is less busy, or raise MIGRATOR_LOCK_TIMEOUT or "
            "MIGRATOR_LOCK_RETRIES",
        )
    if code == "42501":  # also before env.py is entered: Alembic creates its version table on the way
        return _may_not(what)
    if not attempt.entered:
        if had_no_free_connection(error):
            return without_room(what)
        if why := lack(error):
            return without(why)
        if code.startswith("28") or code == "3D000" or "OperationalError" in type(error).__name__:
            return AccessDenied(
                what,
                next_step="env.py connects by itself: check that it uses migrator's address "
                "(MIGRATOR_URL_VARIABLE names the variable that env.py reads)",
            )
        return HistoryError(
            what,
            next_step="fix env.py, or add its imports to the image (prepend_sys_path in alembic.ini, "
            "PYTHONPATH, or FROM migrator); if the application's own command sets something before "
            "env.py loads, such as attributes of Alembic's Config, set that with MIGRATOR_BOOTSTRAP",
        )
    if attempt.cut_after:
        return RolledBack(
            what, state="Everything was rolled back.", next_step=f"{_AROUND}, then run migrator again"
        )
    # Without a revision, the end of the transaction or of env.py failed.
    where = f"revision {attempt.failed_in}" if attempt.failed_in else "the cause"
    cure = _cure(error, attempt) or f"fix {where}, then run migrator again"
    return RolledBack(what, state="Everything was rolled back.", next_step=cure)


def _end_prepared(gids: Sequence[str]) -> str:
    """Return the commands that end prepared transactions, which never end by themselves; empty if there are
    none.
    """
    if not gids:
        return ""
    statements = " ".join(f"ROLLBACK PREPARED {quote_literal(gid).strip()};" for gid in gids)
    return f"{statements} (or COMMIT PREPARED, if its coordinator says so), then run it again"


def none_committed(findings: Sequence[Finding], *, committed: bool) -> MigratorError:
    """Return the error for revisions that ran to their end, after which the version table is as before.

    ``committed`` says that one of their transactions is committed nevertheless.
    """
    if committed:
        return Partial(
            "env.py ran the revisions, but the version table does not show them: a revision may have moved, "
            "emptied or dropped it.",
            state="At least a part of them was committed.",
            next_step="look where the version table is now; env.py has to look there too (version_table, "
            "version_table_schema, search_path)",
        )
    for finding in findings:
        if finding.rule == "rolled-back":  # after SQLAlchemy's own rollback, env.py has nothing to commit
            return RolledBack(
                f"env.py ran the revisions and committed none of them: {finding.place} rolled back "
                "their common transaction.",
                state="Everything was rolled back.",
                next_step=f"use a savepoint in {finding.place} (op.get_bind().begin_nested()), then run it "
                "again",
            )
    return RolledBack(
        "env.py ran the revisions and committed none of them.",
        state="Everything was rolled back.",
        next_step="in env.py, call context.run_migrations() in `with context.begin_transaction():`, like "
        "Alembic's own template",
    )


def without_migrations() -> HistoryError:
    """Return the error for an ``env.py`` that ran no migrations."""
    return HistoryError(
        "env.py ended without running migrations (it never called context.run_migrations() online).",
        next_step="check with `migrator alembic upgrade head --sql` whether Alembic can run env.py",
    )


def _may_not(what: str) -> AccessDenied:
    """Return the error for a statement that the role may not run."""
    return AccessDenied(
        what,
        state="Everything was rolled back.",
        next_step="grant the missing privilege, or migrate as the owner of the objects",
    )


def _what(error: BaseException, attempt: Attempt) -> str:
    where = f"Revision {attempt.failed_in} failed" if attempt.failed_in else "Alembic failed"
    if not attempt.entered and sqlstate(error) != "42501":
        where = "env.py failed"
    if isinstance(error, Interrupt):
        return f"Interrupted by {error.name}" + (
            f" in revision {attempt.failed_in}." if attempt.failed_in else "."
        )
    if isinstance(error, MigratorError):
        return error.message
    if isinstance(error, SystemExit):
        return f"{where}: it called sys.exit({error.code!r})."
    if _cannot_leave(error):
        return f"{where}: it calls autocommit_block() in a transaction that env.py began, not Alembic."
    code = sqlstate(error)
    text = message_of(getattr(error, "orig", None) or error).rstrip(".")
    kind = "" if code else f"{type(error).__name__}: "
    statement = " ".join(str(getattr(error, "statement", "") or "").split())
    shown = (
        f" The statement: `{statement[:300]}{'...' if len(statement) > 300 else ''}`." if statement else ""
    )
    return f"{where}: {kind}{text}{f' [{code}]' if code else ''}.{shown}"


def _way_back(attempt: Attempt) -> str:
    ways = []
    before = ", ".join(sorted(attempt.plan.before)) or "base"
    if (
        attempt.plan.kind == "upgrade"
        and len(attempt.plan.before) <= 1
        and attempt.alike
        and attempt.rows not in (None, attempt.plan.before)
        and not attempt.unfinished  # a committed part outside of its transaction cannot be reverted
        and not set(attempt.plan.one_way) & set(attempt.revisions)
    ):
        ways.append(f"`migrator downgrade {before}{' --yes' if before == 'base' else ''}`")
    if attempt.backup_id:
        ways.append(f"`migrator restore {attempt.backup_id} --yes`")
    return "to go back: " + " or ".join(ways) if ways else "there is no backup to go back to"
