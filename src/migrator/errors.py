"""Every way a run can fail; each error carries its exit code, the state of the database, and a next step.

::

    MigratorError
     ├─ SettingsError        10  BAD_SETTINGS
     ├─ Unreachable          20  UNREACHABLE
     ├─ LockBusy             21  LOCK_BUSY
     ├─ Blocked              22  BLOCKED
     ├─ Interrupted          23  INTERRUPTED
     ├─ NotCurrent           24  NOT_CURRENT
     ├─ AccessDenied         30  ACCESS_DENIED
     │   └─ NoSuchDatabase   30
     ├─ HistoryError         31  BAD_HISTORY
     ├─ DatabaseAhead        32  DATABASE_AHEAD
     ├─ Unversioned          33  UNVERSIONED
     ├─ Tampered             34  TAMPERED
     ├─ Unsafe               35  UNSAFE
     ├─ BackupFailed         36  BACKUP_FAILED
     │   └─ NoSuchBackup     36
     ├─ Drifted              37  DRIFTED
     ├─ RolledBack           39  ROLLED_BACK
     ├─ Partial              40  PARTIAL
     ├─ VerifyFailed         41  VERIFY_FAILED
     ├─ WasRestored          42  RESTORED
     ├─ RestoreFailed        43  RESTORE_FAILED
     │   └─ DamagedBackup    43
     └─ Internal             70  INTERNAL

An error is raised where it is known and printed once, by ``cli``; only ``cli`` exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from migrator.outcome import ExitCode, Finding

UNCHANGED = "The database was not changed."


def some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    """Name the first of many, and say how many more there are."""
    more = f"{between.strip(', ')} and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


class MigratorError(Exception):
    """A failure that a person can act on.

    ``message`` says what happened, ``state`` where the database stands, and ``next_step`` which command
    to type or what to change. Each is one sentence.
    """

    code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init_subclass__(cls, code: ExitCode | None = None) -> None:
        cls.code = code or cls.code

    def __init__(
        self, message: str, *, next_step: str = "", state: str = UNCHANGED, findings: Sequence[Finding] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.state = state
        self.findings = tuple(findings)

    def __str__(self) -> str:
        return f"{self.message} {self.state}".strip()


class SettingsError(MigratorError, code=ExitCode.BAD_SETTINGS):
    """Settings or arguments are wrong; ``problems`` lists all of them."""

    def __init__(self, problems: Sequence[str], *, next_step: str = "") -> None:
        self.problems = tuple(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        told = "; ".join(self.problems)
        super().__init__(
            f"{count} in the settings: {told}{'' if told.endswith('?') else '.'}",
            next_step=next_step
            or "fix it, then check with `migrator settings`, which shows each value and its source",
        )


class Unreachable(MigratorError, code=ExitCode.UNREACHABLE):
    """No Postgres answered within the wait."""


class LockBusy(MigratorError, code=ExitCode.LOCK_BUSY):
    """Another run held the lock until the lock wait ended."""


class Blocked(MigratorError, code=ExitCode.BLOCKED):
    """A statement could not get its lock within ``lock_timeout``."""


class Interrupted(MigratorError, code=ExitCode.INTERRUPTED):
    """SIGTERM, SIGINT or SIGHUP arrived, and everything was rolled back."""


class NotCurrent(MigratorError, code=ExitCode.NOT_CURRENT):
    """The database did not reach this image's heads within the wait."""


class AccessDenied(MigratorError, code=ExitCode.ACCESS_DENIED):
    """Postgres answers and refuses the login: credentials, privileges, TLS, or no such database."""


class NoSuchDatabase(AccessDenied):
    """Postgres answers, and the database does not exist."""


class HistoryError(MigratorError, code=ExitCode.BAD_HISTORY):
    """The revision files do not form one valid graph."""


class DatabaseAhead(MigratorError, code=ExitCode.DATABASE_AHEAD):
    """The database is at a revision that these files do not know."""


class Unversioned(MigratorError, code=ExitCode.UNVERSIONED):
    """There are tables but no version table."""


class Tampered(MigratorError, code=ExitCode.TAMPERED):
    """The file of an applied revision was edited."""


class Unsafe(MigratorError, code=ExitCode.UNSAFE):
    """The guard refused."""


class BackupFailed(MigratorError, code=ExitCode.BACKUP_FAILED):
    """There is no verified backup, so nothing was applied."""


class NoSuchBackup(BackupFailed):
    """There is no backup of that name, or no backup at all; no work was started."""


class Drifted(MigratorError, code=ExitCode.DRIFTED):
    """The live schema differs from the schema that the last run left."""


class RolledBack(MigratorError, code=ExitCode.ROLLED_BACK):
    """A revision failed and everything was rolled back."""


class Partial(MigratorError, code=ExitCode.PARTIAL):
    """A revision failed after something had been committed."""


class VerifyFailed(MigratorError, code=ExitCode.VERIFY_FAILED):
    """The database is at the target revision, but a check failed."""


class WasRestored(MigratorError, code=ExitCode.RESTORED):
    """Apply or verify failed, and the database was restored from the backup."""


class RestoreFailed(MigratorError, code=ExitCode.RESTORE_FAILED):
    """A backup could not be restored."""


class DamagedBackup(RestoreFailed):
    """The stored backup differs from the one that was written."""


class Internal(MigratorError, code=ExitCode.INTERNAL):
    """A defect in migrator."""
