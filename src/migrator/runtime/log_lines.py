"""A line of the log without importing ``logging``: the same line as from :mod:`.log_handlers`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from migrator.runtime.escaping import json_text
from migrator.runtime.redaction import redact


def origin(created: float, level: str, logger: str) -> dict[str, str]:
    """Return the last keys of a line; ``created`` is in seconds since 1970."""
    time = datetime.fromtimestamp(created, UTC).isoformat(timespec="milliseconds")
    return {"time": time, "level": level.lower(), "logger": logger}


def json_line(message: str, extra: Mapping[str, Any], created: float, level: str, logger: str) -> str:
    """Return one JSON object without secrets: the message, its extra keys, and its origin."""
    return redact(json_text({"message": message, **extra, **origin(created, level, logger)}))


def begin_line(stream: TextIO) -> None:
    """End the line of a print without a line end."""
    if getattr(stream, "in_line", False) and not stream.isatty():
        stream.write("\n")
