"""What nodes cost, and what of it a shard's time costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.gateway_config import CostsConfig
from cluster.ray_adapter import NodeInfo
from cluster.reconcile import ShardView
from routing.table import ShardEndpoint

__all__ = ["component_prices", "node_usd_per_hour", "shard_nano_usd_per_s", "with_prices"]

_ACCELERATOR = "accelerator_type:"
_NANO = 1e9
_HOUR_S = 3600.0


def node_usd_per_hour(resources: Mapping[str, float], costs: CostsConfig) -> float:
    """Price of a node.

    Args:
        resources: what Ray says the node has. A GPU's name counts with and without Ray's
            `accelerator_type:` before it.
        costs: the first of its entries by resource that fits counts, else its price for all.
    """
    for name, usd_per_hour in costs.node_usd_per_hour_by_resource.items():
        if resources.get(name, 0) > 0 or resources.get(_ACCELERATOR + name, 0) > 0:
            return usd_per_hour
    return costs.node_usd_per_hour


def shard_nano_usd_per_s(node_usd_per_hour: float, num_shards: int) -> float:
    """Price of a second of a shard's time, in nano-USD: an equal part of its node's.

    Args:
        node_usd_per_hour: of its node.
        num_shards: on that node.
    """
    return node_usd_per_hour * _NANO / _HOUR_S / num_shards


def component_prices(
    views: Iterable[ShardView], nodes: Sequence[NodeInfo], costs: CostsConfig
) -> dict[str, float]:
    """USD per hour of the nodes that host shards (`shards`), and of all others (`router`).

    A node that hosts both is one with shards.
    """
    hosts = {view.report.node_id for view in views if view.report is not None}
    prices = {"router": 0.0, "shards": 0.0}
    for node in nodes:
        component = "shards" if node.node_id in hosts else "router"
        prices[component] += node_usd_per_hour(node.total, costs)
    return prices


def with_prices(
    endpoints: Mapping[str, ShardEndpoint],
    views: Iterable[ShardView],
    nodes: Sequence[NodeInfo],
    costs: CostsConfig,
) -> dict[str, ShardEndpoint]:
    """The endpoints with what an hour of each shard's time costs.

    Shards that are away for the moment go on bearing their part of the node, so that a crash
    does not change the price of the others.
    """
    node_of = {view.shard_id: view.report.node_id for view in views if view.report is not None}
    num_shards = Counter(node_of.values())
    resources = {node.node_id: node.total for node in nodes}
    priced = {}
    for shard_id, endpoint in endpoints.items():
        node_id = node_of[shard_id]
        usd_per_hour = node_usd_per_hour(resources.get(node_id, {}), costs)
        priced[shard_id] = replace(endpoint, usd_per_hour=usd_per_hour / num_shards[node_id])
    return priced
