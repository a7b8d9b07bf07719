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


class MigratorError(Exception):
    """A failure that a person can act on.

    ``message`` says what happened, ``state`` where the database stands, and ``next_step`` which command
    to type or what to change. Each is one sentence.
    """

    code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        next_step: str = "",
        state: str = UNCHANGED,
        findings: Sequence[Finding] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.state = state
        self.findings = tuple(findings)

    def __str__(self) -> str:
        return f"{self.message} {self.state}".strip()


class SettingsError(MigratorError):
    """Settings or arguments are wrong; ``problems`` lists all of them."""

    code = ExitCode.BAD_SETTINGS

    def __init__(self, problems: Sequence[str], *, next_step: str = "") -> None:
        self.problems = tuple(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        told = "; ".join(self.problems)
        super().__init__(
            f"{count} in the settings: {told}{'' if told.endswith('?') else '.'}",
            next_step=next_step
            or "fix it, then check with `migrator settings`, which shows each value and its source",
        )


class Unreachable(MigratorError):
    """No Postgres answered within the wait."""

    code = ExitCode.UNREACHABLE


class LockBusy(MigratorError):
    """Another run held the lock until the lock wait ended."""

    code = ExitCode.LOCK_BUSY


class Blocked(MigratorError):
    """A statement could not get its lock within ``lock_timeout``."""

    code = ExitCode.BLOCKED


class Interrupted(MigratorError):
    """SIGTERM, SIGINT or SIGHUP arrived, and everything was rolled back."""

    code = ExitCode.INTERRUPTED


class NotCurrent(MigratorError):
    """The database did not reach this image's heads within the wait."""

    code = ExitCode.NOT_CURRENT


class AccessDenied(MigratorError):
    """Postgres answers and refuses the login: credentials, privileges, TLS, or no such database."""

    code = ExitCode.ACCESS_DENIED


class NoSuchDatabase(AccessDenied):
    """Postgres answers, and the database does not exist."""


class HistoryError(MigratorError):
    """The revision files do not form one valid graph."""

    code = ExitCode.BAD_HISTORY


class DatabaseAhead(MigratorError):
    """The database is at a revision that these files do not know."""

    code = ExitCode.DATABASE_AHEAD


class Unversioned(MigratorError):
    """There are tables but no version table."""

    code = ExitCode.UNVERSIONED


class Tampered(MigratorError):
    """The file of an applied revision was edited."""

    code = ExitCode.TAMPERED


class Unsafe(MigratorError):
    """The guard refused."""

    code = ExitCode.UNSAFE


class BackupFailed(MigratorError):
    """There is no verified backup, so nothing was applied."""

    code = ExitCode.BACKUP_FAILED


class NoSuchBackup(BackupFailed):
    """There is no backup of that name, or no backup at all; no work was started."""


class Drifted(MigratorError):
    """The live schema differs from the schema that the last run left."""

    code = ExitCode.DRIFTED


class RolledBack(MigratorError):
    """A revision failed and everything was rolled back."""

    code = ExitCode.ROLLED_BACK


class Partial(MigratorError):
    """A revision failed after something had been committed."""

    code = ExitCode.PARTIAL


class VerifyFailed(MigratorError):
    """The database is at the target revision, but a check failed."""

    code = ExitCode.VERIFY_FAILED


class WasRestored(MigratorError):
    """Apply or verify failed, and the database was restored from the backup."""

    code = ExitCode.RESTORED


class RestoreFailed(MigratorError):
    """A backup could not be restored."""

    code = ExitCode.RESTORE_FAILED


class DamagedBackup(RestoreFailed):
    """The stored backup differs from the one that was written."""


class Internal(MigratorError):
    """A defect in migrator."""

    code = ExitCode.INTERNAL
