"""`moonshard usage`: tokens and cost by key, team, model and day."""

from __future__ import annotations

import argparse
import json

from cluster.exceptions import ConfigError
from deployments.cli.ledger_access import add_ledger_options, opened_ledger
from deployments.cli.tables import show_table
from deployments.gateway.usage_report import (
    DEFAULT_GROUPS,
    as_csv,
    as_json,
    as_time,
    grouping,
    usd,
)
from monitoring.ledger import UsageQuery, UsageRow

__all__ = ["add_usage_parser"]

_HEADS = {"day": "DAY", "team": "TEAM", "key": "KEY", "model": "MODEL"}


def add_usage_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `moonshard usage`."""
    parser.add_argument(
        "--group-by", default=DEFAULT_GROUPS, metavar="A,B", help="some of key,team,model,day"
    )
    parser.add_argument("--start", metavar="WHEN", help="from this day or time on (UTC)")
    parser.add_argument("--end", metavar="WHEN", help="before this day or time (UTC)")
    parser.add_argument("--team", help="only this team's")
    parser.add_argument("--key", metavar="KEY_ID", help="only this key's")
    parser.add_argument("--model", help="only this model's")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--csv", action="store_true", help="for spreadsheets")
    add_ledger_options(parser)
    parser.set_defaults(run=_usage)


def _usage(arguments: argparse.Namespace) -> int:
    try:
        query = UsageQuery(
            group_by=grouping(arguments.group_by),
            key_id=arguments.key,
            team=arguments.team,
            model=arguments.model,
            start=None if arguments.start is None else as_time(arguments.start),
            end=None if arguments.end is None else as_time(arguments.end),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with opened_ledger(arguments) as ledger:
        rows = ledger.usage(query)
    if arguments.json:
        print(json.dumps(as_json(rows, query), indent=2))
    elif arguments.csv:
        print(as_csv(rows, query), end="")
    else:
        print(_describe(rows, query))
    return 0


def _describe(rows: list[UsageRow], query: UsageQuery) -> str:
    groups = query.group_by
    head = [_HEADS[group] for group in groups]
    head += ["REQUESTS", "PROMPT", "CACHED", "COMPLETION", "REASONING", "USD", "EXPERTS USD"]
    cells = [
        [
            *(_group(row, group) for group in groups),
            row.requests,
            row.prompt_tokens,
            row.cached_tokens,
            row.completion_tokens,
            row.reasoning_tokens,
            usd(row.cost_nano_usd),
            usd(row.expert_cost_nano_usd),
        ]
        for row in rows
    ]
    return show_table(head, cells)


def _group(row: UsageRow, group: str) -> str:
    return str(getattr(row, "key_id" if group == "key" else group))
