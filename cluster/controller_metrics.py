"""What the controller tells the metrics actor, which it starts and ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.config import MoonshardConfig
from cluster.metrics_actor import MetricsSender, ensure_metrics_actor, stop_metrics_actor
from cluster.node_prices import component_prices
from cluster.ray_adapter import NodeInfo, list_nodes
from cluster.reconcile import Phase, ShardView
from monitoring.messages import SourceId
from monitoring.metrics import Metrics
from monitoring.push import MetricsPusher

__all__ = ["ControllerMetrics", "ControllerState", "RestartCount", "record_state"]

_LIST_INTERVAL_S = 5.0
_OF_VIEWS = {"shards_live", "shard_up", "node_cost_usd_per_hour"}


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What is to be told.

    Attributes:
        views: of all wanted shards.
        table_version: newest that was published; 0 before the first.
    """

    views: Sequence[ShardView]
    table_version: int


class ControllerMetrics:
    """The controller's metrics and the task that pushes them.

    Args:
        state: the controller's state now.
    """

    def __init__(self, state: Callable[[], ControllerState]) -> None:
        self._state = state
        self._task: asyncio.Task[None] | None = None
        self._pusher: MetricsPusher | None = None
        self._listed: list[NodeInfo] = []
        self._listed_s = -_LIST_INTERVAL_S

    async def start(self, config: MoonshardConfig) -> None:
        """Bring the metrics actor up and push to it. Idempotent."""
        await asyncio.to_thread(ensure_metrics_actor, config.metrics.top_experts)
        await self._end_task()
        metrics, restarts = Metrics("controller"), RestartCount()

        def refresh() -> None:
            record_state(metrics, self._state(), self._nodes(), config, restarts)

        self._pusher = MetricsPusher(
            metrics,
            SourceId.new("controller", "controller"),
            MetricsSender().send,
            config.metrics.push_interval_s,
            refresh,
        )
        self._task = asyncio.create_task(self._pusher.run(), name="metrics")

    async def stop(self) -> None:
        """End the metrics actor; its totals go with it. Idempotent."""
        await self._end_task()
        await asyncio.to_thread(stop_metrics_actor)

    async def _end_task(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        pusher, self._pusher = self._pusher, None
        if pusher is not None:
            await pusher.push()  # a restart since the last message: the next task starts at 0

    def _nodes(self) -> list[NodeInfo]:
        if time.monotonic() - self._listed_s >= _LIST_INTERVAL_S:
            self._listed, self._listed_s = list_nodes(), time.monotonic()
        return self._listed


class RestartCount:
    """Restarts of shards since they were first seen: those before, an earlier life of the
    controller has counted."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._count: dict[str, int] = {}

    def of(self, view: ShardView) -> int:
        """How many; never falls."""
        if view.report is None:
            return 0  # nobody has asked Ray yet
        now = view.num_restarts
        before = self._seen.get(view.shard_id, now)
        # Fewer than before: Ray had given it up, and it was made anew.
        self._count.setdefault(view.shard_id, 0)
        self._count[view.shard_id] += now - before if now >= before else now
        self._seen[view.shard_id] = now
        return self._count[view.shard_id]


def record_state(
    metrics: Metrics,
    state: ControllerState,
    nodes: Sequence[NodeInfo],
    config: MoonshardConfig,
    restarts: RestartCount,
) -> None:
    """Bring the controller's metrics up to date.

    What a controller that has just come back does not know yet is left out: as 0 it would say that
    all shards were lost.
    """
    views = state.views
    is_known = bool(views) and all(view.phase is not Phase.UNKNOWN for view in views)
    unknown = {
        *(() if is_known else _OF_VIEWS),
        *(() if views else {"shards_wanted"}),
        *(() if state.table_version else {"table_version"}),
    }
    metrics.withhold(unknown)
    metrics.table_version.set(state.table_version)
    metrics.shards_wanted.set(len(views))
    metrics.shards_live.set(sum(view.phase is Phase.READY for view in views))
    for view in views:
        metrics.shard_up.labels(shard=view.shard_id).set(view.phase is Phase.READY)
        metrics.advance("shard_restarts", restarts.of(view), shard=view.shard_id)
    for component, usd in component_prices(views, nodes, config.costs).items():
        metrics.node_cost_usd_per_hour.labels(component=component).set(usd)
