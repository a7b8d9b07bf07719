"""Expand before the new backend, contract after the old one: a history of two branches, as k8s/ has it for Argo CD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.outcome import ExitCode
from tests.support.kubernetes import ROOT, containers_of, documents, kustomize
from tests.support.runner import Runner
from tests.support.servers import Database

REVISION = """\
from alembic import op

revision, down_revision, branch_labels, depends_on = {names!r}


def upgrade():
    op.execute({sql!r})


def downgrade():
    raise NotImplementedError
"""
FIRST = {
    "r1": (("r1", None, None, None), "CREATE TABLE people (name text)"),
    "e1": (("e1", "r1", ("expand",), None), "ALTER TABLE people ADD given text, ADD family text"),
    "c1": (("c1", "r1", ("contract",), "e1"), "ALTER TABLE people DROP name"),
}
NEXT = {
    "e2": (("e2", "e1", None, None), "ALTER TABLE people ADD born date"),
    "c2": (("c2", "c1", None, "e2"), "ALTER TABLE people ALTER born SET NOT NULL"),
}


def arguments(job: str) -> list[str]:
    """Return what a Job of the overlay runs."""
    objects = documents(kustomize(ROOT / "k8s" / "overlays" / "argocd-expand-contract"))
    (found,) = (item for item in objects if item["kind"] == "Job" and item["metadata"]["name"] == job)
    (container,) = containers_of(found)
    return list(container["args"])


def write(folder: Path, history: dict[str, tuple[Any, str]]) -> None:
    """Add revisions to a project."""
    for name, (names, sql) in history.items():
        text = REVISION.format(names=names, sql=sql)
        (folder / "migrations" / "versions" / f"{name}.py").write_text(text)


@pytest.fixture
def columns(database: Database) -> Callable[[], set[str]]:
    """Return what returns the columns of the table."""
    query = "SELECT column_name FROM information_schema.columns WHERE table_name = 'people'"
    return lambda: {row[0] for row in database.psql(query)}


def test_a_release_expands_then_contracts(
    database: Database, project: Callable[..., Path], run_migrator: Runner, columns: Callable[[], set[str]]
) -> None:
    before, after = arguments("shop-migrate"), arguments("shop-contract")
    folder = project()
    (folder / "migrations" / "versions").mkdir(exist_ok=True)
    write(folder, FIRST)

    def run(*command: str) -> int:
        return run_migrator(*command, cwd=folder, database=database).code

    assert run(*before) == 0
    assert columns() == {"name", "given", "family"}  # old and new pods both find what they need
    assert run(*before) == 0  # a sync that is repeated finds nothing to do
    assert (
        run("wait-for-current", "--wait-timeout=1s") == ExitCode.NOT_CURRENT
    )  # so no pod may wait for the heads
    assert run(*after) == 0
    assert columns() == {"given", "family"}
    assert run("verify") == 0

    write(folder, NEXT)  # the next release, from both heads
    assert run(*before) == 0
    assert columns() == {"given", "family", "born"}
    assert run(*after) == 0
    assert run("check") == 0
    assert [row[0] for row in database.psql("SELECT version_num FROM alembic_version")] == ["c2"]
