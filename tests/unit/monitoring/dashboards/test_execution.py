"""Every expression over Moonshard's own metrics, executed by a real Prometheus.

promtool only parses: that two sides of a division have labels in common, or that a legend's label
survives a sum, shows when it is run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from monitoring.dashboards.expressions import Expression, expressions
from monitoring.declaration import Declaration, Kind
from monitoring.declarations import DECLARATIONS
from tests.prometheus import Prometheus, Sample, ScrapeTarget

RULES = sorted((Path(__file__).resolve().parents[4] / "monitoring" / "rules").glob("*.yaml"))
OWN = [expression for expression in expressions("5s", "10s") if expression.source == "moonshard"]


class _Everything(Collector):
    """All declared metrics, every label with two values, counters that go up with the clock."""

    def __init__(self) -> None:
        self._start = time.monotonic() - 100

    def collect(self) -> Iterator[Metric]:
        elapsed_s = time.monotonic() - self._start
        for declaration in DECLARATIONS:
            yield self._family(declaration, elapsed_s)

    def _family(self, declaration: Declaration, elapsed_s: float) -> Metric:
        name, names = declaration.name, list(declaration.labels)
        combinations = list(itertools.product(*(_values(declaration, label) for label in names)))
        if declaration.kind is Kind.GAUGE:
            gauge = GaugeMetricFamily(name, declaration.help, labels=names)
            for labels in combinations:
                gauge.add_metric(labels, 1)
            return gauge
        if declaration.kind is Kind.COUNTER:
            counter = CounterMetricFamily(name, declaration.help, labels=names)
            for labels in combinations:
                counter.add_metric(labels, elapsed_s)
            return counter
        histogram = HistogramMetricFamily(name, declaration.help, labels=names)
        bounds = [*map(str, declaration.buckets), "+Inf"]
        for labels in combinations:
            buckets = [(bound, elapsed_s * (i + 1)) for i, bound in enumerate(bounds)]
            histogram.add_metric(labels, buckets, sum_value=elapsed_s)
        return histogram


def _values(declaration: Declaration, label: str) -> tuple[str, ...]:
    values = declaration.labels[label]
    return values if isinstance(values, tuple) else (f"{label}-1", f"{label}-2")


@pytest.fixture(scope="module")
def prometheus() -> Iterator[Prometheus]:
    registry = CollectorRegistry()
    registry.register(_Everything())
    server, thread = start_http_server(0, "127.0.0.1", registry)
    target = ScrapeTarget("moonshard", (f"127.0.0.1:{server.server_port}",))
    with Prometheus([target], rules=RULES) as prometheus:
        prometheus.wait_for("llm_cost_per_million_tokens and on () count_over_time(up[10s]) >= 4")
        yield prometheus
    server.shutdown()
    server.server_close()
    thread.join()


def _ask(prometheus: Prometheus, expression: Expression) -> list[Sample]:
    if expression.kind == "timeseries":
        now = time.time()
        return prometheus.query_range(expression.expr, now - 2, now)
    return prometheus.query(expression.expr)


@pytest.mark.parametrize("expression", OWN, ids=lambda e: f"{e.dashboard}-{e.panel}-{e.legend}")
def test_a_panel_gets_series_with_the_labels_of_its_legend(
    prometheus: Prometheus, expression: Expression
) -> None:
    series = _ask(prometheus, expression)
    assert series
    shown = {label for one in series for label in one.labels}
    assert set(expression.labels) <= shown
    legends = [tuple(one.labels.get(label) for label in expression.labels) for one in series]
    if expression.kind != "table":
        assert len(set(legends)) == len(legends), "two series look the same"
    assert all(value == value for one in series for _, value in one.values), "NaN"


def test_every_rule_can_be_evaluated(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert rules
    assert [
        (rule["name"], rule.get("lastError")) for rule in rules if rule["health"] == "err"
    ] == []


def test_what_refers_to_ray_or_vllm_can_be_evaluated_without_them(prometheus: Prometheus) -> None:
    for expression in expressions():
        if expression.source != "moonshard":
            assert _ask(prometheus, expression) == [], expression
