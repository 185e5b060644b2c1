"""The cost of the nodes over time: split, shown, and carried over restarts."""

from __future__ import annotations

import pytest

from monitoring.aggregator import Aggregator
from tests.unit.monitoring.pushes import Clock, Process, value

COST = "moonshard_infrastructure_cost_usd_total"
HOUR_S = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def aggregator(clock: Clock) -> Aggregator:
    return Aggregator(monotonic=clock, unix_time=clock)


def idle_usd(aggregator: Aggregator) -> float:
    usd = value(aggregator, COST, component="shards", phase="idle")
    assert usd is not None
    return usd


def test_the_price_of_time_is_split_by_what_shards_were_busy_with(
    aggregator: Aggregator, clock: Clock
) -> None:
    controller, worker = Process("controller", "c"), Process("router", "r")
    controller.gauges["node_cost_usd_per_hour"] = {("shards",): 3600.0, ("router",): 720.0}
    controller.push(aggregator)
    for name in ("shard-0", "shard-1"):
        Process("shard", name).push(aggregator)
    worker.count("expert_seconds", 2.0, "prompt")
    worker.count("expert_seconds", 4.0, "generation")
    worker.count("expert_seconds", 1.0, "unattributed")
    worker.push(aggregator)
    clock.now_s += 8
    aggregator.tick()
    aggregator.save()
    aggregator.saved()
    for component, usd in (("shards", 8.0), ("router", 1.6)):
        found = [
            value(aggregator, COST, component=component, phase=phase)
            for phase in ("prompt", "generation", "idle")
        ]
        assert found == pytest.approx([usd * 2 / 16, usd * 4 / 16, usd * 10 / 16])


def test_no_cost_is_shown_that_a_restart_could_lose(aggregator: Aggregator, clock: Clock) -> None:
    controller = Process("controller", "c")
    controller.gauges["node_cost_usd_per_hour"] = {("shards",): 3600.0}
    controller.push(aggregator)
    clock.now_s += 2
    aggregator.tick()
    saved = aggregator.save()
    clock.now_s += 3
    aggregator.tick()
    assert idle_usd(aggregator) == 0.0  # stored is not what was only written
    aggregator.saved()
    assert idle_usd(aggregator) == pytest.approx(2.0)

    new = Aggregator(monotonic=clock, unix_time=clock)
    new.restore(saved)
    assert idle_usd(new) == pytest.approx(2.0)


def test_the_time_of_a_restart_is_paid_at_the_prices_of_before_it(
    aggregator: Aggregator, clock: Clock
) -> None:
    controller = Process("controller", "c")
    controller.gauges["node_cost_usd_per_hour"] = {("shards",): 3600.0}
    controller.push(aggregator)
    clock.now_s += 2
    aggregator.tick()
    saved = aggregator.save()
    for gap_s, paid_s in ((7, 2 + 7), (10 * HOUR_S, 2 + 600), (-50, 2)):
        later = Clock()
        later.now_s = clock.now_s + gap_s
        new = Aggregator(monotonic=Clock(), unix_time=later)
        new.restore(saved)
        new.save()
        new.saved()
        assert idle_usd(new) == pytest.approx(paid_s)


def test_nodes_cost_on_while_the_controller_is_away(aggregator: Aggregator, clock: Clock) -> None:
    controller = Process("controller", "c")
    controller.gauges["node_cost_usd_per_hour"] = {("shards",): 3600.0}
    controller.push(aggregator)
    aggregator.tick()
    aggregator.depart("controller", "c")
    clock.now_s += 60
    aggregator.tick()
    aggregator.save()
    aggregator.saved()
    assert idle_usd(aggregator) == pytest.approx(60.0)
    for _ in range(100):
        clock.now_s += 60
        aggregator.tick()
    aggregator.save()
    aggregator.saved()
    assert idle_usd(aggregator) == pytest.approx(600.0)  # nobody knows what ran since


def test_series_of_cost_exist_before_there_is_any(aggregator: Aggregator) -> None:
    assert value(aggregator, COST, component="router", phase="idle") == 0.0
