"""The result of a restore, and the meaning of its failures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from migrator.backups import clients, databases, exported_snapshot
from migrator.backups.clients import failed
from migrator.backups.exported_snapshot import LockedOut, Relation
from migrator.backups.manifest import Backup
from migrator.errors import MigratorError, RestoreFailed
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refused
from migrator.postgres.quoting import quote_identifier
from migrator.postgres.session import Session

LOGGER = logging.getLogger("migrator.restore")


@dataclass(frozen=True)
class Compared:
    """How many tables were restored, how many of them were counted, and their rows."""

    tables: int
    counted: int
    rows: int


@dataclass(frozen=True)
class Restored:
    """The result of a restore.

    ``database`` now holds the backup. ``kept`` is the new name of the replaced database (empty if none
    was replaced, or if it was ``dropped``). ``safety`` is the id of the backup that was made of it for
    a restore in place. Of its ``tables``, ``counted`` have as many rows as in the manifest, ``rows`` in
    total; the others were too big to count. ``notes`` name the objects that differ from the backup.
    """

    backup: Backup
    database: str
    kept: str
    tables: int
    counted: int
    rows: int
    seconds: float
    notes: tuple[str, ...] = ()
    beside: bool = False
    dropped: str = ""
    safety: str = ""
    schema: str = ""

    @property
    def message(self) -> str:
        place = (
            f"schema {self.schema} of database {self.database}"
            if self.schema
            else f"database {self.database}"
        )
        count = f"{self.tables} table{'' if self.tables == 1 else 's'}"
        text = f"Restored {self.backup.id} into {place} in {self.seconds:.1f} s: "
        text += f"{count}, and {self.counted} of them were counted and have the backup's {self.rows} rows."
        if self.kept:
            text += f" The replaced database is now {self.kept}."
        if self.dropped:
            text += " The replaced database was dropped."
        if self.safety:
            text += f" Its earlier content is in backup {self.safety}."
        return " ".join((text, *self.notes))

    @property
    def next_step(self) -> str:
        """Return how to remove the leftovers."""
        if self.schema:
            return f"when you no longer need it: DROP SCHEMA {quote_identifier(self.schema)} CASCADE;"
        if self.kept:
            return f"when you no longer need it: DROP DATABASE {quote_identifier(self.kept)};"
        if self.beside:
            return f"when you no longer need it: DROP DATABASE {quote_identifier(self.database)};"
        if self.safety:
            return (
                f"check with `migrator status`; to undo the restore: `migrator restore {self.safety} --yes`"
            )
        return "check with `migrator status`"


def compare(session: Session, backup: Backup) -> Compared:
    """Compare tables and row counts with the manifest, and collect the planner's statistics; raises
    RestoreFailed.
    """
    counted = {table: facts.rows for table, facts in backup.tables.items() if facts.rows is not None}
    session.query("SET statement_timeout = 0")
    session.query("SET row_security = off")
    found = [relation for relation in exported_snapshot.relations(session) if relation.kind != "S"]
    names = {relation.shown for relation in found}
    wrong = [f"{table} is missing" for table in sorted(backup.tables.keys() - names)]
    wrong += [f"{table} was not in the backup" for table in sorted(names - backup.tables.keys())]
    rows = 0
    for relation in found:
        expected = counted.get(relation.shown)
        if expected is not None:
            actual = exported_snapshot.count_exactly(session, relation)
            rows += actual
            if actual != expected:
                wrong.append(f"{relation.shown} has {actual} rows, not {expected}")
        if relation.kind == "r":
            _analyze(session, relation)
    if wrong:
        raise failed(
            backup,
            f"The restored content of {backup.id} differs from the backup: {'; '.join(wrong[:5])}.",
            "keep the backup, and report this with its manifest",
        )
    return Compared(len(found), len(counted), rows)


def _analyze(session: Session, relation: Relation) -> None:
    """Collect the planner's statistics; a function in an index may fail here, and the copy is still good."""
    try:
        session.query(f"ANALYZE {relation.qualified}")
    except Refused as error:
        LOGGER.warning("%s has no statistics yet, because ANALYZE failed: %s", relation.shown, error.text)


def warn_unproven(backup: Backup) -> None:
    """Warn that a backup was never verified; a user who names its id may restore it anyway."""
    if not backup.verified:
        LOGGER.warning("%s was never verified: `migrator verify-backup %s` verifies it", backup.id, backup.id)


def slots_left(session: Session, database: str) -> list[str]:
    """Return the logical replication slots that stay with a replaced database."""
    names = session.value(
        "SELECT string_agg(slot_name::text, ', ' ORDER BY slot_name) FROM pg_replication_slots WHERE database = %s",
        [database],
    )
    return (
        [f"Replication slots belong to the replaced database and are lost with it: {names}."] if names else []
    )


@contextlib.contextmanager
def failing(backup: Backup) -> Iterator[None]:
    """Turn the errors of the disk, the server and the programs into :class:`RestoreFailed`."""
    what = f"The restore of {backup.id} failed"
    try:
        yield
    except MigratorError:
        raise
    except databases.SwapFailed as error:
        raise failed(
            backup,
            f"{what}: the databases could not be swapped: {error}",
            "end what it names, and restore again",
        ) from error
    except databases.SwapUnknown as error:
        raise RestoreFailed(
            f"{what}: {error}.",
            state="It is not known whether the databases were swapped.",
            next_step="check with `migrator current`; `psql --list` shows the database that is kept beside",
        ) from error
    except LockedOut as error:
        raise failed(backup, f"{what}: {error.table} is locked.", "restore again") from error
    except (QueryFailed, ConnectFailed) as error:
        next_step = clients.remedy(error) or "fix the cause and restore again"
        raise failed(backup, f"{what}: {error.text}.", next_step) from error
    except OSError as error:
        raise failed(backup, f"{what}: {error}.", "fix the cause and restore again") from error
