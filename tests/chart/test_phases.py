"""Expand before a sync and contract after it: what Argo CD's hooks run, one after another, on a real database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.chart.checks import BACKUPS, MODES, of
from tests.support.helm import LEAST, Helm, merged
from tests.support.kubernetes import containers_of
from tests.support.projects import linear_history, write_project
from tests.support.runner import Runner
from tests.support.servers import Database


def hooks(helm: Helm, expand: str) -> list[list[str]]:
    """Return the arguments of the two Jobs, in the order in which they run."""
    phases: dict[str, Any] = {"preSync": {"args": ["upgrade", expand]}}
    objects = helm.template(merged(LEAST, MODES["argocd-both"], BACKUPS["identity"], {"argocd": phases}))
    found = {item["metadata"]["name"]: item for item in of(objects, "Job")}
    jobs = [found["shop-migrator-presync"], found["shop-migrator-postsync"]]
    return [container["args"] for job in jobs for container in containers_of(job)]


def test_each_sync_expands_and_contracts_and_goes_on_from_there(
    helm: Helm, database: Database, tmp_path: Path, run_migrator: Runner
) -> None:
    folder = write_project(tmp_path / "shop", revisions=linear_history(3))

    def run(arguments: list[str]) -> str:
        result = run_migrator(*arguments, cwd=folder, database=database)
        assert result.code == 0, result.stderr
        ((revision,),) = database.psql("SELECT version_num FROM alembic_version")
        return str(revision)

    expand, contract = hooks(helm, "r002")
    assert [run(expand), run(contract)] == ["r002", "r003"]
    # The next sync names the same revision, because nobody has thought of another: it is behind, and nothing is done.
    assert [run(expand), run(contract)] == ["r003", "r003"]

    write_project(folder, revisions=linear_history(5))
    expand, contract = hooks(helm, "r004")
    assert [run(expand), run(contract)] == ["r004", "r005"]
