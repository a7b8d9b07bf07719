"""Fixtures: Helm, and a chart that depends on ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.helm import CHARTS, Helm


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    """The pinned Helm, which sees nothing of the machine's own."""
    return Helm(tmp_path)


@pytest.fixture
def parent(tmp_path: Path, helm: Helm) -> Path:
    """A copy of the chart that depends on ours, its dependency fetched from the folder beside it."""
    charts = tmp_path / "charts"
    shutil.copytree(CHARTS, charts)
    helm.run("dependency", "update", str(charts / "example-backend"))
    return charts / "example-backend"
