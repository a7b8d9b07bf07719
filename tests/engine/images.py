"""What the tests of the image build beside it, and `bin/image`, which looks at images as its users do."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from tests.engine.engine import ROOT, CommandFailed, Engine, call, reach

LOCKED_DOWN = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def look(engine: Engine, *arguments: str, expect: int | None = 0) -> str:
    """Run `bin/image` and return what it prints."""
    settings = {"PYTHON": sys.executable, "DOCKER": shlex.join(reach(engine.docker, engine.settings))}
    command = [str(ROOT / "bin" / "image"), *arguments]
    return call(*command, expect=expect, environment={**engine.settings, **settings}).stdout


def figures(table: str) -> dict[str, tuple[float, float]]:
    """Read a table of `bin/image size`: MB by layer, and the part of it that replaces what is below."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    return {name: (float(size), float(replaced)) for name, size, replaced in rows}


def python(engine: Engine, image: str, program: str, *options: str) -> str:
    """Run a Python program in an image, locked down; return what it prints."""
    command = ("run", "--rm", *LOCKED_DOWN, *options, "--entrypoint", "python", image, "-c", program)
    return engine.run(*command).stdout


def derive(engine: Engine, folder: Path, tag: str, dockerfile: str) -> str:
    """Build an image from a few lines; return its tag."""
    (folder / "Dockerfile").write_text(dockerfile)
    engine.build(folder, tag)
    return tag


def refused_build(engine: Engine, *options: str) -> str:
    """Return what a build says that must not succeed."""
    try:
        engine.build(ROOT, "migrator-test-refused", *options)
    except CommandFailed as failed:
        return failed.result.stdout + failed.result.stderr
    raise AssertionError("the build succeeded")
