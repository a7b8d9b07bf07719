"""What people make of `k8s/`: every combination of components, and the chart with a matrix of values, is admitted.

Nothing is created: the API server is asked whether it would (`--dry-run=server`), schema, defaults and admission
included. Many combinations have the same objects, which are asked about once.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.checks import MATRIX
from tests.chart.test_renderings import EXAMPLES
from tests.support.helm import CHARTS, Helm

from cluster.build import ROOT
from cluster.kubectl import Object
from cluster.shop import Shop

WAYS = ((), ("job",), ("sidecar",))
BUCKETS = ((), ("s3-backups",), ("s3-identity",), ("s3-identity", "s3-key"))
EXTRAS = ("worker", "verify-backup", "drift", "network-policy")
MESHES = ((), ("istio",), ("linkerd",))


COMBINATIONS = [
    (*way, *extras, *bucket, *mesh)
    for way, extras, bucket, mesh in itertools.product(
        WAYS, ((), EXTRAS, *((one,) for one in EXTRAS)), BUCKETS, MESHES
    )
]


def kustomized(shop: Shop, folder: Path, text: str) -> list[Object]:
    """Return what a kustomization renders to whose resources are named from the repository's root."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kustomization.yaml").write_text(
        re.sub(r"(?m)^( *- )(k8s/)", rf"\1{os.path.relpath(ROOT, folder.resolve())}/\2", text)
    )
    return shop.rendered(folder)


def combined(components: tuple[str, ...]) -> str:
    """Return the kustomization of the base with components."""
    lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", "resources:", "- k8s/base"]
    lines += ["components:"] if components else []
    return "\n".join([*lines, *(f"- k8s/components/{name}" for name in components)]) + "\n"


def admit(shop: Shop, objects: Iterable[Object]) -> int:
    """Ask the API server about each different object; returns how many there were."""
    different = {}
    for item in objects:
        if item["kind"] != "Namespace":
            item["metadata"].pop("namespace", None)  # the test's own, which is as restricted
            different[yaml.safe_dump(item)] = item
    # A Pod, such as that of `helm test`, is refused where its account is not there.
    shop.kubectl.apply(*(item for item in different.values() if item["kind"] == "ServiceAccount"))
    text = yaml.safe_dump_all(different.values())
    options = ("--dry-run=server", "--validate=strict")
    answer = shop.kubectl.run("apply", *options, "-f", "-", stdin=text, timeout=300)
    assert answer.stderr == ""
    assert answer.stdout.count("(server dry run)") == len(different)
    return len(different)


def test_every_combination_of_components_is_admitted(shop: Shop, tmp_path: Path) -> None:
    objects = itertools.chain.from_iterable(
        kustomized(shop, tmp_path / str(number), combined(components))
        for number, components in enumerate(COMBINATIONS)
    )
    print(len(COMBINATIONS), "combinations of", admit(shop, objects), "different objects")


def test_the_overlays_of_the_documentation_are_admitted(shop: Shop, tmp_path: Path) -> None:
    """That of `Make it yours`, with the bucket's key and, as backups.md says, with the platform's identity."""
    pages = (ROOT / "docs" / "howto" / "kubernetes" / name for name in ("README.md", "backups.md"))
    page = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = [re.sub(r"(?m)^  ", "", text) if text.startswith("  ") else text for text in _yaml(page)]
    (whole,) = (text for text in blocks if "kind: Kustomization" in text)
    (patch,) = (text for text in blocks if "role-arn" in text)
    whole = whole.replace("../migrator/k8s/", "k8s/")
    identity = re.sub(r"(?m)^  - (k8s/components/s3-key|name: shop-backups) (.*\n)((?:    .*\n)*)", "", whole)
    assert identity.count("s3-key") == identity.count("access-key") == 0
    identity = identity.replace("patches: #", patch.rstrip() + "\n#", 1)
    objects: list[Object] = []
    for name, text in (("key", whole), ("identity", identity)):
        (tmp_path / name).mkdir()
        for file in ("database-url.txt", "access-key-id", "secret-access-key"):
            (tmp_path / name / file).write_text("mine")
        objects += kustomized(shop, tmp_path / name, text)
    assert "arn:aws:iam::123456789012:role/shop-backups" in str(objects)
    admit(shop, objects)


def _yaml(page: str) -> list[str]:
    return re.findall(r"(?ms)^ *```yaml\n(.*?)^ *```", page)


def test_every_rendering_of_the_chart_is_admitted(shop: Shop, tmp_path: Path) -> None:
    helm, classes = Helm(tmp_path), {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
    shop.kubectl.apply({**classes, "metadata": {"name": "migrations"}, "value": 0})  # which an example names
    values: list[Mapping[str, Any] | Path] = [*MATRIX.values(), *EXAMPLES]
    objects = itertools.chain.from_iterable(helm.template(one) for one in values)
    print(len(values), "renderings of", admit(shop, objects), "different objects")


@pytest.mark.parametrize("schema", ["initContainer", "waitForCurrent", "sidecar"])
def test_another_charts_pods_are_admitted(shop: Shop, tmp_path: Path, schema: str) -> None:
    helm, parent = Helm(tmp_path), tmp_path / "charts" / "example-backend"
    shutil.copytree(CHARTS, parent.parent)
    helm.run("dependency", "update", str(parent))
    values = {
        "schema": schema,
        "migrator": {
            "mode": "none",
            "image": {"repository": "registry.example/shop-migrations", "tag": "1.4.2"},
            "database": {"existingSecret": "shop-database"},
        },
    }
    admit(shop, helm.template(values, chart=parent))
