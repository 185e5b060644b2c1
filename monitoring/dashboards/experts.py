"""Experts: is the load even over experts and shards, which are hot, and what does a hop cost."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query, Row
from monitoring.dashboards.promql import rate, ratio

__all__ = ["BOARD"]

_BALANCE_STEPS = ((None, "red"), (0.4, "orange"), (0.7, "green"))
_OK_OR_NOT = ((None, "green"), (1, "red"))
_EXPERTS_PER_TOKEN = ratio(
    rate("moonshard_shard_expert_rows_total"), rate("moonshard_dispatch_rows_total")
)


def _per_shard(
    title: str, description: str, unit: str, expr: str, legend: str = "{{shard}}"
) -> Panel:
    return Panel(title, description, "timeseries", unit, (Query(expr, legend),), width=8)


_NOW = Row(
    "Now",
    (
        Panel(
            "Balancedness over shards",
            "Mean over layers of mean load / highest load of a shard, in the last minute: 1 is "
            "even; at 0.5 the busiest shard has twice the mean, and every step waits for it.",
            "stat",
            "percentunit",
            (Query('max(moonshard_balancedness{over="shards"})'),),
            width=4,
            height=4,
            steps=_BALANCE_STEPS,
            max=1,
        ),
        Panel(
            "Balancedness over experts",
            "The same over single experts. Low values are usual; what counts is how the shards "
            "come out.",
            "stat",
            "percentunit",
            (Query('max(moonshard_balancedness{over="experts"})'),),
            width=4,
            height=4,
            max=1,
        ),
        Panel(
            "Shards live",
            "Shards in the routing table, of those that the configuration wants.",
            "stat",
            "short",
            (
                Query("max(moonshard_shards_live)", "live"),
                Query("max(moonshard_shards_wanted)", "wanted"),
            ),
            width=4,
            height=4,
        ),
        Panel(
            "Table version",
            "Version of the routing table that the controller published last.",
            "stat",
            "none",
            (Query("max(moonshard_table_version)"),),
            width=4,
            height=4,
        ),
        Panel(
            "Hottest expert",
            "Load of the hottest (layer, expert) as a multiple of its fair share, in the last "
            "minute.",
            "stat",
            "short",
            (Query("max(moonshard_hottest_expert_share)"),),
            width=4,
            height=4,
        ),
        Panel(
            "Answers withdrawn",
            "Times in the range that experts stayed unreachable past the recovery timeout, so that "
            "running requests were ended with an error rather than with wrong tokens.",
            "stat",
            "short",
            (Query("sum(increase(moonshard_experts_unavailable_total[$__range]))"),),
            width=4,
            height=4,
            steps=_OK_OR_NOT,
        ),
    ),
)

_BALANCE = Row(
    "Balance",
    (
        Panel(
            "Balancedness",
            "Mean over layers of mean/max load, over shards and over experts: 1 is even. The "
            "lowest that there can be: all on one shard, and the same experts for every token.",
            "timeseries",
            "percentunit",
            (
                Query("max by (over) (moonshard_balancedness)", "over {{over}}"),
                Query("1 / (max(moonshard_shards_live) > 0)", "lowest over shards"),
                Query(
                    f"{_EXPERTS_PER_TOKEN} / max(moonshard_experts_per_layer)",
                    "lowest over experts",
                ),
            ),
            max=1,
        ),
        Panel(
            "Least even layers",
            "The five layers whose load is least even over the shards.",
            "timeseries",
            "percentunit",
            (
                Query(
                    'bottomk(5, max by (layer) (moonshard_layer_balancedness{over="shards"}))',
                    "layer {{layer}}",
                ),
            ),
            max=1,
        ),
        Panel(
            "Layers",
            "Balancedness of every MoE layer in the last minute.",
            "table",
            "percentunit",
            (
                Query(
                    'max by (layer) (moonshard_layer_balancedness{over="experts"})',
                    "over experts",
                ),
                Query(
                    'max by (layer) (moonshard_layer_balancedness{over="shards"})', "over shards"
                ),
            ),
            height=10,
            steps=_BALANCE_STEPS,
        ),
        Panel(
            "Hottest experts",
            "Load as a multiple of a fair share of the layer's rows, in the last minute. The whole "
            "[layer, expert] matrix: GET /v1/experts.",
            "table",
            "short",
            (
                Query(
                    "topk(20, max by (layer, expert) (moonshard_hottest_expert_share))",
                    "times fair share",
                ),
            ),
            height=10,
            sort_by="times fair share",
        ),
    ),
)

_SHARDS = Row(
    "Shards",
    (
        _per_shard(
            "Token rows",
            "Rows that arrive per second: one for every token, layer and shard that holds one of "
            "its experts.",
            "short",
            rate("moonshard_shard_tokens_total", "shard"),
        ),
        _per_shard(
            "Expert rows",
            "(row, expert) pairs computed per second.",
            "short",
            rate("moonshard_shard_expert_rows_total", "shard"),
        ),
        _per_shard(
            "Requests",
            "Layer requests answered per second.",
            "reqps",
            rate("moonshard_shard_requests_total", "shard"),
        ),
        _per_shard(
            "Busy share",
            "Share of the time that the shard computes. Near 100 % it is what everyone waits for.",
            "percentunit",
            rate("moonshard_shard_busy_seconds_total", "shard"),
        ),
        _per_shard(
            "Queue",
            "Layer requests that wait for the shard's compute thread.",
            "short",
            "max by (shard) (moonshard_shard_queued_requests)",
        ),
        _per_shard(
            "Bytes",
            "Data plane traffic as the shard counts it.",
            "Bps",
            rate("moonshard_shard_bytes_total", "shard, direction"),
            "{{shard}} {{direction}}",
        ),
        _per_shard(
            "Connections",
            "Dispatchers connected to the shard.",
            "short",
            "max by (shard) (moonshard_shard_connections)",
        ),
        Panel(
            "Errors",
            "Layer requests per second that a shard refused or failed on.",
            "timeseries",
            "cps",
            (Query(rate("moonshard_shard_errors_total", "shard"), "{{shard}}", "failure"),),
            width=8,
        ),
        Panel(
            "Restarts",
            "Restarts of a shard in the range.",
            "timeseries",
            "short",
            (
                Query(
                    "sum by (shard) (increase(moonshard_shard_restarts_total[$__range]))",
                    "{{shard}}",
                    "failure",
                ),
            ),
            width=8,
        ),
        Panel(
            "Shards wanted and live",
            "Live shards stand in the routing table.",
            "timeseries",
            "short",
            (
                Query("max(moonshard_shards_wanted)", "wanted"),
                Query("max(moonshard_shards_live)", "live"),
            ),
        ),
        _per_shard(
            "Up",
            "1 while the shard serves, 0 while it is dead or loads.",
            "short",
            "max by (shard) (moonshard_shard_up)",
        ),
    ),
)

_LAYERS = rate("moonshard_dispatch_layers_total")

_DISPATCH = Row(
    "Dispatch (router replicas to shards)",
    (
        Panel(
            "Time of one layer's dispatch",
            "By stage, mean: sending to every shard, waiting for the last answer, summing the "
            "parts.",
            "timeseries",
            "s",
            (
                Query(
                    f"{rate('moonshard_dispatch_seconds_total', 'stage')} / on () group_left () "
                    f"({_LAYERS} > 0)",
                    "{{stage}}",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            "Rows of one layer's dispatch",
            "Mean number of rows: about the tokens of a step.",
            "timeseries",
            "short",
            (Query(ratio(rate("moonshard_dispatch_rows_total"), _LAYERS), "rows"),),
        ),
        Panel(
            "Bytes",
            "Data plane traffic as the router replicas count it.",
            "timeseries",
            "Bps",
            (Query(rate("moonshard_dispatch_bytes_total", "direction"), "{{direction}}"),),
        ),
        Panel(
            "Shard time by what asked for it",
            "Seconds per second: prompts, generation, and what no request is charged for "
            "(warm-up, padding).",
            "timeseries",
            "percentunit",
            (Query(rate("moonshard_expert_seconds_total", "phase"), "{{phase}}"),),
            is_stacked=True,
        ),
        Panel(
            "Retries and reconnects",
            "Layer requests sent again, and connections built anew, per second.",
            "timeseries",
            "cps",
            (
                Query(rate("moonshard_dispatch_retries_total"), "retries"),
                Query(rate("moonshard_dispatch_reconnects_total"), "reconnects"),
            ),
        ),
        Panel(
            "Table behind",
            "Versions by which a router replica's table is behind the controller's.",
            "timeseries",
            "short",
            (
                Query(
                    "max(moonshard_table_version) - on () group_right () "
                    "max by (replica) (moonshard_router_table_version)",
                    "{{replica}}",
                ),
            ),
        ),
        Panel(
            "Layers dispatched in Python",
            "Share of layer dispatches that did not go through the native hop.",
            "timeseries",
            "percentunit",
            (Query(ratio(rate("moonshard_dispatch_python_layers_total"), _LAYERS), "Python"),),
            max=1,
        ),
        Panel(
            "Fallbacks",
            "1 where the plain torch kernel computes or no native hop is there: right, but slow.",
            "timeseries",
            "short",
            (
                Query(
                    "max by (shard, kernel) (moonshard_shard_kernel_fallback)",
                    "kernel {{kernel}}, {{shard}}",
                ),
                Query("max(moonshard_router_hop_fallback)", "hop"),
            ),
            steps=_OK_OR_NOT,
        ),
    ),
)

BOARD = Board(
    uid="moonshard-experts",
    title="Moonshard / Experts",
    description="Is the load even over experts and shards, which are hot, what does a hop cost.",
    variables=(),
    rows=(_NOW, _BALANCE, _SHARDS, _DISPATCH),
)
