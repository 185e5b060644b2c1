"""What a declaration of a metric says: name, labels and where their values come from, merging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Literal

__all__ = [
    "MAX_TEAMS",
    "OTHER",
    "ROLES",
    "Declaration",
    "Dimensions",
    "Domain",
    "Kind",
    "Merge",
    "Role",
]

Role = Literal["gateway", "router", "shard", "controller", "aggregator"]
"""Which process counts."""

ROLES: tuple[Role, ...] = ("gateway", "router", "shard", "controller", "aggregator")

OTHER = "other"
"""Label value of all that came after a label's limit was reached."""

MAX_TEAMS = 1000
_MAX_MODELS = 64
_MAX_BUDGETS = 2000


class Kind(StrEnum):
    """Prometheus's type of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Merge(StrEnum):
    """What becomes of a gauge that several processes set with the same labels."""

    SUM = "sum"
    MAX = "max"
    LAST = "last"  # of the process that was heard last


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Size of an installation: what the number of series depends on."""

    models: int = 1
    teams: int = 1
    keys: int = 1
    shards: int = 2
    routers: int = 1
    layers: int = 1
    top_experts: int = 20


class Domain(Enum):
    """Values of a label that are not known beforehand: (what they are, limit or None)."""

    MODEL = ("models that are served", _MAX_MODELS)
    TEAM = ("teams", MAX_TEAMS)
    SHARD = ("shard ids", None)
    REPLICA = ("router replicas", None)
    KERNEL = ("the shard's kernel", None)
    LAYER = ("MoE layers, as in the checkpoint", None)
    HOT_LAYER = ("MoE layer of a hot expert", None)
    HOT_EXPERT = ("expert id", None)
    BUDGET_SCOPE = ("team, key", None)
    BUDGET_NAME = ("team, or id of the key", _MAX_BUDGETS)

    @property
    def text(self) -> str:
        """What the values are."""
        text: str = self.value[0]
        return text

    @property
    def limit(self) -> int | None:
        """Most distinct values. Beyond it a counter goes to `OTHER`, a gauge is left out."""
        limit: int | None = self.value[1]
        return limit

    def count(self, size: Dimensions) -> int:
        """How many values there are at most, `OTHER` included."""
        counts = {
            Domain.MODEL: min(size.models, _MAX_MODELS) + 1,
            Domain.TEAM: min(size.teams, MAX_TEAMS) + 1,
            Domain.SHARD: size.shards,
            Domain.REPLICA: size.routers,
            Domain.LAYER: size.layers,
            Domain.HOT_LAYER: size.top_experts,
            Domain.BUDGET_NAME: min(size.teams + size.keys, _MAX_BUDGETS),
        }
        return counts.get(self, 1)  # the rest follows from another label of the same series


@dataclass(frozen=True, slots=True)
class Declaration:
    """A metric.

    Attributes:
        name: as Prometheus sees it; a counter's ends in `_total`.
        role: the processes that count it.
        help: one line, with the unit where the name has none.
        labels: name -> the values, or where they come from.
        buckets: upper bounds of a histogram's, +Inf left out.
        merge: of a gauge.
    """

    name: str
    role: Role
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...] | Domain] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    merge: Merge = Merge.LAST

    @property
    def attribute(self) -> str:
        """Its name in `Metrics`: without `moonshard_` and `_total`."""
        return self.name.removeprefix("moonshard_").removesuffix("_total")

    @property
    def num_values(self) -> int:
        """Numbers per series: buckets with +Inf, then the sum; 1 unless it is a histogram."""
        return len(self.buckets) + 2 if self.kind is Kind.HISTOGRAM else 1

    def max_series(self, size: Dimensions) -> int:
        """Most series of it in Prometheus (a histogram's `_count` is one, too)."""
        counts = [
            values.count(size) if isinstance(values, Domain) else len(values)
            for values in self.labels.values()
        ]
        per_series = len(self.buckets) + 3 if self.kind is Kind.HISTOGRAM else 1
        return math.prod(counts) * per_series
