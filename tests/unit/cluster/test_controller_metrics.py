"""What the controller tells about the shards."""

from __future__ import annotations

from dataclasses import replace

from cluster.config import parse_config
from cluster.controller_metrics import ControllerState, RestartCount, record_state
from cluster.ray_adapter import NodeInfo
from cluster.reconcile import Phase, ShardReport, ShardView
from monitoring.metrics import Metrics

CONFIG = parse_config({"costs": {"node_usd_per_hour": 3.0}})
NODES = [NodeInfo("a", "10.0.0.1"), NodeInfo("b", "10.0.0.2")]


def view(shard_id: str, phase: Phase, num_restarts: int = 0) -> ShardView:
    report = ShardReport("life", phase, node_id="a")
    return ShardView(shard_id, phase, report=report, num_restarts=num_restarts)


def test_shards_are_counted_by_whether_they_serve() -> None:
    metrics = Metrics("controller")
    views = [view("shard-0", Phase.READY), view("shard-1", Phase.LOADING), ShardView("shard-2")]
    record_state(metrics, ControllerState(views, 7), NODES, CONFIG, RestartCount())
    gauges = metrics.totals().gauges
    assert gauges["table_version"] == {(): 7.0}
    assert gauges["shards_wanted"] == {(): 3.0}
    assert gauges["shards_live"] == {(): 1.0}
    assert gauges["shard_up"] == {("shard-0",): 1.0, ("shard-1",): 0.0, ("shard-2",): 0.0}
    assert gauges["node_cost_usd_per_hour"] == {("shards",): 3.0, ("router",): 3.0}


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
