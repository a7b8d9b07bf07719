"""Missing resources of the machine: files, processes, memory or disk. They are neither a defect nor a wrong
address.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from migrator.errors import Unreachable

_LACKS = {
    errno.EMFILE: "the limit of open files of this process is reached (ulimit -n)",
    errno.ENFILE: "this machine has no file handles left (fs.file-max)",
    errno.ENOMEM: "there is no free memory",
    errno.EAGAIN: "the limit of processes or threads is reached (ulimit -u, or the container's limit)",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit of the file size is reached (ulimit -f)",
    errno.EROFS: "the file system is read-only",
}


def lack(error: BaseException) -> str:
    """Return the missing resource behind an error; an empty string for any other error."""
    for item in _causes(error):
        if isinstance(item, MemoryError):
            return _LACKS[errno.ENOMEM]
        if isinstance(item, RuntimeError) and "can't start new thread" in str(item):
            return _LACKS[errno.EAGAIN]
        if isinstance(item, OSError) and item.errno in _LACKS:
            place = f": {item.filename}" if item.filename else ""
            return f"{_LACKS[item.errno]}{place}"
        if isinstance(item, ImportError):  # the loader of shared libraries has only text
            if "failed to map segment" in str(item):
                return _LACKS[errno.ENOMEM]
            for number, sentence in _LACKS.items():
                if os.strerror(number) in str(item):
                    return sentence
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, but not errors that were only being handled when it was raised."""
    item: BaseException | None = error
    while item is not None:
        yield item
        item = getattr(item, "orig", None) or item.__cause__


def without(why: str) -> Unreachable:
    """Return the error of a run that lacked a resource; it did not change the database."""
    return Unreachable(
        f"This machine lacks a resource that the run needs: {why}.",
        next_step="raise that limit or add that resource, then run it again",
    )


def cannot_start(error: OSError) -> str:
    """Return why an existing program cannot be started."""
    if error.errno == errno.ENOENT:
        return "its loader or interpreter is missing"
    if error.errno == errno.ENOEXEC:
        return "it is not built for this machine"
    return lack(error).partition(": ")[0] or error.strerror or str(error)
