"""Every values file, and the chart's switches two by two, pass every check."""

from __future__ import annotations

import itertools

import pytest
import yaml

from tests.helm.checks import CHECKS, NEEDS_CRDS
from tests.helm.custom_resources import require_crds
from tests.helm.helm_cli import CHART
from tests.helm.kubernetes_kinds import VERSIONS
from tests.helm.matrix import CASES, PAIR_CASES, Case, rendered
from tests.helm.switches import SWITCHES


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_release(case: Case, check: str) -> None:
    if check in NEEDS_CRDS:
        require_crds()
    assert CHECKS[check](case, rendered(case).documents) == []


def test_every_two_positions_of_switches_meet() -> None:
    """But for the pairs that the chart refuses."""
    met = {
        pair
        for case in PAIR_CASES
        for pair in itertools.combinations(zip(SWITCHES, case.positions, strict=True), 2)
    }
    wanted = {
        ((one, a), (other, b))
        for (one, positions), (other, others) in itertools.combinations(SWITCHES.items(), 2)
        for a in positions
        for b in others
    }
    assert wanted - met == {(("pods", "placed"), ("streams", "long"))}


def test_the_oldest_kubernetes_is_the_one_that_the_chart_names() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={VERSIONS[0]}-0"
