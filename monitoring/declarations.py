"""Every metric of Moonshard's own, declared in one place: docs, tests and processes read this.

Nothing here counts; `monitoring.metrics` makes a process's own metrics of it, and
`monitoring.aggregator` adds up what all processes counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from monitoring.declaration import ROLES, Declaration, Dimensions, Domain, Kind, Merge, Role

__all__ = [
    "DECLARATIONS",
    "Declaration",
    "Dimensions",
    "Domain",
    "Kind",
    "Merge",
    "Role",
    "declared_by",
    "max_series",
]


def declared_by(role: Role) -> tuple[Declaration, ...]:
    """The metrics that processes of a role count."""
    return tuple(declaration for declaration in DECLARATIONS if declaration.role == role)


def max_series(size: Dimensions) -> int:
    """Most series of all metrics together."""
    return sum(declaration.max_series(size) for declaration in DECLARATIONS)


# vLLM's bounds, so that its histograms and ours can be laid over one another; finer at the low
# end where a small model on a fast machine would lie in one bucket.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_QUEUE_S = (0.001, 0.01, 0.05, *_REQUEST_S)
_DATABASE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_BY_MODEL = {"model": Domain.MODEL}
_BY_TEAM = {"model": Domain.MODEL, "team": Domain.TEAM}
_BY_SHARD = {"shard": Domain.SHARD}
_BUDGET = {"scope": Domain.BUDGET_SCOPE, "name": Domain.BUDGET_NAME}
_OUTCOMES = ("ok", "client_error", "rejected", "client_closed", "server_error", "timeout")
_REASONS = (
    *("missing_key", "invalid_key", "forbidden", "model_not_allowed", "insufficient_quota"),
    *("rate_limit_requests", "rate_limit_tokens", "rate_limit_parallel", "queue_full"),
    *("queue_timeout", "too_many_auth_failures", "ledger_unavailable"),
)
_COMPONENTS = ("router", "shards")
_OVER = ("shards", "experts")


def _counter(
    role: Role,
    name: str,
    help_text: str,
    labels: Mapping[str, tuple[str, ...] | Domain] | None = None,
) -> Declaration:
    return Declaration(f"moonshard_{name}_total", role, Kind.COUNTER, help_text, labels or {})


def _gauge(
    role: Role,
    name: str,
    help_text: str,
    labels: Mapping[str, tuple[str, ...] | Domain] | None = None,
    merge: Merge = Merge.LAST,
) -> Declaration:
    return Declaration(f"moonshard_{name}", role, Kind.GAUGE, help_text, labels or {}, merge=merge)


def _histogram(
    role: Role,
    name: str,
    help_text: str,
    buckets: tuple[float, ...],
    labels: Mapping[str, tuple[str, ...] | Domain] | None = None,
) -> Declaration:
    return Declaration(f"moonshard_{name}", role, Kind.HISTOGRAM, help_text, labels or {}, buckets)


_GATEWAY = (
    _counter(
        "gateway",
        "requests",
        "Requests that ended, by how.",
        {**_BY_TEAM, "outcome": _OUTCOMES},
    ),
    _counter(
        "gateway", "rejections", "Requests that were not let in, by why.", {"reason": _REASONS}
    ),
    _histogram(
        "gateway",
        "time_to_first_token_seconds",
        "From the arrival of a request to its first token, its wait at the gateway included.",
        _FIRST_TOKEN_S,
        _BY_MODEL,
    ),
    _histogram(
        "gateway",
        "inter_token_latency_seconds",
        "Between two tokens of a stream.",
        _INTER_TOKEN_S,
        _BY_MODEL,
    ),
    _histogram(
        "gateway",
        "e2e_request_latency_seconds",
        "From the arrival of a request to its end.",
        _REQUEST_S,
        _BY_MODEL,
    ),
    _histogram(
        "gateway",
        "request_queue_time_seconds",
        "Wait of a request at the gateway for a free place at a router.",
        _QUEUE_S,
        _BY_MODEL,
    ),
    _gauge(
        "gateway", "gateway_queued_requests", "Requests that wait at the gateway.", merge=Merge.SUM
    ),
    _gauge(
        "gateway",
        "gateway_running_requests",
        "Requests that the gateway has handed to routers.",
        merge=Merge.SUM,
    ),
    _counter(
        "gateway",
        "tokens",
        "Tokens; cached ones are part of the prompt, reasoning is part of the completion.",
        {"kind": ("prompt", "cached", "completion", "reasoning"), **_BY_TEAM},
    ),
    _counter(
        "gateway",
        "cost_usd",
        "Cost of requests in USD, at list prices or by the experts used.",
        {"basis": ("list", "experts"), **_BY_TEAM},
    ),
    _gauge("gateway", "budget_limit_usd", "Budget of the running period.", _BUDGET, Merge.MAX),
    _gauge(
        "gateway",
        "budget_remaining_usd",
        "What is left of the budget; what running requests have reserved counts as spent.",
        _BUDGET,
        Merge.MAX,
    ),
    _counter(
        "gateway",
        "ledger_records",
        "Usage records that came to the ledger.",
        {"result": ("inserted", "duplicate")},
    ),
    _counter("gateway", "ledger_errors", "Operations that the ledger's database failed."),
    _histogram(
        "gateway", "ledger_append_seconds", "Writing usage records to the ledger.", _DATABASE_S
    ),
)

_ROUTER = (
    _counter(
        "router",
        "dispatch_seconds",
        "Time of layer dispatches: splitting and sending, waiting for shards, summing.",
        {"stage": ("dispatch", "wait", "combine")},
    ),
    _counter("router", "dispatch_layers", "Layer dispatches."),
    _counter("router", "dispatch_rows", "Token rows of layer dispatches."),
    _counter(
        "router",
        "dispatch_bytes",
        "Payload between routers and shards.",
        {"direction": ("sent", "received")},
    ),
    _counter("router", "dispatch_retries", "Groups of rows that were sent again after a failure."),
    _counter("router", "dispatch_reconnects", "Connections to shards that were made again."),
    _counter(
        "router", "dispatch_python_layers", "Layer dispatches that did not go through native code."
    ),
    _gauge(
        "router",
        "router_hop_fallback",
        "1 while rows go to the shards through Python because the native hop was not built.",
        merge=Merge.MAX,
    ),
    _gauge(
        "router",
        "router_table_version",
        "Newest routing table that the replica's dispatcher uses.",
        {"replica": Domain.REPLICA},
    ),
    _counter(
        "router",
        "experts_unavailable",
        "Times that a replica withdrew its answers because experts were missing for too long.",
    ),
    _counter(
        "router",
        "expert_seconds",
        "Time that shards spent on rows, by what asked for them.",
        {"phase": ("prompt", "generation", "unattributed")},
    ),
    _gauge(
        "router",
        "ledger_backlog_records",
        "Usage records at routers that are not in the ledger yet.",
        merge=Merge.SUM,
    ),
    _gauge(
        "router",
        "ledger_backlog_age_seconds",
        "Age of the oldest of them.",
        merge=Merge.MAX,
    ),
)

_SHARD = (
    _counter("shard", "shard_tokens", "Token rows that were computed.", _BY_SHARD),
    _counter("shard", "shard_expert_rows", "(row, expert) pairs that were computed.", _BY_SHARD),
    _counter("shard", "shard_requests", "Requests that were answered with rows.", _BY_SHARD),
    _counter("shard", "shard_errors", "Requests that were refused or failed.", _BY_SHARD),
    _counter("shard", "shard_busy_seconds", "Time in the expert kernel.", _BY_SHARD),
    _counter(
        "shard",
        "shard_bytes",
        "Payload of requests and answers.",
        {**_BY_SHARD, "direction": ("sent", "received")},
    ),
    _gauge(
        "shard",
        "shard_queued_requests",
        "Requests that were accepted and are not in the kernel.",
        _BY_SHARD,
    ),
    _gauge("shard", "shard_connections", "Open connections of dispatchers.", _BY_SHARD),
    _gauge(
        "shard",
        "shard_kernel_fallback",
        "1 while the shard runs the plain torch kernel because no faster one can be had there.",
        {**_BY_SHARD, "kernel": Domain.KERNEL},
        Merge.MAX,
    ),
)

_CONTROLLER = (
    _gauge("controller", "table_version", "Newest routing table that was published."),
    _gauge("controller", "shards_wanted", "Shards that the configuration asks for."),
    _gauge("controller", "shards_live", "Shards that serve."),
    _gauge("controller", "shard_up", "1 while the shard serves, else 0.", _BY_SHARD),
    _counter("controller", "shard_restarts", "Times that Ray started the shard again.", _BY_SHARD),
    _gauge(
        "controller",
        "node_cost_usd_per_hour",
        "Price of the nodes that host shards (`shards`), and of all others (`router`).",
        {"component": _COMPONENTS},
    ),
)

_AGGREGATOR = (
    _gauge(
        "aggregator",
        "layer_balancedness",
        "Mean over maximum of the rows of a layer in the last minute; 1 is even.",
        {"layer": Domain.LAYER, "over": _OVER},
    ),
    _gauge(
        "aggregator",
        "balancedness",
        "Mean of moonshard_layer_balancedness over the layers.",
        {"over": _OVER},
    ),
    _gauge(
        "aggregator",
        "experts_per_layer",
        "Logical experts of a MoE layer; what the lowest balancedness over experts depends on.",
    ),
    _gauge(
        "aggregator",
        "hottest_expert_share",
        "Rows of the hottest experts in the last minute, over an even share of their layer's.",
        {"layer": Domain.HOT_LAYER, "expert": Domain.HOT_EXPERT},
    ),
    _gauge("aggregator", "metrics_sources", "Processes that push metrics.", {"role": ROLES[:-1]}),
    _counter(
        "aggregator",
        "infrastructure_cost_usd",
        "Price of the nodes over time, split by what the shards were busy with.",
        {"component": _COMPONENTS, "phase": ("prompt", "generation", "idle")},
    ),
)

DECLARATIONS: tuple[Declaration, ...] = _GATEWAY + _ROUTER + _SHARD + _CONTROLLER + _AGGREGATOR
"""All of them."""
