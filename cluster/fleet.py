"""All shards of one config: planned, started, and taken down together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from cluster.checkpoint import ExpertCheckpoint
from cluster.config import MoonshardConfig
from cluster.keeper import ShardKeeper, ShardPlan
from cluster.names import NAMESPACE, SHARD_PREFIX, shard_ids
from cluster.placement_groups import shard_resources
from cluster.ray_adapter import list_groups
from cluster.reconcile import ShardView
from cluster.shard import ShardSpec
from routing.placement import place_experts

__all__ = ["Fleet", "FleetPlan", "plan_fleet", "remove_leftovers"]

logger = logging.getLogger(__name__)

_REMOVAL_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What is wanted: the experts of which model on how many shards, and what each takes.

    Attributes:
        layers: checkpoint layer ids of the MoE layers.
        num_experts: logical experts per layer.
        held: expert ids of each shard, the same in every layer.
        resources: what Ray reserves for one shard.
        fingerprint: of the checkpoint.
    """

    config: MoonshardConfig
    layers: tuple[int, ...]
    num_experts: int
    held: dict[str, tuple[int, ...]]
    resources: dict[str, float]
    fingerprint: str


def plan_fleet(config: MoonshardConfig) -> FleetPlan:
    """Read the checkpoint's index and lay out the shards; starts nothing.

    Raises:
        CheckpointError: there is no such checkpoint, or it lacks experts.
        PlacementError: more shards than experts.
    """
    checkpoint = ExpertCheckpoint.open(config.model.checkpoint)
    held = place_experts(checkpoint.num_experts, shard_ids(config.shards.count))
    largest_bytes = max(map(len, held.values())) * checkpoint.bytes_per_expert
    return FleetPlan(
        config=config,
        layers=checkpoint.layers,
        num_experts=checkpoint.num_experts,
        held=held,
        resources=shard_resources(config.shards, largest_bytes),
        fingerprint=checkpoint.fingerprint(),
    )


class Fleet:
    """The keepers of all shards.

    Args:
        plan: what is wanted.
        token: the data plane's secret.
        on_change: called with every new view of a shard, on the event loop.
    """

    def __init__(
        self, plan: FleetPlan, token: bytes, on_change: Callable[[ShardView], None]
    ) -> None:
        self.plan = plan
        placing = asyncio.Lock()
        self._keepers = [
            ShardKeeper(_shard_plan(plan, shard_id, token), placing, on_change)
            for shard_id in plan.held
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to look after the shards; those that run already are taken over."""
        self._tasks = [
            asyncio.create_task(keeper.run(), name=keeper.view.shard_id) for keeper in self._keepers
        ]

    @property
    def views(self) -> list[ShardView]:
        """What is believed about each shard, in the order of the plan."""
        return [keeper.view for keeper in self._keepers]

    async def stop(self, drain_s: float) -> None:
        """Drain all shards at once, then end them and give their nodes back.

        Args:
            drain_s: how long they may finish what they have accepted; 0 ends them as they are.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if drain_s > 0:
            await asyncio.gather(*(keeper.drain(drain_s) for keeper in self._keepers))
        await asyncio.to_thread(remove_leftovers)


def _shard_plan(plan: FleetPlan, shard_id: str, token: bytes) -> ShardPlan:
    shards = plan.config.shards
    spec = ShardSpec(
        shard_id=shard_id,
        checkpoint=str(plan.config.model.checkpoint),
        experts=plan.held[shard_id],
        token=token,
        fingerprint=plan.fingerprint,
        bind_host=shards.bind_host,
        num_threads=shards.num_threads,
        kernel=shards.kernel,
        push_interval_s=plan.config.metrics.push_interval_s,
    )
    return ShardPlan(spec=spec, resources=plan.resources, config=shards)


def remove_leftovers() -> None:
    """End every shard and remove every group of ours in the cluster; returns when they are gone.

    By name, so that also those of a config before (another number of shards) go.
    """
    for group in list_groups().values():
        if group.name.startswith(SHARD_PREFIX):
            _kill(group.name)
            remove_placement_group(group.group)
    deadline = time.monotonic() + _REMOVAL_TIMEOUT_S
    while left := [name for name in list_groups() if name.startswith(SHARD_PREFIX)]:
        if time.monotonic() > deadline:
            logger.warning("still there after %g s: %s", _REMOVAL_TIMEOUT_S, ", ".join(left))
            return
        time.sleep(0.05)


def _kill(name: str) -> None:
    try:
        handle: Any = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return  # it has died already
    ray.kill(handle, no_restart=True)
