"""A pod that ends in the middle of a revision: deleted, which asks it to stop, and killed, which does not."""

from __future__ import annotations

import os
import signal
from typing import Any

from cluster import slow
from cluster.kubectl import Object, is_true, state, terminated, wait_for
from cluster.shop import FINALIZER, Shop, of_kind

HOLD_SECONDS = 300


def pod_in_the_middle(shop: Shop, revision: str, *finalizers: str) -> tuple[Object, str]:
    """Start a pod whose migrator is in a revision that never ends; return it and its name."""
    shop.cluster.psql(slow.hold(shop.database, revision, HOLD_SECONDS))
    objects = shop.rendered()
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        **of_kind(objects, "Deployment")["spec"]["template"],
    }
    pod["metadata"] = {"name": "shop-backend", "finalizers": list(finalizers)}
    pod["spec"]["restartPolicy"] = "Always"
    slow.mounted(pod)
    others = [item for item in objects if item["kind"] not in ("Deployment", "Service")]
    shop.apply(*others, slow.history(), pod)
    wait_for(lambda: slow.sleeping(shop.psql, shop.database), 90, shop.explain)
    return pod, "shop-backend"


def test_a_deleted_pod_rolls_back_and_says_so(shop: Shop) -> None:
    pod, name = pod_in_the_middle(shop, "r001", FINALIZER)

    shop.kubectl.delete("pod", name, "--wait=false")
    ended = shop.wait_for_exit(name, "migrator", 90)
    print(shop.kubectl.describe("pod", name))

    assert ended["exitCode"] == 23
    assert shop.psql("SELECT relname FROM pg_stat_user_tables") == []
    wait_for(lambda: not slow.sleeping(shop.psql, shop.database), 30, shop.explain)
    assert shop.locks() == 0

    shop.let_go(name)
    wait_for(lambda: not shop.pods(), 60, shop.explain)
    shop.cluster.psql(slow.hold(shop.database, "r001", 0))
    del pod["metadata"]["finalizers"]
    shop.apply(pod)
    assert shop.wait_for_exit(name, "migrator")["exitCode"] == 0
    assert shop.versions() == {slow.HEAD}
    assert shop.standing() == {"r001", slow.HEAD}


def test_a_killed_container_leaves_nothing_half_told_and_the_next_one_finishes(shop: Shop) -> None:
    _, name = pod_in_the_middle(shop, "r002")
    container = state(shop.kubectl.get("pod", name), "migrator")["containerID"]
    shop.cluster.psql(slow.hold(shop.database, "r002", 0))

    os.kill(shop.cluster.node.process(container), signal.SIGKILL)

    def finished() -> bool:
        now = shop.kubectl.get("pod", name)
        return terminated(now, "migrator").get("exitCode") == 0

    def restarted() -> bool:
        return bool(state(shop.kubectl.get("pod", name), "migrator")["restartCount"])

    wait_for(restarted, 60, shop.explain)
    wait_for(finished, 240, shop.explain)
    now = shop.kubectl.get("pod", name)
    print(shop.kubectl.describe("pod", name))
    assert state(now, "migrator")["lastState"].get("terminated", {"exitCode": 137})["exitCode"] == 137
    assert shop.versions() == {slow.HEAD}
    assert shop.standing() == {"r001", slow.HEAD}
    assert shop.locks() == 0
    assert is_true(now, "Initialized")
