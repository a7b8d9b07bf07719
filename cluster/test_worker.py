"""Workers that wait: they start when somebody has migrated, and do not migrate themselves."""

from __future__ import annotations

from cluster.kubectl import state, terminated, wait_for
from cluster.shop import HEADS, OVERLAYS, Shop, of_kind

NAME = "shop-worker"
LABEL = f"app.kubernetes.io/name={NAME}"


def test_workers_start_once_the_backends_migrator_is_done(shop: Shop) -> None:
    objects = shop.rendered(OVERLAYS / "worker")
    backend = next(item for item in objects if item["metadata"]["name"] == "shop-backend")
    assert backend["kind"] in ("Deployment", "Service")
    held = [item for item in objects if item["metadata"]["name"] != "shop-backend"]
    shop.apply(*held)
    wait_for(lambda: len(shop.pods(LABEL)) == 2, 30, shop.explain)
    names = [pod["metadata"]["name"] for pod in shop.pods(LABEL)]
    for name in names:
        shop.wait_until_started(name, "migrator")
    for name in names:
        wait_for(lambda name=name: "wait" in shop.kubectl.logs(name, "migrator"), 30, shop.explain)  # type: ignore[misc]
    assert [state(pod, "worker")["state"]["waiting"]["reason"] for pod in shop.pods(LABEL)] == [
        "PodInitializing"
    ] * 2
    assert shop.psql("SELECT 1 FROM pg_tables WHERE tablename = 'alembic_version'") == []

    shop.apply(*objects)
    wait_for(lambda: shop.ready(NAME, 2) and shop.ready("shop-backend"), 180, shop.explain)

    assert [terminated(pod, "migrator")["exitCode"] for pod in shop.pods(LABEL)] == [0, 0]
    assert shop.versions() == HEADS
    print(shop.kubectl.run("get", "pods").stdout)


def test_a_worker_that_gives_up_says_24_and_tries_again(shop: Shop) -> None:
    objects = shop.rendered(OVERLAYS / "worker")
    worker = next(item for item in objects if item["metadata"]["name"] == NAME)
    worker["spec"]["replicas"] = 1
    worker["spec"]["template"]["spec"]["initContainers"][0]["args"] = [
        "wait-for-current",
        "--wait-timeout=3s",
    ]
    shop.apply(
        of_kind(objects, "ServiceAccount"), of_kind(objects, "ConfigMap"), of_kind(objects, "Secret"), worker
    )
    (pod,) = wait_for(lambda: shop.pods(LABEL), 30, lambda: "no pod")
    ended = shop.wait_for_exit(pod["metadata"]["name"], "migrator")
    assert ended["exitCode"] == 24
    print(ended["message"])

    def restarted() -> bool:
        return bool(state(shop.pods(LABEL)[0], "migrator")["restartCount"])

    wait_for(restarted, 60, shop.explain)
