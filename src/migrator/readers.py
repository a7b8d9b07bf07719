"""Readers of settings: from the text that a person wrote to a value, or a ValueError that says what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Read ``90``, ``90s``, ``500ms``, ``5m``, ``2h`` or ``1d`` as seconds; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90, 90s or 5m")
    seconds = float(match[1]) * _UNITS[match[2] or "s"]
    if not math.isfinite(seconds) or seconds > 366 * 86400:
        raise ValueError(f"{text!r} is longer than a year")
    return seconds


def optional_duration(text: str) -> float | None:
    """Read a duration, or ``none`` (or ``0``) for no limit."""
    if text.strip().lower() in {"none", "off"}:
        return None
    return duration(text) or None


def whole_number(text: str) -> int:
    """Read a number from 0 to 1000."""
    if not re.fullmatch(r"\d{1,3}|1000", text.strip()):
        raise ValueError(f"{text!r} is not a whole number from 0 to 1000")
    return int(text)


def boolean(text: str) -> bool:
    """Read ``true/false``, ``1/0``, ``yes/no``, ``on/off``."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def choice(*allowed: str) -> Callable[[str], str]:
    """Return a reader that takes one of ``allowed``."""

    def read(text: str) -> str:
        lowered = text.strip().lower()
        if lowered not in allowed:
            raise ValueError(f"{text!r} is not one of {', '.join(allowed)}")
        return lowered

    read.choices = allowed  # type: ignore[attr-defined]
    return read


def relation(text: str) -> str:
    """Read a table name, with or without its schema."""
    if not re.fullmatch(r"[^\s.\"']+(\.[^\s.\"']+)?", text.strip()):
        raise ValueError(f"{text!r} is not a table name such as alembic_version or app.alembic_version")
    return text.strip()


def callable_name(text: str) -> str:
    """Read ``package.module:callable``."""
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text.strip()):
        raise ValueError(f"{text!r} does not name a callable as package.module:callable does")
    return text.strip()


def role_name(text: str) -> str:
    """Read a role's name as it stands in pg_roles, without quotes."""
    if "\0" in text or len(text.strip().encode()) > 63:
        raise ValueError(f"{text!r} is not the name of a role")
    return text.strip()


def backup_url(text: str) -> str:
    """Read the place of the backups: ``file:///folder``, or a plain folder."""
    if text.startswith("/"):
        from urllib.parse import quote

        return f"file://{quote(text)}"
    if re.match(r"^file:///.", text):
        return text
    shown = "an address" if "@" in text else repr(text)  # which may hold a password
    raise ValueError(f"{shown} is not a folder such as file:///backups")


def only_stop(text: str) -> str:
    """Read ``stop``; what else the design names is refused in so many words."""
    lowered = text.strip().lower()
    if lowered in {"downgrade", "restore"}:
        raise ValueError(f"{lowered!r} is not available in this version; only 'stop' is")
    return choice("stop")(text)
