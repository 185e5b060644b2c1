"""Writes `docs/metrics.md` from the declarations.

python -m monitoring.metrics_doc
"""

from __future__ import annotations

from pathlib import Path

from monitoring.declaration import MAX_TEAMS, ROLES, Declaration, Dimensions, Domain, Kind, Role
from monitoring.declarations import DECLARATIONS, declared_by, max_series

__all__ = ["DOCUMENT", "LARGE", "main", "metrics_document"]

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
"""Where the document lies."""

LARGE = Dimensions(
    models=4, teams=1000, keys=1000, shards=64, routers=16, layers=60, top_experts=20
)
"""The installation for which the document states the number of series (384 experts a layer)."""

_WHO: dict[Role, str] = {
    "gateway": "Gateway: every ingress replica",
    "router": "Router replicas",
    "shard": "Expert shards",
    "controller": "Controller",
    "aggregator": "Metrics actor: of all others together",
}

_HEAD = """# Metrics

<!-- Written by `python -m monitoring.metrics_doc`; change monitoring/declarations.py instead. -->

`GET /metrics` at the gateway gives all of them in Prometheus's text format, for the whole cluster:
one scrape target, whichever ingress replica answers. vLLM's and Ray's own metrics are not among
them; Ray exports those on every node.
"""

_TAIL = f"""
## How they get there

Every process counts for itself and pushes what has grown to the metrics actor, each
`metrics.push_interval_s` (a second); reading more than some thousand series takes longer, and
then the pushes are further apart, so that they never cost more than a tenth of a core. A push has
the random id of the process's start and a sequence number. One without an answer is repeated as
it was, and counted once. A process that ends says so; one that is silent for
max(10 s, 5 intervals) is gone. Its gauges go with it, its counts stay: **no counter falls when
replicas come, go, scale or crash.**

What a crash can lose:

| what crashes | what is lost |
|---|---|
| gateway, router replica | what it counted since its last push: at most one interval. \
The ledger, which bills, loses nothing. |
| shard, and it comes back on the same node | nothing; of a request \
that it was just counting, maybe some figures. Its counters lie in a small file in `/dev/shm`, \
which its next life hands on within an hour. |
| shard, and it comes back on another node | at most one interval. |
| metrics actor | nothing of processes that live: they send their totals again, \
and `/metrics` and `/v1/experts` wait up to 8 s for them (with longer push intervals they may \
show less than before until all have pushed). Of processes that ended since the totals were saved \
last (every 5 s, and within a second of a process's end), what they pushed since then. Of the \
infrastructure's cost, nothing that was shown. |
| Ray's head node without a fault-tolerant control store | all totals of processes that had ended. |

`moonshard stop` forgets the totals; the ledger keeps its own.

## What the numbers mean

- `moonshard_layer_balancedness`: per layer, the mean of the rows in the last minute over their
  maximum, once over the shards that serve and once over the layer's experts. 1 is even, 1/n is
  all on one of n. Absent while nothing was computed for a minute. `moonshard_balancedness` is the
  mean over the layers that computed.
- `moonshard_hottest_expert_share`: an expert's rows of the last minute times the number of
  experts, over the rows of its layer; 1 is an even share. Only the `metrics.top_experts` hottest
  have a series. The whole matrix is at `GET /v1/experts`.
- `moonshard_infrastructure_cost_usd_total`: price of the nodes (`costs`) times time. The share of
  `prompt` and of `generation` is the time that shards spent on rows of prompts and of generated
  tokens (`moonshard_expert_seconds_total`), over the time of all live shards; the rest is `idle`,
  and so is time that no request asked for. Busy time that comes in later than it was spent counts
  in the next seconds. Nodes with shards are component `shards`, all others `router`, which is
  split in the same proportion. On a single node everything is `shards`, from when they are placed.
  Only the metrics actor counts it, so it is shown as of the last save, 5 s old at most; time in
  which the actor was away is `idle`, and nodes keep their price while the controller is away, each
  for up to 10 minutes.
- `moonshard_shards_live`, `moonshard_shard_up` and `moonshard_node_cost_usd_per_hour` are absent
  while a controller that has just started does not know all shards yet, `moonshard_table_version`
  until it has published a table.
- `moonshard_experts_per_layer`: a token goes to k different ones of n experts, so the balancedness
  over experts is never below k/n; over shards it is never below 1/n.
- `moonshard_expert_seconds_total` counts time of shards at the routers, by what asked for it;
  `moonshard_shard_busy_seconds_total` counts the same time at the shards.
- Windows ("last minute") are up to 10 s longer than they say.

## `GET /v1/experts`

| key | value |
|---|---|
| `layers` | ids of the MoE layers, as in the checkpoint; the rows of every matrix |
| `num_experts` | columns of every matrix |
| `updated_s` | Unix time of the last count |
| `windows` | `1m`, `10m`, `total`: `[layer][expert]` -> rows computed; those of a replica's few \
warm-up requests included, those of vLLM's profile and dummy runs not |
| `windows_s` | how long `1m` and `10m` really are, in seconds |
| `balancedness` | `shards`, `experts` (null while nothing is computed), and `layers`: \
id -> the same two |
| `shards` | id -> `is_live`, `experts` that it holds, `rows` per window |

## How many series

Labels whose values nobody knows beforehand have limits: {MAX_TEAMS:,} teams, {Domain.MODEL.limit}
models, {Domain.BUDGET_NAME.limit:,} budgets. What comes later goes to `other` (counters) or is left
out (gauges). So at most

"""


def metrics_document() -> str:
    """The document."""
    parts = [_HEAD]
    for role in ROLES:
        parts += [
            f"\n## {_WHO[role]}\n",
            "\n| metric | type | labels | meaning |\n|---|---|---|---|\n",
        ]
        parts += [_row(declaration) for declaration in declared_by(role)]
    parts += [
        "\n## Buckets\n\nUpper bounds in seconds; vLLM's, with finer ones at the low end.\n\n"
    ]
    parts += [
        f"- `{d.name}`: {', '.join(f'{bound:g}' for bound in d.buckets)}\n"
        for d in DECLARATIONS
        if d.kind is Kind.HISTOGRAM
    ]
    parts += [_TAIL, _series()]
    return "".join(parts)


def main() -> None:
    """Write it."""
    DOCUMENT.write_text(metrics_document())


def _row(declaration: Declaration) -> str:
    labels = "; ".join(
        f"`{name}`: {values.text if isinstance(values, Domain) else ', '.join(values)}"
        for name, values in declaration.labels.items()
    )
    kind = declaration.kind.value
    if declaration.kind is Kind.GAUGE and declaration.role != "aggregator":
        kind += f" ({declaration.merge.value})"
    return f"| `{declaration.name}` | {kind} | {labels} | {declaration.help} |\n"


def _series() -> str:
    rows = [f"| `{d.name}` | {_formula(d)} | {d.max_series(LARGE):,} |\n" for d in DECLARATIONS]
    size = LARGE
    return (
        "| metric | series | large |\n|---|---|---|\n"
        + "".join(rows)
        + f"| all | | {max_series(size):,} |\n\n"
        f"Large: {size.models} models, {size.teams:,} teams and {size.keys:,} keys (all with "
        f"budgets), {size.shards} shards, {size.routers} router replicas, {size.layers} layers of "
        f"384 experts, {size.top_experts} hottest experts. A limited label has one value more: "
        "`other`. A gauge's word in brackets says how the values of several processes are merged.\n"
    )


def _formula(declaration: Declaration) -> str:
    factors = [
        _FACTORS[values] if isinstance(values, Domain) else str(len(values))
        for values in declaration.labels.values()
    ]
    if declaration.kind is Kind.HISTOGRAM:
        factors.append(str(len(declaration.buckets) + 3))
    return " × ".join(factor for factor in factors if factor) or "1"


_FACTORS = {
    Domain.MODEL: "(models + 1)",
    Domain.TEAM: "(teams + 1)",
    Domain.SHARD: "shards",
    Domain.REPLICA: "routers",
    Domain.KERNEL: "",
    Domain.LAYER: "layers",
    Domain.HOT_LAYER: "top_experts",
    Domain.HOT_EXPERT: "",
    Domain.BUDGET_SCOPE: "",
    Domain.BUDGET_NAME: "(teams + keys)",
}


if __name__ == "__main__":
    main()
