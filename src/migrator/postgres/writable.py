"""Refuse a session that cannot write: on a standby, or with read-only transactions."""

from __future__ import annotations

from migrator.errors import AccessDenied
from migrator.postgres.session import Session


def demand(session: Session) -> None:
    """Raise :class:`AccessDenied` if the server accepts no writes."""
    if session.facts.in_recovery:
        raise AccessDenied(
            f"{session.target} is a standby and accepts no changes.",
            next_step="point migrator to the primary (several hosts with target_session_attrs=read-write find it)",
        )
    if session.facts.read_only:
        raise AccessDenied(
            f"{session.target} accepts only read-only transactions (default_transaction_read_only is on).",
            next_step="ALTER ROLE or ALTER DATABASE ... SET default_transaction_read_only = off",
        )
