"""Prometheus's text format, out of numbers by declared metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from monitoring.declaration import Declaration, Kind
from monitoring.declarations import DECLARATIONS

__all__ = ["CONTENT_TYPE", "Families", "render"]

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""Of what `render` gives."""

Families = dict[str, Mapping[tuple[str, ...], tuple[float, ...]]]
"""Metric (by attribute) -> label values -> numbers, as in `monitoring.messages.Counts`; a gauge
has one number."""


def render(families: Families) -> str:
    """The text. A declared metric without series still has its help and type in it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for declaration in DECLARATIONS:
            yield _family(declaration, self._families.get(declaration.attribute, {}))


def _family(
    declaration: Declaration, series: Mapping[tuple[str, ...], tuple[float, ...]]
) -> Metric:
    name, text, labels = declaration.name, declaration.help, tuple(declaration.labels)
    if declaration.kind is Kind.HISTOGRAM:
        histogram = HistogramMetricFamily(name, text, labels=labels)
        bounds = [*map(floatToGoString, declaration.buckets), "+Inf"]
        for key, (*buckets, total) in series.items():
            histogram.add_metric(key, list(zip(bounds, buckets, strict=True)), total)
        return histogram
    is_counter = declaration.kind is Kind.COUNTER
    family = (CounterMetricFamily if is_counter else GaugeMetricFamily)(name, text, labels=labels)
    for key, (value,) in series.items():
        family.add_metric(key, value)
    return family
