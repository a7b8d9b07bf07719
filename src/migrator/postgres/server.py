"""The server: the facts that a session asks for on connecting, and the settings that it makes."""

from __future__ import annotations

from typing import NamedTuple

from migrator.postgres import search_path


class ServerFacts(NamedTuple):
    """The facts about server and database from one query on connecting.

    ``started_at`` (microseconds since 1970) and ``database_oid`` distinguish one database from every
    other.
    """

    version: str
    version_number: int
    in_recovery: bool
    read_only: bool
    database: str
    user: str
    started_at: int
    database_oid: int
    pid: int

    @property
    def major(self) -> int:
        return self.version_number // 10000


FACTS = (
    f"current_setting('{search_path.PATH}'), {search_path.RESTRICTS},"  # noqa: S608 - constants only
    " current_setting('server_version'), current_setting('server_version_num')::int,"
    " pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',"
    " current_database()::text, current_user::text,"
    " (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint,"
    " (SELECT oid::bigint FROM pg_database WHERE datname = current_database()), pg_backend_pid()"
)
"""The columns of :class:`ServerFacts`, after the user's search_path and whether the server can refuse views."""


def no_timeouts(server_major: int) -> str:
    """Return the settings that free a session from the timeouts of its role and database, which are for the
    application.

    Not from ``lock_timeout``: no session waits longer for a lock than was set.
    """
    names = ["statement_timeout", "idle_in_transaction_session_timeout"]
    names += ["idle_session_timeout"] if server_major >= 14 else []
    names += ["transaction_timeout"] if server_major >= 17 else []
    return "; ".join(f"SET {name} = 0" for name in names)


def dead_client_values(server_major: int) -> dict[str, str]:
    """Return the settings that make the server check whether a session's client is still there.

    During a statement it checks every two seconds (PostgreSQL 14 and newer). While it waits for the
    client, TCP keepalives notice within about 11 seconds. An unacknowledged answer is given up after
    15.
    https://www.postgresql.org/docs/current/runtime-config-connection.html#RUNTIME-CONFIG-TCP-SETTINGS
    """
    values = {
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "2",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "15000",
    }
    if server_major >= 14:
        values["client_connection_check_interval"] = "2s"
    return values


def dead_client_settings(server_major: int) -> str:
    """Return the query that sets :func:`dead_client_values`."""
    return "SELECT " + ", ".join(
        f"pg_catalog.set_config('{name}', '{value}', false)"
        for name, value in dead_client_values(server_major).items()
    )
