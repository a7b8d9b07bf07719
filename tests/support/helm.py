"""Helm without a cluster: render charts, and read what they refuse."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.kubernetes import documents, program

ROOT = Path(__file__).resolve().parents[2]
CHARTS = ROOT / "k8s" / "chart"
CHART = CHARTS / "migrator"
LEAST: Mapping[str, Any] = {
    "image": {"repository": "registry.example/shop-migrations", "tag": "1.4.2"},
    "database": {"existingSecret": "shop-database"},
}
"""The values that have no default."""


class Refused(Exception):
    """Helm did not accept the values; carries what it printed."""


class Helm:
    """The program, with its caches and its values files in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        homes = {f"HELM_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **homes}

    def run(self, *arguments: str) -> str:
        """Return what `helm ARGUMENTS` prints; raises :class:`Refused` where it fails."""
        done = subprocess.run(
            [str(program("helm")), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        if done.returncode != 0:
            raise Refused(done.stdout + done.stderr)
        return done.stdout

    def values(self, values: Mapping[str, Any]) -> Path:
        """Write a values file."""
        path = self.folder / "values.yaml"
        path.write_text(yaml.safe_dump(dict(values)))
        return path

    def text(
        self,
        values: Mapping[str, Any] | Path,
        *arguments: str,
        chart: Path = CHART,
        release: str = "shop",
        command: Sequence[str] = ("template",),
    ) -> str:
        """Return what the chart renders to with some values, or with a file of them."""
        path = values if isinstance(values, Path) else self.values(values)
        return self.run(*command, release, str(chart), "-f", str(path), *arguments)

    def template(
        self, values: Mapping[str, Any] | Path, *arguments: str, chart: Path = CHART, release: str = "shop"
    ) -> list[dict[str, Any]]:
        """Return the objects that the chart renders to."""
        return documents(self.text(values, *arguments, chart=chart, release=release))


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return mappings laid over each other, as Helm does it with values files."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            both = isinstance(value, Mapping) and isinstance(below, Mapping)
            result[key] = merged(below, value) if both and below is not None else value
    return result
