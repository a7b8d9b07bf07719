"""Wait until the target answers a query, or say at once why it never will."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, wait_random_exponential

from migrator.errors import AccessDenied, NoSuchDatabase, Unreachable
from migrator.postgres import ConnectFailed, Refusal, Session, as_typed, connect
from migrator.settings import Settings
from migrator.target import Target

log = logging.getLogger("migrator.wait")

_LAST_ATTEMPT = 0.5  # seconds that are kept for it


def wait(
    target: Target,
    settings: Settings,
    application_name: str,
    *,
    connect: Callable[[Target, str, float], Session] = connect,
) -> tuple[Session, int]:
    """Connect, again and again within ``settings.wait_timeout`` seconds; return the session and the attempts.

    What passes by itself (refused, not resolvable yet, starting up, too many clients) is retried with
    exponential, jittered pauses; what does not (password, privilege, TLS, no such database) fails at once.
    The total is never overshot: an attempt gets no more time than is left.
    Raises :class:`Unreachable` or :class:`AccessDenied`.
    """
    deadline = time.monotonic() + settings.wait_timeout

    def left() -> float:
        return deadline - time.monotonic()

    def attempt() -> Session:
        # Even a wait of 0 seconds makes one honest attempt.
        longest = settings.connect_timeout if settings.wait_timeout == 0 else left()
        return connect(target, application_name, max(0.05, min(settings.connect_timeout, longest)))

    pause = wait_random_exponential(multiplier=0.25, max=5)

    def bounded_pause(state: RetryCallState) -> float:
        # The last pause is cut short: a server that comes up in the last second is still met.
        return max(0.1, min(pause(state), left() - _LAST_ATTEMPT))

    retrying = Retrying(
        retry=retry_if_exception(lambda error: _can_pass(error, settings)),
        stop=lambda state: left() <= state.upcoming_sleep + 0.05,
        wait=bounded_pause,
        before_sleep=_Complaint(target, left),
    )
    try:
        session = retrying(attempt)
    except RetryError as error:
        last = error.last_attempt.exception()
        reason = last.text if isinstance(last, ConnectFailed) else str(last)
        if isinstance(last, ConnectFailed) and last.refusal is Refusal.NO_DATABASE:
            raise Unreachable(
                f"Postgres answers, but nobody created the database within {settings.wait_timeout:g} s: {target}.",
                next_step="create the database, or wait longer with MIGRATOR_WAIT_TIMEOUT",
            ) from None
        raise Unreachable(
            f"{target} did not answer within {settings.wait_timeout:g} s"
            f" ({error.last_attempt.attempt_number} attempts); the last one: {reason.rstrip('.?')}.",
            next_step="check that Postgres runs and that host and port are right; wait longer with"
            " MIGRATOR_WAIT_TIMEOUT",
        ) from None
    except ConnectFailed as error:
        raise _denied(target, error) from None
    return session, int(retrying.statistics.get("attempt_number", 1))


def _can_pass(error: BaseException, settings: Settings) -> bool:
    if not isinstance(error, ConnectFailed):
        return False
    if error.refusal is Refusal.NO_DATABASE:
        return settings.wait_for_database
    return error.refusal is Refusal.TRANSIENT


class _Complaint:
    """Says what is being waited for: at once, when the reason changes, and every ten seconds."""

    def __init__(self, target: Target, left: Callable[[], float]) -> None:
        self._target, self._left = target, left
        self._said, self._at = "", 0.0

    def __call__(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        text = error.text if isinstance(error, ConnectFailed) else str(error)
        now = time.monotonic()
        if text != self._said or now - self._at >= 10:
            self._said, self._at = text, now
            log.info("waiting for %s (%.0f s left): %s", self._target, max(0.0, self._left()), text)


def _denied(target: Target, error: ConnectFailed) -> AccessDenied:
    from migrator import tls

    kind, text = AccessDenied, tls.explain(target, error.text)
    about_tls = tls.next_step(text) if error.sqlstate in ("", "28000") else ""
    if error.refusal is Refusal.NO_DATABASE:
        kind = NoSuchDatabase
        step = "create the database, or wait for it with MIGRATOR_WAIT_FOR_DATABASE=true"
    elif about_tls:
        step = about_tls
    elif error.sqlstate.startswith("28") or "password" in error.text:
        step = "check user and password, and the server's pg_hba.conf; `migrator settings` shows where they come from"
    elif error.sqlstate == "42501":
        step = (
            f"GRANT CONNECT ON DATABASE {as_typed(target.database)} TO {as_typed(target.user or 'the_role')}"
        )
    elif error.sqlstate:
        step = "correct the connection parameters; `migrator settings` shows where they come from"
    else:
        step = "check sslmode, sslrootcert and the server's certificate"
    code = f" [{error.sqlstate}]" if error.sqlstate else ""
    return kind(f"{target} refuses: {text.rstrip('.')}{code}.", next_step=step)
