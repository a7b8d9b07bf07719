"""Make pgbench databases for the benchmarks of backup and restore: 2 GB at scale 135."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.installations import binaries
from tests.support.projects import linear_history, write_project
from tests.support.servers import Database, Server, running

from bench.measure import clean_environment

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
SHAPES = {"one table": (), "8 partitions": ("--partitions=8",)}
"""pgbench's data are one big table, which pg_dump reads through one session however many workers it has; with
partitions they are several, as the tables of most databases are."""
_SETTINGS = {"shared_buffers": "256MB", "max_wal_size": "4GB"}


def arguments(about: str | None) -> argparse.Namespace:
    """Parse the arguments ``runs`` and ``scale``."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scale", type=int, default=135)
    return parser.parse_args()


def databases(scale: int) -> Iterator[tuple[str, Database, Path]]:
    """Make them one after the other; yields a title, the database, and the folder of a frozen Alembic project."""
    with tempfile.TemporaryDirectory() as place, running(binaries("zstd"), settings=_SETTINGS) as server:
        for title, options in SHAPES.items():
            folder = write_project(Path(place) / "project", revisions=linear_history(1))
            subprocess.run(
                [MIGRATOR, "freeze"], cwd=folder, env=clean_environment(), check=True, capture_output=True
            )
            yield f"pgbench, scale {scale}, {title}", _fill(server, scale, *options), folder
            for (name,) in server.psql("SELECT datname::text FROM pg_database WHERE datname LIKE 'b%%'"):
                server.drop_database(name)
            shutil.rmtree(folder)


def _fill(server: Server, scale: int, *options: str) -> Database:
    database = server.create_database("bench")
    command = [server.bin / "pgbench", "-i", "-q", "-s", str(scale), *options]
    environment = clean_environment() | database.environment()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return database
