"""Readers of settings: from text to a value, or a ValueError that says what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

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


def interval(text: str) -> float:
    """Read a duration of at least a tenth of a second."""
    seconds = duration(text)
    if seconds < 0.1:
        raise ValueError(f"{text!r} is too short: the least is 100ms")
    return seconds


def optional_interval(text: str) -> float | None:
    """Read an interval, or ``none`` for never."""
    return None if text.strip().lower() in {"none", "off", "0"} else interval(text)


def listen_address(text: str) -> str:
    """Read ``HOST:PORT``, such as ``127.0.0.1:8086`` or ``[::1]:8086``; port 0 is any free port."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[\w.-]+):(\d{1,5})", text.strip())
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{text!r} is not an address to listen on such as 127.0.0.1:8086 or [::]:8086")
    return text.strip()


def whole_number(text: str) -> int:
    """Read a number from 0 to 1000."""
    if not re.fullmatch(r"\d{1,3}|1000", text.strip()):
        raise ValueError(f"{text!r} is not a whole number from 0 to 1000")
    return int(text)


def goal(text: str) -> str:
    """Read a destination revision; refuse one that depends on the current revision."""
    if re.match(r"[+-]", text.strip()):
        raise ValueError(f"{text!r} depends on where the database is: name a revision, head or LABEL@head")
    return text.strip()


def boolean(text: str) -> bool:
    """Read ``true/false``, ``1/0``, ``yes/no``, ``on/off``."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"{text!r} is not true or false")


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
    """Read a role's name as in pg_roles, without quotes."""
    if "\0" in text or len(text.strip().encode()) > 63:
        raise ValueError(f"{text!r} is not the name of a role")
    return text.strip()


def backup_url(text: str) -> str:
    """Read the place of backups: ``file:///folder``, a plain folder, or ``s3://bucket/prefix``."""
    if text.startswith("/"):
        from urllib.parse import quote

        return f"file://{quote(text)}"
    if re.match(r"^file:///.", text):
        return text
    shown = "an address" if "@" in text else repr(text)  # which may hold a password
    if re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,62}(/[^?#\x00-\x1f]*)?", text):
        return text.rstrip("/")
    raise ValueError(
        f"{shown} is not a folder such as file:///backups or a bucket such as s3://bucket/prefix"
    )


def web_address(text: str) -> str:
    """Read ``https://host:port``; the message repeats no part that may hold a password."""
    if not re.fullmatch(r"https?://[^\s@?#]+", text.strip()):
        raise ValueError(
            "it is not an address such as https://s3.example.com:9000 (without user and password)"
        )
    return text.strip().rstrip("/")


def public_keys(text: str) -> str:
    """Read public keys of age and SSH, separated by commas, spaces or lines; return one per line."""
    found = re.findall(r"ssh-[a-z0-9-]+\s+[A-Za-z0-9+/=]+|[^\s,]+", _without_comments(text))
    for key in found:
        if key.upper().startswith("AGE-SECRET-KEY-"):
            raise ValueError("a private key (AGE-SECRET-KEY-...) is among the public keys: keep it elsewhere")
        if not re.fullmatch(r"age1[a-z0-9]{20,}|ssh-(ed25519|rsa)\s+\S+", key):
            raise ValueError(f"{key!r} is not a public key such as age1... or ssh-ed25519 AAAA...")
    return "\n".join(" ".join(key.split()) for key in found)


def _without_comments(text: str) -> str:
    """Remove the comment after an SSH key on its line or before the comma, and lines that begin with #."""
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    return re.sub(r"(ssh-[a-z0-9-]+[ \t]+[A-Za-z0-9+/=]+)[^,\n]*", r"\1", text)


KEPT = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def keep(text: str) -> str:
    """Read ``last=5,daily=7,weekly=4,monthly=6``, or ``all`` to keep everything (returned as ``""``)."""
    lowered = text.strip().lower()
    if lowered in {"all", "everything"}:
        return ""
    counts: dict[str, int] = {}
    for part in re.split(r"[,\s]+", lowered):
        match = re.fullmatch(rf"({'|'.join(KEPT)})=(\d{{1,4}})", part)
        if match is None or match[1] in counts:
            raise ValueError(
                f"{text!r} does not say which backups to keep: write such as "
                "last=5,daily=7,weekly=4,monthly=6, or all"
            )
        counts[match[1]] = int(match[2])
    if not any(counts.values()):
        raise ValueError(f"{text!r} would keep nothing: the least is last=1")
    return ",".join(f"{name}={counts[name]}" for name in KEPT if counts.get(name))


def worker_count(text: str) -> int:
    """Read a number of workers from 1 to 64, or ``auto`` as 0."""
    lowered = text.strip().lower()
    if lowered == "auto":
        return 0
    if not re.fullmatch(r"[1-9]\d?", lowered) or int(lowered) > 64:
        raise ValueError(f"{text!r} is not auto or a number from 1 to 64")
    return int(lowered)


_LEVELS = {"zstd": 22, "gzip": 9, "lz4": 12}


def compression(text: str) -> str:
    """Read ``auto`` or ``METHOD:LEVEL``; a method alone means level 1."""
    lowered = text.strip().lower()
    if lowered == "auto":
        return lowered
    method, _, level = lowered.partition(":")
    if lowered in {"0", "none", "off"} or (method in _LEVELS and level == "0"):
        raise ValueError(f"{text!r} is refused: an uncompressed archive cannot reveal a flipped bit")
    most = _LEVELS.get(method, 0)
    if not re.fullmatch(r"[1-9]\d?", level or "1") or int(level or 1) > most:
        raise ValueError(
            f"{text!r} is not a compression such as zstd:1 (to 22), gzip:6 (to 9), lz4:1 (to 12)"
        )
    return f"{method}:{level or 1}"


def table_patterns(text: str) -> str:
    """Read ``audit_log, logs.*, "Odd".t``: unquoted names become lower case and may hold ``*`` and ``?``."""
    part = r'("([^"]|"")+"|[^\s",.]+)'
    if not re.fullmatch(rf"\s*({part}(\.{part})?\s*(,\s*|$))*", text):
        raise ValueError(f'{text!r} is not a list of tables such as audit_log, logs.*, "Odd name"')
    return text.strip()


def path(text: str) -> str:
    """Read the path of a file or folder unchanged."""
    return text


def revision(text: str) -> str:
    """Read a revision unchanged; only the project knows which revisions exist."""
    return text


_TYPE_NAMES: Mapping[Callable[[str], object], str] = {
    duration: "DURATION",
    interval: "DURATION",
    optional_duration: "DURATION|none",
    optional_interval: "DURATION|none",
    whole_number: "N",
    worker_count: "auto|N",
    boolean: "true|false",
    listen_address: "HOST:PORT",
    goal: "REVISION",
    revision: "REVISION",
    relation: "NAME",
    role_name: "NAME",
    callable_name: "MODULE:CALLABLE",
    backup_url: "URL",
    web_address: "URL",
    public_keys: "KEY,...",
    keep: "POLICY",
    compression: "auto|METHOD:N",
    table_patterns: "TABLE,...",
    path: "PATH",
}


def type_name(read: Callable[[str], object]) -> str:
    """Return the form of the value that ``read`` accepts: ``DURATION``, ``N``, or its choices."""
    return "|".join(getattr(read, "choices", ())) or _TYPE_NAMES.get(read, "TEXT")
