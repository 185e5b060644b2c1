"""Both Helms take the chart, and make the same of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from tests.helm.documents import Document, describe
from tests.helm.helm_cli import (
    CUSTOM_KINDS,
    HelmRefused,
    helm3_program,
    lint3,
    lint4,
    render3,
    render4,
)
from tests.helm.matrix import CASES, FILE_CASES, PAIR_CASES, Case

SECRETS_DIFFER = ("data", "stringData")


def comparable(documents: tuple[Document, ...]) -> dict[str, str]:
    """By kind and name; values of Secrets are random at every render, their keys are not."""
    found = {}
    for document in documents:
        shown: dict[str, Any] = dict(document)
        if document["kind"] == "Secret":
            for part in SECRETS_DIFFER:
                shown[part] = sorted(document.get(part) or {})
        found[describe(document)] = json.dumps(shown, sort_keys=True)
    assert len(found) == len(documents)
    return found


def test_these_are_the_versions_that_the_documentation_names() -> None:
    assert helm_python.helm_sdk_version() == "v4.2.3"
    assert Path(helm3_program()).is_file()


@pytest.mark.parametrize("case", FILE_CASES, ids=str)
def test_helm_4_has_nothing_to_say(case: Case) -> None:
    assert lint4(case.values) == []


@pytest.mark.parametrize("case", FILE_CASES, ids=str)
def test_helm_3_has_nothing_to_say(case: Case) -> None:
    assert "[WARNING]" not in lint3(case.values)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_render_the_same(case: Case) -> None:
    assert comparable(render3(case.values)) == comparable(render4(case.values).documents)


@pytest.mark.parametrize("case", FILE_CASES, ids=str)
def test_both_render_the_same_without_any_operator_but_kuberay(case: Case) -> None:
    kinds = [kind for kind in CUSTOM_KINDS if kind.startswith("ray.io")]
    mine = render4(case.values, kinds=kinds).documents
    assert comparable(render3(case.values, kinds=kinds)) == comparable(mine)


def test_both_render_the_same_on_upgrade() -> None:
    four = render4(is_upgrade=True).documents
    assert comparable(render3(is_upgrade=True)) == comparable(four)


def test_a_difference_would_be_seen(tmp_path: Path) -> None:
    """The version of Helm itself, in a chart that renders it."""
    chart = tmp_path / "differs"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: differs\nversion: 0.1.0\n")
    (chart / "templates" / "one.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: one\n"
        "data: {helm: {{ .Capabilities.HelmVersion.Version | quote }}}\n"
    )
    three, four = render3(chart=chart), render4(chart=chart).documents
    assert comparable(three) != comparable(four)
    assert three[0]["data"] == {"helm": "v3.6.2"}


def test_both_lints_can_complain(tmp_path: Path) -> None:
    chart = tmp_path / "broken"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: broken\nversion: 0.1.0\n")
    (chart / "templates" / "one.yaml").write_text("kind: {{ .Values.missing.key }}\n")
    assert lint4(chart=chart)
    with pytest.raises(HelmRefused, match="missing"):
        lint3(chart=chart)


def test_values_files_are_plain_yaml() -> None:
    assert len(FILE_CASES) >= 4
    for case in FILE_CASES:
        assert yaml.safe_load(yaml.safe_dump(case.values)) == case.values
    assert len(PAIR_CASES) > 10
