"""Look at an image from outside: its size layer by layer, another build of it, its bill of materials.

    bin/image size IMAGE        what each layer adds, and each Python distribution in migrator's own; a table for docs/
    bin/image same IMAGE IMAGE  whether two images have the same files to the byte, times aside; exit code 1 where not
    bin/image sbom IMAGE        its bill of materials (CycloneDX), as the build has put it in
    bin/image document IMAGE IMAGE  write the sizes of the full and of the slim image into docs/reference/image.md

A file is its path, type, mode, owner, target and content. Only `docker` is run (DOCKER=podman works as well).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

MB = 1_000_000
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "image.md"
SBOM = "/opt/migrator/sbom.cdx.json"
ENVIRONMENT = "opt/migrator/"
PARTS = (
    ("install client", "PostgreSQL's client programs"),
    ("install python", "Python and the roots of TLS"),
    ("/opt/migrator", "migrator and its dependencies"),
)
"""What a layer is, by what its command has in it; what has none of these adds nothing or belongs to the base."""
MOST = 12
"""How many distributions are listed by name."""
MADE_BY_THE_ENGINE = frozenset({"etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/mtab", ".dockerenv"})


@dataclass
class Layer:
    """What one layer adds, in bytes; ``replaced`` is the part in files that the layers below have, too."""

    name: str
    size: int = 0
    replaced: int = 0
    distributions: Counter[str] = field(default_factory=Counter)


def write(output: IO[bytes], *arguments: str) -> None:
    """Run a command of the engine, its output into a file; ends this program where it fails."""
    command = [*shlex.split(os.environ.get("DOCKER", "docker")), *arguments]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")


def docker(*arguments: str) -> str:
    """Run a command of the engine and return what it prints."""
    with tempfile.TemporaryFile() as output:
        write(output, *arguments)
        output.seek(0)
        return output.read().decode()


@contextlib.contextmanager
def archive_of(*arguments: str) -> Iterator[tarfile.TarFile]:
    """Open the archive that a command of the engine prints."""
    with tempfile.TemporaryFile() as output:
        write(output, *arguments)
        output.seek(0)
        with tarfile.open(fileobj=output) as archive:
            yield archive


@contextlib.contextmanager
def container(image: str) -> Iterator[str]:
    """Create a container that never runs; its id."""
    created = docker("create", image).strip()
    try:
        yield created
    finally:
        docker("rm", created)


@contextlib.contextmanager
def saved(image: str) -> Iterator[tuple[tarfile.TarFile, list[tuple[str, str]]]]:
    """Open an image as `docker save` writes it; the lowest layer first, the command and the file in it of each."""
    with archive_of("save", image) as whole:
        manifest = read_json(whole, "manifest.json")[0]
        history = read_json(whole, manifest["Config"])["history"]
        commands = [line.get("created_by", "") for line in history if not line.get("empty_layer")]
        yield whole, list(zip(commands, manifest["Layers"], strict=True))


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    """Return what a file of an archive holds."""
    return json.load(archive.extractfile(name) or io.BytesIO())


def layers(image: str) -> list[Layer]:
    """Return the base as one layer, then each of ours, what is built on them with the last; by the files' length."""
    found = [Layer("the base image")]
    below: set[str] = set()
    with saved(image) as (whole, contents):
        for command, name in contents:
            with tarfile.open(fileobj=whole.extractfile(name)) as archive:
                files = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
                part = next((part for pattern, part in PARTS if pattern in command), None)
                if part is not None:
                    found.append(Layer(part))
                    found[-1].distributions.update(by_distribution(archive, files))
            found[-1].size += sum(member.size for member in files.values())
            found[-1].replaced += sum(files[path].size for path in files.keys() & below)
            below |= files.keys()
    return found


def by_distribution(archive: tarfile.TarFile, files: Mapping[str, tarfile.TarInfo]) -> Counter[str]:
    """Return how many bytes each Python distribution takes, its bytecode included."""
    owner: dict[str, str] = {}
    for path, member in files.items():
        if path.startswith(ENVIRONMENT) and path.endswith(".dist-info/RECORD"):
            folder = PurePosixPath(path).parents[1]
            name = PurePosixPath(path).parent.name.removesuffix(".dist-info")
            lines = io.TextIOWrapper(archive.extractfile(member) or io.BytesIO())
            owner |= {os.path.normpath(folder / row[0]): name for row in csv.reader(lines) if row}
    found: Counter[str] = Counter()
    for path, member in files.items():
        if path.startswith(ENVIRONMENT):
            found[owner.get(source(path), "(the environment itself)")] += member.size
    return found


def source(path: str) -> str:
    """Return the file that bytecode was compiled from; any other file is itself."""
    folder, _, name = path.rpartition("/")
    if folder.endswith("/__pycache__") and name.endswith(".pyc"):
        return f"{folder.removesuffix('/__pycache__')}/{name.split('.')[0]}.py"
    return path


def table(found: list[Layer]) -> str:
    """Return what each layer adds, and what is in migrator's own, as tables."""
    lines = ["| layer | MB | of which also below |", "|---|---:|---:|"]
    lines += [f"| {layer.name} | {layer.size / MB:.1f} | {layer.replaced / MB:.1f} |" for layer in found]
    lines += [f"| together | {sum(layer.size for layer in found) / MB:.1f} | |"]
    lines += ["", "| in migrator's layer | MB |", "|---|---:|"]
    rows = found[-1].distributions.most_common()
    lines += [f"| {name} | {length / MB:.1f} |" for name, length in rows[:MOST]]
    lines += [f"| {len(rows[MOST:])} more | {sum(length for _, length in rows[MOST:]) / MB:.1f} |"]
    return "\n".join(lines) + "\n"


def size(image: str) -> int:
    """Print what an image is made of."""
    print(table(layers(image)), end="")
    return 0


def document(full: str, slim: str) -> int:
    """Write what both variants are made of between the page's markers."""
    text = PAGE.read_text(encoding="utf-8")
    for command, image in (("bin/image size migrator", full), ("bin/image size migrator:slim", slim)):
        begin, end = f"<!-- measured: {command} -->\n", "<!-- end -->"
        before, marker, rest = text.partition(begin)
        text = before + marker + "\n" + table(layers(image)) + "\n" + end + rest.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")
    return 0


def files(image: str) -> dict[str, str]:
    """Return each path of an image's file system with all that it is, but for its times, in one line."""
    found = {}
    with container(image) as created, archive_of("export", created) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if name not in MADE_BY_THE_ENGINE:
                content = archive.extractfile(member) if member.isreg() else None
                digest = hashlib.sha256(content.read()).hexdigest() if content else member.linkname
                owner = f"{member.uid}:{member.gid}"
                found[name] = f"{member.type.decode()} {member.mode:04o} {owner} {member.size} {digest}"
    return found


def same(one: str, other: str) -> int:
    """Print in which files two images differ; return 1 if they do."""
    first, second = files(one), files(other)
    different = sorted(path for path in first.keys() | second.keys() if first.get(path) != second.get(path))
    for path in different:
        print(f"{path}\n  {first.get(path, 'missing')}\n  {second.get(path, 'missing')}")
    print(f"{len(first)} paths in {one}, {len(second)} in {other}: {len(different)} differ")
    return 1 if different else 0


def sbom(image: str) -> int:
    """Print an image's bill of materials."""
    with container(image) as created, archive_of("cp", f"{created}:{SBOM}", "-") as archive:
        for member in archive:
            print((archive.extractfile(member) or io.BytesIO()).read().decode(), end="")
    return 0


def main() -> int:
    """Do what the arguments say; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="bin/image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_one, of_two = {"size": size, "sbom": sbom}, {"same": same, "document": document}
    for verb in (*of_one, *of_two):
        verbs.add_parser(verb).add_argument("image", nargs=1 if verb in of_one else 2)
    arguments = parser.parse_args()
    if arguments.verb in of_one:
        return of_one[arguments.verb](*arguments.image)
    return of_two[arguments.verb](*arguments.image)


if __name__ == "__main__":
    sys.exit(main())
