"""What `moonshard status` shows of the shards: JSON-able, one line per shard and node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.data_plane import DataPlaneStats
from cluster.fleet import FleetPlan
from cluster.ray_adapter import NodeInfo
from cluster.reconcile import ShardView, Verdict
from routing.table import RoutingTable

__all__ = ["build_status", "ranges"]

_LOAD_FIELDS = (
    "requests",
    "errors",
    "rows",
    "bytes_received",
    "bytes_sent",
    "busy_ns",
    "queued",
    "connections",
    "refused",
)


def build_status(
    verdict: Verdict,
    plan: FleetPlan | None,
    views: Iterable[ShardView],
    table: RoutingTable | None,
    nodes: Sequence[NodeInfo],
    application: str,
) -> dict[str, Any]:
    """The whole status.

    `state` is stopped, starting, ready, degraded or failed, `reason` one line unless ready;
    `table_version` 0 before the first table.
    """
    return {
        "state": verdict.state.value,
        "reason": verdict.reason,
        "application": application,
        "model": plan.config.model.id if plan else "",
        "num_experts": plan.num_experts if plan else 0,
        "moe_layers": list(plan.layers) if plan else [],
        "table_version": table.version if table else 0,
        "table_is_whole": bool(table and table.is_whole),
        "shards": [_shard(view, plan) for view in views] if plan else [],
        "nodes": [
            {
                "node_id": node.node_id,
                "ip": node.ip,
                "total": _numbers(node.total),
                "available": _numbers(node.available),
            }
            for node in nodes
        ],
    }


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _shard(view: ShardView, plan: FleetPlan) -> dict[str, Any]:
    report = view.report
    held = plan.held[view.shard_id]
    return {
        "shard_id": view.shard_id,
        "state": view.phase.value,
        "reason": view.reason,
        "num_restarts": view.num_restarts,
        "experts": {"count": len(held), "ranges": ranges(held)},
        "node_id": report.node_id if report else "",
        "node_ip": report.node_ip if report else "",
        "host": report.host if report else "",
        "port": report.port if report else 0,
        "pid": report.pid if report else 0,
        "incarnation": report.incarnation if report else "",
        "progress": report.progress if report else 0.0,
        "kernel": report.kernel if report else "",
        "load": _load(report.load) if report and report.load else {},
    }


def _load(stats: DataPlaneStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in _LOAD_FIELDS}


def _numbers(resources: Any) -> dict[str, float]:
    # Ray adds resources of its own per node address and placement group: noise to a reader.
    return {k: v for k, v in resources.items() if ":" not in k and "_group_" not in k}
