"""Adds up what all processes push; totals never fall, whoever comes, goes or crashes.

Pure: no Ray, no clock of its own. `cluster.metrics_actor` runs it.
"""

from __future__ import annotations

import pickle
import secrets
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from monitoring.declaration import ROLES, Declaration, Domain, Kind, Merge, Role
from monitoring.declarations import DECLARATIONS
from monitoring.experts import WINDOWS_S, ExpertLoad, Window, hottest, layer_balance
from monitoring.exposition import Families, render
from monitoring.infrastructure import CostCounter
from monitoring.messages import Ack, ClusterView, Counts, Push
from monitoring.metrics import LabelLimit
from monitoring.sources import News, Source, Sources, Standing

__all__ = ["Aggregator"]

_BY_ATTRIBUTE = {declaration.attribute: declaration for declaration in DECLARATIONS}
_LAYOUT = 3  # of what `save` gives
_FORMAT = zlib.crc32(repr((_LAYOUT, DECLARATIONS)).encode())
# Below the 10 s that the gateway waits for an answer, with room for making it.
_AWAIT_S = 8.0
_COST = "infrastructure_cost_usd"


class Aggregator:
    """The totals of the cluster. Not thread-safe.

    Args:
        top_experts: how many of the hottest experts get a series.
        monotonic: seconds, for spans.
        unix_time: seconds, for people.
    """

    def __init__(
        self,
        top_experts: int = 20,
        monotonic: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._top_experts = top_experts
        self._monotonic = monotonic
        self._unix_time = unix_time
        self._incarnation = secrets.token_hex(8)
        self._history = secrets.token_hex(8)
        self._started_s = self._ticked_s = monotonic()
        self._sources = Sources()
        self._totals: Counts = {}
        self._experts = ExpertLoad(self._started_s)
        self._experts_updated_s = 0.0
        self._cost = CostCounter(unix_time())
        self._limits: dict[Domain, LabelLimit] = {}

    def apply(self, push: Push) -> Ack:
        """Count a message, once."""
        now_s = self._monotonic()
        is_gap = self._sources.standing(push) is Standing.GAP
        news = self._sources.hear(push, now_s)
        if news is not None:
            self._count(push.source.name, news)
        return Ack(
            push.sequence, is_gap, self._incarnation, self._history, self._view(push.source.app)
        )

    def depart(self, role: Role, name: str) -> None:
        """A process has ended: its gauges go, its counts stay."""
        self._sources.depart(role, name)

    def tick(self) -> bool:
        """Let time pass; to be called every second or so.

        Returns:
            Whether a process has gone since the last call: nobody can tell its counts again.
        """
        now_s = self._monotonic()
        dt_s, self._ticked_s = now_s - self._ticked_s, now_s
        self._experts.roll(now_s)
        prices = self._gauges(_BY_ATTRIBUTE["node_cost_usd_per_hour"])
        usd_per_hour = {key[0]: usd for key, usd in prices.items()}
        num_shards = sum(1 for _ in self._sources.live("shard"))
        self._cost.step(dt_s, usd_per_hour, num_shards, self._unix_time())
        return self._sources.expire(now_s)

    @property
    def is_settled(self) -> bool:
        """Whether the totals are as new as before a restart.

        Until then a reader would see them fall. But one that died with the aggregator would be
        waited for in vain, so nobody is waited for longer than some seconds.
        """
        late = self._monotonic() - self._started_s > _AWAIT_S
        return late or not self._sources.is_awaiting

    def snapshot(self) -> str:
        """All metrics in Prometheus's text format."""
        families: Families = {}
        for declaration in DECLARATIONS:
            if declaration.kind is Kind.GAUGE and declaration.role != "aggregator":
                gauges = self._gauges(declaration)
                families[declaration.attribute] = {key: (v,) for key, v in gauges.items()}
            elif declaration.kind is not Kind.GAUGE:
                families[declaration.attribute] = self._totals.get(declaration.attribute, {})
        families[_COST] = {key: (usd,) for key, usd in self._cost.shown.items()}
        return render(families | self._own_gauges())

    def experts(self) -> dict[str, Any]:
        """The load of every expert, JSON-able: see `docs/metrics.md`."""
        now_s, load = self._monotonic(), self._experts
        windows = {name: load.window(name, now_s) for name in WINDOWS_S}
        rows = {name: window.rows for name, window in windows.items()} | {"total": load.total}
        by_shard = {name: window.by_shard for name, window in windows.items()}
        by_shard["total"] = load.total_by_shard
        live = {key.name: source for key, source in self._sources.live("shard")}
        return {
            "layers": list(load.layers),
            "num_experts": load.num_experts,
            "updated_s": self._experts_updated_s,
            "windows_s": {name: window.length_s for name, window in windows.items()},
            "windows": {name: matrix.tolist() for name, matrix in rows.items()},
            "balancedness": self._balancedness(windows["1m"]),
            "shards": {
                shard_id: {
                    "is_live": shard_id in live,
                    "experts": _held(live.get(shard_id)),
                    "rows": {
                        name: int(shards[shard_id].sum()) if shard_id in shards else 0
                        for name, shards in by_shard.items()
                    },
                }
                for shard_id in sorted({*live, *load.total_by_shard}, key=_natural)
            },
        }

    def save(self) -> bytes:
        """What a restart needs to go on (`restore`); trust it as you trust its storage.

        Tell when it is stored (`saved`).
        """
        sources = [
            (name, s.sequence, s.silence_s, s.counts, s.experts, s.is_live)
            for name, s in self._sources.items()
        ]
        load = self._experts
        experts = (load.layers, load.total, dict(load.total_by_shard), self._experts_updated_s)
        forgotten, cost = list(self._sources.forgotten), self._cost.save()
        state = (_FORMAT, self._history, self._totals, sources, forgotten, experts, cost)
        return zlib.compress(pickle.dumps(state, protocol=pickle.HIGHEST_PROTOCOL), level=1)

    def saved(self) -> None:
        """What `save` gave last is stored."""
        self._cost.saved()

    def restore(self, data: bytes) -> bool:
        """Go on from what `save` gave; False, and nothing done, if another version wrote it."""
        saved = pickle.loads(zlib.decompress(data))
        if saved[0] != _FORMAT:
            return False
        _, self._history, totals, sources, forgotten, experts, cost = saved
        for attribute, series in totals.items():
            for key, numbers in series.items():
                self._add(attribute, key, numbers)
        now_s = self._monotonic()
        for name, sequence, silence_s, counts, rows, is_live in sources:
            source = Source(sequence, now_s, silence_s, counts, {}, rows, is_live)
            self._sources.restore(name, source)
        self._sources.restore_forgotten(forgotten)
        self._cost.restore(cost, self._unix_time())
        layers, total, by_shard, self._experts_updated_s = experts
        self._experts.restore(layers, total, by_shard)
        return True

    def _count(self, name: str, news: News) -> None:
        for attribute, series in news.counts.items():
            for key, numbers in series.items():
                self._add(attribute, key, numbers)
                if attribute == "expert_seconds" and not news.is_history:
                    self._cost.busy(key[0], numbers[0])
        if news.experts is not None:
            self._experts.add(name, news.experts, is_history=news.is_history)
            self._experts_updated_s = self._unix_time()

    def _add(self, attribute: str, key: tuple[str, ...], numbers: tuple[float, ...]) -> None:
        # Running sums, never made anew from parts: in another order the last bit may differ, and
        # Prometheus takes a counter that fell by a hair for one that began again at 0.
        key = _limited(_BY_ATTRIBUTE[attribute], key, self._limits)
        series = self._totals.setdefault(attribute, {})
        old = series.get(key)
        series[key] = (
            numbers if old is None else tuple(a + b for a, b in zip(old, numbers, strict=True))
        )

    def _gauges(self, declaration: Declaration) -> dict[tuple[str, ...], float]:
        """A gauge's values, each merged over the processes that set it."""
        merged: dict[tuple[str, ...], float] = {}
        limits: dict[Domain, LabelLimit] = {}  # of now: gauges go with their process
        by_age = sorted(self._sources.live(declaration.role), key=lambda item: item[1].seen_s)
        for _, source in by_age:
            for key, value in source.gauges.get(declaration.attribute, {}).items():
                if _limited(declaration, key, limits) != key:
                    continue  # several things in one gauge would mean nothing
                if key not in merged or declaration.merge is Merge.LAST:
                    merged[key] = value
                elif declaration.merge is Merge.SUM:
                    merged[key] += value
                else:
                    merged[key] = max(merged[key], value)
        return merged

    def _own_gauges(self) -> Families:
        now_s = self._monotonic()
        window = self._experts.window("1m", now_s)
        balance = self._balancedness(window)
        hot = hottest(window.rows, self._experts.layers, self._top_experts)
        return {
            "experts_per_layer": (
                {(): (float(self._experts.num_experts),)} if self._experts.num_experts else {}
            ),
            "metrics_sources": {
                (role,): (float(sum(1 for _ in self._sources.live(role))),) for role in ROLES[:-1]
            },
            "balancedness": {
                (over,): (balance[over],)
                for over in ("shards", "experts")
                if balance[over] is not None
            },
            "layer_balancedness": {
                (layer, over): (value,)
                for layer, values in balance["layers"].items()
                for over, value in values.items()
            },
            "hottest_expert_share": {(str(e.layer), str(e.expert)): (e.share,) for e in hot},
        }

    def _balancedness(self, window: Window) -> dict[str, Any]:
        """Means over the layers (None where nothing was computed), and every layer's own."""
        # One that still loads has no experts to be out of balance with.
        serving = [key.name for key, s in self._sources.live("shard") if s.experts is not None]
        balance = layer_balance(window, serving)
        layers: dict[str, dict[str, float]] = {}
        for over, values in balance.items():
            for layer, value in zip(self._experts.layers, values, strict=True):
                if not np.isnan(value):
                    layers.setdefault(str(layer), {})[over] = float(value)
        means: dict[str, Any] = {
            over: float(np.nanmean(values)) if not np.all(np.isnan(values)) else None
            for over, values in balance.items()
        }
        return means | {"layers": layers}

    def _view(self, app: str) -> ClusterView:
        """The cluster as an application's replicas need to see it."""
        gateways = [source for key, source in self._sources.live("gateway") if key.app == app]
        queued = (one.gauges.get("gateway_queued_requests", {}).get((), 0) for one in gateways)
        return ClusterView(
            num_routers=sum(1 for key, _ in self._sources.live("router") if key.app == app),
            num_gateways=len(gateways),
            queued_requests=int(sum(queued)),
        )


def _limited(
    declaration: Declaration, key: tuple[str, ...], limits: dict[Domain, LabelLimit]
) -> tuple[str, ...]:
    """The label values, `OTHER` in place of those past their label's limit."""
    values = list(key)
    for index, domain in enumerate(declaration.labels.values()):
        if isinstance(domain, Domain) and domain.limit is not None:
            limit = limits.setdefault(domain, LabelLimit(domain.limit))
            values[index] = limit(values[index])
    return tuple(values)


def _held(source: Source | None) -> list[int]:
    return [] if source is None or source.experts is None else list(source.experts.experts)


def _natural(name: str) -> tuple[int, str]:
    """shard-2 before shard-10."""
    return len(name), name
