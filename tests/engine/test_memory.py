"""The manifests' memory limit holds, in a container that has it and no swap: long histories and large backups."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.memory import Bench, limit, measure

from tests.engine.containers import Postgres
from tests.engine.engine import Engine

pytestmark = pytest.mark.engine

GIGABYTES = 0.3  # `python -m bench.memory` takes 2: what is needed does not grow with the backup


def test_the_limit_holds(engine: Engine, image: str, postgres: Postgres, tmp_path: Path) -> None:
    found, size = measure(Bench(engine, postgres, tmp_path), GIGABYTES)
    assert size > GIGABYTES * 1e9
    assert limit().endswith("Mi")
    allowed = int(limit().removesuffix("Mi")) * 2**20
    for run in found:
        assert (run.what, run.code, run.killed) == (run.what, 0, False)
        assert run.highest < allowed / 2, f"{run.what} leaves an application's env.py too little room"
    assert max(run.highest for run in found) > 2**20  # the samples are of something
