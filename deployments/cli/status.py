"""`moonshard status`: nodes, shards, experts, table, replicas; ready, or why not."""

from __future__ import annotations

import json
from typing import Any

from cluster import ray_node
from cluster.exceptions import MoonshardError
from deployments.cli.instances import find_instance

__all__ = ["describe", "read_status", "status_command"]

_GIB = 2**30
EXIT_NOT_READY = 1


def status_command(port: int | None, address: str | None, *, as_json: bool) -> int:
    """Print the status; 0 when ready, 1 when not.

    Raises:
        MoonshardError: there is nothing to ask.
    """
    ray_node.connect(address or find_instance(port).address)
    try:
        status = read_status()
    finally:
        ray_node.disconnect()
    print(json.dumps(status, indent=2) if as_json else describe(status))
    return 0 if status["ready"] else EXIT_NOT_READY


def read_status() -> dict[str, Any]:
    """The controller's status, with `replicas` (by deployment), `ready` and `why_not`.

    Raises:
        MoonshardError: no controller runs on the connected cluster.
    """
    from ray import serve

    from cluster.client import controller_status

    status = controller_status()
    if status is None:
        raise MoonshardError("no controller answers on this cluster; is `moonshard serve` running?")
    application = serve.status().applications.get(status["application"])
    state = application.status.value if application else "ABSENT"
    deployments = application.deployments if application else {}
    status["application_state"] = state
    status["replicas"] = {
        name: {str(getattr(k, "value", k)): n for k, n in deployment.replica_states.items()}
        for name, deployment in deployments.items()
    }
    status["why_not"] = _why_not(status, state)
    status["ready"] = not status["why_not"]
    return status


def _why_not(status: dict[str, Any], application_state: str) -> str:
    if status["state"] != "ready":
        return f"shards {status['state']}: {status['reason']}"
    if not status["table_is_whole"]:
        return "the routing table is not whole"
    if status["application"] and application_state != "RUNNING":
        return f"application {application_state}"
    return ""


def describe(status: dict[str, Any]) -> str:
    """The status for people."""
    ready = "ready" if status["ready"] else f"NOT READY ({status['why_not']})"
    whole = "whole" if status["table_is_whole"] else "NOT whole"
    lines = [
        f"{status['model'] or 'no model'}: {ready}",
        f"routing table: version {status['table_version']}, {whole}; "
        f"{status['num_experts']} experts in {len(status['moe_layers'])} MoE layers",
        "nodes:",
        *(_node(node, status["shards"]) for node in status["nodes"]),
        "shards:",
        *map(_shard, status["shards"]),
        f"replicas ({status['application'] or 'no application'}, {status['application_state']}):",
        *(f"  {name}: {_counts(states)}" for name, states in status["replicas"].items()),
    ]
    return "\n".join(lines)


def _node(node: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    here = [s["shard_id"] for s in shards if s["node_id"] == node["node_id"]]
    free, total = node["available"], node["total"]
    return (
        f"  {node['ip']}  {free.get('CPU', 0):g} of {total.get('CPU', 0):g} CPUs, "
        f"{free.get('memory', 0) / _GIB:.1f} of {total.get('memory', 0) / _GIB:.1f} GiB free; "
        f"{', '.join(here) or 'no shards'}"
    )


def _shard(shard: dict[str, Any]) -> str:
    experts, load = shard["experts"], shard["load"]
    place = f"{shard['host']}:{shard['port']}" if shard["port"] else "nowhere yet"
    text = f"  {shard['shard_id']}  {shard['state']}"
    text += f" ({shard['reason']})" if shard["reason"] else ""
    text += f"  {experts['count']} experts ({experts['ranges']})  {place}"
    if shard["pid"]:
        text += f"  pid {shard['pid']}, {shard['num_restarts']} restarts"
    if load:
        text += f"  {shard['kernel']}  {load['rows']} rows in {load['requests']} requests"
    return text


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.lower()}" for name, count in states.items()) or "none"
