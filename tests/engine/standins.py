"""Make stand-ins for the base images that the shipped files name, where they cannot be pulled.

`debian:trixie-slim` comes from debootstrap and `postgres:17` is Debian's PostgreSQL 17 in it. They carry the
official names, so the shipped Dockerfile and compose file run unchanged. An image that is already there, a
really pulled one too, is used as it is.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.engine.engine import CACHE, Engine, install, sudo

BASE_IMAGE = "debian:trixie-slim"
POSTGRES_IMAGE = "postgres:17"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ARCHIVE = CACHE / "trixie-slim.tar"

# As the official slim image leaves it: no documentation now, and none from later packages.
PATH_EXCLUDES = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/info/*
path-exclude /usr/share/lintian/*
path-exclude /usr/share/locale/*
"""
APT_OPTIONS = """\
Acquire::Languages "none";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
"""
SOURCES = """\
Types: deb
URIs: {mirror}
Suites: trixie trixie-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: {mirror}-security
Suites: trixie-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
EMPTIED = (
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
)


def ensure(engine: Engine) -> None:
    """Make the two base images unless the engine has them or can pull them."""
    if not engine.has_image(BASE_IMAGE):
        import_base(engine)
    if not engine.has_image(POSTGRES_IMAGE):
        folder = Path(__file__).parent / "standins" / "postgres"
        engine.build(folder, POSTGRES_IMAGE)


def import_base(engine: Engine) -> None:
    """Import the root file system as an image; keep its archive in the tree for the next fresh engine."""
    if not ARCHIVE.exists():
        bootstrap(ARCHIVE)
    engine.run("import", "-c", f"ENV PATH={PATH}", "-c", 'CMD ["bash"]', str(ARCHIVE), BASE_IMAGE)


def bootstrap(archive: Path) -> None:
    """Write a minimal Debian trixie, slimmed as the official image is, to `archive`."""
    install("debootstrap")
    root = archive.with_suffix(".root")
    sudo("rm", "-rf", "--one-file-system", str(root))
    program = shutil.which("debootstrap", path=f"{PATH}") or "debootstrap"
    try:
        sudo(program, "--variant=minbase", "trixie", str(root), timeout=400)
        slim(root)
        partial = archive.with_suffix(".partial")
        sudo("tar", "--numeric-owner", "-C", str(root), "-cf", str(partial), ".")
        partial.rename(archive)
    finally:
        sudo("rm", "-rf", "--one-file-system", str(root))


def slim(root: Path) -> None:
    """Drop what the official slim image does not have, and point apt at the same suites."""
    write(root / "etc/dpkg/dpkg.cfg.d/docker", PATH_EXCLUDES)
    write(root / "etc/apt/apt.conf.d/docker", APT_OPTIONS)
    (mirror,) = re.findall(r"^deb (\S+) ", (root / "etc/apt/sources.list").read_text(), re.MULTILINE)
    write(root / "etc/apt/sources.list.d/debian.sources", SOURCES.format(mirror=mirror))
    sudo("rm", "-f", str(root / "etc/apt/sources.list"), str(root / "etc/resolv.conf"))
    for folder in EMPTIED:
        sudo("find", str(root / folder), "-mindepth", "1", "-delete")
    sudo(
        "find",
        str(root / "usr/share/doc"),
        "-mindepth",
        "2",
        "!",
        "-name",
        "copyright",
        "!",
        "-type",
        "d",
        "-delete",
    )


def write(path: Path, text: str) -> None:
    """Write a file that may belong to root."""
    sudo("tee", str(path), stdin=text)
