"""What `settings` takes: numbers and truth values as YAML has them, and as `--set` passes them on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migrator.config import settings
from tests.chart.checks import check_settings
from tests.support.helm import CHART, LEAST, Helm, Refused, merged
from tests.support.kubernetes import containers_of, of_kind

SCHEMA: dict[str, dict[str, Any]] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))[
    "properties"
]["settings"]["properties"]


def allowed(name: str) -> set[str]:
    """Return the JSON types that the schema allows for a setting; none where it lists the values."""
    types = SCHEMA[name].get("type", [])
    return {types} if isinstance(types, str) else set(types)


NUMBERS = sorted(name for name in SCHEMA if "integer" in allowed(name))
# Not every text can be a number to migrator itself (a revision can, an age recipient cannot).
MEANT_AS_NUMBERS = (
    "MIGRATOR_BACKUP_JOBS",
    "MIGRATOR_BASELINE",
    "MIGRATOR_LOCK_RETRIES",
    "MIGRATOR_RESTORE_JOBS",
    "MIGRATOR_SIDECAR_INTERVAL",
    "MIGRATOR_WAIT_TIMEOUT",
)


def environment(helm: Helm, *arguments: str, **values: Any) -> dict[str, str]:
    """Return the variables of the Job's container."""
    objects = helm.template(merged(LEAST, {"settings": values}), *arguments)
    (container,) = containers_of(of_kind(objects, "Job"))
    return {item["name"]: item.get("value", "") for item in container["env"]}


def test_every_setting_that_may_be_a_number_takes_one(helm: Helm) -> None:
    assert set(MEANT_AS_NUMBERS) <= set(NUMBERS)
    found = environment(helm, **dict.fromkeys(NUMBERS, 4))
    assert {name: found[name] for name in NUMBERS} == dict.fromkeys(NUMBERS, "4")


def test_numbers_on_the_command_line_reach_migrator_as_it_reads_them(helm: Helm) -> None:
    given = ",".join(f"settings.{name}=4" for name in MEANT_AS_NUMBERS)
    objects = helm.template(LEAST, "--set", given)
    (container,) = containers_of(of_kind(objects, "Job"))
    found = {item["name"]: item.get("value") for item in container["env"]}
    assert {name: found[name] for name in MEANT_AS_NUMBERS} == dict.fromkeys(MEANT_AS_NUMBERS, "4")
    check_settings(container)


@pytest.mark.parametrize("name", [name for name in NUMBERS if "not" in SCHEMA[name]])
def test_a_password_is_refused_in_every_text(name: str, helm: Helm) -> None:
    with pytest.raises(Refused, match=name):
        environment(helm, **{name: "postgresql://shop:planted@postgres/shop"})


def test_the_numbers_are_those_of_all_readers_but_choices_and_truth_values() -> None:
    without = {settings.variable_name(item) for item in settings.OPTIONS if not item.secret} & set(SCHEMA)
    assert without - set(NUMBERS) == {name for name in SCHEMA if "enum" in SCHEMA[name]}
