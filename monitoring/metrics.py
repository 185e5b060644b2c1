"""A process's own metrics, made of the declarations of its role.

They are counted in this process and pushed to the cluster's one aggregator (`monitoring.push`);
nothing scrapes a process by itself.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Sample

from monitoring.declaration import MAX_TEAMS, OTHER, Declaration, Kind, Role
from monitoring.declarations import declared_by
from monitoring.messages import Counts, Totals

__all__ = ["LabelLimit", "Metrics"]


class LabelLimit:
    """Keeps a label from taking more than so many values. Thread-safe.

    Args:
        limit: the first so many values are kept, each later one becomes `OTHER`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """The value to use."""
        if value in self._known:
            return value
        with self._lock:
            if len(self._known) >= self._limit and value not in self._known:
                return OTHER
            self._known.add(value)
        return value


class Metrics:
    """The metrics that a process of a role counts, as attributes by `Declaration.attribute`.

    `Metrics("gateway").tokens.labels(kind="prompt", model="m", team="t").inc(3)`. Thread-safe, as
    prometheus_client's metrics are. Each instance has a registry of its own.

    Args:
        role: of this process.
    """

    def __init__(self, role: Role) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._declared = declared_by(role)
        self._metrics = {
            declaration.attribute: _make(declaration, self.registry)
            for declaration in self._declared
        }
        self._team_limit = LabelLimit(MAX_TEAMS)
        self._advanced: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._withheld: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_metrics"][name]
        except KeyError:
            raise AttributeError(f"no metric {name!r} is declared for this role") from None

    def team_label(self, team: str) -> str:
        """What to put into a label `team`: the team, or `OTHER` past the first 1,000."""
        return self._team_limit(team)

    def begin(self, name: str, **labels: str) -> None:
        """Make series exist before their first event: `rate` does not see one that a series is
        born with.

        Args:
            name: of a counter or histogram.
            labels: of every label whose values nobody knows beforehand; the others take all of
                theirs.
        """
        metric: Any = self._metrics[name]
        (declaration,) = (d for d in self._declared if d.attribute == name)
        values = [
            known if isinstance(known, tuple) else (labels[label],)
            for label, known in declaration.labels.items()
        ]
        for key in itertools.product(*values):
            metric.labels(*key)

    def withhold(self, names: Iterable[str]) -> None:
        """Leave these gauges out, and no others, until the next call: nobody knows their values
        for now."""
        self._withheld = frozenset(names)

    def advance(self, name: str, total: float, **labels: str) -> None:
        """Bring a counter up to a total that is counted elsewhere (a state file, a server).

        A total below the one before is that of a new start, and counts in full. Not thread-safe
        for one and the same series.
        """
        metric = self._metrics[name]
        counter: Any = metric.labels(**labels) if labels else metric
        key = (name, tuple(sorted(labels.items())))
        before = self._advanced.get(key, 0)
        counter.inc(total - before if total >= before else total)
        self._advanced[key] = total

    def totals(self) -> Totals:
        """All of it now."""
        counts: Counts = {}
        gauges: dict[str, dict[tuple[str, ...], float]] = {}
        withheld = self._withheld
        for declaration in self._declared:
            name = declaration.attribute
            if name in withheld:
                continue
            samples = _samples(self._metrics[name])
            if declaration.kind is Kind.GAUGE:
                gauges[name] = {_key(declaration, sample): sample.value for sample in samples}
            elif declaration.kind is Kind.COUNTER:
                counts[name] = {
                    _key(declaration, sample): (sample.value,)
                    for sample in samples
                    if sample.name == declaration.name
                }
            else:
                counts[name] = _histograms(declaration, samples)
        return Totals(counts, gauges)


def _make(declaration: Declaration, registry: CollectorRegistry) -> MetricWrapperBase:
    name, text, labels = declaration.name, declaration.help, tuple(declaration.labels)
    metric: MetricWrapperBase
    if declaration.kind is Kind.GAUGE:
        return Gauge(name, text, labels, registry=registry)
    if declaration.kind is Kind.HISTOGRAM:
        metric = Histogram(name, text, labels, registry=registry, buckets=declaration.buckets)
    else:
        metric = Counter(name, text, labels, registry=registry)
    if len(labels) == 1:
        # As `Metrics.begin` does, where that needs nobody's knowledge.
        (values,) = declaration.labels.values()
        for value in values if isinstance(values, tuple) else ():
            metric.labels(value)
    return metric


def _samples(metric: MetricWrapperBase) -> Iterable[Sample]:
    return (sample for family in metric.collect() for sample in family.samples)


def _key(declaration: Declaration, sample: Sample) -> tuple[str, ...]:
    return tuple(sample.labels[label] for label in declaration.labels)


def _histograms(
    declaration: Declaration, samples: Iterable[Sample]
) -> dict[tuple[str, ...], tuple[float, ...]]:
    series: dict[tuple[str, ...], list[float]] = {}
    sums: dict[tuple[str, ...], float] = {}
    for sample in samples:
        if sample.name.endswith("_bucket"):  # they come in the order of their bounds
            series.setdefault(_key(declaration, sample), []).append(sample.value)
        elif sample.name.endswith("_sum"):
            sums[_key(declaration, sample)] = sample.value
    return {key: (*buckets, sums[key]) for key, buckets in series.items()}
