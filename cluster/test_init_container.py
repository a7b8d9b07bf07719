"""The shipped Deployment: migrator first, then the backend; why a pod does not start; twenty at once."""

from __future__ import annotations

import json
from typing import Any

from cluster.kubectl import is_true, state, terminated, wait_for
from cluster.shop import HEADS, Shop, encoded, of_kind

DEPLOYMENT = "shop-backend"
REPLICAS = 20


def message(ended: dict[str, Any]) -> str:
    """Return the termination message."""
    return str(ended.get("message", ""))


def test_the_backend_starts_once_migrator_is_done(shop: Shop) -> None:
    shop.apply(*shop.rendered())
    wait_for(lambda: shop.ready(DEPLOYMENT), 120, shop.explain)

    (pod,) = shop.pods()
    ended = terminated(pod, "migrator")
    assert (ended["exitCode"], ended["reason"]) == (0, "Completed")
    assert is_true(pod, "Ready")
    assert shop.versions() == HEADS
    started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    assert ended["finishedAt"] <= started
    assert message(ended)
    print(shop.kubectl.run("get", "pods", "-o", "wide").stdout)
    print(message(ended))


def test_a_pod_that_may_do_more_is_refused(shop: Shop) -> None:
    objects = shop.rendered()
    shop.apply(of_kind(objects, "ServiceAccount"))
    template = of_kind(objects, "Deployment")["spec"]["template"]
    template["spec"]["initContainers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"]["name"] = "bold"

    refused = shop.kubectl.run("apply", "-f", "-", stdin=json.dumps(pod), expect=1)

    assert 'violates PodSecurity "restricted:latest"' in refused.stderr
    assert 'container "migrator" must set' in refused.stderr


def test_describe_says_why_and_a_corrected_secret_is_picked_up(shop: Shop) -> None:
    wrong = shop.cluster.address_of(shop.database, "wrong")
    objects = shop.rendered(address=wrong)
    of_kind(objects, "ConfigMap")["data"]["MIGRATOR_ROTATION_GRACE"] = "0"
    shop.apply(*objects)
    (pod,) = wait_for(shop.pods, 30, lambda: "no pod")
    name = pod["metadata"]["name"]

    ended = shop.wait_for_exit(name, "migrator")
    assert ended["exitCode"] == 30
    described = shop.kubectl.describe("pod", name)
    print(described)
    assert message(ended).splitlines()[0] in described
    assert "password authentication failed" in described
    assert not shop.psql("SELECT 1 FROM pg_tables WHERE tablename = 'alembic_version'")

    secret = of_kind(objects, "Secret")
    secret["data"] = {"url": encoded(shop.cluster.address_of(shop.database))}
    shop.kubectl.apply(secret)
    wait_for(lambda: shop.ready(DEPLOYMENT), 240, shop.explain)
    assert [pod["metadata"]["name"] for pod in shop.pods()] == [name]
    assert shop.versions() == HEADS


def test_twenty_replicas_start_at_once(shop: Shop) -> None:
    objects = shop.rendered()
    of_kind(objects, "Deployment")["spec"]["replicas"] = REPLICAS
    shop.apply(*objects)
    wait_for(lambda: shop.ready(DEPLOYMENT, REPLICAS), 300, shop.explain)

    ends = [terminated(pod, "migrator") for pod in shop.pods()]
    assert [ended["exitCode"] for ended in ends] == [0] * REPLICAS
    restarted = [last for pod in shop.pods() if (last := state(pod, "migrator")["lastState"])]
    assert restarted == [], restarted
    assert shop.versions() == HEADS
    applied = shop.psql("SELECT run_id, count(*) FROM migrator_ledger WHERE event = 'applied' GROUP BY 1")
    assert len(applied) == 1, applied
    assert shop.standing() >= HEADS
    assert shop.locks() == 0
    print("\n".join(sorted({message(ended) for ended in ends})))
