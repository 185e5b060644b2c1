"""What processes tell the aggregator of metrics, and what it answers. All picklable."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from monitoring.declaration import Role

__all__ = [
    "Ack",
    "ClusterView",
    "Counts",
    "ExpertRows",
    "Push",
    "SourceId",
    "Totals",
    "longest_silence_s",
]

_MIN_SILENCE_S = 10.0
_SILENT_INTERVALS = 5

Counts = dict[str, dict[tuple[str, ...], tuple[float, ...]]]
"""Metric (by attribute) -> label values in declared order -> numbers that only grow: one of a
counter; of a histogram the cumulative count of every bucket, +Inf last, then the sum."""


@dataclass(frozen=True, slots=True)
class SourceId:
    """One life of a process.

    Attributes:
        role: what it is.
        name: what outlives a restart (a shard's id), or a replica's name.
        epoch: new random id for every start.
        app: the Serve application that it is a replica of; "" for what all of them share.
    """

    role: Role
    name: str
    epoch: str
    app: str = ""

    @classmethod
    def new(cls, role: Role, name: str, app: str = "") -> Self:
        """Of a process that has just started."""
        return cls(role, name, secrets.token_hex(8), app)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """Rows computed per (layer, expert).

    Attributes:
        layers: checkpoint layer ids, the rows of `rows`.
        experts: logical expert ids, the columns of `rows`.
        num_experts: logical experts per layer of the whole model.
        rows: int64 [num_layers, num_held].
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    num_experts: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Totals:
    """All that a process has counted since it started, and its gauges now."""

    counts: Counts = field(default_factory=dict)
    gauges: Mapping[str, Mapping[tuple[str, ...], float]] = field(default_factory=dict)
    experts: ExpertRows | None = None


@dataclass(frozen=True, slots=True)
class Push:
    """One message of a source.

    Attributes:
        source: who.
        sequence: grows with every message of the source that is not a repetition.
        interval_s: when the next is due; a source that stays silent for long is gone.
        is_full: `counts` and `experts` are totals since the source's start, else what came since
            the message before.
        is_last: the source ends.
        counts, gauges, experts: see `Totals`; `experts` is None when nothing was computed.
    """

    source: SourceId
    sequence: int
    interval_s: float
    is_full: bool
    is_last: bool
    counts: Counts
    gauges: Mapping[str, Mapping[tuple[str, ...], float]]
    experts: ExpertRows | None


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What a source may want to know about the others.

    Attributes:
        num_routers: router replicas that push.
        num_gateways: ingress replicas that push.
        queued_requests: requests that wait at all of them together.
    """

    num_routers: int
    num_gateways: int
    queued_requests: int


@dataclass(frozen=True, slots=True)
class Ack:
    """The aggregator's answer.

    Attributes:
        sequence: of the push that it answers.
        wants_full: nothing was counted of it, since messages are missing in between (the
            aggregator was started again): send all totals, with a new sequence.
        incarnation: new random id for every start of the aggregator.
        history: id of its totals; the same after a restart that found the saved ones.
        view: the cluster.
    """

    sequence: int
    wants_full: bool
    incarnation: str
    history: str
    view: ClusterView


def longest_silence_s(interval_s: float) -> float:
    """Who hears nothing for longer, of one that speaks at this interval, takes it as gone."""
    return max(_MIN_SILENCE_S, _SILENT_INTERVALS * interval_s)
