"""Wanted against live: what a shard's signs of life mean, and what the cluster makes of it.

Pure functions over immutable views; the controller's tasks feed them what Ray, the shards and
the sockets say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.data_plane import DataPlaneStats
from routing.table import ShardEndpoint

__all__ = [
    "ClusterState",
    "Phase",
    "ShardReport",
    "ShardView",
    "Verdict",
    "after_closed_connection",
    "after_death",
    "after_report",
    "after_unplaced",
    "judge",
    "next_restart_delay_s",
    "serving",
]


class Phase(StrEnum):
    """Where a shard is in its life, as the controller sees it."""

    UNKNOWN = "unknown"  # the controller has not looked yet (it has just started)
    PLACING = "placing"  # waits for a node, or for its process
    LOADING = "loading"  # reads its experts
    READY = "ready"  # in the routing table
    LOST = "lost"  # was ready, does not answer; Ray starts it again
    FAILED = "failed"  # lives, but could not load or bind
    DRAINING = "draining"  # finishes what it has accepted
    DEAD = "dead"  # will not be started again


class ClusterState(StrEnum):
    """The word for all shards together."""

    STOPPED = "stopped"  # nothing was asked for
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a shard says about itself.

    Attributes:
        incarnation: new random id for every start of its process.
        phase: LOADING, READY, FAILED or DRAINING.
        progress: share of its experts' bytes that are loaded, 0..1.
        error: why it FAILED, one line.
        host, port: its data plane; port 0 until it listens.
        pid, node_id, node_ip: where it runs.
        kernel: name of the expert kernel; empty until it is built.
        load: counters of the data plane since the start; None until it listens.
    """

    incarnation: str
    phase: Phase
    progress: float = 0.0
    error: str = ""
    host: str = ""
    port: int = 0
    pid: int = 0
    node_id: str = ""
    node_ip: str = ""
    kernel: str = ""
    load: DataPlaneStats | None = None


@dataclass(frozen=True, slots=True)
class ShardView:
    """What the controller believes about one shard.

    Attributes:
        shard_id: its name.
        phase: where it is.
        reason: why it is not READY, one line; empty when nothing is wrong.
        report: its last words; kept when it is lost.
        num_restarts: how often Ray has started it again.
    """

    shard_id: str
    phase: Phase = Phase.UNKNOWN
    reason: str = ""
    report: ShardReport | None = None
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of the cluster, and one line about why it is not ready."""

    state: ClusterState
    reason: str = ""


def after_report(view: ShardView, report: ShardReport, *, connected: bool) -> ShardView:
    """The shard has answered.

    Args:
        view: what was believed.
        report: its answer.
        connected: whether the controller holds a connection to this incarnation's data plane.
            Only then is it READY: the table must not name a shard that cannot be reached.
    """
    phase, reason = report.phase, report.error
    if phase is Phase.READY and not connected:
        phase, reason = Phase.LOADING, "its data plane is not reachable yet"
    elif phase is Phase.LOADING:
        reason = f"{report.progress:.0%} of its experts loaded"
    return replace(view, phase=phase, reason=reason, report=report)


def after_closed_connection(view: ShardView) -> ShardView:
    """The connection to its data plane has ended: the first sign of a death."""
    if view.phase is not Phase.READY:
        return view
    return replace(view, phase=Phase.LOST, reason="its connection closed")


def after_death(view: ShardView, *, final: bool, reason: str) -> ShardView:
    """Ray says that its process is gone; `final` when it will not be started again."""
    return replace(view, phase=Phase.DEAD if final else Phase.LOST, reason=reason)


def after_unplaced(view: ShardView, reason: str) -> ShardView:
    """It has no process yet (or, after the loss of a node, none again)."""
    return replace(view, phase=Phase.PLACING, reason=reason)


def serving(views: Iterable[ShardView]) -> dict[str, ShardEndpoint] | None:
    """The endpoints that a table may name now, by shard id.

    None while some shard is UNKNOWN: a controller that has just come back must not publish a
    table without shards that work and that it has only not asked yet.
    """
    endpoints = {}
    for view in views:
        if view.phase is Phase.UNKNOWN:
            return None
        if view.phase is Phase.READY and view.report is not None:
            report = view.report
            endpoints[view.shard_id] = ShardEndpoint(
                view.shard_id, report.host, report.port, report.incarnation
            )
    return endpoints


def judge(views: Iterable[ShardView], *, established: bool) -> Verdict:
    """The state of all shards together.

    Args:
        views: one per wanted shard.
        established: whether all of them have been ready together before. Until then a shard that
            fails or is dead fails the start; afterwards the others go on and it is healed.
    """
    missing = [view for view in views if view.phase is not Phase.READY]
    if not missing:
        return Verdict(ClusterState.READY)
    reason = "; ".join(f"{view.shard_id} is {_phrase(view)}" for view in missing[:3])
    if len(missing) > 3:
        reason += f"; and {len(missing) - 3} more"
    if established:
        return Verdict(ClusterState.DEGRADED, reason)
    broken = [view for view in missing if view.phase in (Phase.FAILED, Phase.DEAD)]
    if broken:
        return Verdict(ClusterState.FAILED, f"{broken[0].shard_id}: {broken[0].reason}")
    return Verdict(ClusterState.STARTING, reason)


def _phrase(view: ShardView) -> str:
    return f"{view.phase.value} ({view.reason})" if view.reason else view.phase.value


def next_restart_delay_s(attempt: int) -> float:
    """How long to wait before a shard that failed to load is started again: 1, 2, 4 … 30 s."""
    return float(min(30, 2 ** min(attempt, 5)))
