"""Messages and clocks for tests of the aggregator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families

from monitoring.aggregator import Aggregator
from monitoring.messages import Counts, ExpertRows, Push, SourceId, Totals
from monitoring.push import PushState


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Process:
    """A process whose counts a test sets."""

    def __init__(
        self,
        role: str,
        name: str,
        interval_s: float = 1.0,
        epoch: str | None = None,
        app: str = "",
    ) -> None:
        self.source = SourceId.new(role, name, app)  # type: ignore[arg-type]
        if epoch is not None:
            self.source = SourceId(role, name, epoch, app)  # type: ignore[arg-type]
        self.counts: Counts = {}
        self.gauges: dict[str, dict[tuple[str, ...], float]] = {}
        self.experts: ExpertRows | None = None
        self.state = PushState(self.source, self.totals, interval_s, clock=lambda: 0.0)

    def totals(self) -> Totals:
        counts = {name: dict(series) for name, series in self.counts.items()}
        return Totals(counts, {n: dict(g) for n, g in self.gauges.items()}, self.experts)

    def count(self, name: str, amount: float, *labels: str) -> None:
        series = self.counts.setdefault(name, {})
        series[labels] = (series.get(labels, (0.0,))[0] + amount,)

    def compute(self, rows: ExpertRows) -> None:
        before = self.experts.rows if self.experts is not None else 0
        self.experts = ExpertRows(rows.layers, rows.experts, rows.num_experts, before + rows.rows)

    def push(self, aggregator: Aggregator, *, is_last: bool = False) -> None:
        """Push until nothing is due."""
        while self.state.acknowledged(aggregator.apply(self.state.next_push(is_last=is_last))):
            pass


def rows_of(layers: Sequence[int], experts: Sequence[int]) -> npt.NDArray[np.int64]:
    """int64 [num_layers, num_experts], all different and above 0."""
    shape = (len(layers), len(experts))
    return np.arange(1, 1 + shape[0] * shape[1], dtype=np.int64).reshape(shape)


def last_words_of(process: Process) -> Push:
    """What a successor on the same node says for a process that was killed."""
    totals = process.totals()
    return Push(
        process.source, 2**53, 0.0, True, True, totals.counts, totals.gauges, totals.experts
    )


def value(aggregator: Aggregator, sample: str, **labels: str) -> float | None:
    """A sample of the snapshot; None when it is not there."""
    for family in text_string_to_metric_families(aggregator.snapshot()):
        for found in family.samples:
            if found.name == sample and found.labels == labels:
                return float(found.value)
    return None
