"""Delete from an environment what no run of migrator and no env.py reads; the build calls it before it compiles.

    python trim.py FOLDER [DISTRIBUTION ...]

The named distributions go as a whole (the slim image's). Each RECORD is kept true: what is gone is not listed.
"""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

UNREAD = (
    "sqlalchemy/testing",  # SQLAlchemy's own tests are built on these, and so are Alembic's
    "alembic/testing",
    "greenlet/tests",
    "boto3/examples",
)
SOURCES = ("*.c", "*.cpp", "*.h", "*.hpp", "*.pyx", "*.pxd", "*.pxi", "*.pyi")
"""What extensions were compiled from, and what only type checkers read."""

SERVICES = frozenset(
    {
        *("s3", "sts", "sso", "sso-oidc", "signin"),  # backups, and every way to an identity
        *("secretsmanager", "ssm", "kms", "rds", "dsql"),  # where an env.py gets a password or a token from
    }
)
"""The services of AWS that boto3 can talk to in the image; the descriptions of the 400 others are 25 MB."""


def main(folder: Path, distributions: list[str]) -> None:
    """Trim all of an environment."""
    (site,) = folder.glob("lib/python3.*/site-packages")
    for name in distributions:
        remove_distribution(site, name)
    for path in unread(site):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for record in site.glob("*.dist-info/RECORD"):
        keep_true(record)


def unread(site: Path) -> Iterator[Path]:
    """Yield what nothing reads."""
    for name in UNREAD:
        if (site / name).exists():
            yield site / name
    for pattern in SOURCES:
        yield from list(site.rglob(pattern))
    for data in (site / "botocore/data", site / "boto3/data"):
        for service in sorted(data.iterdir()) if data.is_dir() else ():
            if service.is_dir() and service.name not in SERVICES:
                yield service


def remove_distribution(site: Path, name: str) -> None:
    """Remove the files that a distribution's RECORD lists, and the folders that this leaves empty."""
    (information,) = site.glob(f"{name.replace('-', '_')}-*.dist-info")
    for path in [site / row[0] for row in rows(information / "RECORD")]:
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == site or not parent.is_relative_to(site) or any(parent.iterdir()):
                break
            parent.rmdir()


def keep_true(record: Path) -> None:
    """Take out of a RECORD what is not there any more."""
    site = record.parents[1]
    kept = [row for row in rows(record) if (site / row[0]).exists()]
    with record.open("w", newline="") as output:
        csv.writer(output, lineterminator="\n").writerows(kept)


def rows(record: Path) -> list[list[str]]:
    """Read a RECORD: path, hash, size."""
    with record.open(newline="") as lines:
        return list(csv.reader(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
