"""The sidecar's knowledge: the end of the run, the last check, the last verification; and its conclusion."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from migrator.outcome import ExitCode

RETRIED = frozenset({ExitCode.UNREACHABLE, ExitCode.LOCK_BUSY, ExitCode.BLOCKED, ExitCode.INTERRUPTED})
"""Codes about the moment and not about the revisions."""
NO_ANSWER = frozenset({ExitCode.UNREACHABLE, ExitCode.ACCESS_DENIED})
"""Codes of a database that was not read."""


@dataclass(frozen=True)
class Check:
    """One check of the version rows.

    ``code`` is 0 if the database is current for this image, else that of the reason. ``at`` is seconds
    since 1970; ``pending`` is None if it was not counted.
    """

    at: float
    seconds: float
    code: int
    outcome: str
    reason: str
    rows: tuple[str, ...] | None = None
    pending: int | None = None

    @property
    def ready(self) -> bool:
        """Whether a backend with this image's revisions may work."""
        return self.code == ExitCode.OK

    @property
    def reached(self) -> bool:
        return self.code not in NO_ANSWER


@dataclass(frozen=True)
class Verification:
    """One ``migrator verify``: its time (seconds since 1970), and its outcome as JSON-ready data."""

    at: float
    report: Mapping[str, Any]

    @property
    def made(self) -> bool:
        """Whether it had a result, good or bad."""
        return self.report["code"] in (ExitCode.OK, ExitCode.VERIFY_FAILED, ExitCode.DRIFTED)


@dataclass(frozen=True)
class Readiness:
    """The answer to ``/readyz``: ready or not, and why not (``code`` and ``outcome`` are those of an exit
    code).
    """

    ready: bool
    reason: str
    code: int | None = None
    outcome: str = ""


@dataclass(frozen=True)
class Snapshot:
    """The knowledge at one moment; ``report`` is that of the run, None while it is running."""

    report: Mapping[str, Any] | None = None
    ended_at: float = 0.0
    check: Check | None = None
    verification: Verification | None = None
    checks: int = 0
    check_failures: int = 0
    verify_failures: int = 0


class Board:
    """The current snapshot, which each result replaces; safe to share between threads.

    ``patience`` is how many seconds a check is valid.
    """

    def __init__(self, patience: float) -> None:
        self._lock = threading.Lock()
        self._patience = patience
        self._checked = 0.0
        self.now = Snapshot()

    def ran(self, report: Mapping[str, Any]) -> None:
        with self._lock:
            self.now = replace(self.now, report=report, ended_at=time.time())

    def checked(self, check: Check) -> None:
        """Record a check; one of a database that was not read counts as a failure."""
        failed = not check.reached or check.code == ExitCode.INTERNAL
        with self._lock:
            self._checked = time.monotonic()
            now = self.now
            self.now = replace(
                now, check=check, checks=now.checks + 1, check_failures=now.check_failures + failed
            )

    def verified(self, verification: Verification) -> None:
        """Record a verification; one without a result counts as a failure, and the one before it stays."""
        with self._lock:
            now = self.now
            if verification.made:
                self.now = replace(now, verification=verification)
            else:
                self.now = replace(now, verify_failures=now.verify_failures + 1)

    def readiness(self) -> Readiness:
        """Decide whether a backend may work now."""
        with self._lock:
            now, age = self.now, time.monotonic() - self._checked
        if now.report is None or now.check is None:
            return Readiness(False, "the run has not ended yet")
        check = now.check
        if age > self._patience:
            return Readiness(False, f"the last check was {age:.0f} s ago")
        return Readiness(check.ready, check.reason, check.code, check.outcome)
