"""What is generated is what its sources say: schema, README, rules, dashboards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helm.documents import of_kind
from tests.helm.helm_cli import CHART, REPO_ROOT
from tests.helm.matrix import DEFAULT, rendered

RULES = ("recording.yaml", "alerts.yaml")
BOARDS = REPO_ROOT / "monitoring" / "dashboards" / "json"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    """`python -m helm.build --check` of a copy of the repository."""
    return subprocess.run(
        [sys.executable, "-m", "helm.build", "--check"],
        cwd=root,
        # What the copy lacks, the repository has.
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_is_stale() -> None:
    done = check(REPO_ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the build reads and writes, to be changed."""
    skip = shutil.ignore_patterns("__pycache__", "tests")
    for folder in ("helm", "monitoring/rules", "monitoring/dashboards/json"):
        shutil.copytree(REPO_ROOT / folder, tmp_path / folder, ignore=skip)
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "helm/moonshard/values.schema.json",
        "helm/moonshard/README.md",
        "helm/moonshard/values.yaml",
        "monitoring/rules/alerts.yaml",
        "monitoring/dashboards/json/moonshard-overview.json",
    ],
)
def test_a_change_is_seen(copy: Path, path: str) -> None:
    """Of a generated file as of a source."""
    assert check(copy).returncode == 0
    changed = copy / path
    text = changed.read_text()
    if path.endswith("values.yaml"):
        changed.write_text(text.replace("# -- Tag; empty", "# -- A tag; empty"))
    elif path.endswith("README.md"):
        changed.write_text(text.replace("`image.tag`", "`image.tags`", 1))
    else:
        changed.write_text(text.replace("oonshard", "oonshards", 1))
    assert changed.read_text() != text
    assert check(copy).returncode == 1


def test_every_value_has_its_line_of_documentation() -> None:
    """`# --` above every key that a person may set."""
    lines = (CHART / "values.yaml").read_text().splitlines()
    values = yaml.safe_load("\n".join(lines))
    documented = (CHART / "README.md").read_text()
    assert [path for path in _paths(values) if f"`{path}`" not in documented] == []


def _paths(values: dict[str, object], above: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        path = f"{above}{name}"
        # A free mapping (labels, resources) is one value; a mapping of values has keys of its own.
        if (
            isinstance(value, dict)
            and value
            and f"`{path}`" not in (CHART / "README.md").read_text()
        ):
            found += _paths(value, f"{path}.")
        else:
            found.append(path)
    return found


def test_the_rules_are_those_of_the_repository() -> None:
    source = [
        group
        for name in RULES
        for group in yaml.safe_load((REPO_ROOT / "monitoring/rules" / name).read_text())["groups"]
    ]
    made = [
        group
        for rule in of_kind(rendered(DEFAULT).documents, "PrometheusRule")
        for group in rule["spec"]["groups"]
    ]
    assert sorted(made, key=str) == sorted(source, key=str)
    # Prometheus's own placeholders look like Helm's: none may have been filled in.
    assert any("$labels" in str(group) for group in made)


def test_the_dashboards_are_those_of_the_repository() -> None:
    made: dict[str, str] = {}
    for document in of_kind(rendered(DEFAULT).documents, "ConfigMap"):
        if "grafana_dashboard" in document["metadata"].get("labels", {}):
            made |= document["data"]
    assert made == {path.name: path.read_text() for path in BOARDS.glob("*.json")}
