"""Names that YAML would read as something else, names that are too long, and tags that are no label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.chart.checks import BACKUPS, EXTRAS, MODES, check, of
from tests.support.helm import LEAST, Helm, merged
from tests.support.kubernetes import containers_of, documents, of_kind, pod_of

ODD = ("123", "0x7", "yes", "on", "null", "007")
LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Yield every scalar below a node."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from scalars(key)
            yield from scalars(value)


def read(text: str, odd: str) -> list[dict[str, Any]]:
    """Return the objects of a rendering, in which a value is somewhere, and everywhere with quotes."""
    found = [
        scalar
        for document in yaml.compose_all(text, Loader=yaml.SafeLoader)
        if document
        for scalar in scalars(document)
        if scalar.value == odd
    ]
    assert found
    assert [scalar.start_mark.line for scalar in found if not scalar.style] == []
    objects = documents(text)
    check(objects)
    return objects


@pytest.mark.parametrize("odd", [*ODD, "1e3"])
def test_a_release_may_be_called_what_yaml_reads_as_something_else(odd: str, helm: Helm) -> None:
    text = helm.text(merged(LEAST, MODES["hook"], BACKUPS["claim"], EXTRAS["watched"]), release=odd)
    objects = read(text, odd)
    assert {item["metadata"]["labels"]["app.kubernetes.io/instance"] for item in objects} == {odd}


@pytest.mark.parametrize("odd", [name for name in ODD if not name[0].isdigit()])
@pytest.mark.parametrize("mode", ["job", "hook"])
def test_so_may_the_chart_and_its_objects(odd: str, mode: str, helm: Helm) -> None:
    values = merged(LEAST, MODES[mode], BACKUPS["claim"], {"nameOverride": odd, "fullnameOverride": odd})
    objects = read(helm.text(values), odd)
    assert {item["metadata"]["labels"]["app.kubernetes.io/name"] for item in objects} == {odd}
    assert odd in {item["metadata"]["name"] for item in of(objects, "NetworkPolicy")}


@pytest.mark.parametrize("odd", ["123", "yes", "null", "007"])
@pytest.mark.parametrize("backups", ["claim", "made", "keys"])
def test_so_may_what_values_name(odd: str, backups: str, helm: Helm) -> None:
    named = {
        "database": {"existingSecret": odd, "certificatesSecret": odd, "key": odd, "directKey": "direct"},
        "serviceAccount": {"name": odd},
        "priorityClassName": odd,
        "imagePullSecrets": [{"name": odd}],
        "verifyBackup": {"enabled": True, "identitySecret": odd, "databaseSecret": odd},
        "drift": {"enabled": True, "databaseSecret": odd},
    }
    places = {
        "claim": {"claim": {"existingClaim": odd}},
        "made": {"claim": {"storageClass": odd}},
        "keys": {"s3": {"existingSecret": odd}},
    }
    objects = read(
        helm.text(
            merged(LEAST, BACKUPS[backups], named, {"backups": places[backups]}), "--namespace", "default"
        ),
        odd,
    )
    pods = [pod["spec"] for item in objects if (pod := pod_of(item))]
    assert len(pods) == 4
    for pod in pods:
        assert (pod["serviceAccountName"], pod["priorityClassName"]) == (odd, odd)
        assert {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume} == {odd}


@pytest.mark.parametrize("key", ["-", "1", "on", "."])
def test_so_may_a_key_of_the_secret(key: str, helm: Helm) -> None:
    values = merged(LEAST, {"database": {"key": key, "directKey": key}})
    pod = pod_of(of_kind(read(helm.text(values), key), "Job"))
    assert pod is not None
    (volume,) = (item for item in pod["spec"]["volumes"] if item["name"] == "migrator-database")
    assert {item["key"] for item in volume["secret"]["items"]} == {key}


def test_an_image_is_no_time_of_the_day(helm: Helm) -> None:
    text = helm.text(merged(LEAST, {"image": {"repository": "12", "tag": "30"}}))
    (container,) = containers_of(of_kind(read(text, "12:30"), "Job"))
    assert container["image"] == "12:30"


def test_a_namespace_may_be_a_number(helm: Helm) -> None:
    text = helm.text(LEAST, "--namespace", "123")
    assert {item["metadata"]["namespace"] for item in documents(text)} == {"123"}


@pytest.mark.parametrize("tag", ["_x", "1.0-_-", "a" * 62 + "_.b", "__", "1.4.2", "x" * 128, "_1_"])
def test_the_version_is_a_label_whatever_the_tag(tag: str, helm: Helm) -> None:
    for item in helm.template(merged(LEAST, {"image": {"tag": tag}})):
        version = item["metadata"]["labels"].get("app.kubernetes.io/version")
        assert (version is None) == (tag == "__")
        assert version is None or (LABEL.fullmatch(version) and version in tag)


# -- length -----------------------------------------------------------------------------------------------


def names(helm: Helm, release: str, **values: Any) -> set[tuple[str, str]]:
    """Return what a release's objects are called, with everything that the chart makes."""
    layers = LEAST, BACKUPS["made"], EXTRAS["watched"], values
    objects = helm.template(merged(*layers), release=release)
    check(objects)
    found = {(item["kind"], item["metadata"]["name"]) for item in objects}
    assert len(found) == len(objects) == 7
    assert [name for _, name in found if not NAME.fullmatch(name)] == []
    return found


def test_a_short_name_is_left_as_it_is(helm: Helm) -> None:
    assert ("PersistentVolumeClaim", "shop-migrator-backups") in names(helm, "shop")
    override = "a-name-that-is-as-long-as-names-may-be"
    assert ("ServiceAccount", override) in names(helm, "shop", fullnameOverride=override)


@pytest.mark.parametrize("at", [28, 29, 37, 38])
@pytest.mark.parametrize("separator", ["-", "."])
def test_a_name_is_never_cut_behind_a_separator(at: int, separator: str, helm: Helm) -> None:
    names(helm, "a" * at + separator + "b" * (52 - at))


def test_releases_that_begin_alike_have_nothing_in_common(helm: Helm) -> None:
    begin = "a-release-of-the-shop-whose-name-is-long-"
    assert len(begin) > 38
    assert names(helm, f"{begin}one") & names(helm, f"{begin}two") == set()
