"""Check on a schedule, reading only, whether the database is current for this image, and whether it verifies.

A check is one small query for the version rows: while they are the rows that were found good, nothing
more is needed. ``migrator check`` judges other rows, in its own process, and its judgement holds until
they change again.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from migrator.config.settings import Settings
from migrator.errors import AccessDenied, SettingsError
from migrator.outcome import ExitCode
from migrator.postgres import tls_hints
from migrator.postgres.errors import ConnectFailed, QueryFailed, Refusal, Refused
from migrator.postgres.session import connect
from migrator.postgres.version_table import VersionTable, place_of, read_rows
from migrator.runtime.subprocesses import TimedOut
from migrator.sidecar.board import RETRIED, Board, Check, Verification
from migrator.sidecar.children import ChildProcess, ChildResult, exit_code

log = logging.getLogger("migrator.sidecar")

JUDGING = 60.0
"""Seconds for a judgement of unknown rows."""
VERIFYING = 900.0
"""Seconds for a verification; each assertion of verify.toml has a minute."""
JUDGED_FOR = 300.0
"""Seconds after which a bad judgement of unchanged rows is repeated: the ledger may have changed."""
_FIRST_PAUSE = 1.0


@dataclass(frozen=True)
class _Judgement:
    """The judgement of version rows, and its time (monotonic)."""

    code: int
    outcome: str
    reason: str
    pending: int | None
    at: float

    @property
    def holds(self) -> bool:
        return self.code == ExitCode.OK or time.monotonic() - self.at < JUDGED_FOR


class Checker:
    """Checks the version rows repeatedly, and puts the results on the board."""

    def __init__(
        self,
        board: Board,
        child: ChildProcess,
        load: Callable[[], Settings],
        application_name: str,
        report: Mapping[str, Any],
    ) -> None:
        self._board, self._kin, self._load, self._name = board, child, load, application_name
        self._settings = load()
        self._several = bool(report.get("others") or report.get("version_tables"))
        self._table = _version_table(str(report.get("version_table") or ""))
        good = tuple(report.get("after") or ())
        self._judged: tuple[tuple[str, ...], _Judgement] | None = (
            good,
            _Judgement(ExitCode.OK, ExitCode.OK.name, _where(good), 0, time.monotonic()),
        )
        self._said: str | None = None

    def once(self) -> Check:
        """Make one check and put it on the board."""
        began = time.monotonic()
        with contextlib.suppress(
            SettingsError
        ):  # a secret's file during its replacement: use the known content
            self._settings = self._load()
        rows, found = self._look()
        check = Check(
            at=time.time(),
            seconds=time.monotonic() - began,
            code=found.code,
            outcome=found.outcome,
            reason=found.reason,
            rows=rows,
            pending=found.pending,
        )
        self._board.checked(check)
        self._say(check)
        return check

    def forever(self, stop: threading.Event) -> None:
        """Check until ``stop`` is set: at the interval, and sooner after a bad check."""
        bad = 0
        while True:
            bad = 0 if self.once().ready else bad + 1
            interval = self._settings.sidecar_interval
            pause = min(interval, _FIRST_PAUSE * 2 ** min(bad - 1, 10)) if bad else interval
            if stop.wait(pause * random.uniform(0.9, 1.1)):  # noqa: S311 - jitter: replicas started together
                return

    def _look(self) -> tuple[tuple[str, ...] | None, _Judgement]:
        if self._several:
            return None, self._ask()  # only env.py knows the other databases, or the other version tables
        try:
            rows = self._read()
        except ConnectFailed as error:
            return None, _unreachable(self._settings, error)
        except QueryFailed as error:
            if error.lost:
                return None, _now(ExitCode.UNREACHABLE, f"the connection was lost: {error.text}")
            rows = None  # no such table: migrator check explains it
        except AccessDenied:
            rows = None
        if rows is not None and self._judged and self._judged[0] == rows and self._judged[1].holds:
            return rows, self._judged[1]
        judgement = self._ask()
        if judgement.code not in {*RETRIED, ExitCode.ACCESS_DENIED, ExitCode.INTERNAL}:
            self._judged = (rows, judgement) if rows is not None else None
        return rows, judgement

    def _read(self) -> tuple[str, ...]:
        """Return the version rows; raises QueryFailed or AccessDenied if there is no table to read."""
        timeout = self._settings.connect_timeout
        with connect(self._settings.required_target, self._name, timeout) as session:
            try:
                begin = f"BEGIN READ ONLY; SET LOCAL statement_timeout = {int(timeout * 1000)}"
                session.query(begin, timeout=timeout + 1)
                if place_of(session, self._table) is None:
                    raise Refused("there is no version table", "42P01")
                return read_rows(session, self._table)
            finally:
                if not session.closed:
                    session.query("ROLLBACK", timeout=timeout)

    def _ask(self) -> _Judgement:
        try:
            told = self._kin.look("check", self._settings.connect_timeout, JUDGING)
        except (TimedOut, OSError) as error:
            return _now(ExitCode.INTERNAL, f"migrator check could not run: {error}")
        return _judge(told)

    def _say(self, check: Check) -> None:
        """Log the changes since the last check."""
        said = f"{check.code} {check.rows}" if check.reached else str(check.code)
        if said == self._said:
            return
        first, self._said = self._said is None, said
        if not check.ready:
            log.warning("not ready: %s", check.reason, extra={"code": check.code, "outcome": check.outcome})
        elif not first:
            log.info("ready: %s", check.reason)


class Verifier:
    """Runs ``migrator verify`` repeatedly, and puts the results on the board."""

    def __init__(self, board: Board, child: ChildProcess, settings: Settings) -> None:
        self._board, self._kin, self._settings = board, child, settings
        self._said: object = ExitCode.OK

    def once(self) -> None:
        """Verify once; a database that is away now is checked the next time."""
        try:
            told = self._kin.look("verify", self._settings.connect_timeout, VERIFYING)
        except (TimedOut, OSError) as error:
            log.warning("verify could not run: %s", error)
            told = ChildResult(int(ExitCode.INTERNAL), {})
        report = {"code": exit_code(told), "outcome": "", "message": "", "findings": [], **told.document}
        self._board.verified(Verification(time.time(), report))
        said = (report["code"], report["message"])
        if report["code"] in (ExitCode.VERIFY_FAILED, ExitCode.DRIFTED) and said != self._said:
            log.warning("verify failed: %s", report["message"], extra={"findings": len(report["findings"])})
        self._said = said

    def forever(self, interval: float, stop: threading.Event) -> None:
        """Verify every ``interval`` seconds until ``stop`` is set; the run itself has verified just now."""
        while not stop.wait(interval * random.uniform(0.9, 1.1)):  # noqa: S311 - jitter
            self.once()


def _judge(told: ChildResult) -> _Judgement:
    """Turn the answer of ``migrator check`` into a judgement."""
    code, document = exit_code(told), told.document
    if code == ExitCode.OK:
        return _now(ExitCode.OK, _where(tuple(document.get("current") or ())), pending=0)
    if code == ExitCode.PENDING:
        count = len(document.get("pending") or ())
        at = ", ".join(document.get("current") or ()) or "base"
        some = f"{count} of this image's revisions {'is' if count == 1 else 'are'}"
        return _now(ExitCode.NOT_CURRENT, f"the database is at {at}; {some} pending", pending=count)
    known = {int(item): item for item in ExitCode}.get(code)
    if known and document.get("message"):
        return _now(known, str(document["message"]))
    return _now(ExitCode.INTERNAL, f"migrator check ended with {code}")


def _now(code: ExitCode, reason: str, pending: int | None = None) -> _Judgement:
    return _Judgement(int(code), code.name, reason, pending, time.monotonic())


def _unreachable(settings: Settings, error: ConnectFailed) -> _Judgement:
    code = ExitCode.UNREACHABLE if error.refusal is Refusal.TRANSIENT else ExitCode.ACCESS_DENIED
    target = settings.required_target
    return _now(code, f"{target}: {tls_hints.explain(target, error.text)}")


def _version_table(name: str) -> VersionTable:
    schema, _, table = name.rpartition(".")
    return VersionTable(table or "alembic_version", schema)


def _where(rows: tuple[str, ...]) -> str:
    return f"the database is at {', '.join(rows) or 'base'}: nothing is pending"
