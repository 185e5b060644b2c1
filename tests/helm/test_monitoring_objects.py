"""Objects of other operators are rendered where their kinds are, and only there."""

from __future__ import annotations

import pytest

from tests.helm.consistency import reference_problems
from tests.helm.documents import describe, of_kind
from tests.helm.helm_cli import CUSTOM_KINDS, render3, render4
from tests.helm.matrix import DEFAULT, rendered
from tests.helm.switches import SWITCHES, merged

MONITORING = ("PodMonitor", "ServiceMonitor", "PrometheusRule")
ASSUMED = {"metrics": {"assumeCrds": True}}


def test_all_of_them_where_the_operator_is() -> None:
    for kind in MONITORING:
        assert of_kind(rendered(DEFAULT).documents, kind), kind


@pytest.mark.parametrize("render", [render3, render4])
def test_none_of_them_where_it_is_not(render: object) -> None:
    kinds = [kind for kind in CUSTOM_KINDS if not kind.startswith("monitoring")]
    documents = render3(kinds=kinds) if render is render3 else render4(kinds=kinds).documents
    assert of_kind(documents, *MONITORING) == []


def test_they_can_be_had_without_asking_the_cluster() -> None:
    """`helm template` for GitOps knows no cluster."""
    documents = render4(ASSUMED, kinds=()).documents
    assert {d["kind"] for d in of_kind(documents, *MONITORING)} == {*MONITORING}


@pytest.mark.parametrize(
    ("switch", "kind"),
    [
        ("podMonitor", "PodMonitor"),
        ("serviceMonitor", "ServiceMonitor"),
        ("prometheusRule", "PrometheusRule"),
    ],
)
def test_each_can_be_switched_off(switch: str, kind: str) -> None:
    values = {"metrics": {switch: {"enabled": False}}}
    documents = render4(values).documents
    assert {d["kind"] for d in of_kind(documents, *MONITORING)} == {*MONITORING} - {kind}


def test_without_a_key_nobody_asks_the_gateway() -> None:
    """Neither Prometheus nor `helm test` would be let in."""
    documents = render4({"adminKey": {"enabled": False}}).documents
    assert of_kind(documents, "ServiceMonitor", "Pod") == []
    assert of_kind(documents, "PodMonitor")
    assert reference_problems(documents) == []


def test_labels_reach_them_all() -> None:
    values = merged(SWITCHES["metrics"]["labelled"], ASSUMED)
    for document in of_kind(render4(values).documents, *MONITORING):
        assert document["metadata"]["labels"]["release"] == "prometheus", describe(document)


def test_the_gateways_metrics_are_asked_for_with_a_key_from_a_secret() -> None:
    for monitor in of_kind(rendered(DEFAULT).documents, "ServiceMonitor"):
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["path"] == "/metrics"
            assert endpoint["authorization"]["credentials"]["name"]
            assert "credentials_file" not in str(endpoint)


def test_metrics_of_every_ray_pod_are_scraped_once() -> None:
    """The gateway's are the whole cluster's: asked at every pod, they would count many times."""
    documents = rendered(DEFAULT).documents
    assert len(of_kind(documents, "ServiceMonitor")) == 1
    ports = [
        endpoint["port"]
        for monitor in of_kind(documents, "PodMonitor")
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    ]
    assert len(ports) == len(set(ports))
    assert "serve" not in ports
