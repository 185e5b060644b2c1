"""Names under which Moonshard's actors and placement groups are found in a Ray cluster."""

from __future__ import annotations

__all__ = [
    "CONTROLLER_NAME",
    "METRICS_NAME",
    "NAMESPACE",
    "SHARD_PREFIX",
    "actor_name",
    "shard_ids",
]

NAMESPACE = "moonshard"
"""Ray namespace of all of them."""

CONTROLLER_NAME = "moonshard-controller"
"""Name of the controller's actor."""

METRICS_NAME = "moonshard-metrics"
"""Name of the actor that adds up all metrics."""

SHARD_PREFIX = "moonshard-shard-"
"""Start of the names of shards' actors and placement groups."""


def shard_ids(count: int) -> list[str]:
    """`shard-0` … `shard-<count - 1>`."""
    return [f"shard-{index}" for index in range(count)]


def actor_name(shard_id: str) -> str:
    """Name of a shard's actor, and of its placement group."""
    return SHARD_PREFIX + shard_id.removeprefix("shard-")
