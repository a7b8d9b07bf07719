"""A gate in a migration: a statement that lasts until the test lets it go on, however quick or slow the machine is.

    with Gate(database) as gate:
        run = start_migrator(cwd=project(revisions=[Revision("r001", None, gate.statement)]), database=database)
        run.wait_for(gate.reached)
        ...                # it stands there, in the middle of its statement
        gate.open()        # this and every later statement of the kind passes

Whoever stands there waits for no lock, so that no `lock_timeout` ends it and nobody is named as blocking it: it asks
for an advisory lock again and again, which the gate holds.
"""

from __future__ import annotations

from types import TracebackType

from tests.support.servers import Database

_KEY = 4711
_WAIT = (
    f"WHILE NOT pg_try_advisory_lock_shared({_KEY}) LOOP PERFORM pg_sleep(0.05); END LOOP;"
    f" PERFORM pg_advisory_unlock_shared({_KEY});"
)


class Gate:
    """Closed from the beginning; a server that stops opens it, as does the end of the block."""

    body = _WAIT
    """Statements of a PL/pgSQL function that waits."""
    statement = f"DO $gate$ BEGIN {_WAIT} END $gate$"
    """The same as one statement of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._session = database.connect(application_name="the gate")
        self._session.autocommit = True
        self._session.cursor().execute("SELECT pg_advisory_lock(%s)", (_KEY,))

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()

    def reached(self) -> bool:
        """Whether a session of the database stands there."""
        waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        return bool(self._database.psql(waits))

    def open(self) -> None:
        """Let pass who stands there, and all who come later."""
        self._session.close()
