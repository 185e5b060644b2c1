"""Arguments of `moonshard`, and what becomes of errors.

Commands import Ray, torch and the application only once they need them: a wrong flag or config
is answered at once, and Ray reads its environment when it is imported.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.exceptions import MoonshardError
from deployments.cli.interrupts import Interrupted
from deployments.cli.keys import add_keys_parser
from deployments.cli.teams import add_teams_parser
from deployments.cli.usage import add_usage_parser

__all__ = ["main"]

EXIT_ERROR = 2
DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for an error (one line on stderr), 128 + signal."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="moonshard: %(message)s")
    try:
        status: int = arguments.run(arguments)
        return status
    except MoonshardError as error:
        print(f"moonshard: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt as error:
        return 128 + Interrupted.of(error).number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moonshard",
        description="Serve mixture-of-experts models whose experts live on Ray actors.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands.add_parser("serve", help="start everything and serve until Ctrl-C"))
    _add_status(commands.add_parser("status", help="show nodes, shards, table and replicas"))
    _add_chat(commands.add_parser("chat", help="talk to a served model"))
    _add_stop(commands.add_parser("stop", help="stop what `moonshard serve` started"))
    add_keys_parser(commands.add_parser("keys", help="make, show and end API keys"))
    add_teams_parser(commands.add_parser("teams", help="budgets, rates and weights of teams"))
    add_usage_parser(commands.add_parser("usage", help="show tokens and cost"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a Ray Serve config file (configs/nano.yaml)")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="serve on the Ray cluster that runs there (`auto`: the one of this machine) instead "
        "of starting a node",
    )
    parser.set_defaults(run=_serve)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")
    _add_target(parser)
    parser.set_defaults(run=_status)


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.set_defaults(run=_stop)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=int, help="HTTP port of the one that is meant, where several run here"
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster, as for `serve`")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default {DEFAULT_URL})")
    parser.add_argument("--model", help="the model (default: the first that is served)")
    parser.add_argument("--no-think", action="store_true", help="answer without thinking first")
    parser.set_defaults(run=_chat)


def _serve(arguments: argparse.Namespace) -> int:
    from deployments.cli.serve import serve_command

    return serve_command(arguments.config, arguments.address)


def _status(arguments: argparse.Namespace) -> int:
    from deployments.cli.status import status_command

    return status_command(arguments.port, arguments.address, as_json=arguments.json)


def _stop(arguments: argparse.Namespace) -> int:
    from deployments.cli.stop import stop_command

    return stop_command(arguments.port, arguments.address)


def _chat(arguments: argparse.Namespace) -> int:
    from deployments.cli.chat import chat_command

    return chat_command(arguments.url, arguments.model, think=not arguments.no_think)
