"""The ledger's database, as the commands about keys, teams and usage reach it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.exceptions import ConfigError, MoonshardError
from deployments.cli.serve_file import load_serve_file
from monitoring.ledger import Ledger, LedgerError
from monitoring.prices import PriceTable

__all__ = ["LEDGER_URL", "add_ledger_options", "opened_ledger"]

LEDGER_URL = "MOONSHARD_LEDGER_URL"
"""Environment variable that stands for `--ledger-url`."""


def add_ledger_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where the ledger is."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the Ray Serve config file of the server (configs/nano.yaml)",
    )
    parser.add_argument(
        "--ledger-url",
        metavar="URL",
        help=f"the ledger's database instead (also: environment variable {LEDGER_URL})",
    )


@contextmanager
def opened_ledger(arguments: argparse.Namespace) -> Iterator[Ledger]:
    """The ledger, open for as long as the context lasts.

    Raises:
        MoonshardError: it cannot be used, or refuses what is done in the context.
    """
    try:
        # No prices: nothing here prices a request.
        ledger = Ledger.open(_url(arguments), PriceTable())
        try:
            yield ledger
        finally:
            ledger.close()
    except LedgerError as error:
        raise MoonshardError(str(error)) from None


def _url(arguments: argparse.Namespace) -> str:
    if url := arguments.ledger_url or (not arguments.config and os.environ.get(LEDGER_URL)):
        return str(url)
    if arguments.config is None:
        raise ConfigError(
            "which ledger? name the server's config file with --config, or the database with "
            f"--ledger-url or {LEDGER_URL}"
        )
    return load_serve_file(arguments.config).config.ledger.database_url
