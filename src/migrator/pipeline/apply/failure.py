"""After a failure, compare the database with its earlier state, and report the truth."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

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
from migrator.pipeline.unexpected import sqlstate, translate, without_room
from migrator.postgres.errors import ConnectFailed, QueryFailed, had_no_free_connection, message_of
from migrator.postgres.quoting import quote_literal
from migrator.project import Plan
from migrator.runtime.resource_errors import lack, without
from migrator.runtime.signals import Interrupt

RETRYABLE = frozenset({"55P03", "40P01", "40001"})
"""SQLSTATEs that can pass by themselves: lock_not_available, deadlock_detected, serialization_failure."""


@dataclass(frozen=True)
class Aftermath:
    """The known facts after the applying connection is gone.

    ``rows`` are the current version rows, None if they could not be read. ``landed`` are the plan's
    revisions that these rows stand for, in order. ``entered`` says whether ``env.py`` got a connection.
    ``anything_committed`` says whether something may have been committed. ``unfinished`` are the
    revisions with a committed part and no version row. ``repeatable`` says that this part may run
    again, ``certain`` that one of its statements is known to be committed.
    """

    plan: Plan
    rows: frozenset[str] | None
    entered: bool
    anything_committed: bool = True
    failed_in: str = ""
    landed: Sequence[str] = ()
    unfinished: Sequence[str] = ()
    repeatable: bool = False
    certain: bool = True
    backup_id: str = ""
    attempts: int = 1
    cut_after: float = 0.0
    blockers: Sequence[str] = ()
    prepared: Sequence[str] = ()
    at: str = ""
    """Where the database stands, if ``env.py`` uses several version tables."""
    rolled_back_by: str = ""
    """The revision that rolled back its own transaction."""
    alike: bool = True
    """Whether all version tables started at the plan's rows."""

    @property
    def where(self) -> str:
        """Return where the database stands."""
        return self.at or ", ".join(sorted(self.rows or ())) or "base"

    @property
    def parts(self) -> str:
        """Return which revisions are partly committed; empty if none is."""
        if not self.unfinished:
            return ""
        names = ", ".join(self.unfinished)
        rows = "its version row was not" if len(self.unfinished) == 1 else "their version rows were not"
        was = "was" if self.certain else "may have been"
        return f"A part of {names} {was} committed outside of its transaction; {rows}."


def explain(error: BaseException, after: Aftermath) -> MigratorError:
    """Turn a failure of apply into the error that says what happened and where the database stands."""
    what = _what(error, after)
    if after.cut_after:
        what += (
            f" Each attempt lost its connection about {after.cut_after:.0f} s after its statement "
            "began, and the server was up. A proxy or a firewall in between ends connections that look "
            "idle."
        )
    way_back = _way_back(after)
    if after.rows is None and not after.anything_committed and not isinstance(error, Interrupt):
        return Unreachable(
            f"{what} Postgres did not come back.",
            state="Nothing was committed: the server rolls back the open transaction.",
            next_step="run it again when Postgres is back; `migrator current` then shows where the database is",
        )
    if after.rows is None:
        return Partial(
            f"{what} The database could not be read after that.",
            state="It is not known what was committed.",
            next_step=f"run `migrator current` when Postgres answers again; {way_back}",
        )
    if after.rows != after.plan.before or after.landed:
        return _partial(what, way_back, after, _cure(error, after))
    if after.unfinished:
        return Partial(
            what,
            state=f"{after.parts} The rest was rolled back; the database is at {after.where}.",
            next_step=f"{_finish(after)}; {way_back}",
        )
    return _unchanged(error, what, after)


def _finish(after: Aftermath) -> str:
    """Return what to do about the committed parts."""
    names, command = ", ".join(after.unfinished), f"migrator {after.plan.kind} {after.plan.destination}"
    if after.repeatable:
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


def _cure(error: BaseException, after: Aftermath) -> str:
    """Return the fix for an error that is not the revision's fault; empty if it may be."""
    code, failed = sqlstate(error), after.failed_in
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
    if "Online migration expected to match" in str(error) and after.rolled_back_by:  # Alembic's own words
        return (
            f"use a savepoint in {after.rolled_back_by} (op.get_bind().begin_nested()): it rolled back the "
            "transaction with the version row of the revision before it; then run migrator again"
        )
    if "Online migration expected to match" in str(error):
        return (
            "the row of the version table could not be changed: look for a trigger, a rule or row-level "
            "security on that table, and for another tool that writes it; then run migrator again"
        )
    first = bool(failed) and after.plan.kind == "upgrade" and failed == after.plan.revisions[0].revision
    if code in _IS_THERE and first and not after.plan.before and not after.plan.baseline:
        return (
            "the version table is empty; if the existing objects belong to this application, name "
            "their revision: `migrator upgrade --baseline REV`"
        )
    return ""


_TOO_LONG = "22001"
_IS_THERE = frozenset({"42P07", "42P06", "42701", "42710", "42723"})
"""Duplicate tables, schemas, columns, objects and functions."""


def _partial(what: str, way_back: str, after: Aftermath, cure: str) -> Partial:
    landed, total = after.landed, len(after.plan.revisions)
    done = "reverted" if after.plan.kind == "downgrade" else "applied"
    rows = after.where
    state = f"{len(landed)} of {total} revisions were {done} and committed; the database is at {rows}."
    if after.at:
        were = "was" if len(landed) == 1 else "were"
        state = f"{', '.join(landed)} {were} {done} and committed; the database is at {rows}."
    if after.unfinished:
        state += f" {after.parts}"
    if after.plan.baseline and not landed:
        state = f"The database was stamped {rows}; no revision was applied."
    cause = _AROUND if after.cut_after else cure or "fix the cause"
    again = f"{cause}, then continue with `migrator {after.plan.kind} {after.plan.destination}`"
    if after.unfinished:
        again = _finish(after)
    elif after.rows == after.plan.after and not after.at:
        again = "fix the cause, then check with `migrator verify`"
    return Partial(what, state=state, next_step=f"{again}; {way_back}")


def _unchanged(error: BaseException, what: str, after: Aftermath) -> MigratorError:
    if isinstance(error, Interrupt):
        return Interrupted(what, next_step="run it again", state="Everything was rolled back.")
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
            state="Everything was rolled back.",
            next_step=_end_prepared(after.prepared)
            or "run it again when the table is less busy, or raise MIGRATOR_LOCK_TIMEOUT or "
            "MIGRATOR_LOCK_RETRIES",
        )
    if code == "42501":  # also before env.py is entered: Alembic creates its version table on the way
        return _may_not(what)
    if not after.entered:
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
    if after.cut_after:
        return RolledBack(
            what, state="Everything was rolled back.", next_step=f"{_AROUND}, then run migrator again"
        )
    # Without a revision, the end of the transaction or of env.py failed.
    where = f"revision {after.failed_in}" if after.failed_in else "the cause"
    cure = _cure(error, after) or f"fix {where}, then run migrator again"
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


def _way_back(after: Aftermath) -> str:
    ways = []
    before = ", ".join(sorted(after.plan.before)) or "base"
    if (
        after.plan.kind == "upgrade"
        and len(after.plan.before) <= 1
        and after.alike
        and after.rows not in (None, after.plan.before)
        and not after.unfinished  # a committed part outside of its transaction cannot be reverted
        and not set(after.plan.one_way) & set(after.landed)
    ):
        ways.append(f"`migrator downgrade {before}{' --yes' if before == 'base' else ''}`")
    if after.backup_id:
        ways.append(f"`migrator restore {after.backup_id} --yes`")
    return "to go back: " + " or ".join(ways) if ways else "there is no backup to go back to"
