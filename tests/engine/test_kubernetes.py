"""The pods of k8s/ run: podman plays them. What the manifests say is checked in tests/manifests/test_manifests.py.

podman plays pods. What a cluster does around them is done here by hand, and said where: it reads a Job's policy, and
asks a startup probe (podman knows no native sidecars).
"""

from __future__ import annotations

import functools
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from migrator.outcome import ExitCode
from migrator.pipeline.stages.lock import LOCK_CLASS, RUN_LOCK
from tests.engine.containers import wait_for
from tests.engine.engine import ROOT, Engine
from tests.engine.pods import Pods, playable
from tests.support.kubernetes import documents, kustomize, of_kind, reaction
from tests.support.ports import free_port

pytestmark = pytest.mark.engine

K8S = ROOT / "k8s"
MIGRATIONS_IMAGE = "shop-migrations:latest"
REPLICAS = 20
SLUGS = ["demo-shop", "demo-shop-uk"]


@pytest.fixture(scope="module", autouse=True)
def _images(engine: Engine, image: str, backend_image: str, playground: Pods) -> None:
    """Give podman the images that the manifests name."""
    engine.build(ROOT, MIGRATIONS_IMAGE, "-f", str(K8S / "Dockerfile"), f"--build-arg=MIGRATOR_IMAGE={image}")
    playground.podman.load(engine, MIGRATIONS_IMAGE, backend_image)


@functools.cache
def _text(overlay: str) -> str:
    return kustomize(K8S / overlay)


class Shop:
    """A database, and the objects of an overlay that use it."""

    def __init__(self, pods: Pods, overlay: str) -> None:
        self.pods, self.database = pods, pods.create_database()
        self.objects = documents(_text(overlay))
        self.secret, self.claim = f"shop-database-{self.database}", f"backups-{self.database}"
        self.say(pods.address(self.database))
        self.settings = of_kind(self.objects, "ConfigMap")
        self.settings["data"]["MIGRATOR_WAIT_TIMEOUT"] = "5s"

    def say(self, address: str) -> None:
        """Put an address into the secret."""
        self.pods.secret(self.secret, address)

    def named(self, name: str) -> dict[str, Any]:
        """Return the object of a name that has a pod."""
        kinds = ("Deployment", "Job", "CronJob")
        (found,) = (
            item for item in self.objects if item["kind"] in kinds and item["metadata"]["name"] == name
        )
        return found

    def pod(self, of: str, name: str = "") -> dict[str, Any]:
        """Return the pod of an object, playable."""
        name = f"{name or of}-{self.database}"
        return playable(self.named(of), name, {}, claim=self.claim, secret=self.secret)

    def run(self, of: str, name: str = "") -> int:
        """Play the pod of a Job or CronJob; return the exit code of its container."""
        pod = self.pod(of, name)
        self.pods.play(self.settings, pod)
        return self.pods.wait(f"{pod['metadata']['name']}-migrator")

    def migrate(self) -> None:
        """Let the Job do its work."""
        assert self.run("shop-migrate", "setup") == 0

    def psql(self, sql: str) -> list[str]:
        """Return the rows of a query."""
        return self.pods.psql(sql, self.database)


@pytest.fixture
def shop(pods: Pods) -> Shop:
    """The overlay with the Job, and a database."""
    return Shop(pods, "overlays/job")


def get(port: int, path: str) -> tuple[int, str]:
    """Return status and body of an answer; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def shops(port: int) -> list[str]:
    """Return what the backend lists."""
    return [row["slug"] for row in json.loads(get(port, "/")[1])]


def test_an_init_container_migrates_first(pods: Pods) -> None:
    shop, port = Shop(pods, ""), free_port()
    pod = shop.pod("shop-backend")
    pod["spec"]["containers"][0]["ports"] = [{"containerPort": 8000, "hostPort": port}]
    pods.play(shop.settings, pod)

    name = pod["metadata"]["name"]
    migrator, backend = pods.inspect(f"{name}-migrator"), pods.inspect(f"{name}-backend")
    assert migrator["State"]["ExitCode"] == 0
    assert migrator["State"]["FinishedAt"] <= backend["State"]["StartedAt"]
    assert migrator["HostConfig"]["ReadonlyRootfs"] is True
    assert migrator["Config"]["User"].split(":")[0] == "10001"
    wait_for(lambda: get(port, "/")[0] == 200, 30, "the backend answers")
    assert shops(port) == SLUGS


def test_twenty_replicas_start_at_once(pods: Pods) -> None:
    shop = Shop(pods, "")
    shop.settings["data"]["MIGRATOR_WAIT_TIMEOUT"] = "60s"
    made = [shop.pod("shop-backend", f"replica-{number}") for number in range(REPLICAS)]
    names = [pod["metadata"]["name"] for pod in made]
    pods.play(shop.settings, *made, start=False)

    # Until two of them are there, nobody works: however long podman takes from one to the next.
    with pods.gate(shop.database, f"SELECT pg_advisory_lock({LOCK_CLASS}, {RUN_LOCK})"):
        starts = pods.start(*names)
        ours = "application_name LIKE 'migrator/%' AND datname = current_database()"
        runs = f"SELECT count(*) >= 2 FROM pg_stat_activity WHERE {ours}"
        wait_for(lambda: shop.psql(runs) == ["t"], 60, "two runs are at work")
    for starting in starts:
        said = starting.communicate(timeout=600)[0]
        assert starting.returncode == 0, said

    states = [pods.inspect(f"{name}-migrator")["State"] for name in names]
    assert [state["ExitCode"] for state in states] == [0] * REPLICAS
    assert all(pods.inspect(f"{name}-backend")["State"]["Status"] == "running" for name in names)
    assert min(state["FinishedAt"] for state in states) > sorted(state["StartedAt"] for state in states)[1]
    (applied, distinct, runs) = shop.psql(
        "SELECT count(*) FILTER (WHERE event = 'applied'),"
        " count(DISTINCT revision) FILTER (WHERE event = 'applied'),"
        " count(DISTINCT run_id) FROM migrator_ledger"
    )[0].split("|")
    assert applied == distinct  # each revision once,
    assert runs == "1"  # by one of the twenty


def test_workers_wait_until_somebody_has_migrated(shop: Shop) -> None:
    pods, worker = shop.pods, shop.pod("shop-worker")
    name = worker["metadata"]["name"]
    pods.play(shop.settings, worker, start=False)
    (starting,) = pods.start(name)
    wait_for(lambda: "waiting for" in pods.podman.logs(f"{name}-migrator"), 30, "the worker waits")
    assert pods.inspect(f"{name}-worker")["State"]["Status"] == "created"

    shop.migrate()

    said = starting.communicate(timeout=300)[0]
    assert starting.returncode == 0, said
    waited, working = (pods.inspect(f"{name}-{container}")["State"] for container in ("migrator", "worker"))
    assert waited["ExitCode"] == 0
    assert working["Status"] == "running"
    assert waited["FinishedAt"] <= working["StartedAt"]


def test_a_job_is_tried_again_where_that_can_help(shop: Shop) -> None:
    """The exit codes are a pod's own; what a Job makes of them is read from the manifest."""
    job = shop.named("shop-migrate")

    shop.say(shop.pods.address(shop.database, host="not-there"))
    code = shop.run("shop-migrate", "nobody")
    assert (code, reaction(job, code)) == (ExitCode.UNREACHABLE, "Count")

    shop.settings["data"]["MIGRATOR_LOCK_TIMEOUT"] = "soon"
    code = shop.run("shop-migrate", "misspelt")
    assert (code, reaction(job, code)) == (ExitCode.BAD_SETTINGS, "FailJob")
    del shop.settings["data"]["MIGRATOR_LOCK_TIMEOUT"]

    shop.say(shop.pods.address(shop.database, password="the-old-one"))
    code = shop.run("shop-migrate", "rotated")
    assert (code, reaction(job, code)) == (ExitCode.ACCESS_DENIED, "FailJob")

    shop.say(shop.pods.address(shop.database))  # the next pod reads the file anew
    assert shop.run("shop-migrate", "again") == 0


def test_cron_jobs_look_after_it(shop: Shop) -> None:
    shop.migrate()
    assert shop.run("shop-drift") == 0
    assert shop.run("shop-verify-backup") == ExitCode.BACKUP_FAILED  # there was nothing to back up yet

    shop.psql("DROP TABLE sales.order_lines CASCADE")
    code = shop.run("shop-drift", "drifted")
    assert code in {ExitCode.DRIFTED, ExitCode.VERIFY_FAILED}
    assert reaction(shop.named("shop-drift"), code) == "FailJob"

    job = shop.pod("shop-migrate", "backup")
    job["spec"]["containers"][0]["args"] = ["backup"]
    shop.pods.play(shop.settings, job)
    assert shop.pods.wait(f"{job['metadata']['name']}-migrator") == 0
    code = shop.run("shop-verify-backup", "proven")
    assert code == 0, shop.pods.podman.logs(f"proven-{shop.database}-migrator")


def test_a_sidecar_holds_the_backend_back(pods: Pods) -> None:
    """The test is the kubelet: it starts the sidecar, asks its startup probe, and starts the backend then."""
    shop = Shop(pods, "overlays/sidecar")
    shop.settings["data"]["MIGRATOR_BACKUP"] = "off"  # there is no bucket here
    asked, listed = free_port(), free_port()
    pod = shop.pod("shop-backend")
    (sidecar,), (backend,) = pod["spec"].pop("initContainers"), pod["spec"]["containers"]
    startup, liveness = (sidecar.pop(kind)["httpGet"] for kind in ("startupProbe", "livenessProbe"))
    assert sidecar.pop("restartPolicy") == "Always"
    for name in ("env", "volumeMounts"):
        sidecar[name] = [item for item in sidecar[name] if not item["name"].startswith(("AWS_", "bucket"))]
    pod["spec"]["volumes"] = [volume for volume in pod["spec"]["volumes"] if volume["name"] != "bucket"]
    sidecar["ports"] = [{"containerPort": 8086, "hostPort": asked}]
    backend["ports"] = [{"containerPort": 8000, "hostPort": listed}]
    pod["spec"]["containers"] = [sidecar, backend]
    name = pod["metadata"]["name"]
    pods.play(shop.settings, pod, start=False)

    with pods.gate(shop.database, f"SELECT pg_advisory_lock({LOCK_CLASS}, {RUN_LOCK})"):
        pods.podman.run("start", f"{name}-migrator")
        wait_for(lambda: get(asked, liveness["path"])[0] == 200, 30, "the sidecar lives")
        assert get(asked, startup["path"])[0] == 503  # another run holds the lock
    wait_for(lambda: get(asked, startup["path"])[0] == 200, 60, "the startup probe succeeds")
    pods.podman.run("start", f"{name}-backend")
    wait_for(lambda: get(listed, "/")[0] == 200, 30, "the backend answers")
    assert shops(listed) == SLUGS
    assert get(asked, "/metrics")[0] == 200
    assert pods.inspect(f"{name}-migrator")["State"]["Status"] == "running"

    pods.podman.run("stop", "--time=20", f"{name}-migrator")
    assert pods.inspect(f"{name}-migrator")["State"]["ExitCode"] == 0
