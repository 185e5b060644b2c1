"""What a router replica tells of its engine's dispatcher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from deployments.guard import ExpertsGuard
from deployments.router_metrics import RouterMetrics
from monitoring.aggregator import Aggregator
from monitoring.messages import Ack, Push
from routing.engine_state import EngineState
from tests.unit.monitoring.pushes import value


async def test_withdrawals_are_counted_not_the_layers_that_lacked_experts(tmp_path: Path) -> None:
    aggregator, state = Aggregator(), EngineState.create(tmp_path / "state")

    async def send(push: Push) -> Ack:
        return aggregator.apply(push)

    class Engine:
        async def abort_all(self) -> None:
            """Nothing runs."""

        async def reset_prefix_cache(self) -> bool:
            return True

    guard = ExpertsGuard(state)
    experts = SimpleNamespace(guard=guard, counters=state.snapshot)
    metrics = RouterMetrics("r", "app", cast(Any, experts), lambda: (0, 0.0), send, 1.0)
    state.add("rows", 7)
    await metrics._pusher.push()
    assert value(aggregator, "moonshard_experts_unavailable_total") == 0
    state.add("poison", 60)  # one step, all of its layers
    await guard._recover(Engine())
    await metrics._pusher.push()
    assert value(aggregator, "moonshard_experts_unavailable_total") == 1
    assert value(aggregator, "moonshard_dispatch_rows_total") == 7
