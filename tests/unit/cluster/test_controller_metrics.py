"""What the controller tells about the shards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster import controller_metrics
from cluster.config import parse_config
from cluster.controller_metrics import (
    ControllerMetrics,
    ControllerState,
    RestartCount,
    record_state,
)
from cluster.ray_adapter import NodeInfo
from cluster.reconcile import Phase, ShardReport, ShardView
from monitoring.aggregator import Aggregator
from monitoring.messages import Ack, Push, SourceId
from monitoring.metrics import Metrics
from tests.unit.monitoring.pushes import value

CONFIG = parse_config({"costs": {"node_usd_per_hour": 3.0}})
NODES = [NodeInfo("a", "10.0.0.1"), NodeInfo("b", "10.0.0.2")]


def view(shard_id: str, phase: Phase, num_restarts: int = 0) -> ShardView:
    report = ShardReport("life", phase, node_id="a")
    return ShardView(shard_id, phase, report=report, num_restarts=num_restarts)


def test_shards_are_counted_by_whether_they_serve() -> None:
    metrics = Metrics("controller")
    placing = ShardView("shard-2", Phase.PLACING)
    views = [view("shard-0", Phase.READY), view("shard-1", Phase.LOADING), placing]
    record_state(metrics, ControllerState(views, 7), NODES, CONFIG, RestartCount())
    gauges = metrics.totals().gauges
    assert gauges["table_version"] == {(): 7.0}
    assert gauges["shards_wanted"] == {(): 3.0}
    assert gauges["shards_live"] == {(): 1.0}
    assert gauges["shard_up"] == {("shard-0",): 1.0, ("shard-1",): 0.0, ("shard-2",): 0.0}
    assert gauges["node_cost_usd_per_hour"] == {("shards",): 3.0, ("router",): 3.0}


@pytest.mark.parametrize(
    "views", [[], [view("shard-0", Phase.READY), ShardView("shard-1")]], ids=["none", "one unasked"]
)
def test_a_controller_that_has_just_come_back_says_nothing_of_what_it_does_not_know(
    views: list[ShardView],
) -> None:
    metrics = Metrics("controller")
    record_state(metrics, ControllerState(views, 0), NODES, CONFIG, RestartCount())
    gauges = metrics.totals().gauges
    assert gauges == ({"shards_wanted": {(): 2.0}} if views else {})
    known = [view("shard-0", Phase.READY), view("shard-1", Phase.LOST)]
    record_state(metrics, ControllerState(known, 3), NODES, CONFIG, RestartCount())
    gauges = metrics.totals().gauges
    assert gauges["shards_live"] == {(): 1.0}
    assert gauges["table_version"] == {(): 3.0}
    assert gauges["node_cost_usd_per_hour"] == {("shards",): 3.0, ("router",): 3.0}


async def test_what_came_since_the_last_message_is_told_before_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aggregator, views = Aggregator(), [view("shard-0", Phase.READY)]
    tasks: set[SourceId] = set()

    class Sender:
        async def send(self, push: Push) -> Ack:
            tasks.add(push.source)
            return aggregator.apply(push)

    monkeypatch.setattr(controller_metrics, "MetricsSender", Sender)
    monkeypatch.setattr(controller_metrics, "ensure_metrics_actor", lambda top_experts: None)
    monkeypatch.setattr(controller_metrics, "stop_metrics_actor", lambda: None)
    monkeypatch.setattr(controller_metrics, "list_nodes", lambda: NODES)

    def restarts() -> float | None:
        return value(aggregator, "moonshard_shard_restarts_total", shard="shard-0")

    metrics = ControllerMetrics(lambda: ControllerState(views, 1))
    config = parse_config({"metrics": {"push_interval_s": 1000}})
    await metrics.start(config)
    await until(lambda: restarts() == 0)
    views[0] = replace(views[0], num_restarts=1)
    await metrics.start(config)
    assert restarts() == 1
    await until(lambda: len(tasks) == 2)
    views[0] = replace(views[0], num_restarts=3)
    await metrics.stop()
    assert restarts() == 3


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


def test_restarts_are_counted_from_when_the_shard_was_first_seen() -> None:
    metrics, restarts = Metrics("controller"), RestartCount()

    def restarts_after(shard: ShardView) -> float:
        record_state(metrics, ControllerState([shard], 1), NODES, CONFIG, restarts)
        return metrics.totals().counts["shard_restarts"][("shard-0",)][0]

    # A controller that came back must not count again what its life before has counted.
    assert restarts_after(ShardView("shard-0")) == 0
    seen = view("shard-0", Phase.READY, num_restarts=5)
    assert restarts_after(seen) == 0
    assert restarts_after(replace(seen, num_restarts=6)) == 1
    assert restarts_after(replace(seen, num_restarts=8)) == 3
    # Given up by Ray, and made anew.
    assert restarts_after(replace(seen, num_restarts=0)) == 3
    assert restarts_after(replace(seen, num_restarts=1)) == 4
