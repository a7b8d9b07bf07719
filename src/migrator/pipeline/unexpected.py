"""Turn an error that no stage expects into the error that says what to do."""

from __future__ import annotations

from migrator.errors import AccessDenied, HistoryError, Internal, MigratorError, Partial, Unreachable
from migrator.postgres.errors import (
    ConnectFailed,
    QueryFailed,
    Refusal,
    classify,
    had_no_free_connection,
    message_of,
    sqlstate_of,
)
from migrator.runtime.resource_errors import lack, without


def translate(error: Exception) -> MigratorError:
    """Turn an unexpected error outside of apply into an error with a code."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, (QueryFailed, ConnectFailed)):
        code = f" [{error.sqlstate}]" if error.sqlstate else ""
        if isinstance(error, ConnectFailed) and (error.waited or error.no_free_connection):
            return without_room(f"{text}{code}")
        if isinstance(error, ConnectFailed) or error.lost:
            return Unreachable(
                f"The connection to Postgres was lost: {text}{code}.",
                next_step="run it again when Postgres is back",
            )
        if error.sqlstate == "42501":
            return AccessDenied(
                f"The role lacks a privilege that migrator needs: {text}{code}.",
                next_step="grant it, or run as the owner of the database",
            )
        if error.sqlstate.startswith("53"):  # insufficient_resources
            return Unreachable(
                f"The server lacks a resource that a query of migrator needs: {text}{code}.",
                next_step="give the server more of it, then run it again",
            )
        return Internal(f"A query of migrator itself failed: {text}{code}.", next_step="please report it")
    if why := lack(error):
        return without(why)
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
    if had_no_free_connection(error):
        return without_room(what)
    if "OperationalError" in type(error).__name__ and not code:
        # psycopg2 has no code for a failed connection.
        if classify("", text) is Refusal.DENIED:
            return AccessDenied(what, next_step="check user and password with `migrator wait`")
        return Unreachable(what, next_step="check that Postgres runs: `migrator wait`")
    if changes:
        return Partial(
            what,
            state="Alembic ran on its own: it is not known what was committed.",
            next_step="check with `migrator current`",
        )
    return HistoryError(what, next_step="fix the cause; `migrator alembic --help` shows the usage")


def without_room(text: str) -> Unreachable:
    """Return the error for a server, or a pooler, that has no room for another connection."""
    return Unreachable(
        f"No further connection was possible: {text.rstrip('.')}.",
        next_step="run it again when fewer sessions are connected (a run takes 2, a backup 3, a restore 4); "
        "else raise max_connections, the CONNECTION LIMIT of the role or the database, or the "
        "pooler's limit; MIGRATOR_WAIT_TIMEOUT bounds this wait",
    )


def sqlstate(error: BaseException) -> str:
    """Return the SQLSTATE of an exception of any driver, through SQLAlchemy or not; empty if it has none."""
    codes = (sqlstate_of(item) for item in (getattr(error, "orig", None), error, error.__cause__) if item)
    return next(filter(None, codes), "")
