"""What nodes and shards cost."""

from __future__ import annotations

import pytest

from cluster.gateway_config import CostsConfig
from cluster.node_prices import (
    component_prices,
    node_usd_per_hour,
    shard_nano_usd_per_s,
    with_prices,
)
from cluster.ray_adapter import NodeInfo
from cluster.reconcile import Phase, ShardReport, ShardView
from routing.table import ShardEndpoint

COSTS = CostsConfig(
    node_usd_per_hour=2.0, node_usd_per_hour_by_resource={"H100": 30.0, "experts": 4.0}
)


def node(node_id: str, **resources: float) -> NodeInfo:
    return NodeInfo(node_id, node_id, {"CPU": 8.0, **resources})


def view(shard_id: str, node_id: str, phase: Phase = Phase.READY) -> ShardView:
    return ShardView(shard_id, phase, report=ShardReport("life", phase, node_id=node_id))


def endpoint(shard_id: str) -> ShardEndpoint:
    return ShardEndpoint(shard_id, "10.0.0.1", 7, "life")


@pytest.mark.parametrize(
    ("resources", "price"),
    [
        ({"CPU": 8.0}, 2.0),
        ({"experts": 1.0}, 4.0),
        ({"experts": 0.0}, 2.0),
        ({"accelerator_type:H100": 1.0, "GPU": 8.0}, 30.0),
        ({"H100": 1.0, "experts": 1.0}, 30.0),  # the first entry that fits
        ({}, 2.0),
    ],
)
def test_a_node_costs_what_the_first_entry_that_fits_says(
    resources: dict[str, float], price: float
) -> None:
    assert node_usd_per_hour(resources, COSTS) == price


def test_a_shard_second_is_an_equal_part_of_its_node() -> None:
    assert shard_nano_usd_per_s(3.6, 1) == pytest.approx(1_000_000)
    assert shard_nano_usd_per_s(3.6, 4) == pytest.approx(250_000)


def test_a_node_with_several_shards_is_paid_once_and_the_rest_is_the_routers() -> None:
    nodes = [node("a", experts=1.0), node("b"), node("c", H100=1.0)]
    views = [view("shard-0", "a"), view("shard-1", "a"), ShardView("shard-2")]
    assert component_prices(views, nodes, COSTS) == {"shards": 4.0, "router": 32.0}


def test_a_node_that_is_gone_costs_nothing() -> None:
    assert component_prices([view("shard-0", "gone")], [node("b")], COSTS) == {
        "shards": 0.0,
        "router": 2.0,
    }


def test_shards_of_a_node_share_its_price_also_while_one_is_away() -> None:
    nodes = [node("a", experts=1.0), node("b")]
    views = [view("shard-0", "a"), view("shard-1", "a", Phase.LOST), view("shard-2", "b")]
    endpoints = {name: endpoint(name) for name in ("shard-0", "shard-2")}
    priced = with_prices(endpoints, views, nodes, COSTS)
    assert {name: e.usd_per_hour for name, e in priced.items()} == {"shard-0": 2.0, "shard-2": 2.0}
    assert (priced["shard-0"].host, priced["shard-0"].port) == ("10.0.0.1", 7)


def test_without_prices_everything_is_free() -> None:
    priced = with_prices(
        {"shard-0": endpoint("shard-0")}, [view("shard-0", "a")], [node("a")], CostsConfig()
    )
    assert priced == {"shard-0": endpoint("shard-0")}
