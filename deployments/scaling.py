"""How many router replicas there should be: what runs counts, and what waits at the gateway.

The gateway holds requests back while the routers are full, so that teams share them fairly. Ray
Serve sees only those that were let through: by its own count the routers are never more than full.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

__all__ = ["POLICY", "WAITING", "desired_replicas"]

POLICY = "deployments.scaling:desired_replicas"
"""For `autoscaling_config.policy.policy_function`."""

WAITING = "gateway_waiting"
"""What a router replica reports by `record_autoscaling_stats`: requests at all gateways."""


def desired_replicas(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ray Serve's own rule (ongoing requests over their target), with those that wait.

    Serve applies delays and bounds to it.
    """
    if ctx.current_num_replicas == 0:
        return ctx.target_num_replicas, {}
    # Each replica reports all that wait, and the newest know best: they all ask the same source.
    reports = (ctx.aggregated_metrics or {}).get(WAITING, {})
    waiting = max(reports.values(), default=0.0)
    ongoing: float = ctx.total_num_requests + waiting
    return ongoing / ctx.config.get_target_ongoing_requests(), {}
