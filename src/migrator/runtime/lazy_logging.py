"""Loggers that do not import ``logging`` for a record that is not shown.

Until logging is set up, the standard library drops records below WARNING. Code that has not imported
logging cannot have set it up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import logging

_set_up: Callable[[], None] | None = None


def get_logger(name: str) -> logging.Logger:
    """Return the standard library's logger of that name, or one that becomes it at the first visible record."""
    return cast("logging.Logger", _Quiet(name))


def before_first_word(set_up: Callable[[], None] | None) -> None:
    """Set up logging at the first record that may be shown, which is at least INFO."""
    global _set_up
    _set_up = set_up


def wake() -> None:
    """Set up logging now, if it waits for the first record."""
    if _set_up is not None:
        _set_up()


class _Quiet:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        if "logging" not in sys.modules and (method == "debug" or (method == "info" and _set_up is None)):
            return _nothing
        wake()
        import logging

        return getattr(logging.getLogger(self._name), method)


def _nothing(*_: object, **__: object) -> None:
    """Drop the record."""
