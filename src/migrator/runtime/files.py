"""Write the files that others read: whole or not at all, never through a link, and never waiting.

Others may be able to write to the folder. The file's name may be a link to another file, a FIFO without
a reader, or a device. The folder is opened once, and all work is relative to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys

_OURS = re.compile(r"/dev/(?:(stdout|stderr)|fd/(\d+))|/proc/(?:self|thread-self)/fd/(\d+)")
_NUMBERS = {"stdout": 1, "stderr": 2}
_OF_A_PROCESS = re.compile(r"/proc/\d+/fd/\d+")  # /proc/1/fd/1 is a container's stdout
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def replace(place: str, text: str) -> None:
    """Write a file under its final name when it is complete; raises OSError.

    A target that is not a regular file (``/dev/stdout``, ``/dev/fd/3``, a device, a FIFO with a reader)
    is written to directly.
    """
    data = text.encode("utf-8", "backslashreplace")
    if _descriptor(place) is not None or _is_special(place):
        overwrite(place, data)
        return
    folder, name = os.path.split(place)
    temporary = f".{name[:200]}.{os.urandom(8).hex()}.part"
    directory = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            number = os.open(temporary, flags, 0o666, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NOT_IN_THIS_FOLDER:
                raise
            overwrite(place, data)  # the file itself may be writable
            return
        try:
            _write_all(number, data)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            if error.errno != errno.EBUSY:
                raise
            overwrite(place, data)  # a file that is mounted on its own
        finally:
            os.close(number)
    finally:
        os.close(directory)


_NOT_IN_THIS_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS)


def overwrite(place: str, data: bytes) -> None:
    """Write to an existing file, and create nothing; raises OSError, also for a link and for a file with two
    names.
    """
    number = _descriptor(place)
    stream = {1: sys.stdout, 2: sys.stderr}.get(number or 0)
    if stream is not None:
        stream.write(data.decode())
        stream.flush()
        return
    if number is not None:
        _write_all(number, data)
        return
    foreign = _OF_A_PROCESS.fullmatch(place) is not None
    number = os.open(place, _WRITE & ~os.O_NOFOLLOW | os.O_APPEND if foreign else _WRITE)
    try:
        found = os.fstat(number)
        if stat.S_ISREG(found.st_mode) and not foreign:
            if found.st_nlink != 1:
                raise OSError(
                    errno.EMLINK, "the file has another name, which others may read or may have created"
                )
            os.ftruncate(number, 0)
        _write_all(number, data)
    finally:
        os.close(number)


def remove(place: str) -> None:
    """Remove a file of an earlier run, or empty it; anything but a regular file stays. Raises OSError."""
    if _descriptor(place) is not None or _is_special(place):
        return
    try:
        os.unlink(place)
    except FileNotFoundError:
        return
    except OSError:
        overwrite(place, b"")


def _descriptor(place: str) -> int | None:
    """Return the number of our own descriptor behind a path; None for any other path."""
    found = _OURS.fullmatch(os.path.normpath(place))
    if found is None:
        return None
    return _NUMBERS[found[1]] if found[1] else int(found[2] or found[3])


def _is_special(place: str) -> bool:
    if _OF_A_PROCESS.fullmatch(place):
        return True
    try:
        mode = os.lstat(place).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISLNK(mode))


def _write_all(number: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(number, left) :]
