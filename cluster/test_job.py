"""The shipped Job: which exit codes its controller tries again, which fail it at once, and who waits for it."""

from __future__ import annotations

import json

from tests.engine.engine import call

from cluster import slow
from cluster.cluster import UNREACHABLE
from cluster.kubectl import Object, is_true, state, terminated, wait_for
from cluster.shop import HEADS, OVERLAYS, Shop, encoded, of_kind

JOB = "shop-migrate"
PODS = f"job-name={JOB}"


def codes(shop: Shop) -> list[int]:
    """Return the exit codes of the Job's pods that have ended, oldest first."""
    ends = [terminated(pod, "migrator") for pod in shop.pods(PODS)]
    return [ended["exitCode"] for ended in ends if ended]


def condition(shop: Shop, kind: str) -> Object:
    """Return a condition of the Job once it is true; empty before."""
    job = shop.kubectl.get("job", JOB)
    if not is_true(job, kind):
        return {}
    return next(entry for entry in job["status"]["conditions"] if entry["type"] == kind)


def test_the_backend_waits_until_the_job_is_complete(shop: Shop) -> None:
    shop.apply(*shop.rendered(OVERLAYS / "job"))
    wait_for(lambda: condition(shop, "Complete"), 120, shop.explain)
    wait_for(lambda: shop.ready("shop-backend"), 120, shop.explain)

    assert codes(shop) == [0]
    assert shop.versions() == HEADS
    (backend,) = shop.pods("app.kubernetes.io/name=shop-backend")
    ended, migrated = terminated(backend, "migrator"), terminated(shop.pods(PODS)[0], "migrator")
    assert ended["exitCode"] == 0
    assert ended["finishedAt"] >= migrated["finishedAt"]
    job = shop.kubectl.get("job", JOB)
    assert job["spec"]["ttlSecondsAfterFinished"] == 86400
    print(shop.kubectl.run("get", "jobs,pods").stdout)


def test_a_twenty_is_tried_again_until_postgres_is_there(shop: Shop) -> None:
    objects = shop.rendered(
        OVERLAYS / "job", address=shop.cluster.address_of(shop.database, host=UNREACHABLE)
    )
    of_kind(objects, "ConfigMap")["data"]["MIGRATOR_WAIT_TIMEOUT"] = "3s"
    shop.apply(*objects)
    wait_for(lambda: codes(shop) == [20, 20], 180, shop.explain)

    secret = of_kind(objects, "Secret")
    secret["data"] = {"url": encoded(shop.cluster.address_of(shop.database))}
    shop.kubectl.apply(secret)
    wait_for(lambda: condition(shop, "Complete"), 180, shop.explain)

    tried = codes(shop)
    assert set(tried[:-1]) == {20}
    assert tried[-1] == 0
    assert shop.versions() == HEADS
    print(shop.kubectl.run("get", "jobs,pods").stdout, tried)


def test_a_thirty_fails_the_job_at_once(shop: Shop) -> None:
    shop.apply(*shop.rendered(OVERLAYS / "job", address=shop.cluster.address_of(shop.database, "wrong")))
    failed = wait_for(lambda: condition(shop, "Failed"), 120, shop.explain)

    assert failed["reason"] == "PodFailurePolicy"
    assert "exit code 30" in failed["message"]
    assert codes(shop) == [30]
    print(shop.kubectl.describe("job", JOB))


def test_a_secret_replaced_under_a_refused_pod_is_what_it_logs_in_with(shop: Shop) -> None:
    """The kubelet writes it into the volume of the running pod within a minute or so: no try is lost."""
    objects = shop.rendered(OVERLAYS / "job", address=shop.cluster.address_of(shop.database, "wrong"))
    of_kind(objects, "ConfigMap")["data"] |= {"MIGRATOR_ROTATION_GRACE": "5m", "MIGRATOR_WAIT_TIMEOUT": "5m"}
    shop.apply(*objects)
    (pod,) = wait_for(lambda: shop.pods(PODS), 30, lambda: "no pod")
    name = pod["metadata"]["name"]
    shop.wait_until_started(name, "migrator")
    wait_for(
        lambda: "only a new version of" in shop.kubectl.logs(name, "migrator"),
        60,
        lambda: shop.kubectl.logs(name, "migrator"),
    )
    secret = of_kind(objects, "Secret")
    secret["data"] = {"url": encoded(shop.cluster.address_of(shop.database))}
    shop.kubectl.apply(secret)
    wait_for(lambda: condition(shop, "Complete"), 240, shop.explain)
    assert codes(shop) == [0]
    assert shop.versions() == HEADS
    print(shop.kubectl.logs(name, "migrator"))


def test_a_revision_that_fails_fails_the_job_at_once(shop: Shop) -> None:
    objects = shop.rendered(OVERLAYS / "job")
    slow.mounted(of_kind(objects, "Job")["spec"]["template"])
    shop.apply(slow.history(failing=True), *objects)
    failed = wait_for(lambda: condition(shop, "Failed"), 120, shop.explain)

    assert failed["reason"] == "PodFailurePolicy"
    assert "exit code 40" in failed["message"]  # its first revision was committed
    assert codes(shop) == [40]
    assert shop.versions() == shop.standing() == {"r001"}
    assert shop.locks() == 0
    print(failed["message"])
    print(terminated(shop.pods(PODS)[0], "migrator")["message"])


def job_in_the_middle(shop: Shop, revision: str, seconds: int = 300) -> str:
    """Start the Job, whose first pod is then in a revision that lasts so long; return the pod's name."""
    shop.cluster.psql(slow.hold(shop.database, revision, seconds))
    objects = shop.rendered(OVERLAYS / "job")
    slow.mounted(of_kind(objects, "Job")["spec"]["template"])
    shop.apply(slow.history(), *(item for item in objects if item["kind"] != "Deployment"))
    wait_for(lambda: slow.sleeping(shop.psql, shop.database), 90, shop.explain)
    shop.cluster.psql(slow.hold(shop.database, revision, 0))
    (pod,) = shop.pods(PODS)
    return str(pod["metadata"]["name"])


def finished_by_another_pod(shop: Shop) -> list[str]:
    """Wait until the Job is complete, and see that nothing was left half done; return the runs' exit codes."""
    wait_for(lambda: condition(shop, "Complete"), 180, shop.explain)
    assert shop.versions() == {slow.HEAD}
    assert shop.standing() == {"r001", slow.HEAD}
    assert shop.locks() == 0
    return shop.psql("SELECT code FROM migrator_ledger WHERE event = 'run' ORDER BY at")


def test_a_deleted_pod_that_changed_nothing_is_replaced(shop: Shop) -> None:
    name = job_in_the_middle(shop, "r001")
    shop.keep(name)
    shop.kubectl.delete("pod", name, "--wait=false")
    assert shop.wait_for_exit(name, "migrator")["exitCode"] == 23
    # The first run rolled back even the ledger that it had made.
    assert finished_by_another_pod(shop) == ["0"]


def test_an_evicted_pod_is_replaced_though_it_had_committed_a_revision(shop: Shop) -> None:
    name = job_in_the_middle(shop, "r002")
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": shop.name},
    }
    path = f"/api/v1/namespaces/{shop.name}/pods/{name}/eviction"
    shop.kubectl.run("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    # 40 would fail the Job; the rule about disruptions comes first, and ignores it.
    assert finished_by_another_pod(shop) == ["40", "0"]


def test_a_pod_whose_network_is_cut_is_replaced(shop: Shop) -> None:
    name = job_in_the_middle(shop, "r001", seconds=20)
    container = state(shop.kubectl.get("pod", name), "migrator")["containerID"]
    inside = ("nsenter", f"--target={shop.cluster.node.process(container)}", "--net", "iptables", "-w")
    for chain in ("INPUT", "OUTPUT"):
        call(*inside, "--insert", chain, "--jump", "DROP")  # nobody is told: a switch that died
    assert shop.wait_for_exit(name, "migrator", 240)["exitCode"] == 20
    assert finished_by_another_pod(shop) == ["0"]


def test_a_deleted_pod_that_had_committed_a_revision_fails_the_job(shop: Shop) -> None:
    name = job_in_the_middle(shop, "r002")
    shop.kubectl.delete("pod", name)
    failed = wait_for(lambda: condition(shop, "Failed"), 120, shop.explain)
    assert failed["reason"] == "PodFailurePolicy"
    assert "exit code 40" in failed["message"]
    assert shop.versions() == shop.standing() == {"r001"}
    assert shop.locks() == 0
