"""The process around the work: what an ``env.py`` may change of it, and what need not be loaded into it."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Give the working directory, the warning filters and the standard streams back after the block.

    Within it all that is printed goes where the logs go, from child processes and C libraries too: stdout is
    for a command's answer.
    """
    folder = os.getcwd()
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


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """Let a module seem not to be installed within the block, unless it is loaded already.

    For ``ssl`` while psycopg2 is imported: it is loaded there only to let Python set OpenSSL's callbacks for threads,
    which OpenSSL has ignored since 1.1 and psycopg2 does without (``libcrypto_threads_init`` in its psycopgmodule.c),
    and takes longer to load than all of psycopg2.  For a program of one thread: another one's import would fail.
    """
    if module in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[module] = None
    try:
        yield
    finally:
        del modules[module]
