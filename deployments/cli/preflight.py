"""What can be known to fail before anything is started."""

from __future__ import annotations

import errno
import socket

from cluster.checkpoint import ExpertCheckpoint
from cluster.config import MoonshardConfig
from cluster.exceptions import ConfigError
from cluster.names import shard_ids
from deployments.gateway.database_rules import check_database
from monitoring.prices import PriceError, PriceTable
from routing.placement import place_experts

__all__ = ["check_ledger", "check_model", "check_port", "check_prices"]


def check_model(config: MoonshardConfig) -> None:
    """Whether the checkpoint is there, is whole, and has experts for every shard.

    Raises:
        CheckpointError, PlacementError: one line that says what to change.
    """
    checkpoint = ExpertCheckpoint.open(config.model.checkpoint)
    place_experts(checkpoint.num_experts, shard_ids(config.shards.count))


def check_prices(config: MoonshardConfig) -> None:
    """Whether the price table is there and right.

    Raises:
        ConfigError: one line that says what to change.
    """
    try:
        PriceTable.load(config.ledger.prices_path)
    except PriceError as error:
        raise ConfigError(str(error)) from None


def check_ledger(config: MoonshardConfig) -> None:
    """Whether the ingress replicas can share the ledger's database.

    Raises:
        ConfigError: one line that says what to change.
    """
    try:
        url = config.ledger.database_url
    except ConfigError:
        return  # it names a variable that only the nodes may have; the ingress will tell
    check_database(url, config.http.num_replicas)


def check_port(host: str, port: int) -> None:
    """Whether the address can be listened on.

    A port whose last owner has just gone counts as free (SO_REUSEADDR), as it does for the
    server itself.

    Raises:
        ConfigError: it is taken, or not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                reason = "it is taken; end what listens there or choose another port"
            raise ConfigError(
                f"cannot serve on {host}:{port} (http_options.host and .port): {reason}"
            ) from None
