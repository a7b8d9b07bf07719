"""The shipped native sidecar: the backend waits for it, outages do not restart it, its failures are seen."""

from __future__ import annotations

import json

from cluster import slow
from cluster.kubectl import Object, state, terminated, wait_for
from cluster.shop import HEADS, OVERLAYS, Shop, of_kind

NAME = "shop-backend"
PORT = 8086


def only_pod(shop: Shop) -> Object:
    """Return the Deployment's pod."""
    (pod,) = wait_for(shop.pods, 30, lambda: "no pod")
    return pod


def page(shop: Shop, path: str, expect: int = 0) -> str:
    """Return what the sidecar answers, asked through the API server; `expect` is 1 for an answer of 503."""
    name = only_pod(shop)["metadata"]["name"]
    proxied = f"/api/v1/namespaces/{shop.name}/pods/{name}:{PORT}/proxy{path}"
    answer = shop.kubectl.run("get", "--raw", proxied, expect=expect)
    return answer.stdout + answer.stderr


def started(shop: Shop) -> list[Object]:
    """Return the objects of the overlay, asked to look every two seconds."""
    objects = shop.rendered(OVERLAYS / "sidecar")
    of_kind(objects, "ConfigMap")["data"]["MIGRATOR_SIDECAR_INTERVAL"] = "2s"
    return objects


def test_the_backend_is_held_back_until_the_sidecar_is_ready(shop: Shop) -> None:
    shop.cluster.psql(slow.hold(shop.database, "r002", 12))
    objects = started(shop)
    slow.mounted(of_kind(objects, "Deployment")["spec"]["template"])
    shop.apply(slow.history(), *objects)
    wait_for(lambda: slow.sleeping(shop.psql, shop.database), 60, shop.explain)

    assert page(shop, "/livez").strip() == "ok"
    assert "ServiceUnavailable" in page(shop, "/readyz", expect=1)
    told = json.loads(page(shop, "/"))
    assert told["ready"] is False
    print(told["reason"])
    pod = only_pod(shop)
    assert state(pod, "migrator")["started"] is False
    assert state(pod, "backend")["state"]["waiting"]["reason"] == "PodInitializing"

    wait_for(lambda: shop.ready(NAME), 90, shop.explain)
    pod = only_pod(shop)
    assert state(pod, "migrator")["started"] is True
    assert "running" in state(pod, "migrator")["state"]
    assert state(pod, "migrator")["restartCount"] == 0
    assert shop.versions() == {slow.HEAD}
    assert json.loads(page(shop, "/readyz"))["ready"] is True
    assert "migrator_ready 1.0" in page(shop, "/metrics")
    print(shop.kubectl.run("get", "pods").stdout, page(shop, "/readyz"))


def test_it_outlives_an_outage_of_the_database_and_ends_with_zero(shop: Shop) -> None:
    shop.apply(*started(shop))
    wait_for(lambda: shop.ready(NAME), 120, shop.explain)
    assert shop.versions() == HEADS

    shop.cluster.psql(f"ALTER DATABASE {shop.database} ALLOW_CONNECTIONS false")
    wait_for(lambda: "migrator_ready 0.0" in page(shop, "/metrics"), 60, lambda: page(shop, "/"))
    assert "ServiceUnavailable" in page(shop, "/readyz", expect=1)
    print(json.loads(page(shop, "/"))["reason"])
    assert page(shop, "/livez").strip() == "ok"
    shop.cluster.psql(f"ALTER DATABASE {shop.database} ALLOW_CONNECTIONS true")
    wait_for(lambda: "migrator_ready 1.0" in page(shop, "/metrics"), 60, lambda: page(shop, "/"))
    pod = only_pod(shop)
    assert state(pod, "migrator")["restartCount"] == state(pod, "backend")["restartCount"] == 0

    name = pod["metadata"]["name"]
    shop.keep(name)
    shop.kubectl.run("scale", "deployment", NAME, "--replicas=0")
    assert shop.wait_for_exit(name, "migrator")["exitCode"] == 0
    assert terminated(shop.kubectl.get("pod", name), "backend")["exitCode"] == 0


def test_a_run_that_fails_is_seen_and_the_backend_does_not_start(shop: Shop) -> None:
    objects = shop.rendered(OVERLAYS / "sidecar", address=shop.cluster.address_of(shop.database, "wrong"))
    of_kind(objects, "ConfigMap")["data"]["MIGRATOR_ROTATION_GRACE"] = "0"
    shop.apply(*objects)
    name = only_pod(shop)["metadata"]["name"]
    ended = shop.wait_for_exit(name, "migrator")
    assert ended["exitCode"] == 30
    assert ended["message"].startswith("ACCESS_DENIED (30)")
    wait_for(lambda: state(only_pod(shop), "migrator")["restartCount"] > 0, 60, shop.explain)
    assert state(only_pod(shop), "backend")["state"]["waiting"]["reason"] == "PodInitializing"
    print(shop.kubectl.run("get", "pods").stdout)
