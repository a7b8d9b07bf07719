"""The format of a dump, its number of workers, its compression.

Measured on a pgbench database of 2 GB (bench/results/backup.md): ``zstd:1`` needed a third of the size
of ``gzip:1``, in the same time, and is read back five times as fast; higher levels saved little.
Workers help with several big tables, because pg_dump cannot divide one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from migrator.backups.clients import Client
from migrator.backups.manifest import human_size
from migrator.config.settings import Settings
from migrator.errors import BackupFailed
from migrator.runtime import subprocesses

CUSTOM, DIRECTORY = "custom", "directory"
PARALLEL_FROM = 256 * 1000 * 1000
"""Bytes of data from which several workers are worth their connections (format ``auto``)."""
MOST_JOBS = 4
"""The most workers that ``auto`` starts: each is a session that reads at full speed, on a server in use."""
_BIGGEST_SHARE = 0.75  # a table with more of the data than this sets the duration, with any number of workers
_METHODS_SINCE = 16  # pg_dump --compress=METHOD:LEVEL
_PROBE_TIMEOUT = 20.0


@dataclass(frozen=True)
class Method:
    """The options of pg_dump; ``note`` says why they differ from the settings."""

    dump_format: str
    jobs: int
    compression: str
    note: str = ""

    @property
    def single(self) -> Method:
        return Method(CUSTOM, 1, self.compression)


def choose(settings: Settings, client: Client, *, folder: bool, table_bytes: Iterable[int]) -> Method:
    """Decide how to dump tables of these sizes; ``folder`` is whether the store can hold a folder.

    Raises :class:`BackupFailed` if the client cannot compress as MIGRATOR_BACKUP_COMPRESSION demands.
    """
    compression = _compression(settings.backup_compression, client)
    wanted = settings.backup_format
    if wanted == DIRECTORY and not folder:
        return Method(
            CUSTOM,
            1,
            compression,
            "a backup in directory format needs a folder and no encryption: migrator writes one file "
            "in custom format instead",
        )
    jobs = settings.backup_jobs or _jobs(list(table_bytes))
    if wanted == CUSTOM or not folder or (wanted == "auto" and jobs == 1):
        return Method(CUSTOM, 1, compression)
    return Method(DIRECTORY, jobs, compression)


def _jobs(sizes: list[int]) -> int:
    total = sum(sizes)
    if total < PARALLEL_FROM or max(sizes) > _BIGGEST_SHARE * total:
        return 1
    return max(1, min(MOST_JOBS, cores()))


def cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compression(wanted: str, client: Client) -> str:
    if wanted == "auto":
        return "zstd:1" if supports(client, "zstd") else "gzip:1"
    if supports(client, wanted.partition(":")[0]):
        return wanted
    raise BackupFailed(
        f"pg_dump {client.version} cannot compress with {wanted.partition(':')[0]} (MIGRATOR_BACKUP_COMPRESSION).",
        next_step="remove MIGRATOR_BACKUP_COMPRESSION, or set MIGRATOR_PG_BIN to a folder of clients that can",
    )


def compress_option(client: Client, compression: str) -> str:
    """Return the option for pg_dump; before 16, only gzip existed and only its level was named."""
    if client.major < _METHODS_SINCE:
        return f"--compress={compression.partition(':')[2] or 6}"
    return f"--compress={compression}"


@functools.cache
def supports(client: Client, method: str) -> bool:
    """Tell whether a pg_dump was built with a compression: it reports that before it connects."""
    if method == "gzip":
        return True
    if client.major < _METHODS_SINCE:
        return False
    probe = ["--format=custom", f"--compress={method}", "--dbname=host=/nonexistent"]
    try:
        done = subprocesses.run([client.pg_dump, *probe], timeout=_PROBE_TIMEOUT)
    except (OSError, subprocesses.TimedOut):
        return False
    return "connection to server" in done.stderr


def describe(method: Method, size: int) -> str:
    workers = f", {method.jobs} workers" if method.jobs > 1 else ""
    return f"{human_size(size)}, {method.dump_format} format{workers}, {method.compression}"
