"""Logging: JSON or text on stderr, without secrets, unaffected by ``fileConfig`` in a user's ``env.py``.

It uses the standard library's ``logging`` (:mod:`.log_handlers`), imported at the first record: the
import takes longer than a whole up-to-date check.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO, cast

from migrator.runtime.redaction import MASK as MASK
from migrator.runtime.redaction import RedactingStream as RedactingStream
from migrator.runtime.redaction import Redactor as Redactor
from migrator.runtime.redaction import begin_line, json_line
from migrator.runtime.redaction import protect_streams as protect_streams
from migrator.runtime.redaction import redact as redact

if TYPE_CHECKING:
    import logging

    from migrator.runtime.log_handlers import Console

_set_up: Callable[[], None] | None = None


def get_logger(name: str) -> logging.Logger:
    """Return the standard library's logger of that name, or one that becomes it at the first visible record."""
    return cast("logging.Logger", _Quiet(name))


def set_up_at_first_record(set_up: Callable[[], None] | None) -> None:
    """Set up logging at the first record that may be shown, which is at least INFO."""
    global _set_up
    _set_up = set_up


def set_up_now() -> None:
    """Set up logging now, if it waits for the first record."""
    if _set_up is not None:
        _set_up()


class _Quiet:
    """A logger that does not import ``logging`` for a record that is not shown.

    Until logging is set up, the standard library drops records below WARNING. Code that has not imported logging
    cannot have set it up.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        if "logging" not in sys.modules and (method == "debug" or (method == "info" and _set_up is None)):
            return _nothing
        set_up_now()
        import logging

        return getattr(logging.getLogger(self._name), method)


def _nothing(*_: object, **__: object) -> None:
    """Drop the record."""


_LEVELS = ("debug", "info", "warning", "error")


class Logs:
    """The process's logging, set up on demand, and again after an ``env.py``."""

    def __init__(self, log_format: str = "auto", level: str = "info", run_id: str = "") -> None:
        self.stream = cast(TextIO, sys.stderr)
        self.is_json = log_format == "json" or (log_format == "auto" and not self.stream.isatty())
        self._level = level.lower()
        self._run_id = run_id
        self._console: Console | None = None

    def install_when_needed(self) -> None:
        """Install before the first record that may be shown."""
        if self._level == "debug":
            self.install()
        else:
            set_up_at_first_record(self.install)

    def install(self) -> None:
        """Make the root logger write only through our handler, and enable our and Alembic's loggers."""
        set_up_at_first_record(None)
        if self._console is None:
            from migrator.runtime.log_handlers import Console

            self._console = Console(self.stream, self._level.upper(), self._run_id, as_json=self.is_json)
        self._console.install()

    def keep(self) -> None:
        """Install again if other code has changed it; the check is quick, because every revision runs it."""
        if self._console is None:
            self.install()
        else:
            self._console.keep()

    def say(self, level: str, message: str, **extra: Any) -> None:
        """Log one line; a JSON line takes no handler where none is installed."""
        if self._console is None and self.is_json:
            if _LEVELS.index(level) >= _LEVELS.index(self._level):
                if self._run_id:
                    extra.setdefault("run_id", self._run_id)
                begin_line(self.stream)
                self.stream.write(json_line(message, extra, time.time(), level, "migrator") + "\n")
                self.stream.flush()
            return
        if self._console is None:
            self.install()
        import logging

        logging.getLogger("migrator").log(logging.getLevelName(level.upper()), "%s", message, extra=extra)
