"""Overview & latency: is it up, how fast is it, and if not, where is it slow."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query, Row, Variable
from monitoring.dashboards.promql import quantile, rate, ratio

__all__ = ["BOARD"]

_WHO = 'model=~"$model", team=~"$team"'
_MODEL = 'model=~"$model"'
_VLLM = 'model_name=~"$model"'
_APP = 'application=~"$application"'
_JUDGED = f'{_WHO}, outcome=~"ok|server_error|timeout"'
_FAILED = f'{_WHO}, outcome=~"server_error|timeout"'
_REQUESTS = "moonshard_requests_total"


def _latency(title: str, description: str, metric: str, quantiles: tuple[float, ...]) -> Panel:
    return Panel(
        title,
        description,
        "timeseries",
        "s",
        tuple(
            Query(quantile(q, metric, "model", _MODEL), f"p{q * 100:.0f} {{{{model}}}}")
            for q in quantiles
        ),
    )


_NOW = Row(
    "Now",
    (
        Panel(
            "Requests",
            "Requests that ended, whatever their outcome.",
            "stat",
            "reqps",
            (Query(rate(_REQUESTS, where=_WHO)),),
            width=4,
            height=4,
        ),
        Panel(
            "Error ratio",
            "Server errors and timeouts, as a share of all requests but those that the caller got "
            "wrong, gave up or was refused.",
            "stat",
            "percentunit",
            (Query(ratio(rate(_REQUESTS, where=_FAILED), rate(_REQUESTS, where=_JUDGED))),),
            width=4,
            height=4,
            steps=((None, "green"), (0.005, "orange"), (0.05, "red")),
        ),
        Panel(
            "TTFT p95",
            "95 % of requests saw their first token within this time.",
            "stat",
            "s",
            (Query(quantile(0.95, "moonshard_time_to_first_token_seconds", where=_MODEL)),),
            width=4,
            height=4,
            steps=((None, "green"), (2.5, "orange"), (10, "red")),
        ),
        Panel(
            "Generated tokens",
            "Tokens of answers per second, thoughts included.",
            "stat",
            "short",
            (Query(rate("moonshard_tokens_total", where=f'{_WHO}, kind="completion"')),),
            width=4,
            height=4,
        ),
        Panel(
            "Running",
            "Requests that a router replica is working on.",
            "stat",
            "short",
            (Query("sum(moonshard_gateway_running_requests)"),),
            width=4,
            height=4,
        ),
        Panel(
            "Queued",
            "Requests that wait at the gateway for a place at a router replica.",
            "stat",
            "short",
            (Query("sum(moonshard_gateway_queued_requests)"),),
            width=4,
            height=4,
            steps=((None, "green"), (1, "orange")),
        ),
    ),
)

_REQUEST_ROW = Row(
    "Requests",
    (
        Panel(
            "Requests by outcome",
            "Per second. `rejected`: refused by a budget, a rate limit or a full queue; "
            "`client_closed`: the caller hung up.",
            "timeseries",
            "reqps",
            (Query(rate(_REQUESTS, "outcome", _WHO), "{{outcome}}"),),
            is_stacked=True,
        ),
        Panel(
            "Error ratio",
            "Server errors and timeouts, as a share of all requests but those that the caller got "
            "wrong, gave up or was refused. The objective is 0.5 %.",
            "timeseries",
            "percentunit",
            (
                Query(
                    ratio(
                        rate(_REQUESTS, "model", _FAILED),
                        rate(_REQUESTS, "model", _JUDGED),
                        "model",
                    ),
                    "{{model}}",
                ),
            ),
            steps=((None, "green"), (0.005, "red")),
        ),
        Panel(
            "Rejections by reason",
            "Requests refused before they reached a model, per second.",
            "timeseries",
            "reqps",
            (Query(rate("moonshard_rejections_total", "reason"), "{{reason}}", "rejection"),),
            is_stacked=True,
        ),
        Panel(
            "Requests at the gateway",
            "Running: handed to a router replica. Queued: waiting for a place there.",
            "timeseries",
            "short",
            (
                Query("sum(moonshard_gateway_running_requests)", "running"),
                Query("sum(moonshard_gateway_queued_requests)", "queued"),
            ),
        ),
        Panel(
            "Error budget burn",
            "How many times faster than allowed the error budget (0.5 % of requests) goes, over "
            "three windows. At 1 it lasts exactly for its 30 days; a page comes at 14.4 over an "
            "hour or 6 over six.",
            "timeseries",
            "short",
            tuple(
                Query(
                    f"moonshard:request_error_ratio:rate{window}{{{_MODEL}}} / 0.005",
                    f"{window} {{{{model}}}}",
                    "rules",
                )
                for window in ("5m", "1h", "6h")
            ),
            steps=((None, "green"), (1, "orange"), (14.4, "red")),
        ),
        Panel(
            "First-token budget burn",
            "How many times faster than allowed the budget of slow first tokens (5 % of requests "
            "over 2.5 s) goes, over three windows.",
            "timeseries",
            "short",
            tuple(
                Query(
                    f"moonshard:slow_first_token_ratio:rate{window}{{{_MODEL}}} / 0.05",
                    f"{window} {{{{model}}}}",
                    "rules",
                )
                for window in ("5m", "1h", "6h")
            ),
            steps=((None, "green"), (1, "orange"), (14.4, "red")),
        ),
    ),
)

_LATENCY = Row(
    "Latency",
    (
        _latency(
            "Time to first token",
            "From the request's arrival at the gateway to its first token there, its wait in the "
            "queue included.",
            "moonshard_time_to_first_token_seconds",
            (0.5, 0.95, 0.99),
        ),
        _latency(
            "Inter-token latency",
            "Between one token of a stream and the next, at the gateway.",
            "moonshard_inter_token_latency_seconds",
            (0.5, 0.95),
        ),
        _latency(
            "End to end",
            "From the request's arrival to the end of its answer.",
            "moonshard_e2e_request_latency_seconds",
            (0.5, 0.95),
        ),
        _latency(
            "Queue time at the gateway",
            "Wait for a place at a router replica. What waits inside vLLM is not in it.",
            "moonshard_request_queue_time_seconds",
            (0.5, 0.95),
        ),
        Panel(
            "Tokens by kind",
            "Per second. `cached` is part of `prompt`, `reasoning` part of `completion`.",
            "timeseries",
            "short",
            (Query(rate("moonshard_tokens_total", "kind", _WHO), "{{kind}}"),),
            width=24,
        ),
    ),
)

_ENGINE = Row(
    "Engine (vLLM's own metrics, through Ray)",
    (
        Panel(
            "KV cache in use",
            "Share of the engine's KV blocks that hold something a request needs. At 100 % "
            "requests are preempted or wait.",
            "timeseries",
            "percentunit",
            (
                Query(
                    f"max by (model_name, ReplicaId) (ray_vllm_kv_cache_usage_perc{{{_VLLM}}})",
                    "{{model_name}} {{ReplicaId}}",
                ),
            ),
            steps=((None, "green"), (0.9, "orange")),
            max=1,
        ),
        Panel(
            "Running and waiting in the engine",
            "Requests in the batch, and those that vLLM's scheduler has not admitted yet.",
            "timeseries",
            "short",
            (
                Query(
                    f"sum by (model_name) (ray_vllm_num_requests_running{{{_VLLM}}})",
                    "running {{model_name}}",
                ),
                Query(
                    f"sum by (model_name) (ray_vllm_num_requests_waiting{{{_VLLM}}})",
                    "waiting {{model_name}}",
                ),
            ),
        ),
        Panel(
            "Prefix cache hit rate",
            "Prompt tokens found in the prefix cache, as a share of those looked up.",
            "timeseries",
            "percentunit",
            (
                Query(
                    ratio(
                        rate("ray_vllm_prefix_cache_hits_total", "model_name", _VLLM),
                        rate("ray_vllm_prefix_cache_queries_total", "model_name", _VLLM),
                        "model_name",
                    ),
                    "{{model_name}}",
                    "prefix cache",
                ),
            ),
            max=1,
        ),
        Panel(
            "Preemptions",
            "Requests per second that lost their KV blocks to others and are computed again. The "
            "series begins with the first one.",
            "timeseries",
            "cps",
            (
                Query(
                    rate("ray_vllm_num_preemptions_total", "model_name", _VLLM),
                    "{{model_name}}",
                    "failure",
                ),
            ),
        ),
        Panel(
            "Engine tokens",
            "Tokens per second as vLLM counts them: computed prompts, and generated.",
            "timeseries",
            "short",
            (
                Query(
                    rate("ray_vllm_prompt_tokens_total", "model_name", _VLLM),
                    "prompt {{model_name}}",
                ),
                Query(
                    rate("ray_vllm_generation_tokens_total", "model_name", _VLLM),
                    "generation {{model_name}}",
                ),
            ),
        ),
        Panel(
            "Time to first token in the engine",
            "The engine's part of it: without the gateway, its queue and Ray.",
            "timeseries",
            "s",
            tuple(
                Query(
                    quantile(q, "ray_vllm_time_to_first_token_seconds", "model_name", _VLLM),
                    f"p{q * 100:.0f} {{{{model_name}}}}",
                )
                for q in (0.5, 0.95)
            ),
        ),
    ),
)

_SERVE = Row(
    "Ray Serve",
    (
        Panel(
            "Calls by deployment",
            "Calls per second that Serve replicas have finished, the router's included.",
            "timeseries",
            "reqps",
            (
                Query(
                    rate("ray_serve_deployment_request_counter_total", "deployment", _APP),
                    "{{deployment}}",
                ),
            ),
        ),
        Panel(
            "Processing time by deployment",
            "Time in a replica, p95. Of streams until their end.",
            "timeseries",
            "ms",
            (
                Query(
                    quantile(
                        0.95, "ray_serve_deployment_processing_latency_ms", "deployment", _APP
                    ),
                    "p95 {{deployment}}",
                ),
            ),
        ),
        Panel(
            "Calls queued at handles",
            "Calls that Serve has not yet given to a replica. The gateway's own queue stands "
            "before it and is not counted here.",
            "timeseries",
            "short",
            (
                Query(
                    f"sum by (deployment) (ray_serve_deployment_queued_queries{{{_APP}}})",
                    "{{deployment}}",
                ),
            ),
        ),
        Panel(
            "Exceptions by deployment",
            "Calls per second that ended in an exception. The series begins with the first one.",
            "timeseries",
            "cps",
            (
                Query(
                    rate("ray_serve_deployment_error_counter_total", "deployment", _APP),
                    "{{deployment}}",
                    "failure",
                ),
            ),
        ),
    ),
)

BOARD = Board(
    uid="moonshard-overview",
    title="Moonshard / Overview & latency",
    description="Is it up, how fast is it, and if it is slow, where.",
    variables=(
        Variable("model", _REQUESTS),
        Variable("team", _REQUESTS),
        Variable("application", "ray_serve_deployment_replica_healthy"),
    ),
    rows=(_NOW, _REQUEST_ROW, _LATENCY, _ENGINE, _SERVE),
)
