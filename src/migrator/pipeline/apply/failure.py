"""After a failure: compare what the database says now with what it said before, and tell the truth about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from migrator.errors import (
    AccessDenied,
    Blocked,
    HistoryError,
    Internal,
    Interrupted,
    MigratorError,
    Partial,
    RolledBack,
    Unreachable,
)
from migrator.history import Plan
from migrator.interruption import Interrupt
from migrator.postgres import ConnectFailed, QueryFailed, Refusal, classify, message_of

RETRYABLE = frozenset({"55P03", "40P01", "40001"})
"""SQLSTATEs that pass by themselves: lock_not_available, deadlock_detected, serialization_failure."""


@dataclass(frozen=True)
class Aftermath:
    """What is known once the applying connection is gone.

    ``rows`` are the version rows now, None where they could not be read; ``entered`` says whether ``env.py``
    got as far as a connection, ``anything_committed`` whether something may have been committed;
    ``committed_parts`` are revisions that left their transaction on the way.
    """

    plan: Plan
    rows: frozenset[str] | None
    entered: bool
    anything_committed: bool = True
    failed_in: str = ""
    committed_parts: Sequence[str] = ()
    backup_id: str = ""
    attempts: int = 1
    blockers: Sequence[str] = ()

    @property
    def landed(self) -> tuple[str, ...]:
        """Return the revisions that were committed, in order."""
        if self.rows is None or self.rows == self.plan.before:
            return ()
        names = [revision.revision for revision in self.plan.revisions]
        if self.rows == self.plan.after:
            return tuple(names)
        if self.failed_in in names:
            return tuple(names[: names.index(self.failed_in)])
        return tuple(names)


def explain(error: BaseException, after: Aftermath) -> MigratorError:
    """Turn a failure of apply into the error that says what happened and what state the database is in."""
    what = _what(error, after)
    way_back = _way_back(after)
    if after.rows is None and not after.anything_committed and not isinstance(error, Interrupt):
        return Unreachable(
            f"{what} Postgres did not come back.",
            state="Nothing was committed: what was under way, the server rolls back.",
            next_step="run it again when Postgres is back; `migrator current` then shows where the database is",
        )
    if after.rows is None:
        return Partial(
            f"{what} The database could not be asked what was committed.",
            state="Its state is not known.",
            next_step=f"`migrator current` when it answers again; {way_back}",
        )
    if after.rows != after.plan.before:
        return _partial(what, way_back, after)
    if after.failed_in and after.failed_in in after.committed_parts:
        return Partial(
            what,
            state=f"A part of {after.failed_in} was committed (it leaves its transaction), but its version row was"
            " not: running it again may fail on what is already there.",
            next_step=f"undo by hand what {after.failed_in} did before it failed, then run again; {way_back}",
        )
    return _unchanged(error, what, after)


def translate(error: Exception) -> MigratorError:
    """Turn what nobody expected, outside of apply, into an error with a code."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, (QueryFailed, ConnectFailed)):
        code = f" [{error.sqlstate}]" if error.sqlstate else ""
        if isinstance(error, ConnectFailed) or error.lost:
            return Unreachable(
                f"The connection to Postgres was lost: {text}{code}.",
                next_step="run it again when Postgres is back",
            )
        if error.sqlstate == "42501":
            return AccessDenied(
                f"The role may not do what migrator needs: {text}{code}.",
                next_step="grant it, or run as the owner of the database",
            )
        return Internal(f"A query of migrator's own failed: {text}{code}.", next_step="please report it")
    return Internal(
        f"A defect in migrator: {type(error).__name__}: {text}.",
        state="`migrator current` shows the state of the database.",
        next_step="please report it, with the log at MIGRATOR_LOG_LEVEL=debug",
    )


def outside_of_stages(
    error: Exception, *, changes: bool, who: str = "Alembic's own command"
) -> MigratorError:
    """Turn a failure under Alembic's own command line; ``changes`` says whether that may have changed the database."""
    code, text = sqlstate(error), message_of(getattr(error, "orig", None) or error).rstrip(".")
    shown = f"{text} [{code}]" if code else f"{type(error).__name__}: {text}"
    what = f"{who} failed: {shown}."
    if "OperationalError" in type(error).__name__ and not code:
        # psycopg2 has no code for a failed connection.
        if classify("", text) is Refusal.DENIED:
            return AccessDenied(what, next_step="check user and password, which `migrator wait` does too")
        return Unreachable(what, next_step="check that Postgres runs: `migrator wait`")
    if changes:
        return Partial(
            what,
            state="Alembic was on its own: what it has committed is not known.",
            next_step="`migrator current` shows where the database is",
        )
    return HistoryError(what, next_step="mend what it says; `migrator alembic --help` shows how it is used")


def _partial(what: str, way_back: str, after: Aftermath) -> Partial:
    landed, total = after.landed, len(after.plan.revisions)
    done = "reverted" if after.plan.kind == "downgrade" else "applied"
    rows = ", ".join(sorted(after.rows or ())) or "base"
    state = f"{len(landed)} of {total} revisions were {done} and committed; the database is at {rows}."
    if after.failed_in and after.failed_in in after.committed_parts:
        state += f" A part of {after.failed_in} was committed too (it leaves its transaction)."
    if after.plan.baseline and not landed:
        state = f"The database was stamped {rows}; no revision was applied."
    again = f"`migrator {after.plan.kind} {after.plan.destination}` goes on from there"
    if after.rows == after.plan.after:
        again = "`migrator verify` checks it"
    return Partial(what, state=state, next_step=f"mend the cause, then {again}; {way_back}")


def _unchanged(error: BaseException, what: str, after: Aftermath) -> MigratorError:
    if isinstance(error, Interrupt):
        return Interrupted(what, next_step="run it again", state="All was rolled back.")
    if isinstance(error, MigratorError):
        return error
    if isinstance(error, (QueryFailed, ConnectFailed)):
        return translate(error)
    code = sqlstate(error)
    if code in RETRYABLE:
        times = f" It was tried {after.attempts} times." if after.attempts > 1 else ""
        by = f" It was last blocked by {'; '.join(after.blockers)}." if after.blockers else ""
        return Blocked(
            f"{what}{times}{by}",
            state="All was rolled back.",
            next_step="run it again when the table is less busy, or give it longer with MIGRATOR_LOCK_TIMEOUT"
            " or MIGRATOR_LOCK_RETRIES",
        )
    if code == "42501":  # before env.py is entered too: Alembic makes its version table on the way
        return _may_not(what)
    if not after.entered:
        if code.startswith("28") or code == "3D000" or "OperationalError" in type(error).__name__:
            return AccessDenied(
                what,
                next_step="env.py connects by itself: check that it uses the address that migrator was given"
                " (MIGRATOR_URL_VARIABLE names the variable it reads)",
            )
        return HistoryError(
            what,
            next_step="mend env.py, or put what it imports into the image (prepend_sys_path in alembic.ini,"
            " PYTHONPATH, or FROM migrator)",
        )
    where = f" {after.failed_in}" if after.failed_in else ""
    return RolledBack(
        what, state="Everything was rolled back.", next_step=f"mend revision{where}, then run migrator again"
    )


def _may_not(what: str) -> AccessDenied:
    """Return the error for a statement that the role may not run."""
    return AccessDenied(
        what,
        state="Everything was rolled back.",
        next_step="grant the role what the statement needs, or migrate as the owner of the objects",
    )


def _what(error: BaseException, after: Aftermath) -> str:
    where = f"Revision {after.failed_in} failed" if after.failed_in else "Alembic failed"
    if not after.entered and sqlstate(error) != "42501":
        where = "env.py failed"
    if isinstance(error, Interrupt):
        return f"Interrupted by {error.name}" + (
            f" in revision {after.failed_in}." if after.failed_in else "."
        )
    if isinstance(error, MigratorError):
        return error.message
    if isinstance(error, SystemExit):
        return f"{where}: it called sys.exit({error.code!r})."
    code = sqlstate(error)
    text = message_of(getattr(error, "orig", None) or error).rstrip(".")
    kind = "" if code else f"{type(error).__name__}: "
    statement = " ".join(str(getattr(error, "statement", "") or "").split())
    shown = (
        f" The statement: `{statement[:300]}{'...' if len(statement) > 300 else ''}`." if statement else ""
    )
    return f"{where}: {kind}{text}{f' [{code}]' if code else ''}.{shown}"


def sqlstate(error: BaseException) -> str:
    """Return the SQLSTATE of an exception of any driver, through SQLAlchemy or not; empty where it has none."""
    for candidate in (getattr(error, "orig", None), error, error.__cause__):
        for name in ("pgcode", "sqlstate"):
            value = getattr(candidate, name, None)
            if isinstance(value, str) and value:
                return value
    return ""


def _way_back(after: Aftermath) -> str:
    ways = []
    before = ", ".join(sorted(after.plan.before)) or "base"
    if (
        after.plan.kind == "upgrade"
        and len(after.plan.before) <= 1
        and after.rows not in (None, after.plan.before)
    ):
        ways.append(f"`migrator downgrade {before}{' --yes' if before == 'base' else ''}`")
    if after.backup_id:
        ways.append(f"`migrator restore {after.backup_id} --yes`")
    return "to go back: " + " or ".join(ways) if ways else "there is no backup to go back to"
