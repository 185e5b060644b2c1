"""What the aggregator makes of many processes' counts and gauges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from monitoring.aggregator import Aggregator
from monitoring.declaration import MAX_TEAMS, OTHER
from monitoring.messages import ClusterView, ExpertRows
from tests.unit.monitoring.pushes import Clock, Process, last_words_of, rows_of, value

HOUR_S = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def aggregator(clock: Clock) -> Aggregator:
    return Aggregator(top_experts=2, monotonic=clock, unix_time=clock)


def pushed(aggregator: Aggregator, process: Process) -> Process:
    process.push(aggregator)
    return process


def router(aggregator: Aggregator, name: str = "r", rows: int = 0) -> Process:
    process = Process("router", name)
    process.count("dispatch_rows", rows)
    return pushed(aggregator, process)


def shard(aggregator: Aggregator, name: str, rows: ExpertRows) -> Process:
    process = Process("shard", name)
    process.compute(rows)
    return pushed(aggregator, process)


def test_counters_of_several_processes_add_up(aggregator: Aggregator) -> None:
    router(aggregator, "a", 3)
    router(aggregator, "b", 4)
    assert value(aggregator, "moonshard_dispatch_rows_total") == 7


def test_the_counts_of_a_process_stay_when_it_goes_and_its_gauges_do_not(
    aggregator: Aggregator, clock: Clock
) -> None:
    process = router(aggregator, "a", 3)
    process.gauges["router_table_version"] = {("a",): 5.0}
    process.push(aggregator)
    assert value(aggregator, "moonshard_router_table_version", replica="a") == 5
    clock.now_s += 10.1
    assert aggregator.tick()
    assert value(aggregator, "moonshard_router_table_version", replica="a") is None
    assert value(aggregator, "moonshard_dispatch_rows_total") == 3
    clock.now_s += 10 * HOUR_S
    aggregator.tick()
    assert value(aggregator, "moonshard_dispatch_rows_total") == 3


def test_a_slow_pusher_may_be_silent_for_five_intervals(
    aggregator: Aggregator, clock: Clock
) -> None:
    pushed(aggregator, Process("router", "slow", interval_s=4.0))
    clock.now_s += 19
    assert not aggregator.tick()
    clock.now_s += 2
    assert aggregator.tick()


def test_a_departure_that_is_told_is_taken_at_once(aggregator: Aggregator) -> None:
    router(aggregator, "a", 3)
    aggregator.depart("router", "a")
    assert value(aggregator, "moonshard_metrics_sources", role="router") == 0
    assert value(aggregator, "moonshard_dispatch_rows_total") == 3


def test_a_process_that_starts_anew_replaces_its_life_before(aggregator: Aggregator) -> None:
    old = Process("shard", "shard-0")
    old.gauges["shard_connections"] = {("shard-0",): 9.0}
    old.push(aggregator)
    pushed(aggregator, Process("shard", "shard-0"))
    assert value(aggregator, "moonshard_metrics_sources", role="shard") == 1
    assert value(aggregator, "moonshard_shard_connections", shard="shard-0") is None


def test_last_words_of_a_dead_life_do_not_end_the_next_one(aggregator: Aggregator) -> None:
    old, new = Process("shard", "shard-0"), Process("shard", "shard-0")
    old.count("shard_tokens", 3, "shard-0")
    old.push(aggregator)
    old.count("shard_tokens", 4, "shard-0")
    new.count("shard_tokens", 1, "shard-0")
    new.push(aggregator)
    for _ in range(2):  # however often they are said
        aggregator.apply(last_words_of(old))
    assert value(aggregator, "moonshard_shard_tokens_total", shard="shard-0") == 8
    assert value(aggregator, "moonshard_metrics_sources", role="shard") == 1


def test_last_words_of_a_life_that_was_never_heard_do_not_end_the_next_one(
    aggregator: Aggregator,
) -> None:
    old, new = Process("shard", "shard-0"), Process("shard", "shard-0")
    old.count("shard_tokens", 3, "shard-0")
    new.push(aggregator)
    aggregator.apply(last_words_of(old))
    assert value(aggregator, "moonshard_shard_tokens_total", shard="shard-0") == 3
    assert value(aggregator, "moonshard_metrics_sources", role="shard") == 1


def test_one_that_was_gone_for_hours_is_not_counted_twice(
    aggregator: Aggregator, clock: Clock
) -> None:
    process = router(aggregator, "a", 3)
    for _ in range(2):
        clock.now_s += 2 * HOUR_S
        aggregator.tick()
    process.push(aggregator)
    assert value(aggregator, "moonshard_dispatch_rows_total") == 3
    process.count("dispatch_rows", 4)
    process.push(aggregator)
    assert value(aggregator, "moonshard_dispatch_rows_total") == 7


def test_one_that_was_gone_for_hours_is_not_counted_twice_after_a_restart(
    aggregator: Aggregator, clock: Clock
) -> None:
    process = router(aggregator, "a", 3)
    for _ in range(2):
        clock.now_s += 2 * HOUR_S
        aggregator.tick()
    new = Aggregator(monotonic=clock, unix_time=clock)
    new.restore(aggregator.save())
    process.push(new)
    assert value(new, "moonshard_dispatch_rows_total") == 3


def test_every_kind_of_end_is_told_once(aggregator: Aggregator) -> None:
    said, departed, replaced = (Process("shard", name) for name in ("a", "b", "c"))
    for process in (said, departed, replaced):
        process.push(aggregator)
    assert not aggregator.tick()
    said.push(aggregator, is_last=True)
    assert aggregator.tick()
    assert not aggregator.tick()
    aggregator.depart("shard", "b")
    assert aggregator.tick()
    pushed(aggregator, Process("shard", "c"))
    assert aggregator.tick()
    assert not aggregator.tick()


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("gateway_queued_requests", 5.0),  # sum
        ("budget_remaining_usd", 3.0),  # max
        ("ledger_backlog_age_seconds", 3.0),  # max
        ("table_version", 2.0),  # the last word
    ],
)
def test_gauges_are_merged_as_declared(
    aggregator: Aggregator, clock: Clock, metric: str, expected: float
) -> None:
    role = {"table_version": "controller", "ledger_backlog_age_seconds": "router"}.get(
        metric, "gateway"
    )
    labels = {"scope": "team", "name": "t"} if metric.startswith("budget") else {}
    for name, amount in (("a", 3.0), ("b", 2.0)):
        process = Process(role, name)
        process.gauges[metric] = {tuple(labels.values()): amount}
        process.push(aggregator)
        clock.now_s += 1
    assert value(aggregator, f"moonshard_{metric}", **labels) == expected


def test_teams_past_the_limit_share_a_series_whoever_counts_them(aggregator: Aggregator) -> None:
    for gateway in range(2):
        process = Process("gateway", f"g{gateway}")
        for team in range(MAX_TEAMS):
            process.count("tokens", 1, "prompt", "m", f"team-{gateway}-{team}")
        process.push(aggregator)
    labels = {"kind": "prompt", "model": "m"}
    name = "moonshard_tokens_total"
    assert value(aggregator, name, team=OTHER, **labels) == MAX_TEAMS
    assert value(aggregator, name, team="team-0-7", **labels) == 1
    assert value(aggregator, name, team="team-1-7", **labels) is None


def test_an_answer_tells_about_the_cluster(aggregator: Aggregator) -> None:
    router(aggregator, "a")
    router(aggregator, "b")
    for name in ("g1", "g2"):
        process = Process("gateway", name)
        process.gauges["gateway_queued_requests"] = {(): 4.0}
        push = process.state.next_push()
        ack = aggregator.apply(push)
    assert ack.view == ClusterView(num_routers=2, num_gateways=2, queued_requests=8)
    # Another application's replicas are none of its business, nor the other way round.
    other = Process("router", "c", app="other")
    view = aggregator.apply(other.state.next_push()).view
    assert view == ClusterView(num_routers=1, num_gateways=0, queued_requests=0)
    view = aggregator.apply(process.state.next_push()).view
    assert (view.num_routers, view.num_gateways) == (2, 2)


def test_a_restart_goes_on_from_what_was_saved(aggregator: Aggregator, clock: Clock) -> None:
    living, gone = router(aggregator, "living", 3), router(aggregator, "gone", 5)
    rows = ExpertRows((3, 7), (0, 1), 2, rows_of((3, 7), (0, 1)))
    shard(aggregator, "shard-0", rows)
    gone.push(aggregator, is_last=True)
    saved = aggregator.save()
    living.count("dispatch_rows", 10)
    living.push(aggregator)

    new = Aggregator(monotonic=clock, unix_time=clock)
    assert new.restore(saved)
    assert not new.is_settled
    assert value(new, "moonshard_dispatch_rows_total") == 8
    living.push(new)
    assert not new.is_settled  # the shard has not been heard
    assert value(new, "moonshard_dispatch_rows_total") == 18
    assert new.experts()["windows"]["total"] == rows.rows.tolist()
    clock.now_s += 7.9  # one that pushes rarely has had no turn yet
    assert not new.is_settled
    clock.now_s += 0.2
    assert new.is_settled  # nobody is waited for longer: the gateway gives up after 10 s


def test_who_lived_when_it_was_saved_is_waited_for(aggregator: Aggregator, clock: Clock) -> None:
    process = router(aggregator, "a", 3)
    new = Aggregator(monotonic=clock, unix_time=clock)
    new.restore(aggregator.save())
    assert not new.is_settled
    process.push(new)
    assert new.is_settled
    assert Aggregator(monotonic=clock).is_settled  # nothing was saved, so nobody is missing


def test_the_id_of_the_totals_outlives_a_restart_that_found_them(aggregator: Aggregator) -> None:
    process = Process("router", "r")
    first = aggregator.apply(process.state.next_push())
    new, stranger = Aggregator(), Aggregator()
    new.restore(aggregator.save())
    again = new.apply(process.state.next_push())
    assert again.history == first.history
    assert again.incarnation != first.incarnation
    assert stranger.apply(process.state.next_push()).history != first.history


def test_what_another_version_saved_is_left_aside(
    aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    router(aggregator, "a", 3)
    saved = aggregator.save()
    monkeypatch.setattr("monitoring.aggregator._FORMAT", 1)
    new = Aggregator()
    assert not new.restore(saved)
    assert value(new, "moonshard_dispatch_rows_total") is None


def test_the_load_of_the_experts_is_told_whole(aggregator: Aggregator, clock: Clock) -> None:
    layers = (3, 7)
    old = ExpertRows(layers, (0, 2), 4, np.array([[8, 0], [0, 4]]))
    first = shard(aggregator, "shard-0", old)
    clock.now_s += 100
    for _ in range(10):
        clock.now_s += 10
        aggregator.tick()
        first.push(aggregator)
    shard(aggregator, "shard-1", ExpertRows(layers, (1, 3), 4, np.array([[1, 1], [0, 0]])))
    load = json.loads(json.dumps(aggregator.experts()))
    assert load["layers"] == [3, 7]
    assert load["num_experts"] == 4
    assert load["updated_s"] == clock.now_s
    assert load["windows"]["total"] == [[8, 1, 0, 1], [0, 0, 4, 0]]
    assert load["windows"]["1m"] == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert load["shards"]["shard-0"] == {
        "is_live": True,
        "experts": [0, 2],
        "rows": {"1m": 0, "10m": 12, "total": 12},
    }
    # Layer 3: shards did 0 and 2 rows, experts 0, 1, 0 and 1; layer 7 did nothing.
    assert load["balancedness"] == {
        "shards": 0.5,
        "experts": 0.5,
        "layers": {"3": {"shards": 0.5, "experts": 0.5}},
    }
    assert value(aggregator, "moonshard_balancedness", over="shards") == 0.5
    assert value(aggregator, "moonshard_layer_balancedness", layer="3", over="experts") == 0.5
    assert value(aggregator, "moonshard_layer_balancedness", layer="7", over="experts") is None
    assert value(aggregator, "moonshard_hottest_expert_share", layer="3", expert="1") == 2.0
    assert value(aggregator, "moonshard_experts_per_layer") == 4


def test_counts_of_before_a_restart_that_found_nothing_are_in_no_window(
    aggregator: Aggregator, clock: Clock
) -> None:
    rows = ExpertRows((3,), (0, 1), 2, np.array([[8, 2]]))
    process = shard(aggregator, "shard-0", rows)
    process.push(aggregator)
    new = Aggregator(monotonic=clock, unix_time=clock)
    process.push(new)
    assert new.experts()["windows"] == {"1m": [[0, 0]], "10m": [[0, 0]], "total": [[8, 2]]}


def test_a_shard_that_still_loads_is_in_no_balance(aggregator: Aggregator) -> None:
    shard(aggregator, "shard-0", ExpertRows((3,), (0, 1), 2, np.array([[8, 8]])))
    pushed(aggregator, Process("shard", "shard-1"))
    assert aggregator.experts()["balancedness"]["shards"] == 1.0


def test_without_rows_there_is_no_balance(aggregator: Aggregator) -> None:
    assert aggregator.experts()["balancedness"] == {
        "shards": None,
        "experts": None,
        "layers": {},
    }
    assert value(aggregator, "moonshard_balancedness", over="shards") is None
