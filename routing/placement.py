"""Placement: which shard holds which experts. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from routing.exceptions import PlacementError
from routing.table import NOBODY, RoutingTable, ShardEndpoint

__all__ = ["build_table", "place_experts"]


def place_experts(num_experts: int, shard_ids: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Spread the experts over the shards, in order, as evenly as whole experts allow.

    Every shard gets one contiguous block of expert ids and holds it in every MoE layer. The
    first `num_experts % len(shard_ids)` shards hold one more than the rest.

    Raises:
        PlacementError: no shards, two shards of one name, or more shards than experts.
    """
    if not shard_ids:
        raise PlacementError("there are no shards to place experts on; ask for at least one")
    if len(set(shard_ids)) != len(shard_ids):
        raise PlacementError(f"two shards have the same id: {', '.join(shard_ids)}")
    if len(shard_ids) > num_experts:
        raise PlacementError(
            f"{len(shard_ids)} shards for {num_experts} experts: a shard would hold none; "
            f"ask for at most {num_experts} shards"
        )
    size, larger = divmod(num_experts, len(shard_ids))
    placed: dict[str, tuple[int, ...]] = {}
    start = 0
    for position, shard_id in enumerate(shard_ids):
        stop = start + size + (position < larger)
        placed[shard_id] = tuple(range(start, stop))
        start = stop
    return placed


def build_table(
    version: int,
    layers: Sequence[int],
    num_experts: int,
    endpoints: Mapping[str, ShardEndpoint],
    held: Mapping[str, Sequence[int]],
) -> RoutingTable:
    """The table for the shards that are ready.

    Args:
        version: the new table's version.
        layers: checkpoint layer ids of the MoE layers.
        num_experts: logical experts per layer.
        endpoints: the ready shards. Those absent here serve nobody, whatever `held` says.
        held: expert ids that each shard holds (in every layer).

    Raises:
        PlacementError: a shard is said to hold an expert that the model does not have.
    """
    ready = [shard_id for shard_id in held if shard_id in endpoints]
    holders: list[list[int]] = [[] for _ in range(num_experts)]
    for index, shard_id in enumerate(ready):
        for expert in held[shard_id]:
            if not 0 <= expert < num_experts:
                raise PlacementError(
                    f"shard {shard_id} holds expert {expert}, but the experts are "
                    f"0..{num_experts - 1}"
                )
            holders[expert].append(index)
    max_replicas = max([1, *map(len, holders)])
    row = np.full((num_experts, max_replicas), NOBODY, dtype=np.int16)
    for expert, indices in enumerate(holders):
        row[expert, : len(indices)] = indices
    return RoutingTable(
        version=version,
        layers=tuple(sorted(layers)),
        num_experts=num_experts,
        shards=tuple(endpoints[shard_id] for shard_id in ready),
        replicas=np.broadcast_to(row, (len(layers), num_experts, max_replicas)),
    )
