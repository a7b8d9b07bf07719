"""The package, the notes after an installation, and the pages that are made from values.yaml."""

from __future__ import annotations

import importlib.util
import json
import re
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import yaml

from migrator.config import settings
from tests.chart.checks import BACKUPS
from tests.support.helm import CHART, CHARTS, LEAST, Helm, merged
from tests.support.kubernetes import of_kind, pod_of


def test_the_notes_have_the_commands_to_type_next(helm: Helm) -> None:
    command = ("install", "--dry-run=client")
    notes = helm.text(LEAST, command=command).partition("NOTES:")[2]
    selector = re.findall(r"-l (\S+)", notes)
    pod = pod_of(of_kind(helm.template(LEAST), "Job"))
    assert pod is not None
    for text in selector:
        assert dict(item.split("=") for item in text.split(",")).items() <= pod["metadata"]["labels"].items()
    assert len(selector) == 3
    assert "helm -n default test shop" in notes
    without = helm.text(merged(LEAST, BACKUPS["no-backups"]), command=command)
    assert "There are no backups" in without


def test_the_package_is_the_same_twice(helm: Helm, tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        helm.run("package", str(CHART), "--destination", str(tmp_path / name))
        (path,) = (tmp_path / name).glob("*.tgz")
        with tarfile.open(path) as archive:
            members = [(item.name, item.mode, archive.extractfile(item)) for item in archive]
            found.append({name: (mode, file.read() if file else b"") for name, mode, file in members})
    assert found[0] == found[1]
    names = set(found[0])
    assert {"migrator/Chart.yaml", "migrator/values.schema.json", "migrator/README.md"} <= names
    assert not [name for name in names if "/ci/" in name]


def generator() -> ModuleType:
    """Load the script that makes the chart's pages."""
    spec = importlib.util.spec_from_file_location("chart_generate", CHARTS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_files_are_current() -> None:
    for path, text in generator().made().items():
        assert path.read_text(encoding="utf-8") == text, "run `python k8s/chart/generate.py`"


def test_every_value_is_described_and_every_rule_is_about_one() -> None:
    module = generator()
    found = module.values((CHART / "values.yaml").read_text(encoding="utf-8"))
    described = {value.path for value in found if value.description}
    groups = {value.path for value in found if not value.description}
    assert all(any(path.startswith(f"{group}.") for path in described) for group in groups)
    assert set(module.RULES) <= described | groups
    page = (CHART / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{path}` |" in page for path in described)


def test_every_setting_that_is_no_secret_can_be_set() -> None:
    module = generator()
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    taken = set(schema["properties"]["settings"]["properties"])
    options = settings.OPTIONS
    assert (
        taken
        == {settings.variable_name(item) for item in options if not item.secret} - module.NOT_IN_SETTINGS
    )
    assert not taken & {settings.variable_name(item) for item in options if item.secret}


def test_the_chart_has_the_versions_of_the_package() -> None:
    project = tomllib.loads((CHARTS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    (dependency,) = yaml.safe_load((CHARTS / "example-backend" / "Chart.yaml").read_text())["dependencies"]
    assert chart["appVersion"] == project["version"]
    assert dependency["version"] == chart["version"]
