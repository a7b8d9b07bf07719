"""SIGTERM, SIGINT and SIGHUP: end the current work at any point of the run.

Python runs a signal handler only between bytecodes of the main thread. A main thread that waits inside
libpq for a long statement would not notice for hours. The C-level handler writes to a pipe at once
(``signal.set_wakeup_fd``). A thread reads it and calls the registered callbacks. One of them cancels
the statement on the server, which makes the C call return.
https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd

The process ends within five seconds of the first signal, even if something hangs. After :data:`ASKING`
seconds no query of ours waits any longer. After :data:`LIMIT` seconds a thread writes the outcome for
the main thread, and exits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from migrator.runtime.deadlines import DEADLINES
from migrator.runtime.logs import get_logger

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from migrator.outcome import Outcome

log = get_logger("migrator")

ASKING = 2.5
"""For so many seconds after a signal, queries are still made; then each is cancelled (deadlines.CANCEL_TIMEOUT)."""
LIMIT = 4.2
"""After so many seconds after a signal, the main thread is not waited for any more."""
WRITING = 0.5
"""Seconds for writing the outcome, which may hang: a full pipe, a stuck file system."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupt(BaseException):
    """Raised in the main thread by a signal; it is not an Exception, so no ``except Exception`` swallows it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Interruption:
    """The process's one reaction to signals: a flag, an exception in the main thread, and callbacks at once."""

    def __init__(self) -> None:
        self.received = ""
        self.code = 40
        """The exit code, once it is known: PARTIAL until then."""
        self.unsure = ""
        """The command that shows the database's state, while running work may change it."""
        self.left: list[str] = []
        """What stays unchanged, with the command that fixes it, if the process ends before its clean-up."""
        self.last_word: Callable[[], object] = lambda: None
        """Sets ``code`` and writes the outcome of a run with a main thread that does not end after a signal.
        """
        self.outcome: Callable[[], Outcome] | None = None
        """Returns the outcome of the current run if it ends now; None if a command is not a run."""
        self.whole: Callable[[Outcome], Outcome] = lambda outcome: outcome
        """Returns the outcome of a command from that of the current run, if it has several."""
        self.tell: Callable[[Outcome], object] = lambda _: None
        """Writes an outcome to every destination."""
        self.limit = LIMIT
        self._ending = threading.Lock()
        self._telling = threading.Lock()
        self._writer = -1
        self._callbacks: list[Callable[[], None]] = []
        self._shielded = False
        self._raised = False
        self._settled = False
        self._signals: tuple[signal.Signals, ...] = SIGNALS

    def install(self) -> None:
        """Take over :data:`SIGNALS`; call once, from the main thread.

        An ignored SIGHUP stays ignored: that is the purpose of nohup(1).
        """
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            self._signals = (signal.SIGTERM, signal.SIGINT)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self.reinstall()
        sys.unraisablehook = self._raise_again
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def reinstall(self) -> None:
        """Take the signals back from an ``env.py`` with an application that installed its own handlers."""
        if self._writer < 0 or threading.current_thread() is not threading.main_thread():
            return  # within another program, whose signals are its own
        for number in self._signals:
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def check(self) -> None:
        """Raise :class:`Interrupt` if a signal has arrived, even if its exception was swallowed."""
        if self.received and not self._shielded:
            raise Interrupt(self.received)

    @contextlib.contextmanager
    def on_signal(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call ``callback`` from another thread as soon as a signal arrives within the block."""
        self._callbacks.append(callback)
        try:
            yield
        finally:
            self._callbacks.remove(callback)

    @contextlib.contextmanager
    def changing(self, look: str) -> Iterator[None]:
        """Within the block the database may be changed, and ``look`` is the command that shows its state.

        An :class:`Interrupt` leaves it set: the code that catches it cannot know the state.
        """
        self.unsure = look
        try:
            yield
        except Exception:
            self.unsure = ""
            raise
        self.unsure = ""

    @contextlib.contextmanager
    def leaving(self, sentence: str) -> Iterator[None]:
        """Within the block a clean-up is pending; ``sentence`` names what remains if it never happens."""
        self.left.append(sentence)
        try:
            yield
        finally:
            self.left.remove(sentence)

    def settle(self, code: int, *, forced: bool = False) -> None:
        """Set the exit code: the outcome is known, and nothing interrupts its report.

        It does not return if the time is over and :attr:`last_word` (``forced``) reports already.
        """
        self._shielded = True
        if not forced and not self._telling.acquire(blocking=False) and not self._settled:
            threading.Event().wait()
        self._settled = self._settled or not forced
        self.code = code

    def block(self) -> None:
        """Raise nothing from now on: only the check of the database and the report remain."""
        self._shielded = True

    def unblock(self) -> None:
        """Raise again: the following work may be interrupted."""
        self._shielded = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        if not self._shielded and not self._raised:
            self._raised = True
            raise Interrupt(self.received)

    def _raise_again(self, lost: UnraisableHookArgs) -> None:
        """Send a signal again if Python dropped its exception, within a finalizer or a weakref's callback.

        https://docs.python.org/3/library/sys.html#sys.unraisablehook
        """
        if not isinstance(lost.exc_value, Interrupt):
            sys.__unraisablehook__(lost)
            return
        self._raised = False
        number = signal.Signals[lost.exc_value.name]
        threading.Thread(target=_send, args=(number,), name="signal again", daemon=True).start()

    def _watch(self, reader: int) -> None:
        while True:
            numbers = set(os.read(reader, 64))
            ours = numbers & set(self._signals)
            if ours and self._ending.acquire(blocking=False):
                DEADLINES.end_at(time.monotonic() + ASKING)
                threading.Thread(target=self._end, name="limit", daemon=True).start()
            if not ours or self._shielded:
                continue
            # An application's own handler may have taken the signal and swallowed it.
            self.received = self.received or signal.Signals(min(ours)).name
            for callback in reversed(self._callbacks.copy()):  # the innermost first
                try:
                    callback()
                except Exception as error:  # noqa: BLE001 - the thread must survive for the next callback
                    with contextlib.suppress(Exception):  # a closed terminal accepts no output
                        log.warning("could not cancel the running statement: %s", error)

    def _end(self) -> None:
        """End the process when the time is over, with the known outcome."""
        time.sleep(self.limit)
        if self._telling.acquire(blocking=False):
            telling = threading.Thread(target=self.last_word, name="last word", daemon=True)
            telling.start()
            telling.join(WRITING)
        else:
            time.sleep(WRITING)
        os._exit(self.code)


def _send(number: signal.Signals) -> None:
    time.sleep(0.01)  # until the code that lost the exception has ended
    signal.pthread_kill(threading.main_thread().ident or 0, number)
