"""The manifest: the history frozen at build time, so that a run can tell what the image holds without Alembic.

``migrator freeze`` writes ``manifest.json`` beside ``env.py``.  It holds nothing that differs from one build to the
next: no time, no absolute path.  Each revision is one line, oldest first, so that a new revision is one more line in
a review.  Standard library only, and little of it, for a run with nothing to do reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileSums:
    """A file's checksums, hexadecimal: the sha256 of its bytes, and that of its syntax tree (empty: no Python)."""

    sha256: str
    syntax: str

    def edited_from(self, other: FileSums) -> str:
        """Return what kind of edit led from ``other`` to this: none (an empty string), ``cosmetic`` or ``real``."""
        if self.sha256 == other.sha256:
            return ""
        return "cosmetic" if self.syntax and self.syntax == other.syntax else "real"


def file_sums(path: Path) -> FileSums:
    """Return both checksums of a file; raises OSError."""
    source = path.read_bytes()
    return FileSums(hashlib.sha256(source).hexdigest(), syntax_of(source))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes; raises OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def syntax_of(source: bytes) -> str:
    """Return the digest of a source text's syntax tree; see :mod:`migrator.syntax`."""
    from migrator import syntax

    return syntax.digest(source)


def digest_of(sums: Mapping[str, str]) -> str:
    """Return one digest over a history: ``sums`` are the sha256 of each revision's file by the revision's id."""
    lines = "".join(f"{revision} {sums[revision]}\n" for revision in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()
