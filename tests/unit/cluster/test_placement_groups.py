from __future__ import annotations

import pytest

from cluster.config import parse_config
from cluster.exceptions import PlacementFailedError
from cluster.placement_groups import (
    BASE_MEMORY_BYTES,
    Demand,
    check_room,
    choose_node,
    describe_resources,
    shard_resources,
)
from cluster.ray_adapter import NodeInfo

GIB = 2**30
WANTED = {"CPU": 1.0, "memory": 1.0 * GIB}


def node(name: str, cpus: float = 4, gib: float = 8) -> NodeInfo:
    resources = {"CPU": cpus, "memory": gib * GIB}
    return NodeInfo(name, f"10.0.0.{name}", resources, resources)


NODES = [node("1"), node("2"), node("3")]


def test_spread_takes_the_node_with_the_fewest_shards() -> None:
    choice = choose_node("SPREAD", WANTED, NODES, {"1": 1, "2": 0, "3": 1})
    assert choice is not None
    assert choice.target == "2"
    assert choice.forbidden == ()


def test_spread_shares_a_node_when_the_others_are_full() -> None:
    choice = choose_node("SPREAD", WANTED, [node("1"), node("2", cpus=0.5)], {"1": 5})
    assert choice is not None
    assert choice.target == "1"


def test_pack_fills_the_fullest_node_that_has_room() -> None:
    nodes = [node("1"), node("2"), node("3", cpus=0)]
    choice = choose_node("PACK", WANTED, nodes, {"1": 1, "2": 2, "3": 9})
    assert choice is not None
    assert choice.target == "2"


def test_strict_spread_rules_taken_nodes_out() -> None:
    choice = choose_node("STRICT_SPREAD", WANTED, NODES, {"1": 1, "3": 1})
    assert choice is not None
    assert choice.target == "2"
    assert choice.forbidden == ("1", "3")
    assert choose_node("STRICT_SPREAD", WANTED, NODES, {"1": 1, "2": 1, "3": 1}) is None


def test_room_is_counted_down_shard_by_shard() -> None:
    check_room([Demand("a shard", WANTED, 12)], NODES)
    with pytest.raises(PlacementFailedError):
        check_room([Demand("a shard", WANTED, 13)], NODES)


def test_what_comes_after_the_shards_needs_room_too() -> None:
    demands = [Demand("a shard", WANTED, 4), Demand("a router replica", {"CPU": 0.5}, 1)]
    with pytest.raises(PlacementFailedError, match="a router replica"):
        check_room(demands, [node("1")])


def test_too_little_room_is_one_line_with_both_sides() -> None:
    with pytest.raises(PlacementFailedError) as caught:
        check_room([Demand("a shard", {"CPU": 64, "memory": 2 * GIB}, 1)], [node("1")])
    message = str(caught.value)
    assert "\n" not in message
    assert "64 CPU, 2.00 GiB memory" in message
    assert "10.0.0.1 has 4 CPU, 8.00 GiB memory free" in message


def test_too_few_nodes_for_strict_spread_says_so() -> None:
    demand = Demand("a shard", WANTED, 4, "STRICT_SPREAD")
    with pytest.raises(PlacementFailedError, match="without another shard"):
        check_room([demand], NODES)


def test_a_shard_reserves_the_memory_of_its_experts_and_a_margin() -> None:
    config = parse_config({"shards": {"num_cpus": 2, "resources": {"big": 1}}}).shards
    wanted = shard_resources(config, expert_bytes=10 * GIB)
    assert wanted["memory"] > 10 * GIB + BASE_MEMORY_BYTES
    assert (wanted["CPU"], wanted["big"]) == (2, 1)
    assert "GPU" not in wanted


def test_a_given_memory_is_taken_as_it_is() -> None:
    config = parse_config({"shards": {"memory_bytes": 5 * GIB}}).shards
    assert shard_resources(config, expert_bytes=10 * GIB)["memory"] == 5 * GIB


def test_missing_resources_are_shown_as_none() -> None:
    assert describe_resources({}, {"GPU": 1}) == "0 GPU"
