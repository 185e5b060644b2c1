"""Capacity & autoscaling: is there enough of everything, does scaling follow, what does it cost."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query, Row, Variable
from monitoring.dashboards.promql import quantile, rate, ratio

__all__ = ["BOARD"]

_APP = 'application=~"$application"'


def _by_deployment(function: str, metric: str) -> str:
    return f"{function} by (deployment) ({metric}{{{_APP}}})"


_TARGET = _by_deployment("max", "ray_serve_autoscaling_target_ongoing_requests")

_ROUTERS = Row(
    "Router replicas",
    (
        Panel(
            "Replicas",
            "Healthy replicas of every deployment, and how many its autoscaler aims at.",
            "timeseries",
            "short",
            (
                Query(
                    _by_deployment("sum", "ray_serve_deployment_replica_healthy"),
                    "healthy {{deployment}}",
                ),
                Query(
                    _by_deployment("max", "ray_serve_autoscaling_target_replicas"),
                    "target {{deployment}}",
                ),
            ),
        ),
        Panel(
            "Autoscaler's wish",
            "Replicas that the policy wants before the configured bounds, and those it gets.",
            "timeseries",
            "short",
            (
                Query(
                    _by_deployment("max", "ray_serve_autoscaling_desired_replicas"),
                    "wanted {{deployment}}",
                ),
                Query(
                    _by_deployment("max", "ray_serve_autoscaling_target_replicas"),
                    "bounded {{deployment}}",
                ),
            ),
        ),
        Panel(
            "Load against capacity",
            "Requests that the autoscaler sees (those queued at the gateway included), against the "
            "number that the present replicas are meant to carry.",
            "timeseries",
            "short",
            (
                Query(
                    _by_deployment("max", "ray_serve_autoscaling_total_requests"),
                    "requests {{deployment}}",
                ),
                Query(
                    f"{_TARGET} * on (deployment) "
                    f"{_by_deployment('sum', 'ray_serve_deployment_replica_healthy')}",
                    "capacity {{deployment}}",
                ),
            ),
        ),
        Panel(
            "Gateway",
            "Requests running at a router replica, and queued at the gateway.",
            "timeseries",
            "short",
            (
                Query("sum(moonshard_gateway_running_requests)", "running"),
                Query("sum(moonshard_gateway_queued_requests)", "queued"),
            ),
            is_stacked=True,
        ),
        Panel(
            "Requests by replica",
            "Calls in progress at every replica; shows whether the load is even over them.",
            "timeseries",
            "short",
            (
                Query(
                    "sum by (deployment, replica) "
                    f"(ray_serve_replica_processing_queries{{{_APP}}})",
                    "{{deployment}} {{replica}}",
                ),
            ),
        ),
        Panel(
            "Replica start-up time",
            "From Serve's decision to a replica that is ready, p95: how far ahead to see.",
            "timeseries",
            "ms",
            (
                Query(
                    quantile(0.95, "ray_serve_replica_startup_latency_ms", "deployment", _APP),
                    "p95 {{deployment}}",
                    "failure",
                ),
            ),
        ),
    ),
)

_SHARDS = Row(
    "Expert shards",
    (
        Panel(
            "Shards by state",
            "Wanted by the configuration, live in the routing table, and up.",
            "timeseries",
            "short",
            (
                Query("max(moonshard_shards_wanted)", "wanted"),
                Query("max(moonshard_shards_live)", "live"),
                Query("sum(max by (shard) (moonshard_shard_up))", "up"),
            ),
            width=8,
        ),
        Panel(
            "Busy share",
            "Mean and highest over the shards. A highest near 100 % with a low mean is imbalance; "
            "both high is too few shards.",
            "timeseries",
            "percentunit",
            (
                Query(f"avg({rate('moonshard_shard_busy_seconds_total', 'shard')})", "mean"),
                Query(f"max({rate('moonshard_shard_busy_seconds_total', 'shard')})", "highest"),
            ),
            width=8,
        ),
        Panel(
            "Queue",
            "Layer requests that wait for a shard's compute thread, the longest queue.",
            "timeseries",
            "short",
            (Query("max(moonshard_shard_queued_requests)", "longest"),),
            width=8,
        ),
    ),
)

_NODES = Row(
    "Nodes",
    (
        Panel(
            "CPU",
            "Share of a node's CPUs in use.",
            "timeseries",
            "percentunit",
            (Query("max by (ip) (ray_node_cpu_utilization) / 100", "{{ip}}"),),
            max=1,
        ),
        Panel(
            "Memory",
            "Used memory of a node. Shards hold their weights there.",
            "timeseries",
            "bytes",
            (
                Query("max by (ip) (ray_node_mem_used)", "used {{ip}}"),
                Query("max by (ip) (ray_node_mem_total)", "total {{ip}}"),
            ),
        ),
        Panel(
            "GPU",
            "Use of a GPU's compute units.",
            "timeseries",
            "percentunit",
            (
                Query(
                    "max by (ip, GpuIndex) (ray_node_gpus_utilization) / 100",
                    "{{ip}} GPU {{GpuIndex}}",
                    "gpu",
                ),
            ),
        ),
        Panel(
            "GPU memory",
            "Share of a GPU's memory in use.",
            "timeseries",
            "percentunit",
            (
                Query(
                    ratio(
                        "max by (ip, GpuIndex) (ray_node_gram_used)",
                        "(max by (ip, GpuIndex) (ray_node_gram_used)"
                        " + max by (ip, GpuIndex) (ray_node_gram_available))",
                        "ip, GpuIndex",
                    ),
                    "{{ip}} GPU {{GpuIndex}}",
                    "gpu",
                ),
            ),
        ),
        Panel(
            "Network",
            "Bytes per second of a node, the data plane included.",
            "timeseries",
            "Bps",
            (
                Query("max by (ip) (ray_node_network_send_speed)", "sent {{ip}}"),
                Query("max by (ip) (ray_node_network_receive_speed)", "received {{ip}}"),
            ),
        ),
        Panel(
            "Cost of nodes per hour",
            "What the nodes cost that routers and shards stand on, by the configured prices.",
            "timeseries",
            "currencyUSD",
            (
                Query(
                    "max by (component) (moonshard_node_cost_usd_per_hour)",
                    "{{component}}",
                    "prices",
                ),
            ),
            is_stacked=True,
        ),
    ),
)

_METRICS = Row(
    "Metrics themselves",
    (
        Panel(
            "Sources by role",
            "Processes that hand their counts to the aggregator.",
            "timeseries",
            "short",
            (Query("max by (role) (moonshard_metrics_sources)", "{{role}}"),),
            width=24,
        ),
    ),
)

BOARD = Board(
    uid="moonshard-capacity",
    title="Moonshard / Capacity & autoscaling",
    description="Is there enough of everything, does scaling follow the load, what does it cost.",
    variables=(Variable("application", "ray_serve_deployment_replica_healthy"),),
    rows=(_ROUTERS, _SHARDS, _NODES, _METRICS),
)
