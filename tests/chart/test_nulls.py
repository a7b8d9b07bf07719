"""null leaves a number to Kubernetes, and where there is none to leave it to it is refused: it is never 0."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart.checks import BACKUPS, EXTRAS, MODES, check, jobs, of
from tests.support.helm import LEAST, Helm, Refused, merged
from tests.support.kubernetes import of_kind, pod_of

FIELDS = ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished", "terminationGracePeriodSeconds")


def fields(item: dict[str, Any]) -> set[str]:
    """Return which of the fields a Job's or CronJob's specification has."""
    spec = item["spec"] if item["kind"] == "Job" else item["spec"]["jobTemplate"]["spec"]
    pod = pod_of(item)
    assert pod is not None
    return {name for name in FIELDS if name in spec or name in pod["spec"]}


@pytest.mark.parametrize("name", FIELDS)
def test_null_leaves_a_field_out(name: str, helm: Helm) -> None:
    layers = LEAST, MODES["job"], EXTRAS["watched"]
    objects = helm.template(merged(*layers, {name: None}))
    check(objects)
    assert len(jobs(objects)) == 3
    for item in jobs(objects):
        assert fields(item) == set(FIELDS) - {name}
    assert all(fields(item) == set(FIELDS) for item in jobs(helm.template(merged(*layers))))


def test_null_leaves_a_field_out_on_the_command_line_too(helm: Helm) -> None:
    given = ",".join(f"{name}=null" for name in FIELDS)
    assert fields(of_kind(helm.template(LEAST, "--set", given), "Job")) == set()


def test_nought_stays_nought(helm: Helm) -> None:
    job = of_kind(helm.template(merged(LEAST, {"backoffLimit": 0, "ttlSecondsAfterFinished": 0})), "Job")
    assert (job["spec"]["backoffLimit"], job["spec"]["ttlSecondsAfterFinished"]) == (0, 0)


@pytest.mark.parametrize(
    "path",
    ["hook.weight", "argocd.preSync.wave", "argocd.postSync.wave", "sidecar.port", "sidecar.startupSeconds"],
)
def test_null_is_refused_where_it_would_be_nought(path: str, helm: Helm) -> None:
    with pytest.raises(Refused, match=path.rpartition(".")[2]):
        helm.template(LEAST, "--set", f"{path}=null")


def test_argo_cd_removes_its_jobs_itself(helm: Helm) -> None:
    objects = helm.template(merged(LEAST, MODES["argocd-both"], BACKUPS["identity"], EXTRAS["watched"]))
    assert len(list(of(objects, "Job"))) == len(list(of(objects, "CronJob"))) == 2
    for item in of(objects, "Job"):
        assert fields(item) == set(FIELDS) - {"ttlSecondsAfterFinished"}
    for item in of(objects, "CronJob"):
        assert fields(item) == set(FIELDS)
