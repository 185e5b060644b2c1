"""The one module that touches what Ray keeps private, or hands out loosely typed.

All functions are synchronous calls to Ray's control store (about a millisecond each) and need a
connected process; the controller runs them on threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import state as ray_state
from ray._raylet import PlacementGroupID
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, placement_group_table

__all__ = [
    "ActorInfo",
    "GroupInfo",
    "NodeInfo",
    "actor_info",
    "dead_daemons",
    "kv_delete",
    "kv_get",
    "kv_put",
    "list_groups",
    "list_nodes",
    "log_folder",
    "serve_http_host",
    "serve_is_running",
]

_KV_NAMESPACE = b"moonshard"
_SERVE_CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
_SERVE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A live Ray node. Resources in Ray's units (`memory` in bytes)."""

    node_id: str
    ip: str
    total: Mapping[str, float] = field(default_factory=dict)
    available: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ActorInfo:
    """What Ray's control store says about an actor.

    Attributes:
        state: DEPENDENCIES_UNREADY, PENDING_CREATION, ALIVE, RESTARTING or DEAD.
        num_restarts: lives after the first.
        death_cause: one line; empty while it lives.
    """

    state: str
    num_restarts: int
    death_cause: str


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """A placement group that has not been removed.

    Attributes:
        state: PENDING, PREPARED, CREATED or RESCHEDULING.
        node_id: where its (first) bundle lies; empty unless it is CREATED.
    """

    name: str
    state: str
    node_id: str
    group: PlacementGroup


def list_nodes() -> list[NodeInfo]:
    """The live nodes, by address."""
    available = ray_state.available_resources_per_node()
    nodes = [
        NodeInfo(
            node_id=node["NodeID"],
            ip=node["NodeManagerAddress"],
            total=dict(node["Resources"]),
            available=dict(available.get(node["NodeID"], {})),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.ip, node.node_id))


def actor_info(actor_id: str) -> ActorInfo | None:
    """What Ray knows about the actor with this id (hex); None when it knows nothing."""
    info: dict[str, Any] = ray_state.actors(actor_id)
    if not info:
        return None
    cause = info.get("DeathCause")
    return ActorInfo(
        state=str(info["State"]),
        num_restarts=int(info.get("NumRestarts") or 0),
        death_cause=_death_cause(cause) if info["State"] == "DEAD" else "",
    )


def _death_cause(cause: Any) -> str:
    # A protobuf oneof whose members all carry their text as `error_message` or nothing.
    kind = cause.WhichOneof("context") if cause is not None else None
    message = getattr(getattr(cause, kind), "error_message", "") if kind else ""
    return " ".join(str(message).split()) or "unknown cause"


def list_groups() -> dict[str, GroupInfo]:
    """Every named placement group of the cluster that was not removed, by name."""
    groups = {}
    for group_id, info in placement_group_table().items():
        if info["name"] and info["state"] != "REMOVED":
            nodes = info.get("bundles_to_node_id") or {}
            groups[info["name"]] = GroupInfo(
                name=info["name"],
                state=info["state"],
                node_id=next(iter(nodes.values()), "") if info["state"] == "CREATED" else "",
                group=PlacementGroup(PlacementGroupID(bytes.fromhex(group_id))),
            )
    return groups


def log_folder() -> str:
    """Folder with the logs of this node's Ray processes."""
    return str(ray._private.worker._global_node.get_logs_dir_path())


def daemon_pids() -> set[int]:
    """Processes that Ray has started from this one, and waits for."""
    node = ray._private.worker._global_node
    processes = node.all_processes.values() if node is not None else ()
    return {info.process.pid for infos in processes for info in infos}


def dead_daemons() -> list[str]:
    """Which of the daemons that this process started, and without which there is no node, died."""
    node = ray._private.worker._global_node
    dead = {kind for kind, _ in node.dead_processes()} if node is not None else set()
    return sorted(dead & {"raylet", "gcs_server"})


def kv_get(key: str) -> bytes | None:
    """A value of Moonshard's in the control store."""
    value: bytes | None = internal_kv._internal_kv_get(key, namespace=_KV_NAMESPACE)
    return value


def kv_put(key: str, value: bytes) -> None:
    """Keep a value in the control store; it lives as long as the cluster."""
    internal_kv._internal_kv_put(key, value, overwrite=True, namespace=_KV_NAMESPACE)


def kv_delete(key: str) -> None:
    """Forget a value; no error when there is none."""
    internal_kv._internal_kv_del(key, namespace=_KV_NAMESPACE)


def serve_is_running() -> bool:
    """Whether the cluster has a Ray Serve instance (also one that just restarts)."""
    name, namespace = _SERVE_CONTROLLER
    try:
        ray.get_actor(name, namespace=namespace)
    except ValueError:
        return False
    return True


def serve_http_host() -> str | None:
    """Address on which Ray Serve's proxies listen; None when that cannot be known."""
    name, namespace = _SERVE_CONTROLLER
    try:
        controller = ray.get_actor(name, namespace=namespace)
        options = ray.get(controller.get_http_config.remote(), timeout=_SERVE_TIMEOUT_S)
    except (ValueError, RayError):
        return None
    host: str | None = options.host
    return host
