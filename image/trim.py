"""Delete from an environment what no run of migrator and no env.py reads; the build calls it before it compiles.

    python trim.py FOLDER [--system-libpq] [DISTRIBUTION ...]

The named distributions go as a whole (the slim image's). Each RECORD is kept true: what is gone is not listed, and what
was changed, by strip too, has its new hash.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

UNREAD = (
    "sqlalchemy/testing",  # SQLAlchemy's own tests are built on these, and so are Alembic's
    "alembic/testing",
    "mako/testing",
    "asyncpg/_testbase",
    "greenlet/tests",
    "boto3/examples",
    "sqlalchemy/ext/mypy",  # mypy's plugin
    "urllib3/contrib/emscripten",  # for Python in a browser
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
EXAMPLES = "examples-1.json"
"""What boto3's help() shows of each service."""


def main(folder: Path, distributions: list[str], *, system_libpq: bool) -> None:
    """Trim all of an environment."""
    (site,) = folder.glob("lib/python3.*/site-packages")
    for name in distributions:
        remove_distribution(site, name)
    for path in unread(site):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (site / "botocore").exists():
        keep_endpoints(site / "botocore/data")
    if system_libpq:
        link_system_libpq(site)
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
            else:
                yield from service.glob(f"*/{EXAMPLES}")


def keep_endpoints(data: Path) -> None:
    """Take the endpoints of services that are not there out of botocore's list of all (1.2 MB)."""
    descriptions = [
        json.loads(gzip.decompress(path.read_bytes())) for path in data.glob("*/*/service-2.json.gz")
    ]
    names = {description["metadata"]["endpointPrefix"] for description in descriptions}
    every = json.loads((data / "endpoints.json").read_text())
    for partition in every["partitions"]:
        services = partition["services"]
        partition["services"] = {name: services[name] for name in services if name in names}
    (data / "endpoints.json").write_text(json.dumps(every, indent=1))


def link_system_libpq(site: Path) -> None:
    """Let psycopg2 load the system's libpq, and delete the wheel's own with its OpenSSL, Kerberos and LDAP (11 MB).

    The name that the dynamic linker reads is replaced where it stands, by the shorter one, so that nothing moves.
    """
    (own,) = site.glob("psycopg2_binary.libs/libpq-*.so.5.*")
    (driver,) = site.glob("psycopg2/_psycopg.*.so")
    old = f"\0{own.name}\0".encode()
    before, found, after = driver.read_bytes().partition(old)
    if not found or old in after:
        raise SystemExit(f"{driver} does not name {own.name} once: fix link_system_libpq() for this release")
    driver.write_bytes(before + b"\0libpq.so.5".ljust(len(old), b"\0") + after)
    shutil.rmtree(own.parent)
    for bill in site.glob("psycopg2_binary-*.dist-info/sboms/auditwheel.cdx.json"):
        bill.unlink()  # of what was just deleted


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
    """Take out of a RECORD what is not there any more, and note the rest as it is now."""
    site = record.parents[1]
    kept = [noted(site / row[0], row) for row in rows(record) if (site / row[0]).exists()]
    with record.open("w", newline="") as output:
        csv.writer(output, lineterminator="\n").writerows(kept)


def noted(path: Path, row: list[str]) -> list[str]:
    """Return a file's row; RECORD itself has no hash there."""
    if not row[1]:
        return row
    content = path.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [row[0], f"sha256={digest}", str(len(content))]


def rows(record: Path) -> list[list[str]]:
    """Read a RECORD: path, hash, size."""
    with record.open(newline="") as lines:
        return list(csv.reader(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("distributions", nargs="*")
    parser.add_argument("--system-libpq", action="store_true")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.distributions, system_libpq=arguments.system_libpq)
