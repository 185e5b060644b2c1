"""`moonshard teams`: budgets, rates and weights of teams."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from deployments.cli.ledger_access import add_ledger_options, opened_ledger
from deployments.cli.quantities import add_limit_options, limits_from, show_limits
from deployments.cli.tables import show_table

__all__ = ["add_teams_parser"]


def add_teams_parser(parser: argparse.ArgumentParser) -> None:
    """Subcommands of `moonshard teams`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    shown = actions.add_parser("list", help="show the teams that have limits")
    shown.set_defaults(run=_list)
    change = actions.add_parser("set", help="change limits of a team; what is not named stays")
    change.add_argument("team", metavar="TEAM")
    add_limit_options(change, with_weight=True)
    change.set_defaults(run=_set)
    for action in (shown, change):
        action.add_argument("--json", action="store_true", help="for programs")
        add_ledger_options(action)


def _list(arguments: argparse.Namespace) -> int:
    with opened_ledger(arguments) as ledger:
        teams = ledger.teams.list()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(team) for team in teams], indent=2))
        return 0
    rows = [(team.name, show_limits(team.limits) or "none") for team in teams]
    print(show_table(("TEAM", "LIMITS"), rows))
    return 0


def _set(arguments: argparse.Namespace) -> int:
    with opened_ledger(arguments) as ledger:
        limits = limits_from(arguments, ledger.teams.get(arguments.team))
        ledger.teams.set(arguments.team, limits)
    if arguments.json:
        print(json.dumps({"name": arguments.team, "limits": dataclasses.asdict(limits)}))
    text = show_limits(limits) or "none"
    print(f"moonshard: limits of team {arguments.team}: {text}", file=sys.stderr)
    return 0
