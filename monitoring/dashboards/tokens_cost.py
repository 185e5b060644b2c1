"""Tokens & cost: who uses what, what it costs by three measures, and what is left to spend."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Need, Panel, Query, Row, Variable
from monitoring.dashboards.promql import increase, quantile, rate, ratio

__all__ = ["BOARD"]

_WHO = 'model=~"$model", team=~"$team"'
_TOKENS = "moonshard_tokens_total"
_COST = "moonshard_cost_usd_total"
_INFRASTRUCTURE = "moonshard_infrastructure_cost_usd_total"
_ALL_TOKENS = f'{_WHO}, kind=~"prompt|completion"'
_LIST = f'{_WHO}, basis="list"'
_EXPERTS = f'{_WHO}, basis="experts"'
_LIMIT = "max by (scope, name) (moonshard_budget_limit_usd)"
_REMAINING = "max by (scope, name) (moonshard_budget_remaining_usd)"
_SPENT_SHARE = f"1 - {_REMAINING} / on (scope, name) ({_LIMIT} > 0)"
_SPENT_STEPS = ((None, "green"), (0.9, "orange"), (0.99, "red"))


def _sum_of_range(title: str, description: str, unit: str, expr: str, needs: Need = "") -> Panel:
    return Panel(title, description, "stat", unit, (Query(expr, "", needs),), width=6, height=4)


_NOW = Row(
    "In the range",
    (
        _sum_of_range(
            "Tokens",
            "Prompt and answer tokens, as the ledger has them.",
            "short",
            increase(_TOKENS, where=_ALL_TOKENS),
        ),
        _sum_of_range(
            "List cost",
            "Tokens at the list prices of the price table, as teams are charged.",
            "currencyUSD",
            increase(_COST, where=_LIST),
        ),
        _sum_of_range(
            "Cost by experts",
            "Shard time that the requests' experts took, at the price of the shards' nodes.",
            "currencyUSD",
            increase(_COST, where=_EXPERTS),
            "prices",
        ),
        _sum_of_range(
            "Infrastructure cost",
            "What the nodes of routers and shards cost, used or idle.",
            "currencyUSD",
            increase(_INFRASTRUCTURE),
            "prices",
        ),
    ),
)

_TOKENS_ROW = Row(
    "Tokens",
    (
        Panel(
            "Tokens by team",
            "Prompt and answer tokens per second.",
            "timeseries",
            "short",
            (Query(rate(_TOKENS, "team", _ALL_TOKENS), "{{team}}"),),
            is_stacked=True,
        ),
        Panel(
            "Tokens by model and kind",
            "Per second. `cached` is part of `prompt`, `reasoning` part of `completion`.",
            "timeseries",
            "short",
            (Query(rate(_TOKENS, "model, kind", _WHO), "{{model}} {{kind}}"),),
        ),
        Panel(
            "Tokens of teams",
            "Of every team over the dashboard's range.",
            "table",
            "short",
            (
                Query(increase(_TOKENS, "team", f'{_WHO}, kind="prompt"'), "prompt tokens"),
                Query(increase(_TOKENS, "team", f'{_WHO}, kind="completion"'), "answer tokens"),
            ),
            sort_by="answer tokens",
        ),
        Panel(
            "Money of teams",
            "Of every team over the dashboard's range, at list prices and by the shard time of its "
            "experts.",
            "table",
            "currencyUSD",
            (
                Query(increase(_COST, "team", _LIST), "list cost"),
                Query(increase(_COST, "team", _EXPERTS), "cost by experts", "prices"),
            ),
            sort_by="list cost",
        ),
        Panel(
            "Cached share of prompts",
            "Prompt tokens found in the prefix cache; they are billed at the cached price.",
            "timeseries",
            "percentunit",
            (
                Query(
                    ratio(
                        rate(_TOKENS, "model", f'{_WHO}, kind="cached"'),
                        rate(_TOKENS, "model", f'{_WHO}, kind="prompt"'),
                        "model",
                    ),
                    "{{model}}",
                ),
            ),
            max=1,
        ),
        Panel(
            "Thoughts' share of answers",
            "Reasoning tokens, as a share of all generated ones.",
            "timeseries",
            "percentunit",
            (
                Query(
                    ratio(
                        rate(_TOKENS, "model", f'{_WHO}, kind="reasoning"'),
                        rate(_TOKENS, "model", f'{_WHO}, kind="completion"'),
                        "model",
                    ),
                    "{{model}}",
                ),
            ),
            max=1,
        ),
    ),
)

_COST_ROW = Row(
    "Cost",
    (
        Panel(
            "List cost per hour by team",
            "Money at list prices, at the present rate.",
            "timeseries",
            "currencyUSD",
            (Query(f"3600 * {rate(_COST, 'team', _LIST)}", "{{team}}"),),
            is_stacked=True,
        ),
        Panel(
            "Cost by experts per hour by team",
            "Shard time of the team's experts at the shards' price, at the present rate.",
            "timeseries",
            "currencyUSD",
            (Query(f"3600 * {rate(_COST, 'team', _EXPERTS)}", "{{team}}", "prices"),),
            is_stacked=True,
        ),
        Panel(
            "Dearest teams",
            "The 20 teams with the highest list cost over the dashboard's range.",
            "bargauge",
            "currencyUSD",
            (Query(f"topk(20, {increase(_COST, 'team', _LIST)})", "{{team}}"),),
        ),
        Panel(
            "Cost per million tokens",
            "`list` and `experts` per million prompt and answer tokens; `infrastructure` apart for "
            "prompt and generation, and `total` with idle time in it.",
            "timeseries",
            "currencyUSD",
            (
                Query(
                    "max by (cost_basis, phase, model) (llm_cost_per_million_tokens)",
                    "{{cost_basis}} {{phase}} {{model}}",
                    "rules",
                ),
            ),
        ),
        Panel(
            "Infrastructure cost per hour",
            "By component and by what its time went to.",
            "timeseries",
            "currencyUSD",
            (
                Query(
                    f"3600 * {rate(_INFRASTRUCTURE, 'component, phase')}",
                    "{{component}} {{phase}}",
                    "prices",
                ),
            ),
            is_stacked=True,
        ),
        Panel(
            "Idle share of infrastructure cost",
            "Money for nodes that computed nothing, as a share of all of it.",
            "timeseries",
            "percentunit",
            (
                Query(
                    ratio(
                        rate(_INFRASTRUCTURE, "component", 'phase="idle"'),
                        rate(_INFRASTRUCTURE, "component"),
                        "component",
                    ),
                    "{{component}}",
                    "prices",
                ),
            ),
            max=1,
        ),
    ),
)

_BUDGETS = Row(
    "Budgets",
    (
        Panel(
            "Budgets now",
            "Limit of the period and what is left of it. What running requests have reserved "
            "counts as spent.",
            "table",
            "currencyUSD",
            (
                Query(_LIMIT, "limit", "budget"),
                Query(_REMAINING, "remaining", "budget"),
            ),
            width=8,
            sort_by="limit",
        ),
        Panel(
            "Share spent now",
            "Of the 20 budgets that are nearest to their limit.",
            "bargauge",
            "percentunit",
            (Query(f"topk(20, {_SPENT_SHARE})", "{{scope}} {{name}}", "budget"),),
            width=8,
            steps=_SPENT_STEPS,
            max=1,
        ),
        Panel(
            "Share spent",
            "Of the 20 budgets that are nearest to their limit.",
            "timeseries",
            "percentunit",
            (Query(f"topk(20, {_SPENT_SHARE})", "{{scope}} {{name}}", "budget"),),
            width=8,
            steps=_SPENT_STEPS,
        ),
    ),
)

_LEDGER = Row(
    "Ledger",
    (
        Panel(
            "Records",
            "Usage records per second. Duplicates are repeated deliveries, which the ledger drops.",
            "timeseries",
            "cps",
            (Query(rate("moonshard_ledger_records_total", "result"), "{{result}}"),),
        ),
        Panel(
            "Time to write a batch",
            "Of the database transaction that writes usage records.",
            "timeseries",
            "s",
            tuple(
                Query(quantile(q, "moonshard_ledger_append_seconds"), f"p{q * 100:.0f}")
                for q in (0.5, 0.95)
            ),
        ),
        Panel(
            "Backlog",
            "Records that lie in the write-ahead files of router replicas and are not yet in the "
            "database.",
            "timeseries",
            "short",
            (Query("sum(moonshard_ledger_backlog_records)", "records"),),
            width=8,
        ),
        Panel(
            "Age of the backlog",
            "Of the oldest such record.",
            "timeseries",
            "s",
            (Query("max(moonshard_ledger_backlog_age_seconds)", "oldest"),),
            width=8,
            steps=((None, "green"), (60, "red")),
        ),
        Panel(
            "Errors",
            "Failed database operations per second.",
            "timeseries",
            "cps",
            (Query(rate("moonshard_ledger_errors_total"), "errors"),),
            width=8,
        ),
    ),
)

BOARD = Board(
    uid="moonshard-tokens-cost",
    title="Moonshard / Tokens & cost",
    description="Who uses what, what it costs by three measures, and what is left to spend.",
    variables=(Variable("model", _TOKENS), Variable("team", _TOKENS)),
    rows=(_NOW, _TOKENS_ROW, _COST_ROW, _BUDGETS, _LEDGER),
)
