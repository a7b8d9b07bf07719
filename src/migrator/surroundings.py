"""What an ``env.py`` may change of the process around it, and migrator still needs afterwards."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Give the working directory, the warning filters and the standard streams back after the block.

    Within it all that is printed goes where the logs go, from child processes and C libraries too: stdout is
    for a command's answer.
    """
    folder = Path.cwd()
    stdout, stderr = sys.stdout, sys.stderr
    stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = stderr
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        with contextlib.suppress(ValueError, OSError):
            stdout.flush()  # what was printed through the stream that Alembic's Config had kept
        os.dup2(answers, 1)
        os.close(answers)
        with contextlib.suppress(OSError):
            os.chdir(folder)
