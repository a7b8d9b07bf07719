"""The image's tags (docs/reference/image.md), for messages that recommend another image."""

from __future__ import annotations

import os

from migrator import __version__


def full() -> str:
    """Return the full image of this version."""
    version = os.environ.get("MIGRATOR_IMAGE_VERSION") or __version__
    return f"migrator:{version.replace('+', '-')}"  # a tag has no plus


def with_client(major: int) -> str:
    """Return the image of this version that has the client programs of a PostgreSQL major."""
    return f"{full()}-pg{major}"
