"""Where shards go: one placement group per shard, spread over nodes by us.

Ray's strategies spread the bundles *of one group*; ours have one bundle each, because a group
cannot grow and a shard must be able to come and go alone. So the node is chosen here and handed
to Ray as a soft target (a STRICT_PACK group takes one), or, where distinct nodes are a must, as a
label selector that rules the taken nodes out. Either way Ray moves the group by itself when its
node dies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group

from cluster.config import ShardsConfig
from cluster.exceptions import PlacementFailedError
from cluster.ray_adapter import NodeInfo

__all__ = [
    "Demand",
    "NodeChoice",
    "check_room",
    "choose_node",
    "create_group",
    "describe_resources",
    "explain_no_room",
    "forbidden_nodes",
    "shard_resources",
]

_NODE_ID_LABEL = "ray.io/node-id"
_GIB = 2**30

# A shard's process without any weights: interpreter, torch, vLLM's kernels, thread stacks.
BASE_MEMORY_BYTES = 768 * 2**20
# Weights are read and then packed for the kernel, one expert matrix at a time.
MEMORY_MARGIN = 1.15


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """Where a shard's group is to lie.

    Attributes:
        target: preferred node id; empty leaves it to Ray.
        forbidden: node ids that are out of the question.
    """

    target: str = ""
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Demand:
    """Equal things that need room.

    Attributes:
        what: for messages; one of them.
        wanted: what each needs.
        count: how many.
        strategy: as `shards.placement_strategy`.
    """

    what: str
    wanted: Mapping[str, float]
    count: int
    strategy: str = "SPREAD"


def shard_resources(config: ShardsConfig, expert_bytes: int) -> dict[str, float]:
    """What Ray reserves for one shard, in Ray's units.

    Args:
        config: the shards' settings.
        expert_bytes: bytes of the experts that the largest shard holds, as in the checkpoint.
    """
    memory = config.memory_bytes or int(expert_bytes * MEMORY_MARGIN) + BASE_MEMORY_BYTES
    wanted = {"CPU": config.num_cpus, "GPU": config.num_gpus, "memory": float(memory)}
    wanted |= config.resources
    return {name: amount for name, amount in wanted.items() if amount > 0}


def fits(wanted: Mapping[str, float], offered: Mapping[str, float]) -> bool:
    """Whether `offered` holds all of `wanted`; a hair's breadth of rounding is forgiven."""
    return all(offered.get(name, 0.0) + 1e-6 >= amount for name, amount in wanted.items())


def choose_node(
    strategy: str,
    wanted: Mapping[str, float],
    nodes: Sequence[NodeInfo],
    occupants: Mapping[str, int],
) -> NodeChoice | None:
    """The node for one more shard, or None when no node has room for it now.

    SPREAD takes the node with the fewest shards, STRICT_SPREAD only nodes without any, PACK the
    one with the most; equals in the order of `nodes`, so the choice is deterministic.

    Args:
        strategy: `shards.placement_strategy`.
        wanted: what the shard needs.
        nodes: the live nodes.
        occupants: node id -> number of shards that lie there already.
    """
    forbidden = forbidden_nodes(strategy, occupants)
    free = [n for n in nodes if n.node_id not in forbidden and fits(wanted, n.available)]
    if not free:
        return None
    sign = -1 if strategy == "PACK" else 1
    best = min(free, key=lambda node: sign * occupants.get(node.node_id, 0))
    return NodeChoice(target=best.node_id, forbidden=forbidden)


def forbidden_nodes(strategy: str, occupants: Mapping[str, int]) -> tuple[str, ...]:
    """Ids of the nodes on which one more shard must not lie, whatever room they have."""
    if strategy != "STRICT_SPREAD":
        return ()
    return tuple(sorted(node_id for node_id, count in occupants.items() if count))


def check_room(demands: Sequence[Demand], nodes: Sequence[NodeInfo]) -> None:
    """Whether all of it finds room on these nodes, before anything is started.

    Raises:
        PlacementFailedError: something does not; says what is wanted and what there is.
    """
    left = list(nodes)
    for demand in demands:
        occupants: dict[str, int] = {}
        for _ in range(demand.count):
            choice = choose_node(demand.strategy, demand.wanted, left, occupants)
            if choice is None:
                raise PlacementFailedError(
                    explain_no_room(demand.what, demand.strategy, demand.wanted, left, occupants)
                )
            occupants[choice.target] = occupants.get(choice.target, 0) + 1
            left = [
                _without(node, demand.wanted) if node.node_id == choice.target else node
                for node in left
            ]


def _without(node: NodeInfo, taken: Mapping[str, float]) -> NodeInfo:
    available = {name: amount - taken.get(name, 0.0) for name, amount in node.available.items()}
    return NodeInfo(node.node_id, node.ip, node.total, available)


def explain_no_room(
    who: str,
    strategy: str,
    wanted: Mapping[str, float],
    nodes: Sequence[NodeInfo],
    occupants: Mapping[str, int],
) -> str:
    """One line: what is wanted, and what every node has free."""
    distinct = " on a node without another shard" if strategy == "STRICT_SPREAD" else ""
    offers = [
        f"{node.ip} has {describe_resources(node.available, wanted)} free"
        + (", has a shard" if distinct and occupants.get(node.node_id) else "")
        for node in nodes
    ]
    return (
        f"no node has room for {who}: it wants {describe_resources(wanted)}{distinct}; "
        f"{'; '.join(offers) or 'there are no nodes'}; ask for less in the config, or add nodes"
    )


def describe_resources(
    resources: Mapping[str, float], names: Mapping[str, float] | None = None
) -> str:
    """For people: `0.25 CPU, 1.20 GiB memory`."""
    shown = []
    for name in sorted(names if names is not None else resources):
        amount = max(0.0, resources.get(name, 0.0))
        if name in ("memory", "object_store_memory"):
            shown.append(f"{amount / _GIB:.2f} GiB {name.replace('_', ' ')}")
        else:
            shown.append(f"{amount:g} {name}")
    return ", ".join(shown)


def create_group(name: str, wanted: Mapping[str, float], choice: NodeChoice) -> PlacementGroup:
    """Ask Ray for a shard's placement group; returns before it is placed.

    The group outlives its creator (a controller that is restarted finds it by name).
    """
    selector = {_NODE_ID_LABEL: f"!in({','.join(choice.forbidden)})"} if choice.forbidden else {}
    return placement_group(
        bundles=[dict(wanted)],
        strategy="STRICT_PACK",
        name=name,
        lifetime="detached",
        _soft_target_node_id=choice.target or None,
        bundle_label_selector=[selector] if selector else None,
    )
