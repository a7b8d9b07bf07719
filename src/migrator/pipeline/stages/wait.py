"""Wait until the target answers a query, or report at once why it never will."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, wait_random_exponential

from migrator.config.database_url import Target
from migrator.config.secret_files import State
from migrator.config.settings import Settings
from migrator.errors import AccessDenied, NoSuchDatabase, Unreachable
from migrator.postgres.errors import ConnectFailed, Refusal
from migrator.postgres.quoting import as_typed
from migrator.postgres.session import Session, connect

log = logging.getLogger("migrator.wait")

_LAST_ATTEMPT = 0.5  # seconds that are kept for it
_BETWEEN_LOGINS = 5.0  # seconds between two refused attempts, because servers may count them


def wait(
    target: Target,
    settings: Settings,
    application_name: str,
    *,
    connect: Callable[[Target, str, float], Session] = connect,
) -> tuple[Session, int]:
    """Connect, with retries within ``settings.wait_timeout`` seconds; return the session and the attempts.

    A failure that can pass (refused, not resolvable yet, starting up, too many clients) is retried with
    exponential, jittered pauses. Any other (password, privilege, TLS, no such database) fails at once,
    unless the target's secrets are files that were or may be replaced: see :class:`_Aim`. The total is
    never exceeded: an attempt gets at most the remaining time. Raises :class:`Unreachable` or
    :class:`AccessDenied`.
    """
    return _wait(_Aim(target, settings), settings, application_name, connect)


def log_in_again(session: Session, settings: Settings, application_name: str) -> None:
    """Wait until a login works, if Kubernetes replaces the password's file some time after the password.

    It is for programs that log in themselves after a long step, and give up when refused: pg_dump,
    ``env.py``. Raises the errors of :func:`wait`.
    """
    if session.target.source is not None and session.target.source.kept_up:
        aim = _Aim(session.target, settings, password_only=True)
        _wait(aim, settings, application_name, connect)[0].close()


def _wait(
    aim: _Aim, settings: Settings, application_name: str, connect: Callable[[Target, str, float], Session]
) -> tuple[Session, int]:
    def attempt() -> Session:
        # Even a wait of 0 seconds makes one real attempt.
        longest = settings.connect_timeout if settings.wait_timeout == 0 else aim.left
        aim.given = max(0.05, min(settings.connect_timeout, longest))
        return connect(aim.take(), application_name, aim.given)

    pause = wait_random_exponential(multiplier=0.25, max=5)

    def bounded_pause(state: RetryCallState) -> float:
        # The last pause is cut short: a server that starts in the last second is still reached.
        return max(0.1, min(aim.pause or pause(state), aim.left - _LAST_ATTEMPT))

    retrying = Retrying(
        retry=retry_if_exception(aim.can_pass),
        stop=lambda state: aim.left <= state.upcoming_sleep + 0.05,
        wait=bounded_pause,
        before_sleep=_Complaint(aim),
        sleep=aim.sleep,
    )
    try:
        session = retrying(attempt)
    except RetryError as error:
        last = aim.told or error.last_attempt.exception()
        reason = last.text if isinstance(last, ConnectFailed) else str(last)
        if isinstance(last, ConnectFailed) and last.refusal is Refusal.DENIED:
            raise _denied(aim, last) from None
        if isinstance(last, ConnectFailed) and last.refusal is Refusal.NO_DATABASE:
            raise Unreachable(
                f"Postgres answers, but the database was not created within {settings.wait_timeout:g} "
                f"s: {aim.target}.",
                next_step="create the database, or wait longer with MIGRATOR_WAIT_TIMEOUT",
            ) from None
        raise Unreachable(
            f"{aim.target} did not answer within {settings.wait_timeout:g} s"
            f" ({error.last_attempt.attempt_number} attempts); the last one: {reason.rstrip('.?')}.",
            next_step="check that Postgres runs and that host and port are right; MIGRATOR_WAIT_TIMEOUT sets "
            "how long to wait",
        ) from None
    except ConnectFailed as error:
        raise _denied(aim, error) from None
    return session, int(retrying.statistics.get("attempt_number", 1))


class _Aim:
    """The target, its deadline, and which failures can pass.

    Secrets in files are read again before each attempt. A refused login is retried at once if a file
    was replaced since. It is retried for ``settings.rotation_grace`` seconds if Kubernetes may still
    replace it. With ``password_only``, no other part of the address may change.
    """

    def __init__(self, target: Target, settings: Settings, *, password_only: bool = False) -> None:
        self.target = target
        self._settings, self._password_only = settings, password_only
        self.grace = settings.rotation_grace
        self._deadline = time.monotonic() + settings.wait_timeout
        self._state: State = ()
        self.refused_at: float | None = None
        self.given = 0.0
        """The longest time for an attempt, in seconds."""
        self.told: ConnectFailed | None = None
        """The last failure of an attempt that was not cut short, or the message of one that was."""
        self.pause = 0.0
        """Seconds until the next attempt after a refused login; 0 leaves it to the caller."""

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self._deadline - time.monotonic()

    @property
    def refused_for(self) -> float:
        """Return for how many seconds logins have been refused that a new secret could have fixed."""
        return 0.0 if self.refused_at is None else time.monotonic() - self.refused_at

    @property
    def places(self) -> str:
        """Return the names of the files."""
        return " or ".join(self.target.source.places) if self.target.source else ""

    def take(self) -> Target:
        """Return the target for the next attempt."""
        files = self.target.source
        if files is not None:
            self._state = files.state()
            known, self.target = self.target, self.target.fresh() if self._password_only else files.now()
            if self.target != known:
                log.info("%s was replaced: its new content is used", self.places)
        return self.target

    def can_pass(self, error: BaseException) -> bool:
        """Tell whether an attempt's failure may pass by itself."""
        self.pause = 0.0
        if not isinstance(error, ConnectFailed):
            return False
        if not error.silent or self.given >= self._settings.connect_timeout:
            self.told = error  # the last attempt's fraction of a second is too short for a busy server
        if error.refusal is Refusal.NO_DATABASE and self._settings.wait_for_database:
            return True
        return error.refusal is Refusal.TRANSIENT or self._being_replaced(error)

    def _being_replaced(self, error: ConnectFailed) -> bool:
        files = self.target.source
        if files is None or not self._settings.wait_timeout:
            return False
        if self._is_replaced():
            self.pause = 0.1
            return True
        if not self.grace or not _about_secrets(error) or not files.kept_up:
            return False
        now = time.monotonic()
        self.refused_at = self.refused_at or now
        left = self.refused_at + self.grace - now
        self.pause = max(0.1, min(_BETWEEN_LOGINS, left))
        return left > 0

    def _is_replaced(self) -> bool:
        files = self.target.source
        return files is not None and files.state() != self._state

    def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the replacement of a file."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._is_replaced():
            time.sleep(left if self.target.source is None else min(left, 0.25))


def _about_secrets(error: ConnectFailed) -> bool:
    """Tell whether another password, certificate or key could have been accepted."""
    words = ("password", "authentication failed", "certificate", "private key", "tlsv1 alert", "SSL error")
    named = error.refusal is Refusal.DENIED and any(word in error.text for word in words)
    return error.sqlstate.startswith("28") or (named and error.sqlstate in ("", "08P01", "XX000"))


class _Complaint:
    """Reports what is being waited for: at once, when the reason changes, and every ten seconds."""

    def __init__(self, aim: _Aim) -> None:
        self._aim = aim
        self._said, self._at = "", 0.0

    def __call__(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        text = error.text if isinstance(error, ConnectFailed) else str(error)
        now = time.monotonic()
        if text != self._said or now - self._at >= 10:
            self._said, self._at = text, now
            log.info("waiting for %s (%.0f s left): %s", self._aim.target, max(0.0, self._aim.left), text)
            if self._aim.refused_at is not None:
                seconds = max(0.0, min(self._aim.left, self._aim.grace - self._aim.refused_for))
                log.warning(
                    "only a new version of %s can fix this: waiting %.0f s for it",
                    self._aim.places,
                    seconds,
                )


def _denied(aim: _Aim, error: ConnectFailed) -> AccessDenied:
    from migrator.postgres import tls_hints

    target = aim.target
    kind, text = AccessDenied, tls_hints.explain(target, error.text)
    about_tls = tls_hints.next_step(text) if error.sqlstate in ("", "28000") else ""
    if error.refusal is Refusal.NO_DATABASE:
        kind = NoSuchDatabase
        step = "create the database, or wait for it with MIGRATOR_WAIT_FOR_DATABASE=true"
    elif about_tls:
        step = about_tls
    elif error.sqlstate.startswith("28") or "password" in error.text or "authentication" in error.text:
        step = "check user and password, and the server's pg_hba.conf; `migrator settings` shows their source"
    elif error.sqlstate == "42501":
        step = (
            f"GRANT CONNECT ON DATABASE {as_typed(target.database)} TO {as_typed(target.user or 'the_role')}"
        )
    elif error.sqlstate:
        step = "fix the connection parameters; `migrator settings` shows their source"
    else:
        step = "check sslmode, sslrootcert and the server's certificate"
    code = f" [{error.sqlstate}]" if error.sqlstate else ""
    again = (
        f", for {aim.refused_for:.0f} s in which {aim.places} might have been replaced"
        if aim.refused_for
        else ""
    )
    return kind(f"{target} refuses: {text.rstrip('.')}{code}{again}.", next_step=step)
